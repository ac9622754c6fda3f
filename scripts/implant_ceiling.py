# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What can be seen: a classifier of voxels that is shown the masks, beside which maps learnt without them are put."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from scipy import ndimage
from sklearn.ensemble import HistGradientBoostingClassifier

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


def mask_ceiling(cohort: Path, seed: int = 0) -> float:
    """Average precision, on the test scans of implants, of a classifier that was shown the masks of the others.

    Mean over the diseased test scans, as `configs/evaluate.json` has it for maps; NaN without one. The classifier is
    gradient-boosted trees on :func:`descriptors`: local evidence only, and no bound to a map that sees more of a scan.

    Args:
        cohort: `cohort.csv` of `scripts.make_implants`.
        seed: of the voxels drawn and of the fit.
    """
    table, rng = pd.read_csv(cohort), np.random.default_rng(seed)
    drawn = []
    for _, row in table[table.split != "test"].iterrows():
        x, sick = read_lung(cohort.parent, row)
        for part in (np.flatnonzero(sick), np.flatnonzero(~sick)):
            some = rng.permutation(part)[:A_SCAN]
            drawn.append((x[some], sick[some]))
    model = HistGradientBoostingClassifier(random_state=seed)
    model.fit(*(np.concatenate(part) for part in zip(*drawn)))
    scores = []
    for _, row in table[(table.split == "test") & (table.share > 0)].iterrows():
        x, sick = read_lung(cohort.parent, row)
        scores.append(average_precision(model.predict_proba(x)[None, None, :, 1], sick[None, None]))
    return float(np.mean(scores)) if scores else float("nan")
