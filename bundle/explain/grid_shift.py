# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A finer survival map from several origins of the patch grid."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from monai.inferers import Inferer
from torch import Tensor

__all__ = ["GridShiftInferer"]


class GridShiftInferer(Inferer):
    """Run the network with the patch grid at several origins and combine the maps on a finer grid.

    A lesion's border cuts through patches, and a patch that straddles it is hot all over. Here a cell's location is the
    mean over the patches that contain it, one of each grid, and its weight their geometric mean: as the softmin of the
    mean location would give it. A cell is hot only if all patches around it are, so that the heat beside a lesion goes
    and a thin lesion stays thin; the arithmetic mean of the weights would keep both blurred. A cell that patches reach in
    only a share of the grids, at the lung's border, has its weight times that share squared. The patient's location is
    the mean of the grids', and the result is a survival map like any other, with cells of ``stride / shifts`` voxels.

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
        scans = inputs.shape[0]
        total = torch.zeros(scans, 3, *grid, device=inputs.device)
        patient = torch.zeros(scans, device=inputs.device)
        for shift in product(range(self.shifts), repeat=3):
            # In front the shift, behind what makes the unshifted grid whole, so that every grid covers the image.
            sides = [(start * cell, -size % self.stride) for start, size in zip(shift, inputs.shape[2:])]
            pad = [n for side in reversed(sides) for n in side]
            moved = {k: F.pad(v, pad) if k in self.keys and v is not None else v for k, v in kwargs.items()}
            loc, weight = network(F.pad(inputs, pad, mode="replicate"), *args, **moved).unbind(1)
            patient = patient + (loc * weight).sum((1, 2, 3))
            inside = (weight > 0) | (loc != 0)
            log = torch.where(inside, weight.clamp_min(torch.finfo(weight.dtype).tiny).log(), 0.0)
            part = torch.stack([loc, log, inside.to(loc.dtype)], 1)
            for axis, start in zip((2, 3, 4), shift):
                part = part.repeat_interleave(self.shifts, axis).narrow(axis, start, grid[axis - 2])
            total = total + part
        location, log_weight, count = total.unbind(1)
        inside = count > 0
        # Few patches reach a cell at the lung's border; their mean is noisy, and must not win for that.
        log_weight = log_weight / count.clamp_min(1) + 2 * count.clamp_min(1).log()
        log_weight = log_weight.masked_fill(~inside, -torch.inf)
        weight = log_weight.flatten(1).softmax(1).view_as(log_weight)
        location = location / count.clamp_min(1)
        off = patient / self.shifts**3 - (location * weight).sum((1, 2, 3))
        location = (location + off.view(-1, 1, 1, 1)) * inside
        return torch.stack([location, weight], 1)
