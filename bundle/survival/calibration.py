# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What a cohort says without any model, and distributions that fall back on it."""

import numpy as np
from torch import Tensor

from bundle.survival.kaplan_meier import kaplan_meier


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


def widened(pmf: Tensor, cohort: list[float], share: float) -> Tensor:
    """A mixture of P(T = t), (tmax,), with a `share` from 0 to 1 of the cohort's own, from :func:`cohort_pmf`."""
    return (1 - share) * pmf + share * pmf.new_tensor(cohort) if share > 0 else pmf
