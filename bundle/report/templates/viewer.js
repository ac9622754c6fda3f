"use strict";
// The viewer of a scan's report: volumes and NiiVue lie in the page; nothing is loaded from anywhere.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const COLOURS = "plasma"; // told apart by the colour-blind, and grows in lightness
const OUTLINES = { lung: [64, 140, 255], gt_mask: [46, 230, 176], confounder_mask: [255, 255, 255] };
let planes, rendering, ct, outlines, map, lut;

async function loadNiivue() {
  const packed = Uint8Array.from(atob($("niivue").textContent), (c) => c.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const code = document.createElement("script");
  code.textContent = await new Response(unpacked).text();
  document.head.append(code);
}

function volume(base64, name, colormap, low, high, opacity) {
  const options = { base64, name: `${name}.nii.gz`, colormap, opacity, cal_min: low, cal_max: high };
  return window.niivue.NVImage.loadFromBase64(options);
}

const overlay = () => data.overlays[$("map").selectedIndex];

async function showMap() {
  for (const shown of planes.volumes.slice(1)) planes.removeVolume(shown);
  map = await volume(overlay().base64, "map", COLOURS, 0, overlay().most, 1);
  map.colormapType = 2; // colours run from 0, and what lies below the threshold is clear
  planes.addVolume(map);
  for (const outline of outlines) planes.addVolume(outline.volume);
  $("most").textContent = `${overlay().most.toPrecision(2)} ${overlay().unit}`;
  adjust();
}

function adjust() {
  const from = Math.max(overlay().most * $("threshold").value / 100, overlay().most * 1e-6);
  $("from").textContent = from.toPrecision(2);
  map.cal_min = from;
  map.opacity = $("opacity").value / 100;
  for (const outline of outlines) outline.volume.opacity = outline.switch.checked ? 0.7 : 0;
  planes.updateGLVolume();
  render(from / overlay().most, $("opacity").value / 100);
}

// The rendered volume has a colour and an opacity a voxel: glassy surfaces, dense tissue of the lung, and heat that glows through.
function render(from, opacity) {
  const size = ct.img.length, pixels = new Uint8ClampedArray(4 * size), lung = outlines[0].volume.img;
  const shown = outlines.filter((outline) => outline.switch.checked);
  const slope = map.hdr.scl_slope / overlay().most, start = map.hdr.scl_inter / overlay().most;
  for (let i = 0; i < size; i++) {
    if (!lung[i]) continue;
    let r, g, b, alpha;
    r = g = b = 60 + ct.img[i];
    if (data.masked) alpha = lung[i] === 1 ? 0.6 * Math.max(0, ct.img[i] - 80) : 0;
    else alpha = ct.img[i] / 50; // all tissue, faintly
    for (const { name, colour, volume } of shown) {
      if (volume.img[i] === 2) [[r, g, b], alpha] = [colour, name === "lung" ? 25 : 60];
    }
    const heat = Math.min(1, map.img[i] * slope + start);
    if (heat >= from && opacity > 0) {
      const glow = opacity * (20 + 235 * heat * heat), part = glow / (glow + alpha), at = 4 * Math.round(255 * heat);
      r += part * (lut[at] - r);
      g += part * (lut[at + 1] - g);
      b += part * (lut[at + 2] - b);
      alpha = Math.max(alpha, glow);
    }
    pixels[4 * i] = r;
    pixels[4 * i + 1] = g;
    pixels[4 * i + 2] = b;
    pixels[4 * i + 3] = alpha;
  }
  const composed = rendering.volumes[0] ?? ct.clone();
  composed.img = new Uint8Array(pixels.buffer);
  if (rendering.volumes.length) return rendering.updateGLVolume();
  composed.hdr = Object.assign(Object.create(Object.getPrototypeOf(ct.hdr)), ct.hdr, { datatypeCode: 2304, numBitsPerVoxel: 32 }); // RGBA
  rendering.addVolume(composed);
}

function tell({ mm, values }) {
  const hu = values[0].value, [low, high] = data.hu_window;
  const beyond = hu <= low ? "≤ " : hu >= high ? "≥ " : "";
  const at = [...mm].slice(0, 3).map((x) => Math.round(x) + 0).join(", ");
  const heat = values[1].value;
  $("where").textContent = `${at} mm (RAS) · ${beyond}${hu.toFixed(0)} HU · ${overlay().name} ${heat.toPrecision(2)} ${overlay().unit}`;
  rendering.scene.crosshairPos = rendering.mm2frac(mm);
  rendering.drawScene();
}

function goTo(mm) {
  planes.scene.crosshairPos = planes.mm2frac(mm);
  planes.createOnLocationChange();
  planes.drawScene();
}

const STEPS = { ArrowLeft: [1, 0, 0], ArrowRight: [-1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0], PageUp: [0, 0, 1], PageDown: [0, 0, -1] };

function key(event) {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.matches("input, select")) return;
  if (event.target === $("planes") && STEPS[event.key]) {
    planes.moveCrosshairInVox(...STEPS[event.key]);
    event.preventDefault();
  } else if (data.regions[event.key - 1]) {
    goTo(data.regions[event.key - 1]);
  }
}

function drawBar() {
  const bar = $("bar").getContext("2d"), pixels = bar.createImageData(256, 1);
  for (let i = 0; i < 1024; i++) pixels.data[i] = i % 4 === 3 ? 255 : lut[i];
  bar.putImageData(pixels, 0, 0);
}

async function start() {
  await loadNiivue();
  const { Niivue, SHOW_RENDER, SLICE_TYPE } = window.niivue;
  const options = { dragAndDropEnabled: false, isRadiologicalConvention: true, sagittalNoseLeft: true, backColor: [0, 0, 0, 1], logLevel: "error" };
  planes = new Niivue({ ...options, multiplanarShowRender: SHOW_RENDER.NEVER, crosshairColor: [1, 1, 1, 0.6], crosshairWidth: 0.5 });
  rendering = new Niivue({ ...options, crosshairColor: [1, 1, 1, 0.6], crosshairWidth: 0.5, crosshairGap: 6, show3Dcrosshair: true });
  await planes.attachToCanvas($("planes"));
  await rendering.attachToCanvas($("rendering"));
  const [low, high] = data.hu_window;
  ct = await volume(data.ct, "ct", "gray", low, high, 1);
  planes.addVolume(ct);
  outlines = [];
  for (const { name, base64 } of data.outlines) {
    const colour = OUTLINES[name], [R, G, B] = colour.map((c) => [0, c]);
    planes.addColormap(name, { R, G, B, A: [0, 255], I: [0, 255] });
    const each = await volume(base64, name, name, 1.5, 2, 0.7); // 1 inside, 2 at the surface
    outlines.push({ name, colour, volume: each, switch: $(`outline-${name}`) });
  }
  lut = planes.colormap(COLOURS);
  planes.setSliceType(SLICE_TYPE.MULTIPLANAR);
  rendering.setSliceType(SLICE_TYPE.RENDER);
  [rendering.scene.renderAzimuth, rendering.scene.renderElevation] = [180, 10]; // from the front
  planes.onLocationChange = tell;
  drawBar();
  await showMap();
  goTo(data.start);
  $("map").addEventListener("change", showMap);
  for (const input of [$("opacity"), $("threshold"), ...outlines.map((outline) => outline.switch)]) input.addEventListener("input", adjust);
  for (const button of document.querySelectorAll("[data-region]"))
    button.addEventListener("click", () => goTo(data.regions[button.dataset.region]));
  document.addEventListener("keydown", key);
  document.body.dataset.ready = "true";
}

start().catch((error) => {
  $("viewer").classList.add("nothing"); // the picture takes its place
  $("viewer").append(`This browser can't show the viewer (${error.message}); expected one with WebGL 2.`);
});
