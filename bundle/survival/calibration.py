# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What a cohort says without any model, and distributions that fall back on it."""

import numpy as np
from torch import Tensor

from bundle.survival.kaplan_meier import kaplan_meier
from bundle.survival.readout import dead_at

LEVELS = (0.025, 0.975)  # probabilities between which 95 % of a right distribution lies


def cohort_pmf(outcome: Tensor, tmax: int) -> list[float]:
    """P(T = 1..tmax months) of a cohort by Kaplan and Meier; what lies beyond its follow-up is in the last month.

    Args:
        outcome: (time in months, event), (N, 2).
        tmax: last month.

    Example::

        >>> import torch
        >>> cohort_pmf(torch.tensor([[1.0, 1.0], [3.0, 1.0]]), tmax=4)
        [0.5, 0.0, 0.5, 0.0]
    """
    time, event = outcome.double().numpy().T
    survival = kaplan_meier(time, event).evaluate(np.arange(1, tmax + 1) + 0.5)
    survival[-1] = 0.0
    return (np.concatenate([[1.0], survival[:-1]]) - survival).tolist()


def last_death(outcome: Tensor) -> float | None:
    """Months of the last death in a cohort, (N, 2): no later time is known to be survived by few; None without one."""
    return max(outcome[outcome[:, 1] > 0, 0].tolist(), default=None)


def interval_levels(pmf: Tensor, outcome: Tensor) -> list[float]:
    """Predicted probabilities of death between which the times of 95 in 100 patients lie, if patients are like these.

    Where distributions are right, and no upper end lies beyond the last death, they are :data:`LEVELS`. Where they are too
    wide or too narrow, an end is that of the observed P(T <= t), as split conformal prediction has it: of n patients the
    k-th from the end, k = 0.025 (n + 1). Kaplan and Meier's estimate takes the place of the count, as for a censored patient
    P(T <= t) is known to be more than at the last contact. An upper end beyond the last death is open, and nobody dies
    after it; where a share of the patients has such an end, the lower end may come later for as many more: k = 0.025
    (1 + share) (n + 1). An end that so few patients or deaths don't reach stays, or is further out if a patient died there.

    Args:
        pmf: P(T = 1..tmax months), (N, tmax), of patients whose outcomes the prediction has not seen.
        outcome: (time in months, event), (N, 2).

    Source: Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005; for censored times, Candès, Lei and
    Ren, J R Stat Soc B 85 (2023) 24, whose lower bound needs the time of censoring of every patient, which cohorts lack.
    """
    died = outcome[:, 1].numpy() == 1
    level = dead_at(pmf.double(), outcome[:, 0].double()).numpy()
    if not died.any():
        return list(LEVELS)
    deaths, n = np.sort(level[died]), len(level)
    observed = 1 - kaplan_meier(level, died).evaluate(deaths)

    k = int(LEVELS[0] * (n + 1))
    late = deaths[observed > (n + 0.5 - k) / n]
    high = late[0] if len(late) else max(LEVELS[1], deaths[-1])

    last = outcome[:, 0].double()[outcome[:, 1] > 0].max().expand(n)
    is_open = dead_at(pmf.double(), last).numpy() < high
    missed = LEVELS[0] * (1 + is_open.mean())
    k = int(missed * (n + 1))
    early = deaths[observed > (k - 0.5) / n]
    low = early[0] if k > 0 else min(missed, deaths[0])
    return [round(float(low), 6), round(float(high), 6)]


def widened(pmf: Tensor, cohort: list[float], share: float) -> Tensor:
    """A mixture of P(T = t), (tmax,), with a `share` from 0 to 1 of the cohort's own, from :func:`cohort_pmf`."""
    return (1 - share) * pmf + share * pmf.new_tensor(cohort) if share > 0 else pmf
