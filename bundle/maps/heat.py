# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Heat: which share of a patient's risk of death by the horizon each voxel carries."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["patch_heat", "to_voxels"]


def patch_heat(survival_map: Tensor, death: Tensor) -> Tensor:
    """heat_i = P(T <= horizon) * weight_i for each patch.

    Args:
        survival_map: (B, C, d, h, w), see :class:`~bundle.networks.SurvivalMapNet`.
        death: P(T <= horizon) of each patient, (B,).

    Returns:
        (B, 1, d, h, w); sums to P(T <= horizon) over a patient.
    """
    return survival_map[:, -1:] * death.view(-1, 1, 1, 1, 1)


def to_voxels(heat: Tensor, cell: int, image_shape: tuple[int, ...], lung: Tensor | None) -> Tensor:
    """Bring patch heat to voxels; the total heat of a patient stays the same.

    Each cell's heat is spread evenly over its voxels; what falls outside the lung comes back to the lung in proportion.

    Args:
        heat: (B, 1, d, h, w), from :func:`patch_heat`.
        cell: side of a grid cell in voxels.
        image_shape: (D, H, W) of the image the network saw.
        lung: (B, 1, D, H, W) in {0, 1}, or None for no mask.

    Returns:
        (B, 1, D, H, W).
    """
    total = heat.sum((2, 3, 4), keepdim=True)
    for axis, size in zip((2, 3, 4), image_shape):
        heat = heat.repeat_interleave(cell, axis).narrow(axis, 0, size)
    if lung is not None:
        heat = heat * lung
    return heat * (total / heat.sum((2, 3, 4), keepdim=True).clamp_min(torch.finfo(heat.dtype).tiny))
