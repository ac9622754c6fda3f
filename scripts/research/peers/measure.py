# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""One way to measure every method, on test scans whose anatomies no method has seen."""

import numpy as np
import torch
from tqdm import tqdm

from bundle.metrics.localisation import average_precision, confounder_mass, pointing_game
from bundle.metrics.survival import c_index
from scripts.research.peers.cohort import Cohort, Predict, Scan, outcome

MEASURES = {  # their columns in the page
    "c_index_less_oracle": "C-index less the oracle's",
    "average_precision": "AP",
    "pointing_game": "pointing",
    "lookalike_heat": "heat in look-alikes / their share",
    "healthy_heat": "heat of the healthy / of the diseased",
    "fit_seconds": "fit, s of one core",
}


def mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def ratio(above: list[float], below: list[float]) -> float | None:
    """Of two means; None where there is none."""
    return mean(above) / mean(below) if above and below and mean(below) > 0 else None


def measure(cohort: Cohort, predict: Predict) -> tuple[dict, dict[str, np.ndarray]]:
    """MEASURES by name, without the time, with what they are compared to; and planes of the scan that is pictured.

    Maps are scored in diseased scans; heat in look-alikes is that of diseased scans which have some.
    """
    risks, total, score = [], {True: [], False: []}, {"ap": [], "point": [], "like": [], "share": [], "base": []}
    shown, planes = pictured(cohort), {}
    for scan in tqdm(cohort.test, desc="test scans", unit="scan", leave=False):
        risk, heat = predict(scan)
        lung, lesion, like = (scan.mask(f"{name}_mask").numpy() for name in ("lung", "gt", "confounder"))
        risks.append(risk)
        total[bool(lesion.any())].append(float(heat.sum(dtype=np.float64)))
        if lesion.any():
            score["ap"].append(average_precision(heat, lesion))
            score["point"].append(pointing_game(heat, lesion))
            score["base"].append(lesion.sum() / lung.sum())
        if lesion.any() and like.any():
            score["like"].append(confounder_mass(heat, like))
            score["share"].append(like.sum() / lung.sum())
        if scan is shown:
            k = int(lesion.sum((0, 1)).argmax())
            volumes = {"image": scan.volume("image").numpy(), "lesion": lesion, "lookalike": like}
            planes = {name: v[:, :, k] for name, v in {**volumes, "heat": heat / max(heat.max(), 1e-30)}.items()}
    time, event = outcome(cohort.test)
    share = torch.tensor([float(scan.row["share"]) for scan in cohort.test], dtype=torch.float64)
    c, oracle = (c_index(r, time, event) for r in (torch.tensor(risks, dtype=torch.float64), share))
    found = {"c_index": c, "c_index_oracle": oracle, "c_index_less_oracle": None if None in (c, oracle) else c - oracle}
    found |= {"average_precision": mean(score["ap"]), "pointing_game": mean(score["point"])}
    found |= {"lookalike_heat": ratio(score["like"], score["share"]), "healthy_heat": ratio(total[False], total[True])}
    found["healthy_deaths"] = healthy_deaths(cohort)
    found |= {"base_rate": mean(score["base"]), "test_scans": len(risks), "test_diseased": len(score["ap"])}
    return found, planes


def healthy_deaths(cohort: Cohort, horizon: float = 60.0) -> float | None:
    """Share of the healthy who in truth die within the horizon, months, over that of the diseased: the heat's own ratio."""
    scans = [scan.row for scan in cohort.train + cohort.test]
    dies = {ill: [float(row.true_time <= horizon) for row in scans if (row.share > 0) == ill] for ill in (False, True)}
    return ratio(dies[False], dies[True])


def pictured(cohort: Cohort) -> Scan | None:
    """Of the diseased test scans the one in the middle by its diseased share."""
    ill = sorted((scan for scan in cohort.test if float(scan.row["share"]) > 0), key=lambda scan: float(scan.row["share"]))
    return ill[len(ill) // 2] if ill else None
