# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A finer survival map: the mean over several origins of the patch grid."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from monai.inferers import Inferer
from torch import Tensor

__all__ = ["GridShiftInferer"]


class GridShiftInferer(Inferer):
    """Run the network with the patch grid at several origins and average the maps on a finer grid.

    A lesion's border cuts through patches, and a patch that straddles it is hot all over. Averaging the maps of
    `shifts**3` grids resolves the border to a fraction of a patch, and the readouts of the grids are averaged as well:
    the result is a survival map like any other, with cells of ``stride / shifts`` voxels.

    Args:
        shifts: origins an axis, a divisor of the network's stride; 1 runs the network once.
        stride: of the network's patch grid, in voxels.
        keys: names of the volumes among the network's keyword arguments; they move with the image.
    """

    def __init__(self, shifts: int, stride: int, keys: tuple[str, ...] = ("lung",)) -> None:
        super().__init__()
        if shifts < 1 or stride % shifts:
            raise ValueError(f"shifts ({shifts}) must divide the stride of the patch grid ({stride}).")
        self.shifts = shifts
        self.stride = stride
        self.keys = keys

    def __call__(self, inputs: Tensor, network: torch.nn.Module, *args, **kwargs) -> Tensor:
        if self.shifts == 1:
            return network(inputs, *args, **kwargs)
        cell = self.stride // self.shifts
        grid = [-(-size // self.stride) * self.shifts for size in inputs.shape[2:]]
        total = None
        for shift in product(range(self.shifts), repeat=3):
            # In front the shift, behind what makes the unshifted grid whole, so that every grid covers the image.
            sides = [(start * cell, -size % self.stride) for start, size in zip(shift, inputs.shape[2:])]
            pad = [n for side in reversed(sides) for n in side]
            moved = {k: F.pad(v, pad) if k in self.keys and v is not None else v for k, v in kwargs.items()}
            survival_map = network(F.pad(inputs, pad, mode="replicate"), *args, **moved)
            location, weight = survival_map.unbind(1)
            part = torch.stack([location * weight, weight], 1)
            for axis, start in zip((2, 3, 4), shift):
                part = part.repeat_interleave(self.shifts, axis).narrow(axis, start, grid[axis - 2])
            total = part if total is None else total + part
        moment, weight = total.unbind(1)
        location = torch.where(weight > 0, moment / weight.clamp_min(torch.finfo(weight.dtype).tiny), 0.0)
        weight = weight / weight.sum((1, 2, 3), keepdim=True)
        return torch.stack([location, weight], 1)
