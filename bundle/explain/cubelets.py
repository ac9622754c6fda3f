# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Cubelets: the patches of a patient that shorten and lengthen life most, on one sheet."""

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from bundle.explain.features import location
from bundle.explain.scan import ScanTokens
from bundle.report.pictures import LUNG_WINDOW, plane

NUM = 8  # of the worst, and of the best
APART = 15.0  # mm between centres, so that one lesion doesn't fill the sheet
AROUND = 24.0  # mm shown on each side


def apart(order: Tensor, centres: Tensor, num: int = NUM, least: float = APART) -> list[int]:
    """The first `num` tokens of an order (M,) whose `centres`, (M, 3) in mm, are `least` mm apart."""
    found: list[int] = []
    free = torch.ones(len(order), dtype=torch.bool)
    while len(found) < num and bool(free[order].any()):
        found.append(int(order[free[order]][0]))
        free &= (centres - centres[found[-1]]).norm(dim=1) >= least
    return found


def contact_sheet(scan: ScanTokens, affine: np.ndarray, hu_window: tuple[float, float]) -> Figure:
    """Axial slices through the patches of the earliest and of the latest location, which are marked.

    Above each are its centre in mm (RAS), the mean HU of its lung, and its location.

    Args:
        scan: to show.
        affine: of its image (RAS, mm), with axes towards right, front and head.
        hu_window: HU that are 0 and 1 in the image.
    """
    low, high = hu_window
    hu, lung = ((x[0, 0].cpu().numpy()) for x in (scan.image * (high - low) + low, scan.lung))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    months, corner = location(scan).cpu(), scan.index.cpu() * scan.cell
    centre = corner + (scan.cell - 1) / 2
    mm = centre @ torch.as_tensor(affine[:3, :3].T.copy()).float() + torch.as_tensor(affine[:3, 3].copy()).float()
    figure = Figure(figsize=(2 * NUM, 5.2), facecolor="black", layout="constrained")
    rows = {"shorten life most": months.argsort(), "lengthen life most": months.argsort(descending=True)}
    for part, (title, order) in zip(figure.subfigures(2), rows.items()):
        part.set_facecolor("black")
        part.suptitle(f"patches that {title}", color="white", fontsize=10)
        for ax, token in zip(part.subplots(1, NUM), apart(order, mm) + [None] * NUM):
            ax.set_axis_off()
            if token is None:
                continue
            first = corner[token].numpy()
            box = tuple(slice(n, n + scan.cell) for n in first)
            inside = lung[box] > 0
            mean = hu[box][inside].mean() if inside.any() else hu[box].mean()
            reach = np.round(AROUND / spacing[:2]).astype(int)
            padded = np.pad(
                hu[:, :, min(first[2] + scan.cell // 2, hu.shape[2] - 1)], [(n, n) for n in reach], constant_values=low
            )
            crop = padded[first[0] : first[0] + 2 * reach[0] + scan.cell, first[1] : first[1] + 2 * reach[1] + scan.cell]
            extent = (0, crop.shape[0] * spacing[0], 0, crop.shape[1] * spacing[1])
            ax.imshow(plane(crop[..., None], 2, 0), cmap="gray", vmin=LUNG_WINDOW[0], vmax=LUNG_WINDOW[1], extent=extent)
            side = scan.cell * spacing[:2]
            corner_mm = reach * spacing[:2]
            ax.add_patch(Rectangle(corner_mm, *side, fill=False, color="#ffb000", lw=1))
            where = ", ".join(f"{x:.0f}" for x in mm[token])
            ax.set_title(f"{where} mm\n{mean:.0f} HU, {months[token]:.0f} months", color="white", fontsize=8)
    return figure
