# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""How good the lung mask without weights is: against masks of real scans, lesions of real scans, and chest phantoms.

Writes a page with the tables and a picture with the masks' outlines. Real scans that are not there are left out.
"""

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from monai.transforms import Compose, Orientationd, Spacingd
from scipy import ndimage
from tqdm import tqdm

from bundle.files import write_text
from bundle.phantoms import Chest, Phantom, PhantomCohort, ball
from bundle.report.pictures import write_png
from bundle.transforms import LoadCTd, fill_thorax, threshold_lung_mask
from scripts.jobs import markdown

SPACING = 3.0  # mm, that of the shipped configuration
CHESTS = {  # file or folder: reference, and whether that is the lungs' mask, a lesion's, or boxes around a tumour
    "ct/chest_cip_64_lowres_ct.nrrd": ("ct/chest_cip_64_lowres_lung_labelmap.nrrd", "lungs"),
    "ct/rightlung_elastix_ct.mha": ("ct/rightlung_elastix_lung_mask.mha", "lungs"),
    "ct/chest_pyradiomics_lung1_ct.nrrd": ("ct/chest_pyradiomics_lung1_nodule_mask.nrrd", "nodule"),
    "ct/chest_lungpetctdx_A0001_ct.nii.gz": ("ct/chest_lungpetctdx_A0001_tumour_boxes.csv", "tumour boxes"),
    "dicom_lungpetctdx_A0002_B40f": ("dicom_lungpetctdx_A0002_B40f_tumour_boxes.csv", "tumour boxes"),
}
FULL_CT = (512, 512, 300)
RADII_MM = (10, 20, 30)
PAGE = """\
# Lung masks without weights

What `lung_mask: threshold` finds, and with `lung_mask_fill: true` (*thorax filled*). Seconds are of one processor core.
{full}
## Real scans at 3 mm

*Kept* is the share of the reference that lies in the mask. Boxes around a tumour hold chest wall and mediastinum too, so
that all of a box can't and shouldn't be kept; its *solid part* is what is denser than -400 HU.

{real}
## Chest phantoms

{num} phantoms `chest` of 64³ voxels of 5 mm, half of which have fibrosis at the pleura.

{parts}
The same with a solid mass (40 HU) centred on the pleura in the middle half of the lung: the share of it that is kept.

{masses}
Made by `python -m scripts.research.measure_lung_masks --num {num} --seed {seed}`.
"""


@dataclass
class Measured:
    """One scan with its masks, all (D, H, W) in RAS order, and what was measured."""

    name: str
    hu: np.ndarray
    spacing: float
    reference: np.ndarray
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


def read(folder: Path, name: str, reference: str, kind: str) -> Measured:
    """A scan of the shared data as the bundle reads it, at 3 mm, with its reference, and its mask."""
    data = LoadCTd(mask_keys=())({"patient_id": name, "image": str(folder / name)})
    if kind == "tumour boxes":
        data["reference"] = torch.zeros_like(data["image"])
        for box in pd.read_csv(folder / reference).itertuples():
            data["reference"][0, box.xmin : box.xmax + 1, box.ymin : box.ymax + 1, box.slice_index_k] = 1
    else:
        path = {"patient_id": name, "reference": str(folder / reference)}
        data["reference"] = LoadCTd("reference", mask_keys=(), hounsfield=False)(path)["reference"]
    keys = ["image", "reference"]
    spacing = Spacingd(keys, pixdim=(SPACING,) * 3, mode=["bilinear", "nearest"])
    data = Compose([Orientationd(keys, axcodes="RAS", labels=None), spacing])(data)
    hu, labels = (data[key].numpy()[0] for key in keys)
    return Measured(Path(name).name, hu, SPACING, lung_labels(labels), kind)


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


def measure_parts(scans: list[Phantom]) -> pd.DataFrame:
    """What of lungs and of disease the masks of phantoms keep."""
    plain = [Measured("phantom", s.image, Chest.FIELD / len(s.image), s.lung_mask) for s in tqdm(scans, desc="phantoms")]
    dice = [m.dice() for m in plain]
    rows = [{"": "Dice of the lungs", "mean": f"{np.mean(dice):.3f}", "worst": f"{min(dice):.3f}"}]
    titles = {"gt_mask": "the fibrosis at the pleura", "confounder_mask": "ground glass and nodules"}
    for name, title in titles.items():
        masks = [(m.mask, getattr(s, name)) for m, s in zip(plain, scans, strict=True)]
        kept = [float((mask & part).sum()) / part.sum() for mask, part in masks if part.any()]
        rows.append({"": f"kept of {title} (`{name}`)", "mean": f"{np.mean(kept):.3f}", "worst": f"{min(kept):.3f}"})
    taken = [m.seconds for m in plain]
    return pd.DataFrame([*rows, {"": "seconds", "mean": f"{np.mean(taken):.2f}", "worst": f"{max(taken):.2f}"}])


def measure_masses(scans: list[Phantom], seed: int) -> tuple[pd.DataFrame, Measured]:
    """What of masses at the pleura the masks of phantoms keep, and one of these scans for the picture."""
    mm, rows, shown = Chest.FIELD / len(scans[0].image), [], None
    for radius in tqdm(RADII_MM, desc="masses"):
        cells = {"radius, mm": radius}
        for place in ("at the chest wall", "at the mediastinum"):
            costal, kept = place == "at the chest wall", []
            for i, scan in enumerate(scans):
                hu, mass = with_mass(scan, radius, costal, np.random.default_rng([seed, radius, i]))
                m = Measured(f"chest phantom, mass of {radius} mm radius", hu, mm, mass)
                kept.append((m.kept(), m.kept(filled=True)))
                shown = m if costal and radius == 20 and i == 0 else shown
            cells[place], cells[f"{place}, thorax filled"] = (f"{value:.2f}" for value in np.mean(kept, 0))
        rows.append(cells)
    return pd.DataFrame(rows), shown


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
        k = int(scan.reference.sum((0, 1)).argmax())
        view = np.s_[::-1, :, k]  # as radiologists look at it: the patient's right is left
        ax.imshow(scan.hu[view].T, cmap="gray", vmin=-1100, vmax=250, origin="lower")
        for mask, colour in ((scan.filled, "gold"), (scan.reference, "red"), (scan.mask, "cyan")):
            if mask[:, :, k].any():
                ax.contour(mask[view].T, [0.5], colors=colour, linewidths=1)
        ax.set_title(scan.name, fontsize=8)
    write_png(path, figure, dpi=80)


def real_table(scans: list[Measured]) -> pd.DataFrame:
    rows = []
    for s in scans:
        row = {"scan": f"`{s.name}`", "reference": s.kind, "Dice": "–", "kept": f"{s.kept():.3f}"}
        row |= {
            "of its solid part": f"{s.kept(solid=True):.3f}",
            "… thorax filled": f"{s.kept(filled=True, solid=True):.3f}",
        }
        if s.kind == "lungs":
            row |= {"Dice": f"{s.dice():.3f}", "of its solid part": "–", "… thorax filled": "–"}
        row |= {"mask, L": f"{s.litres():.2f}", "thorax filled, L": f"{s.litres(filled=True):.2f}"}
        rows.append(row | {"seconds": f"{s.seconds:.1f}"})
    return pd.DataFrame(rows)


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m scripts.research.measure_lung_masks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of real scans (default ../shared/data)")
    p.add_argument("--num", type=int, default=10, help="phantoms (default 10)")
    p.add_argument("--seed", type=int, default=0, help="of the phantoms (default 0)")
    p.add_argument("--page", type=Path, default=Path("docs/results/lung_masks.md"), help="to write (default %(default)s)")
    p.add_argument("--picture", type=Path, default=Path("docs/lung_masks.png"), help="to draw (default %(default)s)")
    args = p.parse_args()
    if args.num < 2:
        sys.exit(f"error: --num is {args.num}; expected at least 2, of which one dies.")
    here = {name: reference for name, reference in CHESTS.items() if (args.data / name).exists()}
    chests = [read(args.data, name, *reference) for name, reference in tqdm(here.items(), desc="real scans")]
    phantoms = [scan for _, scan in PhantomCohort("chest", args.num, args.seed)]
    masses, shown = measure_masses(phantoms, args.seed)
    draw([*chests, shown], args.picture)
    shape = " x ".join(map(str, FULL_CT))
    full = f"A chest of {shape} voxels takes {full_ct_seconds(chests[-1]):.1f} s at full resolution.\n" if chests else ""
    tables = {"real": real_table(chests), "parts": measure_parts(phantoms), "masses": masses}
    tables = {name: markdown(table) for name, table in tables.items()}
    write_text(args.page, PAGE.format(full=full, num=args.num, seed=args.seed, **tables))


if __name__ == "__main__":
    main()
