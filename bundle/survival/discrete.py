# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Distributions of free shape over months, and death by one month as a yes or no."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bundle.errors import InputError
from bundle.survival.kaplan_meier import kaplan_meier_censoring
from bundle.survival.objectives import MonthsObjective, Objective, classical_log_likelihood, whole_months
from bundle.survival.readout import months, patient_numbers


def deephit_ranking(pmf: Tensor, time: Tensor, event: Tensor, sigma: float) -> Tensor:
    """DeepHit's ranking loss of P(T = 1..tmax), (B, tmax): who died first must have had the higher risk by then.

    The mean of ``eta = exp(-(F(t_i | x_i) - F(t_i | x_j)) / sigma)`` over the pairs (i, j) with a death of i at t_i <
    t_j, in whole months; 0 without such pairs. F is P(T <= t). The paper sums; a mean is the same for any batch size.

    Source: Lee et al., DeepHit, AAAI 2018, equation 4.
    """
    risk = pmf.cumsum(1)[:, time - 1].T  # of each patient j in column j by the time of i in row i
    pair = (event > 0).unsqueeze(1) & (time.unsqueeze(1) < time)
    eta = torch.exp((risk - risk.diagonal().unsqueeze(1)) / sigma)
    return (eta * pair).sum() / pair.sum().clamp_min(1)


class IntervalsObjective(MonthsObjective):
    """A distribution over months of free shape: the map has an extra number for each of some intervals up to tmax."""

    def __init__(self, tmax: int = 100, variance: float = 36.0, learn_variance: bool = False, intervals: int = 20) -> None:
        super().__init__(tmax, variance, learn_variance)
        if not 1 <= intervals <= tmax:
            raise InputError(f"intervals must be from 1 to tmax ({tmax}), got {intervals}.")
        self.intervals = self.extra = intervals

    def shape(self, survival_map: Tensor) -> tuple[Tensor, Tensor]:
        """Location, (B, 1), and the extra number of the interval that each month lies in, (B, tmax)."""
        location, extra = patient_numbers(survival_map)
        interval = torch.arange(self.tmax, device=extra.device) * self.extra // self.tmax
        return location.unsqueeze(1), extra[:, interval]


class DeepHit(IntervalsObjective):
    """DeepHit with one cause of death: classical likelihood of a free distribution over months, and a ranking loss.

    ``P(T = t)`` is a softmax over t = 1..tmax of ``-(t - location)^2 / 2 variance + x_k``, with x_k the extra number of
    the interval k that t lies in. Loss: :func:`classical_log_likelihood`, plus `alpha` times :func:`deephit_ranking`.

    Source: Lee et al., DeepHit, AAAI 2018.

    Args:
        tmax, variance, learn_variance: as for :class:`~bundle.survival.CenTime`.
        intervals: number of intervals, of equal width to a month.
        alpha: weight of the ranking loss.
        sigma: of the ranking loss; the smaller, the more a wrong order costs.
    """

    name = "deephit"

    def __init__(
        self,
        tmax: int = 100,
        variance: float = 36.0,
        learn_variance: bool = False,
        intervals: int = 20,
        alpha: float = 1.0,
        sigma: float = 0.1,
    ) -> None:
        super().__init__(tmax, variance, learn_variance, intervals)
        if alpha < 0 or sigma <= 0:
            raise InputError(f"need alpha >= 0 and sigma > 0, got {alpha} and {sigma}.")
        self.alpha = alpha
        self.sigma = sigma

    def log_pmf(self, survival_map: Tensor) -> Tensor:
        location, shape = self.shape(survival_map)
        normal = -0.5 * (months(self.tmax, location) - location).square() / self.spread()
        return torch.log_softmax(normal + shape, 1)

    def forward(self, survival_map: Tensor, outcome: Tensor) -> Tensor:
        time, event = outcome.unbind(1)
        log_p = self.log_pmf(survival_map)
        loss = -classical_log_likelihood(log_p, time, event).mean()
        return loss + self.alpha * deephit_ranking(log_p.exp(), whole_months(time, event, self.tmax), event, self.sigma)


class LogisticHazard(IntervalsObjective):
    """Discrete-time hazards: in every month those still alive die with some probability, the month's hazard h_t.

    ``P(T = t) = h_t prod_{s<t} (1 - h_s)``, and ``logit h_t = (t - location) / s - log s + x_k``, with x_k the extra
    number of the interval k that t lies in. Without it these are about the hazards of Gompertz's distribution, whose
    standard deviation s pi / sqrt(6) is that of `variance`. Whoever is alive at tmax - 1 dies at tmax.

    Source: Gensheimer and Narasimhan, A scalable discrete-time survival model for neural networks, PeerJ 2019, with
    intervals of a month; some of them share a free number.
    """

    name = "logistic_hazard"

    def log_pmf(self, survival_map: Tensor) -> Tensor:
        location, shape = self.shape(survival_map)
        scale = torch.as_tensor(6 * self.spread(), dtype=location.dtype, device=location.device).sqrt() / math.pi
        logit = (months(self.tmax, location) - location) / scale - scale.log() + shape
        alive = F.pad(F.logsigmoid(-logit)[:, :-1].cumsum(1), [1, 0])
        # log h_tmax = 0: all who are left die in the last month
        return alive + F.pad(F.logsigmoid(logit)[:, :-1], [0, 1])

    def forward(self, survival_map: Tensor, outcome: Tensor) -> Tensor:
        return -classical_log_likelihood(self.log_pmf(survival_map), *outcome.unbind(1)).mean()


def seen_until(outcome: Tensor, tmax: int) -> list[float]:
    """P(C >= t) at t = 1..tmax, by Kaplan and Meier: that a patient is not yet censored before month t.

    In a month deaths come before censorings. `outcome`: (time in months, event) of the training scans, (N, 2).

    Example::

        >>> [round(p, 2) for p in seen_until(torch.tensor([[1.0, 0], [2, 1], [3, 0]]), 3)]
        [1.0, 0.67, 0.67]
    """
    time, event = outcome.double().unbind(1)
    return kaplan_meier_censoring(time.round().clamp_min(1), event).evaluate(np.arange(tmax)).tolist()


class Logistic(Objective):
    """Death within `by` months as a yes or no: logistic regression, for those of whom the answer is known.

    ``P(T <= by) = sigmoid((by - location) / scale)``, and the loss is its cross-entropy. No is whoever was seen alive
    then. Those censored before are left out, and the loss is the mean over the others. With `censoring`, each of the
    others has the weight ``1 / P(C >= min(T, by))``, at most 20, for those like them who were censored, and the loss is
    the mean over all. The readout, sigmoid at all t < tmax, is trained at `by` alone.

    Source: Cox, JRSS B 1958; weights: Graf et al., Statistics in Medicine 1999.

    Args:
        tmax: last month of the distribution; above the largest time in the cohort.
        by: months, from 1 to tmax - 1.
        scale: months of location that are one unit of the logit.
        censoring: from :func:`seen_until`; None to leave out those censored before `by`.
    """

    name = "logistic"
    MOST = 20.0  # weight of a patient

    def __init__(self, tmax: int = 100, by: int = 60, scale: float = 10.0, censoring: Sequence[float] | None = None) -> None:
        super().__init__(tmax)
        if not 1 <= by < tmax:
            raise InputError(f"death by month {by} can't be learnt: expected a month from 1 to {tmax - 1} (tmax - 1).")
        if scale <= 0:
            raise InputError(f"scale must be above 0 months, got {scale}.")
        if censoring is not None and len(censoring) != tmax:
            raise InputError(f"censoring must have {tmax} numbers, one a month up to tmax, got {len(censoring)}.")
        self.by = by
        self.scale = scale
        self.censoring = None if censoring is None else [float(share) for share in censoring]

    def log_pmf(self, survival_map: Tensor) -> Tensor:
        location, _ = patient_numbers(survival_map)
        end = (months(self.tmax, location)[:-1] - location.unsqueeze(1)) / self.scale
        first, last = F.logsigmoid(end[:, :1]), F.logsigmoid(-end[:, -1:])
        # sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - exp(a - b)), with b - a = 1 / scale
        between = F.logsigmoid(end[:, 1:]) + F.logsigmoid(-end[:, :-1]) + math.log(-math.expm1(-1 / self.scale))
        return torch.cat([first, between, last], 1)

    def answer(self, outcome: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each patient died by then, and whether that is known, both (B,) in {0, 1}."""
        time, event = outcome.unbind(1)
        time = whole_months(time, event, self.tmax)
        died = (event > 0) & (time <= self.by)
        return died.to(outcome.dtype), (died | (time >= self.by + (event > 0))).to(outcome.dtype)

    def forward(self, survival_map: Tensor, outcome: Tensor) -> Tensor:
        died, weight = self.answer(outcome)
        total = weight.sum().clamp_min(1)
        if self.censoring is not None:
            seen = torch.tensor(self.censoring, dtype=outcome.dtype, device=outcome.device).clamp_min(1 / self.MOST)
            weight = weight / seen[whole_months(*outcome.unbind(1), self.tmax).clamp_max(self.by) - 1]
            total = len(weight)
        location, _ = patient_numbers(survival_map)
        logit = (self.by - location) / self.scale
        loss = F.binary_cross_entropy_with_logits(logit, died.to(logit.dtype), reduction="none")
        return (weight * loss).sum() / total

    def check(self, outcome: Tensor, head: nn.Module | None = None) -> None:
        died, known = self.answer(outcome)
        yes, no = int(died.sum()), int((known - died).sum())
        if min(yes, no) == 0:
            raise InputError(
                f"death by month {self.by} can't be learnt: {yes} training scans died by then and {no} were seen alive "
                "then (expected at least one of each)."
            )
