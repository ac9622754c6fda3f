# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What a survival map is trained for: a readout of the map and a loss for censored times."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from .readout import log_pmf, months

__all__ = ["CenTime", "SurvivalMapLoss", "centime_log_likelihood", "neighbour_difference", "weight_entropy"]


def centime_log_likelihood(log_p: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Log-likelihood of each patient under CenTime's event-conditional censoring, (B,).

    A death at t gives log p(t); a patient censored at c gives log sum_{t > c} p(t) / (t - 1): the censoring time is
    uniform on 1..t-1 when death comes at t. The sum starts above c, so t - 1 is never 0.

    Source: Shahin et al., CenTime: Event-conditional modelling of censoring in survival analysis, Medical Image
    Analysis 2024.

    Args:
        log_p: log P(T = 1..tmax), (B, tmax).
        time: months, (B,), rounded to whole months, at least 1.
        event: 1 died, 0 censored, (B,).

    Raises:
        ValueError: a death after tmax, or a censoring time at or above it, for which no likelihood exists.
    """
    tmax = log_p.shape[-1]
    bins = time.round().clamp_min(1)
    if bool((bins > tmax - 1 + event).any()):
        raise ValueError(f"times must lie below tmax = {tmax} months, got {float(time.max())}.")
    death = log_p.gather(1, bins.long().unsqueeze(1) - 1).squeeze(1)
    t = months(tmax, log_p)
    after = t > bins.unsqueeze(1)
    share = (log_p - (t - 1).clamp_min(1).log()).masked_fill(~after, -torch.inf)
    # The row of a death may have no bin left above it: its logsumexp is never used, but its gradient must be finite.
    share = torch.where((event > 0).unsqueeze(1), log_p, share)
    return torch.where(event > 0, death, torch.logsumexp(share, 1))


class CenTime(nn.Module):
    """CenTime objective: the loss is the mean negative log-likelihood, the readout a discretised normal.

    Args:
        tmax: last month of the distribution; above the largest time in the cohort.
        variance: of the discretised normal, months squared.
        alpha_censored: weight of censored patients in the mean; a death has weight 1.
        mixture: read a mixture over patches off the map instead of one normal; see :func:`log_pmf`.
    """

    def __init__(
        self, tmax: int = 100, variance: float = 36.0, alpha_censored: float = 1.0, mixture: bool = False
    ) -> None:
        super().__init__()
        self.arguments = dict(tmax=tmax, variance=variance, alpha_censored=alpha_censored, mixture=mixture)
        if tmax < 2 or variance <= 0 or alpha_censored < 0:
            raise ValueError(f"need tmax > 1, variance > 0, alpha_censored >= 0: {tmax}, {variance}, {alpha_censored}.")
        self.tmax = tmax
        self.variance = variance
        self.alpha_censored = alpha_censored
        self.mixture = mixture

    def log_pmf(self, survival_map: Tensor) -> Tensor:
        """log P(T = 1..tmax months), (B, tmax)."""
        return log_pmf(survival_map, self.tmax, self.variance, self.mixture)

    def pmf(self, survival_map: Tensor) -> Tensor:
        """P(T = 1..tmax months), (B, tmax)."""
        return self.log_pmf(survival_map).exp()

    def forward(self, survival_map: Tensor, outcome: Tensor) -> Tensor:
        """Loss of a survival map (B, 2, d, h, w) given `outcome` (B, 2) = (time in months, event)."""
        time, event = outcome.unbind(1)
        likelihood = centime_log_likelihood(self.log_pmf(survival_map), time, event)
        weight = torch.where(event > 0, 1.0, self.alpha_censored)
        return -(weight * likelihood).mean()


def weight_entropy(weight: Tensor) -> Tensor:
    """Entropy (nats) of each patient's patch weights (B, d, h, w), (B,)."""
    weight = weight.flatten(1)
    return -(weight * weight.clamp_min(1e-30).log()).sum(1)


def neighbour_difference(location: Tensor, weight: Tensor) -> Tensor:
    """Mean squared difference of neighbouring patches' locations, in units of 10 months, over pairs in the lung.

    Args:
        location: months, (B, d, h, w).
        weight: (B, d, h, w); a patch with weight 0 is outside the lung.
    """
    inside = weight > 0
    total = location.new_zeros(())
    for axis in (1, 2, 3):
        n = location.shape[axis] - 1
        pair = inside.narrow(axis, 0, n) & inside.narrow(axis, 1, n)
        total = total + (location.diff(dim=axis) / 10).square().mul(pair).sum() / pair.sum().clamp_min(1)
    return total


class SurvivalMapLoss(nn.Module):
    """An objective plus what keeps the map honest while it learns.

    ``objective(map) - entropy * H(weights) + smoothness * (L2 difference of neighbouring locations)``.
    The entropy *bonus* keeps the first lucky patch from taking all the weight, and with it all the gradient.

    Args:
        objective: a module such as :class:`CenTime`.
        entropy: weight of the mean entropy of the patch weights (nats).
        smoothness: weight of :func:`neighbour_difference`.
    """

    def __init__(self, objective: nn.Module, entropy: float = 0.5, smoothness: float = 0.1) -> None:
        super().__init__()
        self.objective = objective
        self.entropy = entropy
        self.smoothness = smoothness
        self.strength = 1.0

    def set_strength(self, strength: float) -> None:
        """Scale both regularisers, for a schedule."""
        self.strength = strength

    def forward(self, survival_map: Tensor, outcome: Tensor) -> Tensor:
        location, weight = survival_map.unbind(1)
        loss = self.objective(survival_map, outcome)
        loss = loss - self.strength * self.entropy * weight_entropy(weight).mean()
        return loss + self.strength * self.smoothness * neighbour_difference(location, weight)
