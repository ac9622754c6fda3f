# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""From a survival map to one survival distribution a patient, and to the numbers read off it."""

from __future__ import annotations

import torch
from torch import Tensor

from bundle.errors import InputError

__all__ = [
    "check_horizon",
    "death_by",
    "log_pmf",
    "mean_months",
    "months",
    "normal_log_pmf",
    "patient_numbers",
    "quantile_months",
    "restricted_mean_months",
    "survival_curve",
]


def months(tmax: int, like: Tensor) -> Tensor:
    """The time bins 1, 2, ..., tmax (months), of the type and on the device of `like`."""
    return torch.arange(1, tmax + 1, dtype=like.dtype, device=like.device)


def patient_numbers(survival_map: Tensor) -> tuple[Tensor, Tensor]:
    """Each patient's location (months), (B,), and extra numbers, (B, C - 2): the map's weighted sums over patches.

    The extra numbers shape the distribution around the location. They take the weights as they are, without a gradient:
    what sets the weights is the location alone.

    Args:
        survival_map: (B, C, d, h, w): location, C - 2 extra channels, weight.
    """
    flat = survival_map.flatten(2)
    weight = flat[:, -1:]
    return (flat[:, 0] * weight[:, 0]).sum(1), (flat[:, 1:-1] * weight.detach()).sum(2)


def normal_log_pmf(location: Tensor, variance: Tensor | float, tmax: int) -> Tensor:
    """Normal distribution discretised to the bins 1..tmax: log p(t), with p(t) proportional to exp(-(t-loc)^2/2var).

    Source: Shahin et al., CenTime, Medical Image Analysis 2024, the discretised Gaussian.

    Args:
        location: months, any shape (...).
        variance: months squared, a number or a tensor that broadcasts against `location`.
        tmax: last bin (months).

    Returns:
        log probabilities (..., tmax); their exponentials sum to 1.
    """
    variance = torch.as_tensor(variance, dtype=location.dtype, device=location.device).unsqueeze(-1)
    exponent = -0.5 * (months(tmax, location) - location.unsqueeze(-1)).square() / variance
    return torch.log_softmax(exponent, -1)


def log_pmf(survival_map: Tensor, tmax: int, variance: Tensor | float, mixture: bool = False) -> Tensor:
    """log P(T = 1..tmax months) of each patient, (B, tmax), from a survival map (B, C, d, h, w).

    Args:
        survival_map: location (months) of each patch first, its weight last.
        tmax: last bin (months).
        variance: of the discretised normal, months squared; a number, or one a patient (B,) if not a mixture.
        mixture: if true, the softmin mixture sum_i w_i N(loc_i, variance); else N(sum_i w_i loc_i, variance). The
            mixture of an ``lse`` map is wider, because its patches differ by about 1/beta.
    """
    if not mixture:
        return normal_log_pmf(patient_numbers(survival_map)[0], variance, tmax)
    location, weight = survival_map[:, 0].flatten(1), survival_map[:, -1].flatten(1)
    # A log of 0 would have no finite gradient; a patch of weight 1e-30 adds nothing.
    log_weight = weight.clamp_min(1e-30).log().unsqueeze(-1)
    return torch.logsumexp(log_weight + normal_log_pmf(location, variance, tmax), 1)


def survival_curve(pmf: Tensor) -> Tensor:
    """S(t) = P(T > t) at t = 1..tmax months, (B, tmax), from P(T = t), (B, tmax)."""
    return (1 - pmf.cumsum(-1)).clamp(0, 1)


def mean_months(pmf: Tensor) -> Tensor:
    """Expected time in months, (B,), from P(T = t), (B, tmax)."""
    return (pmf * months(pmf.shape[-1], pmf)).sum(-1)


def restricted_mean_months(pmf: Tensor, horizon: float) -> Tensor:
    """Restricted mean survival time E[min(T, horizon)] in months, (B,): the mean time lived up to the horizon."""
    return (pmf * months(pmf.shape[-1], pmf).clamp_max(horizon)).sum(-1)


def quantile_months(pmf: Tensor, probability: float) -> Tensor:
    """Time by which death has `probability`, (B,), linear between the ends of the bins; 0.5 gives the median.

    Bin t covers the month that ends half a month after t, so a distribution on one bin has its median there.
    """
    cdf = pmf.cumsum(-1)
    index = (cdf < probability).sum(-1, keepdim=True).clamp_max(pmf.shape[-1] - 1)
    before = (cdf - pmf).gather(-1, index)
    within = (probability - before) / pmf.gather(-1, index).clamp_min(1e-12)
    return (index + 0.5 + within.clamp(0, 1)).squeeze(-1)


def death_by(pmf: Tensor, horizon: float) -> Tensor:
    """P(T <= horizon), (B,), for a horizon in months; 1 for horizons at or beyond tmax."""
    return (pmf * (months(pmf.shape[-1], pmf) <= horizon)).sum(-1).clamp(0, 1)


def check_horizon(horizon: int, tmax: int) -> None:
    """Raise an InputError for a horizon (months) beyond `tmax`, by which everybody is dead under the model."""
    if horizon > tmax:
        raise InputError(f"--horizon is {horizon} months (expected at most tmax, the last month of the prediction: {tmax}).")
