# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What could be seen: a small network that is shown the masks, for the average precision of maps learnt without them."""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from torch import nn

from bundle.metrics.localisation import average_precision

SIDES_MM = (9.0, 15.0, 27.0)  # of the cubes whose mean and deviation are taken
A_SCAN = 600  # voxels that each scan gives to the fit, of the disease and of the rest


def descriptors(hu: np.ndarray, lung: np.ndarray, spacing: float) -> np.ndarray:
    """What the surroundings of each lung voxel look like, (voxels, 9) float32.

    Density, its local mean and log deviation at three scales, all within the lung and less the scan's own median; depth
    below the pleura; share of lung nearby.

    Args:
        hu: (D, H, W).
        lung: bool, same shape; not empty.
        spacing: of cubic voxels, mm.
    """
    value = (np.clip(hu, -1000, 200).astype(np.float32) + 1000) / 1200
    box = ndimage.find_objects(lung.astype(np.uint8))[0]
    value, lung = value[box], lung[box]
    parts, columns = [part * lung for part in (np.ones_like(value), value, value**2)], [value]
    for mm in SIDES_MM:
        near, mean, square = (ndimage.uniform_filter(part, max(3, round(mm / spacing)), mode="constant") for part in parts)
        mean, square = mean / np.maximum(near, 1e-3), square / np.maximum(near, 1e-3)
        columns += [mean, np.log(np.maximum(square - mean**2, 1e-5))]
    found = np.stack([column[lung] for column in columns], 1)
    depth = ndimage.distance_transform_edt(np.pad(lung, 1))[1:-1, 1:-1, 1:-1][lung] * spacing
    return np.column_stack([found - np.median(found, 0), np.minimum(depth, 50) / 25, near[lung]]).astype(np.float32)


def read_lung(folder: Path, row: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Descriptors of an implanted scan's lung voxels, and which of them are diseased."""
    image = nib.load(folder / row.image)
    lung, gt = (np.asarray(nib.load(folder / row[name]).dataobj) > 0 for name in ("lung_mask", "gt_mask"))
    return descriptors(np.asarray(image.dataobj), lung, float(image.header.get_zooms()[0])), gt[lung]


def fit(x: torch.Tensor, y: torch.Tensor, seed: int, steps: int = 400) -> Callable[[torch.Tensor], torch.Tensor]:
    """A small network that tells diseased voxels (`y` 1) from others by their descriptors `x`, (voxels, 9)."""
    torch.manual_seed(seed)
    mean, std = x.mean(0), x.std(0) + 1e-6
    network = nn.Sequential(nn.Linear(x.shape[1], 48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 1))
    optimizer = torch.optim.AdamW(network.parameters(), 0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        some = torch.randint(len(x), (4096,))
        loss = nn.functional.binary_cross_entropy_with_logits(network((x[some] - mean) / std)[:, 0], y[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return lambda other: torch.sigmoid(network((other - mean) / std)[:, 0])


def mask_ceiling(cohort: Path, seed: int = 0) -> float:
    """Average precision, on the test scans of implants, of a small network trained on the masks of the others.

    Mean over the diseased test scans, as `configs/evaluate.json` has it for maps; NaN without one. It uses local evidence
    only, and is no bound: a map that sees more of a scan may pass it.

    Args:
        cohort: `cohort.csv` of `scripts.make_implants`.
        seed: of the voxels drawn and of the fit.
    """
    table, rng = pd.read_csv(cohort), np.random.default_rng(seed)
    drawn: list[tuple[np.ndarray, np.ndarray]] = []
    for _, row in table[table.split != "test"].iterrows():
        x, sick = read_lung(cohort.parent, row)
        for part in (np.flatnonzero(sick), np.flatnonzero(~sick)):
            some = rng.permutation(part)[:A_SCAN]
            drawn.append((x[some], sick[some]))
    x, y = (torch.from_numpy(np.concatenate(part)).float() for part in zip(*drawn))
    predict, scores = fit(x, y, seed), []
    for _, row in table[(table.split == "test") & (table.share > 0)].iterrows():
        x, sick = read_lung(cohort.parent, row)
        with torch.no_grad():
            scores.append(average_precision(predict(torch.from_numpy(x)).numpy()[None, None], sick[None, None]))
    return float(np.mean(scores)) if scores else float("nan")
