# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""MONAI transforms from a survival map to a distribution, a heat map and the scan's own space."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import MapTransform, SpatialResample, Transform

from bundle.grids import mask_on_grid, relation
from bundle.maps.heat import patch_heat, to_voxels
from bundle.survival import check_horizon, death_by
from bundle.survival.calibration import widened


def to_scan_space(
    volume: MetaTensor, affine: torch.Tensor, shape: tuple[int, ...], lung: torch.Tensor | None = None
) -> MetaTensor:
    """:func:`on_scan_grid`, keeping the sum: heat is a share, of which each voxel of a finer grid has less."""
    out = on_scan_grid(volume, affine, shape, lung)
    total = volume.as_tensor().sum()
    return out.mul_(total / out.as_tensor().sum().clamp_min(torch.finfo(torch.float32).tiny))


def on_scan_grid(
    volume: MetaTensor, affine: torch.Tensor, shape: tuple[int, ...], lung: torch.Tensor | None = None
) -> MetaTensor:
    """Resample a volume (1, D, H, W) onto the grid given by `affine` (RAS, mm) and `shape`, linearly.

    One resampling by world coordinates undoes orientation, spacing, cropping and padding at once, oblique affines
    included. What lies outside the volume is 0, and so is what lies outside a `lung` mask on the volume's grid. The
    lung's border is as bright as what lies behind it: lesions lie at the pleura.
    """
    shape = tuple(int(n) for n in shape)
    affine = torch.as_tensor(affine, dtype=torch.float64)
    values = volume.as_tensor()
    if lung is not None:
        lung = MetaTensor(torch.as_tensor(lung, device=volume.device), affine=volume.affine)
        # Just outside the lung the mean of the neighbours that are lung: interpolation is between values of the lung.
        inside = lung.as_tensor().to(values)
        near = 27 * F.avg_pool3d(torch.stack([values * inside, inside], 1), 3, 1, 1)
        beyond = torch.where(inside > 0, values, near[:, 0] / near[:, 1].clamp_min(1))
        volume = MetaTensor(beyond, affine=volume.affine)
    out = interpolated(volume, affine, shape)
    if lung is not None:
        out *= torch.from_numpy(mask_on_grid(lung, affine, shape)).to(out.device)
    return out


def interpolated(volume: MetaTensor, affine: torch.Tensor, shape: tuple[int, ...]) -> MetaTensor:
    """The resampling of :func:`on_scan_grid`, whatever lies outside a lung.

    Where the axes of both grids are parallel, linear interpolation is a small matrix an axis: a CT takes a tenth of the
    time and memory of a general resampling, which is left for sheared affines. The memory of the result runs as a
    NIfTI's does, the first axis fastest, so that it is written fast.
    """
    matrix, offset, source, bent = relation(volume.affine, affine)
    if len(set(source)) < 3 or (abs(bent) * shape).sum(1).max() > 0.01:
        resample = SpatialResample(mode="bilinear", padding_mode="zeros", dtype=torch.float32)
        return resample(volume, dst_affine=affine, spatial_size=shape)
    out = volume.as_tensor()[0].float().permute(*reversed(source))
    for axis, of in reversed(list(enumerate(source))):  # of the grid's axes from last to first, as `out` has them
        at = torch.from_numpy(matrix[of, axis] * np.arange(shape[axis]) + offset[of])
        weights = (1 - (at.unsqueeze(1) - torch.arange(volume.shape[1 + of])).abs()).clamp_min(0)
        out = torch.tensordot(out, weights.to(out), ([0], [1]))
    return MetaTensor(out.permute(2, 1, 0)[None], affine=affine)


class MapToHeatd(Transform):
    """Read a survival map: adds ``pmf``, P(T = 1..tmax months), and ``heat`` on the grid the network saw.

    Heat sums to P(T <= horizon), a month that the objective has (else an InputError). A cell of the map is `cell`
    voxels wide, or one where the map has the image's size.

    Args:
        objective: of the network's weights.
        horizon: of the heat, months.
        cell: voxels.
        cohort: P(T = 1..tmax months) of the training cohort, of which a strange scan gets its ``strangeness`` (see
            :class:`~bundle.maps.Familiarityd`); None to widen nothing.
        map_key: of the survival map.
    """

    def __init__(
        self,
        objective: torch.nn.Module,
        horizon: int,
        cell: int,
        cohort: Sequence[float] | None = None,
        map_key: str = "pred",
    ) -> None:
        check_horizon(horizon, objective.tmax)
        self.cohort = cohort
        self.objective = objective
        self.horizon = horizon
        self.cell = cell
        self.map_key = map_key

    def __call__(self, data: Mapping[str, Any]) -> dict:
        out = dict(data)
        survival_map = torch.as_tensor(data[self.map_key])[None]
        image, lung = data["image"], torch.as_tensor(data["lung"])[None]
        pmf = self.objective.pmf(survival_map)
        if self.cohort is not None:
            pmf = widened(pmf, self.cohort, float(data.get("strangeness", 0)))
        heat = patch_heat(survival_map, death_by(pmf, self.horizon))
        cell = 1 if survival_map.shape[2:] == image.shape[1:] else self.cell
        heat = to_voxels(heat, cell, tuple(image.shape[1:]), lung.to(heat.device))
        out["pmf"] = pmf[0]
        out["heat"] = MetaTensor(heat[0], affine=image.affine)
        return out


def in_cells(survival_map: torch.Tensor, cell: int) -> torch.Tensor:
    """Location and weight of voxels (2, D, H, W) in cells of `cell` voxels a side: the mean location, the sum of weights."""
    location, weight = (F.avg_pool3d(x[None], cell, ceil_mode=True, divisor_override=1) for x in survival_map)
    inside = F.avg_pool3d((survival_map[None, 1] > 0).to(weight), cell, ceil_mode=True, divisor_override=1)
    return torch.cat([location / inside.clamp_min(1), weight])


class EnsembleToHeatd(Transform):
    """As :class:`MapToHeatd` for the maps ``pred_0``, ``pred_1``, ... of several networks, one an objective.

    ``pmf`` and ``heat`` are the means of the members', so heat sums to P(T <= horizon) of the mean distribution.
    ``pred`` becomes the mean of the members' locations and weights, to look at.
    """

    def __init__(
        self, objectives: Sequence[torch.nn.Module], horizon: int, cell: int, cohort: Sequence[float] | None = None
    ) -> None:
        self.members = [MapToHeatd(o, horizon, cell, cohort, f"pred_{i}") for i, o in enumerate(objectives)]

    def __call__(self, data: Mapping[str, Any]) -> dict:
        out = dict(data)
        read = [member(data) for member in self.members]
        out["pmf"] = torch.stack([one["pmf"] for one in read]).mean(0)
        heat = torch.stack([one["heat"].as_tensor() for one in read]).mean(0)
        out["heat"] = MetaTensor(heat, affine=data["image"].affine)
        size = data["image"].shape[1:]
        maps = [torch.as_tensor(data[member.map_key])[[0, -1]] for member in self.members]
        maps = [in_cells(m, member.cell) if m.shape[1:] == size else m for m, member in zip(maps, self.members)]
        d, h, w = (min(sizes) for sizes in zip(*(m.shape[1:] for m in maps)))  # some reach beyond the image's end
        out["pred"] = torch.stack([m[:, :d, :h, :w] for m in maps]).mean(0)
        return out


class HeatToScand(MapTransform):
    """Bring volumes on the grid of ``lung``, outside of which they are 0, to that of the file, as ``scan_<key>``."""

    def __call__(self, data: Mapping[str, Any]) -> dict:
        out = dict(data)
        meta, lung = data["image"].meta, data["lung"]
        for key in self.key_iterator(out):
            out[f"scan_{key}"] = to_scan_space(data[key], meta["original_affine"], meta["spatial_shape"], lung)
        return out
