# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Heat in more than one kind of mask, and what the true masks would allow."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch

from bundle.survival.cox import cox_regression


def read_mask(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj) > 0


def heat_ratio(scans: pd.DataFrame, cohort: pd.DataFrame, folder: Path, column: str, other: str) -> float | None:
    """Heat per voxel in one mask over that in the rest of the lesions, or over the scan's mean.

    Args:
        scans: `metrics_per_scan.csv` of an evaluation that had this mask in the place of the confounder's.
        cohort: of the same scans; its masks lie in `folder`.
        column: of the mask.
        other: "lesions" or "scan".

    Returns:
        The median over the scans that have lesions, this mask and the other; None without such a scan.
    """
    ratios = []
    for scan in scans.merge(cohort, on="patient_id").itertuples():
        if np.isnan(scan.confounder_mass) or np.isnan(scan.mass_accuracy):
            continue
        one, lesions = (read_mask(folder / getattr(scan, name)) for name in (column, "gt_mask"))
        if other == "scan":
            ratios.append(scan.confounder_mass / one.mean())
        elif (rest := lesions & ~one).any():
            heat = max(scan.mass_accuracy - scan.confounder_mass, 0.0)
            ratios.append(scan.confounder_mass / one.sum() / max(heat / rest.sum(), 1e-12))
    return float(np.median(ratios)) if ratios else None


def heat_ratio_of_true_volumes(train: Path) -> float:
    """How many times as dangerous severe lesions are than mild ones, as far as the training scans' outcomes tell.

    It is the ratio of the coefficients of Cox's regression on the true volumes of either kind.
    """
    cohort, volumes = pd.read_csv(train / "cohort.csv"), []
    for scan in cohort.itertuples():
        lesions, severe = read_mask(train / scan.gt_mask), read_mask(train / scan.gt_severe_mask)
        volumes.append([(lesions & ~severe).mean(), severe.mean()])
    volumes = torch.tensor(volumes, dtype=torch.float64)
    scale = volumes.std(0)
    mild, severe = cox_regression(volumes / scale, torch.tensor(cohort.time), torch.tensor(cohort.event)) / scale
    return float(severe / mild)
