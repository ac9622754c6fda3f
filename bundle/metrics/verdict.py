# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether a training learnt anything: its predictions of patients it hadn't seen, against chance."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bundle.metrics.survival import c_index, integrated_brier

YES, NO = 0.005, 0.02  # p-values below and above which the verdict is certain
LEAST_DEATHS = 5  # with fewer the verdict is not certain
PERMUTATIONS = 9999


def martingale_residuals(time: Tensor, event: Tensor) -> Tensor:
    """Deaths less those expected by the follow-up alone, (N,): event - H(time), with Nelson and Aalen's H.

    Source: Therneau, Grambsch and Fleming, Biometrika 77 (1990) 147.
    """
    at_risk = (time.unsqueeze(0) >= time.unsqueeze(1)).sum(1)
    before = time.unsqueeze(0) <= time.unsqueeze(1)  # [i, j]: j's time is not after i's
    return event - (before * (event / at_risk)).sum(1)


def verdict(risk: Tensor, time: Tensor, event: Tensor, by: str, seed: int = 0) -> dict:
    """Whether risks of unseen patients go with their deaths more than they do when outcomes are shuffled.

    The statistic is the score of Cox regression on the ranks of the risks: the sum of rank times martingale residual.
    Its p-value is the share of 9999 shuffles of the patients that reach it.

    Args:
        risk: of each patient (N,), made without the patient's outcome; larger is worse.
        time: months, (N,).
        event: 1 died, 0 censored, (N,).
        by: how the risks were made: ``"out of fold"`` or ``"validation"``.
        seed: of the shuffles.

    Returns:
        ``verdict``, "yes" (p below 0.005), "no" (p above 0.02), or "unsure" (between, or fewer than 5 deaths); ``by``,
        ``patients``, ``deaths``, ``c_index`` and ``p_value``.
    """
    risk, time, event = risk.double(), time.double(), event.double()
    rank = torch.unique(risk, return_inverse=True)[1].double()
    rank, residual = rank - rank.mean(), martingale_residuals(time, event)
    g = torch.Generator().manual_seed(seed)
    reached = 0
    for _ in range(PERMUTATIONS // 99):
        shuffles = torch.stack([torch.randperm(len(rank), generator=g) for _ in range(99)])
        reached += int((rank[shuffles] @ residual >= rank @ residual - 1e-9).sum())
    p = (1 + reached) / (1 + PERMUTATIONS)
    deaths = int(event.sum())
    learnt = "yes" if p < YES else "no" if p > NO else "unsure"
    if deaths < LEAST_DEATHS:
        learnt = "unsure"
    return {
        "verdict": learnt, "by": by, "patients": len(risk), "deaths": deaths,
        "c_index": c_index(risk, time, event), "p_value": p,
    }  # fmt: skip


def prediction_accuracy(pmf: Tensor, cohort: Sequence[float], time: Tensor, event: Tensor) -> float | None:
    """Index of prediction accuracy (IPA): how much better than Kaplan and Meier's estimate of the cohort, for everybody.

    1 - integrated Brier score / that of the estimate: 1 is right, 0 is no better, below 0 is worse.

    Args:
        pmf: P(T = 1..tmax months), (N, tmax), of patients whose outcomes the prediction has not seen.
        cohort: the estimate, (tmax,), from :func:`~bundle.survival.calibration.cohort_pmf`.
        time: months, (N,).
        event: 1 died, 0 censored, (N,).

    Returns:
        None where :func:`~bundle.metrics.survival.integrated_brier` is, or the estimate makes no error.

    Source: Kattan and Gerds, Diagnostic and Prognostic Research 2 (2018) 7.
    """
    pmf, time, event = pmf.double(), time.double(), event.double()
    own, null = (integrated_brier(p, time, event) for p in (pmf, pmf.new_tensor(cohort).expand_as(pmf)))
    return 1 - own / null if own is not None and null else None


def in_words(found: dict) -> str:
    """One sentence on a verdict, for logs, messages and reports."""
    tested = f"{found['by']}, {found['patients']} patients, {found['deaths']} deaths, p = {found['p_value']:.2g}"
    c = "" if found["c_index"] is None else f"C-index {found['c_index']:.2f}, "
    if found.get("ipa") is not None:  # weights of earlier versions have none
        c += f"IPA {found['ipa']:+.2f}, "
    what = {
        "yes": "the training learnt something",
        "unsure": "it is not sure that the training learnt anything",
        "no": "the training learnt nothing that could be shown",
    }[found["verdict"]]
    known = "survival times were simulated, so nothing is known of patients; " if found.get("simulated") else ""
    return f"{known}{what} ({c}{tested})"


def doubtful(found: dict) -> bool:
    """Whether maps of patients by such a training are not to be relied on: unless the verdict is "yes", of real times."""
    return found["verdict"] != "yes" or found.get("simulated", False)
