# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Survival-MNIST: each digit dies at times of its own; can its picture tell when, and are the odds right?

Source: Goldstein et al., X-CAL: Explicit calibration for survival analysis, NeurIPS 2020, section 4.2, appendix D.2.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bundle.files import write_text
from bundle.metrics.survival import c_index, calibration_counts, d_calibration, mae_events
from bundle.survival import mean_months, quantile_months
from scripts.research.benchmarks.runs import kept, predicted, train, write_picture

RISK = np.array([11.25, 2.25, 5.25, 5.0, 4.75, 8.0, 2.0, 11.0, 1.75, 10.75])  # mean time of each digit, their table 5
VARIANCE = 1e-3
MONTHS = 8.0  # of a unit of their time, so that all lie below tmax
SCANS = {"train": 4000, "val": 500, "test": 1000}
QUICK_SCANS = {"train": 600, "val": 100, "test": 500}
BINS = 20  # of D-calibration, as theirs
# The shipped patches are small and begin anywhere, to know tissue wherever it lies. A digit is known by where its strokes
# are: here four patches cover it, each always the same quarter, and each sees the others.
FOUR = {
    "recipe": "network",
    "network_def#patch_size": 14,
    "network_def#window": 0,
    "train#random_transforms#0#prob": 0.0,
    "severity": False,
    "batch_size": 32,
    "max_epochs": 60,
}
VARIANTS = {"as shipped": {}, "four patches": FOUR}


def outcomes(digits: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Times in their unit and events (1 died) of digits (N,).

    t ~ Gamma(m² / v, rate m / v) with m the digit's risk and v = 1e-3; censored uniformly between the first t and the
    90th percentile.
    """
    mean = RISK[digits]
    failure = rng.gamma(mean**2 / VARIANCE, VARIANCE / mean)
    censoring = rng.uniform(failure.min(), np.quantile(failure, 0.9), len(failure))
    return np.minimum(failure, censoring), (failure <= censoring).astype(int)


def d_cal(pmf: Tensor, time: Tensor, event: Tensor) -> float:
    """Their D-CAL: the sum over bins of (share of patients - 1 / bins)²; 0 is best."""
    counts = calibration_counts(pmf, time, event, BINS)
    return float((counts / len(time) - 1 / BINS).square().sum())


def cohort(folder: Path, images: np.ndarray, shown: np.ndarray, seed: int, scans: dict[str, int]) -> Path:
    """Table of pictures laid as volumes, each in one part only; `index` is its place among them."""
    path = folder / "cohort.csv"
    if path.is_file():
        return path
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    order, rows = rng.permutation(len(images)), []
    for split, number in scans.items():
        chosen, order = order[:number], order[number:]
        for index, time, event in zip(chosen, *outcomes(shown[chosen], rng), strict=True):
            name = f"digit{index:05d}"
            write_picture(folder / "images" / f"{name}.nii", images[index])
            row = {"patient_id": name, "image": f"images/{name}.nii", "time": MONTHS * time, "event": event, "split": split}
            rows.append({**row, "index": index})
    write_text(path, pd.DataFrame(rows).to_csv(index=False))
    return path


def measured(work: Path, images: np.ndarray, shown: np.ndarray, variant: str, seed: int, quick: bool, threads: int) -> dict:
    """Scores of one training on digits it never saw, and the oracle's, who knows each digit's mean time."""
    table = cohort(work / f"mnist_{seed}", images, shown, seed, QUICK_SCANS if quick else SCANS)
    folder = work / f"mnist_{list(VARIANTS).index(variant)}_{seed}"
    options = VARIANTS[variant]
    ckpt = train(folder, table, ["configs/cohort/phantom.json"], options, seed, threads)
    test = pd.read_csv(table).query("split == 'test'")
    time, event = (torch.tensor(test[name].to_numpy()) for name in ("time", "event"))
    shifts = 1 if "train#random_transforms#0#prob" in options else None  # as it was trained
    pmf = predicted(ckpt, images[test["index"]], shifts=shifts).double()
    return {
        "kept": kept(ckpt),
        "c_index": c_index(-mean_months(pmf), time, event),
        "oracle": c_index(-torch.from_numpy(RISK[shown[test["index"]]]), time, event),
        "d_cal": d_cal(pmf, time, event),
        "d_calibration_p": d_calibration(pmf, time, event),
        "mae_events": mae_events(quantile_months(pmf, 0.5), time, event),
    }
