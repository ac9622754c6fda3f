# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""From a survival map to one survival distribution a patient, and to the numbers read off it."""

import torch
from torch import Tensor

from bundle.errors import InputError


def months(tmax: int, like: Tensor) -> Tensor:
    """The time bins 1, 2, ..., tmax (months), of the type and on the device of `like`."""
    return torch.arange(1, tmax + 1, dtype=like.dtype, device=like.device)


def patient_numbers(survival_map: Tensor) -> tuple[Tensor, Tensor]:
    """Each patient's location (months), (B,), and extra numbers, (B, C - 2): the map's weighted sums over patches.

    The extra numbers take the weights without a gradient: what sets the weights is the location alone.
    """
    flat = survival_map.flatten(2)
    weight = flat[:, -1:]
    return (flat[:, 0] * weight[:, 0]).sum(1), (flat[:, 1:-1] * weight.detach()).sum(2)


def normal_log_pmf(location: Tensor, variance: Tensor | float, tmax: int) -> Tensor:
    """log p(t) of a normal distribution discretised to t = 1..tmax: p(t) ~ exp(-(t - location)^2 / 2 variance).

    Location in months and variance in months squared have any shape (...); the result is (..., tmax). Source: Shahin et
    al., CenTime, Medical Image Analysis 2024.
    """
    variance = torch.as_tensor(variance, dtype=location.dtype, device=location.device).unsqueeze(-1)
    exponent = -0.5 * (months(tmax, location) - location.unsqueeze(-1)).square() / variance
    return torch.log_softmax(exponent, -1)


def log_pmf(survival_map: Tensor, tmax: int, variance: Tensor | float, mixture: bool = False) -> Tensor:
    """log P(T = 1..tmax months) of each patient, (B, tmax), from a survival map (B, C, d, h, w).

    The normal of a `variance` in months squared, a number or one a patient (B,), about the patient's location; or the
    softmin `mixture` sum_i w_i N(loc_i, variance), which is wider: patches of an ``lse`` map differ by about 1/beta.
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


def dead_at(pmf: Tensor, time: Tensor) -> Tensor:
    """P(T <= time), (B,), for each patient's own time in months, (B,), linear as :func:`quantile_months`, its inverse."""
    within = (time.unsqueeze(1) + 0.5 - months(pmf.shape[-1], pmf)).clamp(0, 1)
    return (pmf * within).sum(-1).clamp(0, 1)


def death_by(pmf: Tensor, horizon: float) -> Tensor:
    """P(T <= horizon), (B,), for a horizon in months; 1 for horizons at or beyond tmax."""
    return (pmf * (months(pmf.shape[-1], pmf) <= horizon)).sum(-1).clamp(0, 1)


def check_horizon(horizon: int, tmax: int) -> None:
    """Raise an InputError for a horizon (months) beyond `tmax`, by which everybody is dead under the model."""
    if horizon > tmax:
        raise InputError(f"--horizon is {horizon} months (expected at most tmax, the last month of the prediction: {tmax}).")
