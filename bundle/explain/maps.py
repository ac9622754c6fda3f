# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""MONAI transforms from a survival map to a distribution, a heat map and the scan's own space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, SpatialResample, Transform
from scipy import ndimage

from bundle.survival.readout import death_by

from .heat import patch_heat, to_voxels

__all__ = ["HeatToScand", "MapToHeatd", "mask_to_scan_space", "to_scan_space"]


def to_scan_space(volume: MetaTensor, affine: torch.Tensor, shape: tuple[int, ...]) -> MetaTensor:
    """Resample a volume (C, D, H, W) onto the grid given by `affine` (RAS, mm) and `shape`, linearly, keeping its sum.

    One resampling by world coordinates undoes orientation, spacing, cropping and padding at once, oblique affines
    included. What lies outside the volume is 0.
    """
    resample = SpatialResample(mode="bilinear", padding_mode="zeros", dtype=torch.float32)
    out = resample(volume, dst_affine=affine, spatial_size=tuple(int(n) for n in shape))
    total = out.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return out * (volume.sum() / total)


def mask_to_scan_space(mask: MetaTensor, affine: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """The nearest voxel of a mask (1, D, H, W) for each one of the grid given by `affine` (RAS, mm) and `shape`.

    Returns:
        uint8 of that shape; 0 outside the mask's grid.
    """
    source = np.asarray(mask[0].cpu(), dtype=np.uint8)
    to_source = np.linalg.inv(np.asarray(mask.affine, dtype=float)) @ np.asarray(affine, dtype=float)
    matrix, offset = to_source[:3, :3], to_source[:3, 3]
    shape = tuple(int(n) for n in shape)
    axes = abs(matrix).argmax(1)
    steps = matrix[range(3), axes]
    rest = matrix.copy()
    rest[range(3), axes] = 0
    if len(set(axes)) < 3 or abs(rest).sum(1).max() * max(shape) > 0.5:  # half a voxel off at most
        return ndimage.affine_transform(source, matrix, offset, shape, order=0, mode="grid-constant")
    # The axes run along each other: one index an axis, hundreds of times as fast on a whole CT.
    for axis in range(3):
        index = np.rint(np.arange(shape[axes[axis]]) * steps[axis] + offset[axis]).astype(int)
        inside = (index >= 0) & (index < source.shape[axis])
        source = np.take(source, index.clip(0, source.shape[axis] - 1), axis)
        source *= inside.reshape([-1 if n == axis else 1 for n in range(3)])
    return np.ascontiguousarray(source.transpose(np.argsort(axes)))


class MapToHeatd(Transform):
    """Read a survival map: adds ``pmf``, P(T = 1..tmax months), and ``heat`` on the grid the network saw.

    Args:
        objective: whose readout to use.
        horizon: months; heat sums to P(T <= horizon).
        cell: side of a cell of the map in voxels.
        map_key, image_key, lung_key: names in the data.
    """

    def __init__(
        self,
        objective: torch.nn.Module,
        horizon: int,
        cell: int,
        map_key: str = "pred",
        image_key: str = "image",
        lung_key: str = "lung",
    ) -> None:
        self.objective = objective
        self.horizon = horizon
        self.cell = cell
        self.map_key = map_key
        self.image_key = image_key
        self.lung_key = lung_key

    def __call__(self, data: Mapping[str, Any]) -> dict:
        out = dict(data)
        survival_map = torch.as_tensor(data[self.map_key])[None]
        image, lung = data[self.image_key], torch.as_tensor(data[self.lung_key])[None]
        pmf = self.objective.pmf(survival_map)
        heat = patch_heat(survival_map, death_by(pmf, self.horizon))
        heat = to_voxels(heat, self.cell, tuple(image.shape[1:]), lung.to(heat.device))
        out["pmf"] = pmf[0]
        out["heat"] = MetaTensor(heat[0], affine=image.affine)
        return out


class HeatToScand(MapTransform):
    """Bring volumes to the grid of the file that ``image`` was loaded from, under the name ``scan_<key>``.

    Args:
        keys: volumes on the grid that the network saw.
        image_key: whose metadata know the file's affine and shape.
    """

    def __init__(self, keys: str = "heat", image_key: str = "image") -> None:
        super().__init__(keys)
        self.image_key = image_key

    def __call__(self, data: Mapping[str, Any]) -> dict:
        out = dict(data)
        meta = data[self.image_key].meta
        for key in self.key_iterator(out):
            out[f"scan_{key}"] = to_scan_space(data[key], meta["original_affine"], meta["spatial_shape"])
        return out
