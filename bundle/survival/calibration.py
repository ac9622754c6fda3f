# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What a cohort says without any model, and distributions that fall back on it."""

import numpy as np
from torch import Tensor

from bundle.survival.kaplan_meier import kaplan_meier
from bundle.survival.readout import dead_at

# Probabilities between which 95 % of a right distribution lies; the third is the lower one if there is no upper end.
LEVELS = (0.025, 0.975, 0.05)


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

    Where distributions are right they are :data:`LEVELS`: of the lower end, of the upper one, and of the lower end where
    the upper one is open, as it lies beyond the last death. Where distributions are too wide or too narrow, each is that of
    the observed P(T <= t), as split conformal prediction has it: of n patients the k-th from the end, k = 0.025 (n + 1), or
    0.05 (n + 1). Kaplan and Meier's estimate takes the place of the count, as for a censored patient P(T <= t) is known to
    be more than at the last contact; late on, where few are left, n is the number of deaths. An end that so few patients or
    deaths don't reach stays, or is further out if a patient died there.

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
    deaths = np.sort(level[died])
    observed = 1 - kaplan_meier(level, died).evaluate(deaths)

    def low(missed: float) -> float:
        within = int((observed * len(level) / (len(level) + 1) <= missed + 1e-9).sum())
        return deaths[within - 1] if within else min(missed, deaths[0])

    low_closed, high_closed, low_open = LEVELS
    late = deaths[observed * len(deaths) / (len(deaths) + 1) >= high_closed - 1e-9]
    high = late[0] if len(late) else max(high_closed, deaths[-1])
    return [round(float(found), 6) for found in (low(low_closed), high, low(low_open))]


def widened(pmf: Tensor, cohort: list[float], share: float) -> Tensor:
    """A mixture of P(T = t), (tmax,), with a `share` from 0 to 1 of the cohort's own, from :func:`cohort_pmf`."""
    return (1 - share) * pmf + share * pmf.new_tensor(cohort) if share > 0 else pmf
