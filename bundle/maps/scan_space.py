# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""MONAI transforms from a survival map to a distribution, a heat map and the scan's own space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import MapTransform, SpatialResample, Transform
from scipy import ndimage

from bundle.maps.heat import patch_heat, to_voxels
from bundle.survival import check_horizon, death_by

__all__ = ["EnsembleToHeatd", "HeatToScand", "MapToHeatd", "mask_to_scan_space", "to_scan_space"]


def linear_weights(at: torch.Tensor, size: int) -> torch.Tensor:
    """Weights (len(at), size) by which linear interpolation at the places `at` takes voxels 0..size-1; 0 is outside."""
    return (1 - (at.unsqueeze(1) - torch.arange(size).to(at)).abs()).clamp_min(0)


def relation(volume_affine: Any, affine: Any) -> tuple[np.ndarray, np.ndarray, list[int], np.ndarray]:
    """From the voxels of a grid to those of a volume, and how far their axes are from running along each other.

    Args:
        volume_affine, affine: of the volume and of the grid, RAS, mm.

    Returns:
        matrix (3, 3) and offset (3,): voxel of the volume = matrix @ voxel of the grid + offset; the volume's axis along
        each axis of the grid; and what is left of the matrix without these, 0 where axes are parallel.
    """
    to_volume = np.linalg.solve(np.asarray(volume_affine, dtype=float), np.asarray(affine, dtype=float))
    matrix, offset = to_volume[:3, :3], to_volume[:3, 3]
    axes = abs(matrix).argmax(0).tolist()
    rest = matrix.copy()
    rest[axes, range(3)] = 0
    return matrix, offset, axes, rest


def beyond_lung(volume: torch.Tensor, lung: torch.Tensor) -> torch.Tensor:
    """The volume (1, D, H, W), and just outside the lung the mean of the neighbours (26) that are lung; 0 further away.

    So linear interpolation at the lung's border is between values of the lung, not between one and nothing.
    """
    lung = lung.to(volume)
    near = 27 * F.avg_pool3d(torch.stack([volume * lung, lung], 1), 3, 1, 1)
    return torch.where(lung > 0, volume, near[:, 0] / near[:, 1].clamp_min(1))


def to_scan_space(
    volume: MetaTensor, affine: torch.Tensor, shape: tuple[int, ...], lung: torch.Tensor | None = None
) -> MetaTensor:
    """Resample a volume (1, D, H, W) onto the grid given by `affine` (RAS, mm) and `shape`, linearly, keeping its sum.

    One resampling by world coordinates undoes orientation, spacing, cropping and padding at once, oblique affines
    included. What lies outside the volume is 0. With a `lung` mask on the volume's grid, what lies outside the lung
    (:func:`mask_to_scan_space`) is 0 as well, and its border is as bright as what lies behind it: lesions lie at the pleura.
    """
    shape = tuple(int(n) for n in shape)
    affine = torch.as_tensor(affine, dtype=torch.float64)
    volume_sum = volume.as_tensor().sum()
    if lung is not None:
        lung = MetaTensor(torch.as_tensor(lung, device=volume.device), affine=volume.affine)
        volume = MetaTensor(beyond_lung(volume.as_tensor(), lung.as_tensor()), affine=volume.affine)
    out = interpolated(volume, affine, shape)
    if lung is not None:
        out *= torch.from_numpy(mask_to_scan_space(lung, affine, shape)).to(out.device)
    return out.mul_(volume_sum / out.as_tensor().sum().clamp_min(torch.finfo(torch.float32).tiny))


def interpolated(volume: MetaTensor, affine: torch.Tensor, shape: tuple[int, ...]) -> MetaTensor:
    """The resampling of :func:`to_scan_space`, whatever comes of the sum.

    Orientation and spacing leave the axes of both grids parallel, and linear interpolation is then a small matrix an axis: a
    CT takes a tenth of the time and memory of a general resampling, which is left for sheared affines. The memory of the
    result runs as a NIfTI's does, the first axis fastest, so that it is written fast.
    """
    matrix, offset, source, bent = relation(volume.affine, affine)
    if len(set(source)) < 3 or (abs(bent) * shape).sum(1).max() > 0.01:
        resample = SpatialResample(mode="bilinear", padding_mode="zeros", dtype=torch.float32)
        return resample(volume, dst_affine=affine, spatial_size=shape)
    out = volume.as_tensor()[0].float().permute(*reversed(source))
    for axis, of in reversed(list(enumerate(source))):  # of the grid's axes from last to first, as `out` has them
        at = torch.from_numpy(matrix[of, axis] * np.arange(shape[axis]) + offset[of])
        out = torch.tensordot(out, linear_weights(at, volume.shape[1 + of]).to(out), ([0], [1]))
    return MetaTensor(out.permute(2, 1, 0)[None], affine=affine)


def mask_to_scan_space(mask: MetaTensor, affine: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """The nearest voxel of a mask (1, D, H, W) for each one of the grid given by `affine` (RAS, mm) and `shape`.

    Returns:
        uint8 of that shape; 0 outside the mask's grid.
    """
    source = np.asarray(mask[0].cpu(), dtype=np.uint8)
    matrix, offset, axes, rest = relation(mask.affine, affine)
    shape = tuple(int(n) for n in shape)
    if len(set(axes)) < 3 or abs(rest).sum(1).max() * max(shape) > 0.5:  # half a voxel off at most
        return ndimage.affine_transform(source, matrix, offset, shape, order=0, mode="grid-constant")
    # One index an axis is hundreds of times as fast on a whole CT; the memory of the result runs as a NIfTI's does.
    source = source.transpose(axes).T
    for axis, of in enumerate(axes):
        index = np.rint(np.arange(shape[axis]) * matrix[of, axis] + offset[of]).astype(int)
        inside = (index >= 0) & (index < mask.shape[1 + of])
        source = np.take(source, index.clip(0, mask.shape[1 + of] - 1), 2 - axis)
        source *= inside.reshape([-1 if n == 2 - axis else 1 for n in range(3)])
    return source.T


class MapToHeatd(Transform):
    """Read a survival map: adds ``pmf``, P(T = 1..tmax months), and ``heat`` on the grid the network saw.

    Args:
        objective: whose readout to use.
        horizon: months; heat sums to P(T <= horizon).
        cell: side of a cell of the map in voxels.
        map_key, image_key, lung_key: names in the data.

    Raises:
        InputError: the horizon lies beyond the objective's last month.
    """

    def __init__(self, objective: torch.nn.Module, horizon: int, cell: int, map_key: str = "pred") -> None:
        check_horizon(horizon, objective.tmax)
        self.objective = objective
        self.horizon = horizon
        self.cell = cell
        self.map_key = map_key

    def __call__(self, data: Mapping[str, Any]) -> dict:
        out = dict(data)
        survival_map = torch.as_tensor(data[self.map_key])[None]
        image, lung = data["image"], torch.as_tensor(data["lung"])[None]
        pmf = self.objective.pmf(survival_map)
        heat = patch_heat(survival_map, death_by(pmf, self.horizon))
        heat = to_voxels(heat, self.cell, tuple(image.shape[1:]), lung.to(heat.device))
        out["pmf"] = pmf[0]
        out["heat"] = MetaTensor(heat[0], affine=image.affine)
        return out


class EnsembleToHeatd(Transform):
    """As :class:`MapToHeatd` for the maps of several networks: ``pmf`` and ``heat`` are the means of the members'.

    A member's heat sums to its own P(T <= horizon), so the mean sums to that of the mean distribution. ``pred`` becomes
    the mean of the members' locations and weights, to look at: nothing is read off it.

    Args:
        objectives: of the members; their maps are ``pred_0``, ``pred_1``, ..., as `EnsembleEvaluator` names them.
        horizon, cell: as for one.
    """

    def __init__(self, objectives: Sequence[torch.nn.Module], horizon: int, cell: int) -> None:
        self.members = [MapToHeatd(o, horizon, cell, map_key=f"pred_{i}") for i, o in enumerate(objectives)]

    def __call__(self, data: Mapping[str, Any]) -> dict:
        out = dict(data)
        read = [member(data) for member in self.members]
        out["pmf"] = torch.stack([one["pmf"] for one in read]).mean(0)
        heat = torch.stack([one["heat"].as_tensor() for one in read]).mean(0)
        out["heat"] = MetaTensor(heat, affine=data["image"].affine)
        out["pred"] = torch.stack([torch.as_tensor(data[member.map_key])[[0, -1]] for member in self.members]).mean(0)
        return out


class HeatToScand(MapTransform):
    """Bring volumes of the lung to the grid of the file that ``image`` was loaded from, under the name ``scan_<key>``.

    Args:
        keys: volumes on the grid that the network saw, as ``image`` and ``lung`` are; outside the lung there is nothing.
    """

    def __call__(self, data: Mapping[str, Any]) -> dict:
        out = dict(data)
        meta, lung = data["image"].meta, data["lung"]
        for key in self.key_iterator(out):
            out[f"scan_{key}"] = to_scan_space(data[key], meta["original_affine"], meta["spatial_shape"], lung)
        return out
