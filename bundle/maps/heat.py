# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Heat: which share of a patient's risk of death by the horizon each voxel carries."""

import torch
from torch import Tensor


def patch_heat(survival_map: Tensor, death: Tensor) -> Tensor:
    """heat_i = P(T <= horizon) * weight_i of each patch of a map, (B, 1, d, h, w); `death`: P(T <= horizon), (B,)."""
    return survival_map[:, -1:] * death.view(-1, 1, 1, 1, 1)


def to_voxels(heat: Tensor, cell: int, image_shape: tuple[int, ...], lung: Tensor | None) -> Tensor:
    """Bring patch heat (B, 1, d, h, w) to voxels, (B, 1, D, H, W); the total heat of a patient stays the same.

    Each cell's heat is spread evenly over its `cell` voxels a side; what falls outside the lung (B, 1, D, H, W), None
    for no mask, comes back to the lung in proportion. `image_shape`: (D, H, W).
    """
    total = heat.sum((2, 3, 4), keepdim=True)
    heat = spread(heat, cell, image_shape, lung)
    return heat * (total / heat.sum((2, 3, 4), keepdim=True).clamp_min(torch.finfo(heat.dtype).tiny))


def spread(values: Tensor, cell: int, image_shape: tuple[int, ...], lung: Tensor | None) -> Tensor:
    """Values of cells (B, C, d, h, w) in each of their voxels, (B, C, D, H, W); 0 outside the lung, as :func:`to_voxels`."""
    for axis, size in zip((2, 3, 4), image_shape):
        values = values.repeat_interleave(cell, axis).narrow(axis, 0, size)
    return values if lung is None else values * lung
