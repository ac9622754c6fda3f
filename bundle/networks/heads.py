# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Heads: from tokens to a location in months and a weight for every patch.

The patient's location is the weighted sum of the map's locations, whatever the head. A patch's weight doesn't depend on
how much of it is lung; in means over the lung a patch counts by its share of lung.

A new head is a subclass of :class:`Head` with an entry in :data:`HEADS`.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from bundle.errors import InputError
from bundle.networks.patches import on_grid


def token_mlp(dim: int, hidden_layers: int) -> nn.Sequential:
    """MLP from a token to one number, near 0 in an untrained network."""
    layers: list[nn.Module] = [nn.LayerNorm(dim)]
    for _ in range(hidden_layers):
        layers += [nn.Linear(dim, dim, bias=False), nn.GELU()]
    last = nn.Linear(dim, 1, bias=False)
    nn.init.normal_(last.weight, std=0.01)
    return nn.Sequential(*layers, last)


def softmax_in_lung(score: Tensor, share: Tensor) -> Tensor:
    """Softmax of scores (B, N) over the patches with a share of lung; 0 elsewhere."""
    return score.masked_fill(share == 0, -math.inf).softmax(1)


def mean_in_lung(values: Tensor, share: Tensor) -> Tensor:
    """Mean over the lung, (B, 1), of values (B, N) of patches."""
    return (values * share).sum(1, keepdim=True) / share.sum(1, keepdim=True)


def moved_to(patient: Tensor, location: Tensor, weight: Tensor) -> Tensor:
    """Locations (B, N), all moved by the same months so that their weighted sum is `patient` (B, 1)."""
    return location + patient - (location * weight).sum(1, keepdim=True)


class Head(nn.Module):
    """An MLP gives every token a number of months; subclasses turn months into locations and weights in `weigh`.

    Those from whose maps :mod:`bundle.survival.severity` can be told have `danger`, too: from a map's locations and
    weights to how dangerous each patch is by itself, from 0 to 1. All arguments and results are (B, N). A constructor
    has the length of a token, the hidden layers of the MLP, and what else :class:`~bundle.networks.SurvivalMapNet` has.
    """

    mixes = True  # whether its weighted patches can be read as a mixture of distributions

    def __init__(self, dim: int, layers: int, loc_range: Sequence[float], beta: float, learn_beta: bool) -> None:
        super().__init__()
        if layers not in (1, 2):
            raise InputError(f"head_layers must be 1 or 2, got {layers}.")
        if len(loc_range) != 2 or not loc_range[0] < loc_range[1] / 2:
            raise InputError(f"loc_range must be two months, the first below half of the second, got {loc_range}.")
        if beta <= 0:
            raise InputError(f"beta must be positive (per month), got {beta}.")
        self.low, self.high = float(loc_range[0]), float(loc_range[1])
        self.unit = 30.0  # months of a layer's output of 1: locations can move by tens of months in a training
        self.to_location = token_mlp(dim, layers)
        self.bias = nn.Parameter(torch.tensor(self.high / 2))

    def months(self, x: Tensor, index: Tensor, share: Tensor) -> Tensor:
        """Months that each patch says, not bounded, (B, N)."""
        return on_grid(self.unit * self.to_location(x)[:, 0] + self.bias, index, list(share.shape)).flatten(1)

    def forward(self, x: Tensor, index: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        """Location in months and weight of each patch, (B, d, h, w), from tokens (M, dim); no lung, no weight."""
        location, weight = self.weigh(self.months(x, index, share), share.flatten(1))
        return location.view_as(share), weight.view_as(share)


class BoundedHead(Head):
    """Locations lie between a lower bound that is learnt and a fixed upper one.

    Where the lower bound is too high for lesions to explain the deaths, what isn't diseased has to. At the bound all
    patches of a lesion weigh the same, so that the map covers it whole.
    """

    def __init__(self, dim: int, layers: int, loc_range: Sequence[float], beta: float, learn_beta: bool) -> None:
        super().__init__(dim, layers, loc_range, beta, learn_beta)
        self.lower = nn.Parameter(torch.tensor(self.low / self.unit))

    def bounded(self, months: Tensor) -> Tensor:
        """Months squashed between the bounds by a sigmoid of slope 1 in the middle."""
        low = self.unit * self.lower
        return low + (self.high - low) * torch.sigmoid((months - 0.5 * (low + self.high)) * 4 / (self.high - low))

    def danger(self, location: Tensor, weight: Tensor, share: Tensor) -> Tensor:
        return (self.high - location) / (self.high - self.unit * self.lower)


class Softmin(BoundedHead):
    """Weights ``softmax(-beta * loc_i)``; the patient's location forgets how many patches are diseased."""

    def __init__(self, dim: int, layers: int, loc_range: Sequence[float], beta: float, learn_beta: bool) -> None:
        super().__init__(dim, layers, loc_range, beta, learn_beta)
        self.beta = beta
        self.log_beta = nn.Parameter(torch.tensor(math.log(beta)), requires_grad=learn_beta)

    def set_beta_factor(self, factor: float) -> None:
        """Set beta to what it started from times `factor`, for a schedule: with a low beta every patch learns."""
        with torch.no_grad():
            self.log_beta.fill_(math.log(factor * self.beta))

    def softmin(self, months: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        location = self.bounded(months)
        return location, softmax_in_lung(-self.log_beta.exp() * location, share)

    def weigh(self, months: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        return self.softmin(months, share)


class LogMeanExp(Softmin):
    """Weights of :class:`Softmin`; the patient's location is the log-mean-exp of the patches'.

    ``-1/beta * (logsumexp(-beta * loc_i) - log N)``: every patch brings a hazard ``exp(beta * (t - loc_i))``, hazards
    add up, and twice the diseased patches mean a shorter life.
    """

    def log_mean_exp(self, location: Tensor, share: Tensor) -> Tensor:
        beta = self.log_beta.exp()
        total = (share.log() - beta * location).logsumexp(1, keepdim=True)
        return (share.sum(1, keepdim=True).log() - total) / beta

    def weigh(self, months: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        location, weight = self.softmin(months, share)
        return moved_to(self.log_mean_exp(location, share), location, weight), weight

    def danger(self, location: Tensor, weight: Tensor, share: Tensor) -> Tensor:
        patient = (location * weight).sum(1, keepdim=True)
        moved = self.log_mean_exp(location, share) - patient  # what `weigh` moved them by moves their log-mean-exp too
        return (self.high - location + moved) / (self.high - self.unit * self.lower)


class AttentionPooling(BoundedHead):
    """Weights ``softmax(score_i)`` by an MLP of their own: nothing ties a patch's weight to its danger.

    Source: Ilse et al., Attention-based deep multiple instance learning, ICML 2018.
    """

    def __init__(self, dim: int, layers: int, loc_range: Sequence[float], beta: float, learn_beta: bool) -> None:
        super().__init__(dim, layers, loc_range, beta, learn_beta)
        self.to_score = token_mlp(dim, layers)

    def forward(self, x: Tensor, index: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        location = self.bounded(self.months(x, index, share))
        score = on_grid(self.to_score(x)[:, 0], index, list(share.shape)).flatten(1)
        return location.view_as(share), softmax_in_lung(score, share.flatten(1)).view_as(share)


class AdditiveHazards(Head):
    """A patient's hazard is ``1 / high`` plus the mean of what each patch adds, ``rate * danger_i / high`` per month.

    The location is the mean survival time ``1 / hazard``; a voxel's heat is its exact share of what the lung adds.
    """

    mixes = False

    def __init__(self, dim: int, layers: int, loc_range: Sequence[float], beta: float, learn_beta: bool) -> None:
        super().__init__(dim, layers, loc_range, beta, learn_beta)
        # An untrained patch adds 5 % of the largest hazard, exp(3) / high: patients start at about half of `high`.
        self.log_rate = nn.Parameter(torch.tensor(3.0))

    def weigh(self, months: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        danger = torch.sigmoid((self.bias - months) / self.unit - 3)
        weight = softmax_in_lung(danger.log(), share)
        patient = self.high / (1 + self.log_rate.exp() * mean_in_lung(danger, share))
        return moved_to(patient, self.high * (1 - danger), weight), weight

    def danger(self, location: Tensor, weight: Tensor, share: Tensor) -> Tensor:
        patient = (location * weight).sum(1, keepdim=True)
        mean = (self.high / patient - 1) / self.log_rate.exp()
        return weight * mean / mean_in_lung(weight, share)


class MeanPooling(Head):
    """Global average pooling and a linear layer, which has no map of its own; the map is its Grad-CAM.

    Every token has the same gradient, so that Grad-CAM is ``relu`` of the bias minus a token's months.

    Source: Selvaraju et al., Grad-CAM, ICCV 2017.
    """

    mixes = False

    def weigh(self, months: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        weight = softmax_in_lung((self.bias - months).detach().clamp_min(1e-6).log(), share)
        return moved_to(mean_in_lung(months, share), months, weight), weight


HEADS = {
    "lse": LogMeanExp,
    "softmin": Softmin,
    "attention": AttentionPooling,
    "hazard": AdditiveHazards,
    "mean": MeanPooling,
}
