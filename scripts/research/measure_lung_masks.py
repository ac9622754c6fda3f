# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""How good the lung mask without weights is: against masks of real scans, lesions of real scans, and chest phantoms.

Writes a page with the tables and a picture with the masks' outlines. Real scans are read from the folder of shared data
beside the checkout; those that are not there are left out.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import dataclass, field
from pathlib import Path

import itk
import numpy as np
import torch
from matplotlib.figure import Figure
from monai.transforms import Compose, Orientationd, Spacingd
from scipy import ndimage
from tqdm import tqdm

from bundle.files import write_text
from bundle.phantoms.chest import Chest
from bundle.phantoms.cohort import PhantomCohort
from bundle.phantoms.cubes import Phantom, ball
from bundle.report.pictures import write_png
from bundle.transforms import LoadCTd, fill_thorax, threshold_lung_mask

SPACING = 3.0  # mm, that of the shipped configuration
CHESTS = {  # file or folder: reference, and whether that is the lungs' mask, a lesion's, or boxes around a tumour
    "ct/chest_cip_64_lowres_ct.nrrd": ("ct/chest_cip_64_lowres_lung_labelmap.nrrd", "lungs"),
    "ct/rightlung_elastix_ct.mha": ("ct/rightlung_elastix_lung_mask.mha", "lungs"),
    "ct/chest_pyradiomics_lung1_ct.nrrd": ("ct/chest_pyradiomics_lung1_nodule_mask.nrrd", "nodule"),
    "ct/chest_lungpetctdx_A0001_ct.nii.gz": ("ct/chest_lungpetctdx_A0001_tumour_boxes.csv", "tumour boxes"),
    "dicom_lungpetctdx_A0002_B40f": ("dicom_lungpetctdx_A0002_B40f_tumour_boxes.csv", "tumour boxes"),
}
NO_CHEST = "ct/NOTchest_abdomenpelvis_totalsegmentator_ct.nii.gz"
SLICE = "dicom_covid_ny_sbu_single_slices/A002304_19010112-135.dcm"
FULL_CT = (512, 512, 300)
RADII_MM = (10, 20, 30)


@dataclass
class Measured:
    """One scan with its masks, all (D, H, W) in RAS order, and what was measured."""

    name: str
    hu: np.ndarray
    spacing: float
    reference: np.ndarray | None = None
    kind: str = ""
    mask: np.ndarray = field(init=False)
    filled: np.ndarray = field(init=False)
    seconds: float = field(init=False)

    def __post_init__(self) -> None:
        hu = torch.from_numpy(np.ascontiguousarray(self.hu, dtype=np.float32))[None]
        # Of the processor, not of the clock: the same while other programs run.
        start = time.process_time()
        mask = threshold_lung_mask(hu, (self.spacing,) * 3)
        self.seconds = time.process_time() - start
        self.mask, self.filled = mask[0].numpy() > 0, fill_thorax(mask, hu)[0].numpy() > 0

    def dice(self) -> float:
        return 2 * float((self.mask & self.reference).sum()) / float(self.mask.sum() + self.reference.sum())

    def kept(self, filled: bool = False, solid: bool = False) -> float:
        """Share of the reference, or of what in it is denser than -400 HU, that the mask keeps."""
        reference = self.reference & (self.hu > -400) if solid else self.reference
        return float(((self.filled if filled else self.mask) & reference).sum()) / max(1, float(reference.sum()))

    def litres(self, filled: bool = False) -> float:
        return float((self.filled if filled else self.mask).sum()) * self.spacing**3 / 1e6


def lung_labels(labels: np.ndarray) -> np.ndarray:
    """Lungs in a label map; of the Chest Imaging Platform's codes, those whose low byte is 0 are no region of the lung."""
    labels = labels.astype(int)
    return (labels > 0) & ((labels & 255) != 0)


def read(folder: Path, name: str, reference: str = "", kind: str = "") -> Measured:
    """A scan of the shared data as the bundle reads it, at 3 mm, with its reference, and its mask."""
    data = LoadCTd(mask_keys=())({"patient_id": name, "image": str(folder / name)})
    keys, modes = ["image"], ["bilinear"]
    if kind == "tumour boxes":
        boxes = torch.zeros_like(data["image"])
        with open(folder / reference, newline="") as f:
            for r in csv.DictReader(f):
                x, y = (slice(int(r[f"{a}min"]), int(r[f"{a}max"]) + 1) for a in "xy")
                boxes[0, x, y, int(r["slice_index_k"])] = 1
        data["reference"] = boxes
    elif kind:
        path = {"patient_id": name, "reference": str(folder / reference)}
        data["reference"] = LoadCTd("reference", mask_keys=(), hounsfield=False)(path)["reference"]
    if kind:
        keys, modes = ["image", "reference"], ["bilinear", "nearest"]
    data = Compose([Orientationd(keys, axcodes="RAS", labels=None), Spacingd(keys, pixdim=(SPACING,) * 3, mode=modes)])(data)
    mask = lung_labels(data["reference"].numpy()[0]) if kind else None
    return Measured(Path(name).name, data["image"].numpy()[0], SPACING, mask, kind)


def repeated_slice(path: Path) -> Measured:
    """A single DICOM slice, repeated so that it is a volume."""
    image = itk.imread(str(path))
    spacing = image.GetSpacing()[0]
    plane = np.clip(itk.array_from_image(image)[0], -1024, None).T[::-1, ::-1].astype(np.float32)
    plane = ndimage.zoom(plane, spacing / SPACING, order=1)
    return Measured(path.name, np.repeat(plane[:, :, None], 16, 2), SPACING)


def with_mass(scan: Phantom, radius: float, costal: bool, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A chest phantom with a solid mass of `radius` mm centred on the pleura, and what of it lies in the lung.

    Costal pleura has no lung further out on the ray from the chest's axis; the other kind faces the mediastinum.
    """
    lung, mm = scan.lung_mask, Chest.FIELD / len(scan.lung_mask)
    heights = np.flatnonzero(lung.any((0, 1)))
    low, high = (round(np.quantile(heights, q)) for q in (0.3, 0.85))
    rim = np.argwhere((lung & ~ndimage.binary_erosion(lung))[:, :, low:high]) + [0, 0, low]
    outwards = rim[:, :2] - (len(lung) - 1) / 2
    outwards /= np.linalg.norm(outwards, axis=1, keepdims=True)
    beyond = np.zeros(len(rim), bool)
    for step in range(2, len(lung) // 2):
        x, y = np.round(rim[:, :2] + step * outwards).astype(int).clip(0, len(lung) - 1).T
        beyond |= lung[x, y, rim[:, 2]]
    centre = rng.choice(rim[~beyond if costal else beyond])
    mass = ball(len(lung), centre, radius / mm) & lung
    return np.where(mass, 40, scan.image), mass


def measure_phantoms(num: int, seed: int) -> tuple[list[str], Measured]:
    """Rows of the two tables of phantoms, and one with a mass for the picture."""
    scans = [scan for _, scan in PhantomCohort(9, num, seed)]
    mm = Chest.FIELD / len(scans[0].image)
    plain = [Measured("phantom", s.image, mm, s.lung_mask, "lungs") for s in tqdm(scans, desc="phantoms")]
    parts = {}
    for what in ("gt_mask", "confounder_mask"):
        parts[what] = [
            float((m.mask & getattr(s, what)).sum()) / getattr(s, what).sum()
            for m, s in zip(plain, scans)
            if getattr(s, what).any()
        ]
    dice = [m.dice() for m in plain]
    rows = [
        "| | mean | worst |",
        "|---|---|---|",
        f"| Dice of the lungs | {np.mean(dice):.3f} | {min(dice):.3f} |",
        f"| kept of the fibrosis at the pleura (`gt_mask`) | {np.mean(parts['gt_mask']):.3f} | {min(parts['gt_mask']):.3f} |",
        f"| kept of ground glass and nodules (`confounder_mask`) | {np.mean(parts['confounder_mask']):.3f} | "
        f"{min(parts['confounder_mask']):.3f} |",
        f"| seconds | {np.mean([m.seconds for m in plain]):.2f} | {max(m.seconds for m in plain):.2f} |",
        "",
        "| radius, mm | at the chest wall | thorax filled | at the mediastinum | thorax filled |",
        "|---|---|---|---|---|",
    ]
    shown = None
    for radius in tqdm(RADII_MM, desc="masses"):
        cells = []
        for costal in (True, False):
            kept = []
            for i, scan in enumerate(scans):
                hu, mass = with_mass(scan, radius, costal, np.random.default_rng([seed, radius, i]))
                m = Measured(f"phantom 9, mass of {radius} mm radius", hu, mm, mass, "mass")
                kept.append((m.kept(), m.kept(filled=True)))
                shown = m if costal and radius == 20 and i == 0 else shown
            cells += [f"{np.mean([k[n] for k in kept]):.2f}" for n in (0, 1)]
        rows.append(f"| {radius} | " + " | ".join(cells) + " |")
    return rows, shown


def full_ct_seconds(scan: Measured) -> float:
    """Seconds for the scan blown up to 512 x 512 x 300 voxels."""
    hu = torch.from_numpy(scan.hu.astype(np.float32))[None, None]
    hu = torch.nn.functional.interpolate(hu, FULL_CT, mode="trilinear")[0]
    spacing = [SPACING * old / new for old, new in zip(scan.hu.shape, FULL_CT)]
    start = time.process_time()
    threshold_lung_mask(hu, spacing)
    return time.process_time() - start


def draw(scans: list[Measured], path: Path) -> None:
    columns = 4
    figure = Figure(figsize=(14, 7.2), layout="constrained")
    axes = figure.subplots(-(-len(scans) // columns), columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, scan in zip(axes.flat, scans):
        where = scan.mask if scan.reference is None else scan.reference
        k = int(where.sum((0, 1)).argmax())
        view = lambda volume: volume[::-1, :, k].T  # noqa: E731  as radiologists look at it: the patient's right is left
        ax.imshow(view(scan.hu), cmap="gray", vmin=-1100, vmax=250, origin="lower")
        for mask, colour in ((scan.filled, "gold"), (scan.reference, "red"), (scan.mask, "cyan")):
            if mask is not None and mask[:, :, k].any():
                ax.contour(view(mask), [0.5], colors=colour, linewidths=1)
        ax.set_title(scan.name, fontsize=8)
    write_png(path, figure, dpi=80)


def real_rows(scans: list[Measured]) -> list[str]:
    rows = [
        "| scan | reference | Dice | kept | of its solid part | … thorax filled | mask, L | … thorax filled | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for s in scans:
        if s.reference is None:
            cells = ["none"] + ["–"] * 4
        else:
            dice = f"{s.dice():.3f}" if s.kind == "lungs" else "–"
            solid = ["–"] * 2 if s.kind == "lungs" else [f"{s.kept(solid=True):.3f}", f"{s.kept(True, True):.3f}"]
            cells = [s.kind, dice, f"{s.kept():.3f}", *solid]
        size = [f"{s.litres():.2f}", f"{s.litres(filled=True):.2f}"]
        rows.append("| " + " | ".join([f"`{s.name}`", *cells, *size, f"{s.seconds:.1f}"]) + " |")
    return rows


def page(real: list[str], full: float | None, phantoms: list[str], picture: str, num: int, command: str) -> str:
    lines = [
        "# Lung masks without weights",
        "",
        "What `lung_mask: threshold` finds (`bundle/transforms/lung_threshold.py`), and with `lung_mask_fill: true` (*thorax filled*). "
        "`lungmask`'s networks are not measured here: their weights don't come with this repository. Seconds are of one processor core.",
        "",
        "## Real scans",
        "",
        "At 3 mm, as the network sees them. *Kept* is the share of the reference that lies in the mask. Boxes around a tumour hold "
        "chest wall and mediastinum too, so that all of a box can't and shouldn't be kept; its *solid part* is what is denser than -400 HU.",
        "",
        *real,
        "",
    ]
    if full is not None:
        lines += [f"A chest of {' x '.join(map(str, FULL_CT))} voxels takes {full:.1f} s without resampling it first.", ""]
    lines += [
        f"![outlines of the masks]({picture})",
        "",
        "*Cyan: the mask. Red: the reference. Gold: thorax filled.*",
        "",
        "## Chest phantoms",
        "",
        f"{num} phantoms of complexity 9 (64³ voxels of 5 mm), half of which have fibrosis at the pleura.",
        "",
        *phantoms[: phantoms.index("")],
        "",
        "The same with a solid mass (40 HU) centred on the pleura in the middle half of the lung: the share of it that is kept.",
        "",
        *phantoms[phantoms.index("") + 1 :],
        "",
        "## Where it fails",
        "",
        "- **What isn't surrounded by lung.** A mass in a corner of the lung (its apex, the angles at the sternum, spine and "
        "diaphragm) or one that merges with the mediastinum looks like what lies beside the lung. `--lung_mask_fill true` keeps all between "
        "the lungs, and with it the heart, the mediastinum and what is under the diaphragm's dome.",
        "- **Consolidation** is as dense as muscle. Where aerated lung surrounds it, it is kept; where it reaches the chest wall over "
        "a long way, as in the single slice above (repeated to a volume), it isn't.",
        "- **A scan without a chest** has a mask all the same: gas in the bowel is air inside the body.",
        "",
        f"Made by `{command}`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m scripts.research.measure_lung_masks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of real scans (default ../shared/data)")
    p.add_argument("--num", type=int, default=10, help="phantoms (default 10)")
    p.add_argument("--seed", type=int, default=0, help="of the phantoms (default 0)")
    p.add_argument("--page", type=Path, default=Path("docs/lung_masks.md"), help="page to write, with a PNG beside it")
    args = p.parse_args()
    chests = [
        read(args.data, name, *reference)
        for name, reference in tqdm(CHESTS.items(), desc="real scans")
        if (args.data / name).exists()
    ]
    others = [read(args.data, NO_CHEST)] if (args.data / NO_CHEST).exists() else []
    if (args.data / SLICE).exists():
        others.append(repeated_slice(args.data / SLICE))
    phantoms, shown = measure_phantoms(args.num, args.seed)
    args.page.parent.mkdir(parents=True, exist_ok=True)
    picture = args.page.with_suffix(".png")
    draw([*chests, *others, shown], picture)
    full = full_ct_seconds(chests[-1]) if chests else None
    command = f"python -m scripts.research.measure_lung_masks --num {args.num} --seed {args.seed}"
    write_text(args.page, page(real_rows(chests + others), full, phantoms, picture.name, args.num, command))


if __name__ == "__main__":
    main()
