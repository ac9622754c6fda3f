# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The loss that a network is trained by: an objective, and what keeps the map honest while it learns."""

import torch
import torch.nn as nn
from torch import Tensor

from bundle.survival.objectives import Objective


def weight_entropy(weight: Tensor) -> Tensor:
    """Entropy (nats) of each patient's patch weights (B, d, h, w), (B,)."""
    weight = weight.flatten(1)
    return -(weight * weight.clamp_min(1e-30).log()).sum(1)


def neighbour_difference(location: Tensor, weight: Tensor) -> Tensor:
    """Mean squared difference of neighbouring patches' locations, in units of 10 months, over pairs in the lung.

    Locations (months) and weights, 0 outside the lung, are (B, d, h, w).
    """
    inside = weight > 0
    total = location.new_zeros(())
    for axis in (1, 2, 3):
        n = location.shape[axis] - 1
        pair = inside.narrow(axis, 0, n) & inside.narrow(axis, 1, n)
        total = total + (location.diff(dim=axis) / 10).square().mul(pair).sum() / pair.sum().clamp_min(1)
    return total


def occlusion_inconsistency(location: Tensor, weight: Tensor, tmax: int, top: float = 0.2) -> Tensor:
    """How far a map is from what it should say of its heaviest patches, and of the rest, in units of 10 months, (B,).

    Necessity: without the heaviest patches, the share `top` of the lung's, the weighted mean location must be a
    survivor's, `tmax` or later. Sufficiency: theirs alone must be the patient's. The network isn't run again on what is
    left of the image: what a patch says comes from its neighbourhood. Arguments as for :func:`neighbour_difference`.
    """
    location, weight = location.flatten(1), weight.flatten(1)
    rank = weight.argsort(1, descending=True).argsort(1)
    heaviest = rank < (top * (weight > 0).sum(1, keepdim=True)).ceil()

    def said(part: Tensor) -> Tensor:
        part = part * weight
        return (location * part).sum(1) / part.sum(1).clamp_min(1e-30)

    necessity = torch.where((weight * ~heaviest).sum(1) > 0, (tmax - said(~heaviest)).clamp_min(0), 0.0)
    return (necessity + (said(heaviest) - (location * weight).sum(1)).abs()) / 10


class SurvivalMapLoss(nn.Module):
    """``objective(map) - entropy * H(weights) + smoothness * (L2 difference of neighbouring locations)``.

    The entropy *bonus* keeps the first lucky patch from taking all the weight, and with it all the gradient.

    Args:
        objective: a module such as :class:`CenTime`.
        entropy: weight of the mean :func:`weight_entropy`.
        smoothness: weight of :func:`neighbour_difference`.
        occlusion: weight of :func:`occlusion_inconsistency`, a mean over those who died.
    """

    def __init__(self, objective: Objective, entropy: float = 0.5, smoothness: float = 0.1, occlusion: float = 0.0) -> None:
        super().__init__()
        self.objective = objective
        self.entropy = entropy
        self.smoothness = smoothness
        self.occlusion = occlusion
        self.strength = 1.0

    def set_strength(self, strength: float) -> None:
        """Scale the regularisers, for a schedule."""
        self.strength = strength

    def forward(self, survival_map: Tensor, outcome: Tensor) -> Tensor:
        location, weight = survival_map[:, 0], survival_map[:, -1]
        loss = self.objective(survival_map, outcome)
        loss = loss - self.strength * self.entropy * weight_entropy(weight).mean()
        loss = loss + self.strength * self.smoothness * neighbour_difference(location, weight)
        if self.occlusion:
            died = outcome[:, 1] > 0
            inconsistency = occlusion_inconsistency(location, weight, self.objective.tmax)
            loss = loss + self.strength * self.occlusion * (inconsistency * died).sum() / died.sum().clamp_min(1)
        return loss
