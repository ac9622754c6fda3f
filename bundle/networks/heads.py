# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Heads: from one number a patch to the patient's location, and to the weight of each patch in it.

Every head takes what the patches say, (B, N), and `lung`, the share of lung in each of them, (B, N), 0 for what is no
token; and gives locations in months and the logs of the weights, both (B, N). Whatever the head, the patient's location
is the weighted sum of the map's locations. Weights are heat per volume of lung: of a patch that is half lung no more
than that half of it is heated when they are brought to the voxels, and in means over the lung it counts half.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["HEADS", "attention_head", "bounded", "hazard_head", "mean_head", "softmin_head"]

HEADS = ("lse", "softmin", "attention", "hazard", "mean")


def bounded(tokens: Tensor, low: Tensor, high: float) -> Tensor:
    """Squash months to (low, high) by a sigmoid of slope 1 in the middle."""
    return low + (high - low) * torch.sigmoid((tokens - 0.5 * (low + high)) * 4 / (high - low))


def log_softmax(score: Tensor, lung: Tensor) -> Tensor:
    """Log-softmax of `score` over the patches of lung; -1e9 and less elsewhere."""
    return F.log_softmax(score.masked_fill(lung == 0, -1e9), 1)


def log_share(lung: Tensor) -> Tensor:
    """Log of the share of lung in each patch; -1e9 of none."""
    return lung.log().clamp_min(-1e9)


def moved_to(patient: Tensor, location: Tensor, log_weight: Tensor, lung: Tensor) -> Tensor:
    """All locations moved by the same months, so that their weighted sum is `patient` (B, 1)."""
    return location + patient - (location * log_weight.exp() * (lung > 0)).sum(1, keepdim=True)


def softmin_head(location: Tensor, lung: Tensor, beta: Tensor, lse: bool) -> tuple[Tensor, Tensor]:
    """Weights ``softmax(-beta * (loc_i - median))``: the most dangerous patches speak for the patient.

    With `lse` all locations of a scan move together until their weighted sum is the log-mean-exp
    ``-1/beta * (logsumexp(-beta * loc_i) - log N)``: every patch brings a hazard ``exp(beta * (t - loc_i))``, hazards add
    up, and twice the diseased patches mean a shorter life. Without it the sum is a mean that forgets how many patches
    are diseased.

    Args:
        location: months, (B, N).
        lung: share of lung in each patch, (B, N).
        beta: steepness per month, a scalar.
        lse: log-mean-exp rather than a weighted mean.
    """
    # Centring leaves the softmin as it is and keeps its exponents small.
    median = torch.where(lung > 0, location, torch.full_like(location, torch.nan)).detach().nanmedian(1, True)[0]
    score = -beta * (location - median)
    log_weight = log_softmax(score, lung)
    if lse:
        mean = (score + log_share(lung)).logsumexp(1, True) - lung.sum(1, keepdim=True).log()
        location = moved_to(median - mean / beta, location, log_weight, lung)
    return location, log_weight


def attention_head(location: Tensor, score: Tensor, lung: Tensor) -> tuple[Tensor, Tensor]:
    """Weights ``softmax(score_i)`` by an MLP of their own, apart from the one that says months: attention pooling.

    Ilse et al., ICML 2018. Nothing ties a patch's weight to its danger: the map shows what the network read, which may
    be healthy tissue as well.

    Args:
        location: months, (B, N).
        score: logits of the weights, (B, N).
        lung: share of lung in each patch, (B, N).
    """
    return location, log_softmax(score, lung)


def hazard_head(danger: Tensor, lung: Tensor, log_rate: Tensor, high: float) -> tuple[Tensor, Tensor]:
    """Additive hazards: a patient's hazard is a constant 1 / high plus the mean of what each patch adds, never below 0.

    The location is the mean survival time ``1 / hazard`` of ``S(t) = exp(-hazard * t)``, and the heat of a voxel its exact
    share of what the voxels of the lung add.

    Args:
        danger: in (0, 1), (B, N); a patch adds ``exp(log_rate) * danger / high`` per month.
        lung: share of lung in each patch, (B, N).
        log_rate: a scalar.
        high: months that a patient without danger lives on average.
    """
    log_weight = log_softmax(danger.log(), lung)
    mean = (danger * lung).sum(1, keepdim=True) / lung.sum(1, keepdim=True)
    return moved_to(high / (1 + log_rate.exp() * mean), high * (1 - danger), log_weight, lung), log_weight


def mean_head(tokens: Tensor, lung: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Global average pooling and a linear layer, which has no map of its own; the map is its Grad-CAM.

    After average pooling every token has the same gradient, the weights of the linear layer, so that Grad-CAM (Selvaraju
    et al., ICCV 2017) is ``relu`` of what a token adds to the danger, `bias` minus its own number.

    Args:
        tokens: months, (B, N), not bounded.
        lung: share of lung in each patch, (B, N).
        bias: months that a token of nothing stands for, a scalar.
    """
    log_weight = log_softmax((bias - tokens).detach().clamp_min(1e-6).log(), lung)
    patient = (tokens * lung).sum(1, keepdim=True) / lung.sum(1, keepdim=True)
    return moved_to(patient, tokens, log_weight, lung), log_weight
