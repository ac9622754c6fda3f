# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A finer survival map from several origins of the patch grid."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from monai.inferers import Inferer
from monai.networks.layers import GaussianFilter
from torch import Tensor

from bundle.maps.refinement import appearance_ratio

__all__ = ["GridShiftInferer"]


class GridShiftInferer(Inferer):
    """Run the network with the patch grid at several origins and combine the maps on a finer grid.

    1. **Origins.** A lesion's border cuts through patches, and a patch that straddles it is hot all over; and a patch at
       the front of a window of attention sees other neighbours than one at its back. Here a cell's location is the mean
       over the patches that contain it, one of each grid, and its weight their geometric mean: as the softmin of the mean
       location would give it. A cell is hot only if all patches around it are, so that the heat beside a lesion goes; the
       arithmetic mean of the weights would keep it blurred. A cell that patches reach in only a share of the grids, at
       the lung's border, has its weight times that share squared.
    2. **Smoothing** by a Gaussian.
    3. **Refinement** within patches. A wall one voxel thick makes every patch around it hot, and the air beside it looks
       like air elsewhere; of a lesion that the network is sure of in some places only, the rest looks like these. Cells
       have their weight times :func:`appearance_ratio`, a naive Bayes factor that asks the scan itself how its hot places
       differ, in brightness and in texture, from those of a map which is even; such a map it leaves as it is.

    The patient's location is the median of the grids', and so are extra channels of the map: a lesion of a patch or two
    that some grids cut up, and don't see, would otherwise come out years too late. The result is a survival map like any
    other, with cells of ``stride / shifts`` voxels.

    Args:
        shifts: origins an axis, a divisor of the network's stride; 1 runs the network once.
        stride: of the network's patch grid, in voxels.
        sigma: of the Gaussian, in cells; 0 for none.
        refine: do step 3.
        origins: take so many of the `shifts³` origins only, spread evenly (a Sobol sequence); None for all.
        keys: names of the volumes among the network's keyword arguments; they move with the image.

    Raises:
        ValueError: `shifts` doesn't divide `stride`.
    """

    def __init__(
        self,
        shifts: int,
        stride: int,
        sigma: float = 0.0,
        refine: bool = False,
        origins: int | None = None,
        keys: tuple[str, ...] = ("lung",),
    ) -> None:
        super().__init__()
        if shifts < 1 or stride % shifts:
            raise ValueError(f"shifts ({shifts}) must divide the stride of the patch grid ({stride}).")
        self.shifts = shifts
        self.stride = stride
        self.sigma = sigma
        self.refine = refine
        self.origins = list(product(range(shifts), repeat=3))
        if origins is not None and origins < len(self.origins):
            # Not the sequence's first, among which is the corner that all axes share.
            places = torch.quasirandom.SobolEngine(3).fast_forward(origins).draw(origins)
            self.origins = (places * shifts).int().tolist()
        self.keys = keys

    def __call__(self, inputs: Tensor, network: torch.nn.Module, *args, **kwargs) -> Tensor:
        inputs = inputs.detach().as_subclass(Tensor)  # no metadata on every operation
        cell = self.stride // self.shifts
        grid = [-(-size // self.stride) * self.shifts for size in inputs.shape[2:]]
        scans = inputs.shape[0]
        total, patients = torch.zeros(()), []
        for origin in self.origins:
            # Every other origin lies a patch further out: windows of attention, two patches wide, begin in either half.
            shift = [start + self.shifts * (start % 2) for start in origin]
            # In front the shift, behind what makes the unshifted grid whole, so that every grid covers the image.
            sides = [(start * cell, -size % self.stride) for start, size in zip(shift, inputs.shape[2:])]
            pad = [n for side in reversed(sides) for n in side]
            moved = {k: F.pad(v, pad) if k in self.keys and v is not None else v for k, v in kwargs.items()}
            with torch.no_grad():
                survival_map = network(F.pad(inputs, pad, mode="replicate"), *args, **moved)
            said, weight = survival_map[:, :-1], survival_map[:, -1:]
            patients.append((said * weight).sum((2, 3, 4)))
            inside = (weight > 0) | (said[:, :1] != 0)
            log = torch.where(inside, weight.clamp_min(torch.finfo(weight.dtype).tiny).log(), 0.0)
            part = torch.cat([said, log, inside.to(said.dtype)], 1)
            for axis, start in zip((2, 3, 4), shift):
                part = part.repeat_interleave(self.shifts, axis).narrow(axis, start, grid[axis - 2])
            total = total + part
        said, log_weight, count = total[:, :-2], total[:, -2], total[:, -1]
        inside = count > 0
        # Few patches reach a cell at the lung's border; their mean is noisy, and must not win for that.
        reached = 2 * count.clamp_min(1).log()
        weight = self.smooth(log_weight / count.clamp_min(1) + reached, inside)
        if self.refine:
            pad = [n for size, cells in zip(inputs.shape[:1:-1], grid[::-1]) for n in (0, cells * cell - size)]
            lung = kwargs.get(self.keys[0]) if self.keys else None
            lung = F.pad(torch.ones_like(inputs) if lung is None else lung.to(inputs.dtype), pad)
            amount = F.avg_pool3d(lung, cell)[:, 0]
            brightness = F.avg_pool3d(F.pad(inputs, pad) * lung, cell)[:, 0] / amount.clamp_min(1e-6)
            even = self.smooth(reached, inside)
            weight = weight * appearance_ratio(brightness, inside & (amount > 0), weight, even)
            weight = weight / weight.sum((1, 2, 3), keepdim=True)
        weight, inside, count = weight.unsqueeze(1), inside.unsqueeze(1), count.unsqueeze(1)
        said = said / count.clamp_min(1)
        off = torch.stack(patients).quantile(0.5, 0) - (said * weight).sum((2, 3, 4))
        said = (said + off.view(scans, -1, 1, 1, 1)) * inside
        return torch.cat([said, weight], 1)

    def smooth(self, log_weight: Tensor, inside: Tensor) -> Tensor:
        """Softmax over the cells of each scan that are `inside`, smoothed by the Gaussian; (B, d, h, w)."""
        weight = log_weight.masked_fill(~inside, -torch.inf).flatten(1).softmax(1).view_as(log_weight)
        if self.sigma > 0:
            weight = GaussianFilter(3, self.sigma, truncated=3.0)(weight.unsqueeze(1))[:, 0] * inside
            weight = weight / weight.sum((1, 2, 3), keepdim=True)
        return weight
