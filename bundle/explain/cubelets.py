# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Cubelets: the patches that shorten and lengthen life most, of a patient and of a cohort, on one sheet."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from bundle.explain.features import location
from bundle.explain.scan import ScanTokens
from bundle.files import write_atomically
from bundle.report.pictures import LUNG_WINDOW, plane

NUM = 8  # of the worst, and of the best
APART = 15.0  # mm between centres, so that one lesion doesn't fill the sheet
AROUND = 24.0  # mm shown on each side
EACH = 2  # of a patient on the sheet of a cohort


@dataclass(frozen=True)
class Cubelets:
    """Patches of a scan, the earliest locations first; N of them.

    Attributes:
        months: their locations, (N,).
        hu: mean HU of their lung, (N,).
        mm: their centres, (N, 3), RAS.
        crops: the axial slices around them, (N, A, B), HU, axes towards right and front.
        spacing: mm of a voxel, (2,).
        cell: voxels a side of a patch.
    """

    months: np.ndarray
    hu: np.ndarray
    mm: np.ndarray
    crops: np.ndarray
    spacing: np.ndarray
    cell: int

    def save(self, path: Path) -> None:
        """Write them, whole or not at all."""
        write_atomically(path, lambda part: np.savez_compressed(open(part, "wb"), **asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "Cubelets":
        with np.load(path, allow_pickle=False) as found:
            return cls(**found)

    def picture(self) -> Figure:
        """The sheet of this scan."""
        num = min(NUM, (len(self.months) + 1) // 2)
        return sheet([("", self, n) for n in range(num)], [("", self, -1 - n) for n in range(num)])


def apart(order: Tensor, centres: Tensor, num: int = NUM, least: float = APART) -> list[int]:
    """The first `num` tokens of an order (M,) whose `centres`, (M, 3) in mm, are `least` mm apart."""
    found: list[int] = []
    free = torch.ones(len(order), dtype=torch.bool)
    while len(found) < num and bool(free[order].any()):
        found.append(int(order[free[order]][0]))
        free &= (centres - centres[found[-1]]).norm(dim=1) >= least
    return found


def cubelets(scan: ScanTokens, affine: np.ndarray, hu_window: tuple[float, float]) -> Cubelets:
    """The patches of a scan's earliest and of its latest locations, as many of either.

    Args:
        scan: to show.
        affine: of its image (RAS, mm), with axes towards right, front and head.
        hu_window: HU that are 0 and 1 in the image.
    """
    low, high = hu_window
    hu, lung = ((x[0, 0].cpu().numpy()) for x in (scan.image * (high - low) + low, scan.lung))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)[:2]
    months, corner = location(scan).cpu(), scan.index.cpu() * scan.cell
    centre = corner + (scan.cell - 1) / 2
    mm = centre @ torch.as_tensor(affine[:3, :3].T.copy()).float() + torch.as_tensor(affine[:3, 3].copy()).float()
    worst, best = apart(months.argsort(), mm), apart(months.argsort(descending=True), mm)
    chosen = [*worst, *reversed(best)]
    reach = np.round(AROUND / spacing).astype(int)
    means, crops = [], []
    for first in corner[chosen].numpy():
        box = tuple(slice(n, n + scan.cell) for n in first)
        inside = lung[box] > 0
        means.append(hu[box][inside].mean() if inside.any() else hu[box].mean())
        flat = hu[:, :, min(first[2] + scan.cell // 2, hu.shape[2] - 1)]
        padded = np.pad(flat, [(n, n + scan.cell) for n in reach], constant_values=low)
        crops.append(padded[first[0] : first[0] + 2 * reach[0] + scan.cell, first[1] : first[1] + 2 * reach[1] + scan.cell])
    return Cubelets(months[chosen].numpy(), np.array(means), mm[chosen].numpy(), np.stack(crops), spacing, scan.cell)


def cohort_sheet(scans: Mapping[str, Cubelets]) -> Figure:
    """The sheet of a cohort, of scans by the patient's id: at most `EACH` patches of a patient in a row."""
    worst = [(name, found, n) for name, found in scans.items() for n in range(min(EACH, len(found.months)))]
    best = [(name, found, -1 - n) for name, found in scans.items() for n in range(min(EACH, len(found.months)))]
    worst.sort(key=lambda each: each[1].months[each[2]])
    best.sort(key=lambda each: -each[1].months[each[2]])
    return sheet(worst[:NUM], best[:NUM])


def sheet(worst: list[tuple[str, Cubelets, int]], best: list[tuple[str, Cubelets, int]]) -> Figure:
    """Axial slices through patches, which are marked, given as whose they are, the scan's patches, and which of them.

    Above each are whose it is, its centre in mm (RAS), the mean HU of its lung, and its location.
    """
    figure = Figure(figsize=(2 * NUM, 5.6), facecolor="black", layout="constrained")
    for part, title, row in zip(figure.subfigures(2), ("shorten life most", "lengthen life most"), (worst, best)):
        part.set_facecolor("black")
        part.suptitle(f"patches that {title}", color="white", fontsize=10)
        axes = part.subplots(1, NUM)
        for ax in axes:
            ax.set_axis_off()
        for ax, (whose, found, n) in zip(axes, row):
            crop, size = found.crops[n], found.cell * found.spacing
            extent = (0, crop.shape[0] * found.spacing[0], 0, crop.shape[1] * found.spacing[1])
            ax.imshow(plane(crop[..., None], 2, 0), cmap="gray", vmin=LUNG_WINDOW[0], vmax=LUNG_WINDOW[1], extent=extent)
            corner = (np.array(crop.shape) - found.cell) / 2 * found.spacing
            ax.add_patch(Rectangle(corner, *size, fill=False, color="#ffb000", lw=1))
            where = ", ".join(f"{x:.0f}" for x in found.mm[n])
            says = f"{where} mm\n{found.hu[n]:.0f} HU, {found.months[n]:.0f} months"
            ax.set_title(f"{whose}\n{says}" if whose else says, color="white", fontsize=8)
    return figure
