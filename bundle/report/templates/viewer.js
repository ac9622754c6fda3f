"use strict";
// The viewer of a scan's report: volumes and NiiVue lie in the page; nothing is loaded from anywhere.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const COLOURS = "plasma"; // told apart by the colour-blind, and grows in lightness
let planes, rendering;

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
  for (const nv of [planes, rendering]) {
    if (nv.volumes.length > nv.own) nv.removeVolume(nv.volumes.at(-1));
    const map = await volume(overlay().base64, "map", COLOURS, 0, overlay().most, 1);
    map.colormapType = 2; // colours run from 0, and what lies below the threshold is clear
    nv.addVolume(map);
  }
  $("most").textContent = `${overlay().most.toPrecision(2)} ${overlay().unit}`;
  adjust();
}

function adjust() {
  const from = Math.max(overlay().most * $("threshold").value / 100, overlay().most * 1e-6);
  $("from").textContent = from.toPrecision(2);
  for (const nv of [planes, rendering]) {
    nv.volumes.at(-1).cal_min = from;
    nv.setOpacity(nv.volumes.length - 1, $("opacity").value / 100);
  }
  planes.setOpacity(1, $("outline").checked ? 0.6 : 0);
}

function tell({ mm, values }) {
  const hu = values[0].value, [low, high] = data.hu_window;
  const beyond = hu <= low ? "≤ " : hu >= high ? "≥ " : "";
  const at = [...mm].slice(0, 3).map((x) => Math.round(x) + 0).join(", ");
  const heat = values.at(-1).value;
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
  const lut = planes.colormap(COLOURS), bar = $("bar").getContext("2d"), pixels = bar.createImageData(256, 1);
  for (let i = 0; i < 1024; i++) pixels.data[i] = i % 4 === 3 ? 255 : lut[i];
  bar.putImageData(pixels, 0, 0);
}

async function start() {
  await loadNiivue();
  const { Niivue, SHOW_RENDER, SLICE_TYPE } = window.niivue;
  const options = { dragAndDropEnabled: false, isRadiologicalConvention: true, sagittalNoseLeft: true, backColor: [0, 0, 0, 1], logLevel: "error" };
  planes = new Niivue({ ...options, multiplanarShowRender: SHOW_RENDER.NEVER, crosshairColor: [1, 1, 1, 0.6], crosshairWidth: 0.5 });
  rendering = new Niivue({ ...options, crosshairColor: [1, 1, 1, 0.6], crosshairWidth: 0.5 });
  await planes.attachToCanvas($("planes"));
  await rendering.attachToCanvas($("rendering"));
  const [low, high] = data.hu_window;
  const ct = await volume(data.ct, "ct", "gray", low, high, 1);
  const lung = await volume(data.lung, "lung", "winter", 1.5, 3, 0.6); // 1 inside, 2 at the surface
  const inner = ct.clone();
  for (let i = 0; i < inner.img.length; i++) if (lung.img[i] === 0) inner.img[i] = 0;
  planes.addVolume(ct);
  planes.addVolume(lung);
  rendering.addVolume(inner);
  [planes.own, rendering.own] = [2, 1];
  planes.setSliceType(SLICE_TYPE.MULTIPLANAR);
  rendering.setSliceType(SLICE_TYPE.RENDER);
  planes.onLocationChange = tell;
  drawBar();
  await showMap();
  goTo(data.start);
  $("map").addEventListener("change", showMap);
  for (const id of ["opacity", "threshold", "outline"]) $(id).addEventListener("input", adjust);
  for (const button of document.querySelectorAll("[data-region]"))
    button.addEventListener("click", () => goTo(data.regions[button.dataset.region]));
  document.addEventListener("keydown", key);
  document.body.dataset.ready = "true";
}

start().catch((error) => {
  $("viewer").classList.add("nothing"); // the picture takes its place
  $("viewer").append(`This browser can't show the viewer (${error.message}); expected one with WebGL 2.`);
});
