# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A finer survival map from several origins of the patch grid."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from monai.inferers import Inferer
from monai.networks.layers import GaussianFilter
from torch import Tensor

from bundle.errors import InputError
from bundle.maps.refinement import refined
from bundle.networks.patches import share_of_lung, to_grid
from bundle.survival import Severity, severity_numbers

FEW = 8  # origins that tell severity


def in_lung(survival_map: Tensor) -> Tensor:
    """Which patches are tokens, (B, 1, d, h, w)."""
    return (survival_map[:, -1:] > 0) | (survival_map[:, :1] != 0)


class GridShiftInferer(Inferer):
    """Run the network with the patch grid at several origins and combine the maps on a finer grid.

    1. **Origins.** A patch that straddles a lesion's border is hot all over. Here a cell's location is the mean over
       the patches that contain it, one of each grid, and its weight their geometric mean: a cell is hot only if all
       patches around it are. At the lung's border it is less by the square of the share of grids that reach the cell.
    2. **Smoothing** by a Gaussian.
    3. **Refinement** within patches; see :func:`bundle.maps.refinement.refined`.
    4. **Severity** moves all locations of a scan by the same months. Its numbers are the medians of those of 8 of the
       origins, spread evenly: the same 8 in its fit and in use.

    A network with a cell for every voxel (``stride`` 1) and no severity is run once, and its map stays as it is.

    The patient's location is the median of the grids', and so are extra channels: some grids cut up a lesion of a patch
    or two and don't see it. The result is a survival map like any other, with cells of ``stride / shifts`` voxels.

    Args:
        shifts: origins an axis, a divisor of the stride (else an InputError); 1 runs the network once.
        stride: of the network's patch grid, in voxels.
        sigma: of the Gaussian, in cells; 0 for none.
        refine: do step 3.
        few_origins: run 8 of the `shifts³` origins only, those that tell severity.
        severity: of the network's weights; for several networks, that of each in a dict; None for none.
    """

    def __init__(
        self,
        shifts: int,
        stride: int,
        sigma: float = 1.25,
        refine: bool = True,
        few_origins: bool = False,
        severity: Severity | Mapping[nn.Module, Severity | None] | None = None,
    ) -> None:
        super().__init__()
        if shifts < 1 or stride % shifts:
            raise InputError(f"shifts ({shifts}) must divide the stride of the patch grid ({stride}).")
        self.shifts = shifts
        self.stride = stride
        self.sigma = sigma
        self.refine = refine
        self.severity = severity
        every = list(product(range(shifts), repeat=3))
        # Not the Sobol sequence's first, among which is the corner that all axes share.
        places = torch.quasirandom.SobolEngine(3).fast_forward(FEW).draw(FEW)
        self.few = [tuple(place) for place in (places * shifts).int().tolist()] if FEW < len(every) else every
        self.origins = self.few if few_origins else every

    def __call__(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """The combined survival map of scans (B, 1, D, H, W); a `lung` among the keyword arguments moves with them."""
        severity = self.severity.get(network) if isinstance(self.severity, Mapping) else self.severity
        if getattr(network, "stride", self.stride) == 1 and severity is None:
            with torch.no_grad():
                return network(inputs, *args, **kwargs)
        if severity is None:
            return self.combine(self.maps(inputs, network, *args, **kwargs), inputs, kwargs.get("lung"))
        survival_map, numbers = self.read(inputs, network, *args, **kwargs)
        months = severity(numbers).view(-1, 1, 1, 1, 1)
        return torch.cat([survival_map[:, :1] + months * in_lung(survival_map), survival_map[:, 1:]], 1)

    def read(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The combined map without severity, and the numbers that tell it, (B, 8)."""
        maps, numbers = self.maps(inputs, network, *args, **kwargs), []
        for origin in self.few:
            image, lung = to_grid(*self.shifted(origin, inputs, kwargs.get("lung")), self.stride)
            share = share_of_lung(image, lung, self.stride)
            with torch.no_grad():
                danger = network.danger(maps[origin], share, kwargs.get("clinical"))
            numbers.append(severity_numbers(maps[origin], danger, share))
        return self.combine(maps, inputs, kwargs.get("lung")), torch.stack(numbers).quantile(0.5, 0)

    def maps(self, inputs: Tensor, network: nn.Module, *args: Any, **kwargs: Any) -> dict[tuple[int, ...], Tensor]:
        """What the network says with the patch grid at each origin, (B, C, d, h, w)."""
        found, inputs = {}, inputs.detach().as_subclass(Tensor)  # no metadata on every operation
        for origin in self.origins:
            image, lung = self.shifted(origin, inputs, kwargs.get("lung"))
            moved = kwargs if lung is None else {**kwargs, "lung": lung}
            with torch.no_grad():
                found[origin] = network(image, *args, **moved)
        return found

    def shift(self, origin: tuple[int, ...]) -> list[int]:
        """Cells of the combined map that lie in front of the scan with the patch grid at an origin, an axis each."""
        # Every other origin lies a patch further out: windows of attention, two patches wide, begin in either half.
        return [start + self.shifts * (start % 2) for start in origin]

    def shifted(self, origin: tuple[int, ...], inputs: Tensor, lung: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scan and lung, padded by the shift in front, and behind by what makes the unshifted grid whole."""
        cell, sizes = self.stride // self.shifts, inputs.shape[2:]
        sides = [(start * cell, -size % self.stride) for start, size in zip(self.shift(origin), sizes, strict=True)]
        pad = [n for side in reversed(sides) for n in side]
        return F.pad(inputs, pad, mode="replicate"), None if lung is None else F.pad(lung, pad)

    def combine(self, maps: dict[tuple[int, ...], Tensor], inputs: Tensor, lung: Tensor | None) -> Tensor:
        """Steps 1 to 3, from what the network says at each origin."""
        size = [-(-n // self.stride) * self.shifts for n in inputs.shape[2:]]
        total = torch.zeros(())
        for origin, survival_map in maps.items():
            said, weight, inside = survival_map[:, :-1], survival_map[:, -1:], in_lung(survival_map)
            log = torch.where(inside, weight.clamp_min(torch.finfo(weight.dtype).tiny).log(), 0.0)
            part = torch.cat([said, log, inside.to(said.dtype)], 1)
            for axis, start in zip((2, 3, 4), self.shift(origin), strict=True):
                part = part.repeat_interleave(self.shifts, axis).narrow(axis, start, size[axis - 2])
            total = total + part
        said, log_weight, count = total[:, :-2], total[:, -2], total[:, -1]
        inside = count > 0
        # Few patches reach a cell at the lung's border; their mean is noisy, and must not win for that.
        reached = 2 * count.clamp_min(1).log()
        weight = self.smooth(log_weight / count.clamp_min(1) + reached, inside)
        if self.refine:
            even = self.smooth(reached, inside)
            image, cell = inputs.detach().as_subclass(Tensor), self.stride // self.shifts
            weight = refined(weight, even, inside, image, lung, cell)
        said = said / count.clamp_min(1).unsqueeze(1)
        patients = [(m[:, :-1] * m[:, -1:]).sum((2, 3, 4)) for m in maps.values()]
        off = torch.stack(patients).quantile(0.5, 0) - (said * weight.unsqueeze(1)).sum((2, 3, 4))
        said = (said + off[:, :, None, None, None]) * inside.unsqueeze(1)
        return torch.cat([said, weight.unsqueeze(1)], 1)

    def smooth(self, log_weight: Tensor, inside: Tensor) -> Tensor:
        """Softmax over the cells of each scan that are `inside`, smoothed by the Gaussian; (B, d, h, w)."""
        weight = log_weight.masked_fill(~inside, -torch.inf).flatten(1).softmax(1).view_as(log_weight)
        if self.sigma > 0:
            weight = GaussianFilter(3, self.sigma, truncated=3.0)(weight.unsqueeze(1))[:, 0] * inside
            weight = weight / weight.sum((1, 2, 3), keepdim=True)
        return weight
