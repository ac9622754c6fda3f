# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The regions of a map that carry most risk, and where in the lung they lie."""

from typing import NamedTuple

import numpy as np
from scipy import ndimage

from bundle.report.pictures import heat_colours

HOT = 0.25  # share of the hottest voxel's heat from which on a voxel belongs to a region
LEAST_ML = 0.1  # of a region that is listed
MOST = 10  # regions that are listed
LUNG_COLOUR = (0.5, 0.7, 0.9)  # red, green, blue, beside the colours of heat
EVEN = 2.0  # a map whose hottest voxel is below so many times the lung's mean has no regions


class Region(NamedTuple):
    """One connected part of a map."""

    share: float  # of the patient's risk
    volume: float  # mL
    hu: float  # mean
    side: str  # "left" or "right", the patient's
    third: str  # "upper", "middle" or "lower", of that side's height
    pleura: float  # mm from its nearest voxel to the surface of the lung mask
    mm: tuple[float, float, float]  # its hottest voxel, RAS


def fault_of(heat: np.ndarray, lung: np.ndarray) -> str:
    """Why a map has no regions to rank, in words; empty for one that has."""
    if not np.isfinite(heat).all():
        return "the map has values that are no numbers"
    if heat.max() <= 0:
        return "the map has no heat"
    if heat.max() < EVEN * heat[lung].mean():
        return f"the map is nearly even: its hottest voxel has less than {EVEN:g} times the lung's mean heat"
    return ""


def region_ranks(heat: np.ndarray, lung: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """The rank of the region that each voxel of a map belongs to, 1 for that with most risk, 0 for none; uint8.

    A region is a connected part of at least :data:`LEAST_ML`; :data:`MOST` of them are ranked. A map with a
    :func:`fault_of` has none. Arguments are as for :func:`ranked_regions`.
    """
    if fault_of(heat, lung):
        return np.zeros(heat.shape, np.uint8)
    labels, _ = ndimage.label(heat >= HOT * heat.max(), np.ones((3, 3, 3)))
    share, size = (np.bincount(labels.ravel(), weights) for weights in (heat.ravel(), None))
    ml = size * abs(np.linalg.det(affine[:3, :3])) / 1000
    listed = [n for n in share[1:].argsort()[::-1] + 1 if ml[n] >= LEAST_ML][:MOST]
    ranks = np.zeros(len(size), np.uint8)
    ranks[listed] = np.arange(1, len(listed) + 1)
    return ranks[labels]


def ranked_regions(
    heat: np.ndarray, hu: np.ndarray, lung: np.ndarray, affine: np.ndarray, masked: bool = True
) -> list[Region]:
    """The connected parts of a map, those with most risk first; none of a map with a :func:`fault_of`.

    Args:
        heat: share of the risk of each voxel, (D, H, W), axes towards right, front, head (RAS).
        hu: same shape.
        lung: True in the lung, same shape.
        affine: of the voxels (RAS, mm).
        masked: whether the lung is known; else side, third and pleura are not, and stay empty and NaN.
    """
    ranks = region_ranks(heat, lung, affine)
    if not ranks.any():
        return []
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    filled = ndimage.binary_fill_holes(lung)
    surface = ndimage.distance_transform_edt(~(filled & ~ndimage.binary_erosion(filled)), sampling=spacing)
    regions = []
    for rank, box in enumerate(ndimage.find_objects(ranks), 1):
        inside = ranks[box] == rank
        at = np.unravel_index(np.where(inside, heat[box], -1).argmax(), inside.shape)
        voxel = np.array([part.start for part in box]) + at
        side, third = _place(voxel, lung) if masked else ("", "")
        pleura = float(surface[box][inside].min()) if masked else np.nan
        mm = tuple(float(x) for x in affine[:3, :3] @ voxel + affine[:3, 3])
        mean = float(hu[box][inside].mean())
        share, ml = float(heat[box][inside].sum() / heat.sum()), float(inside.sum() * spacing.prod() / 1000)
        regions.append(Region(share, ml, mean, side, third, pleura, mm))
    return regions


def segments(
    heat: np.ndarray, hu: np.ndarray, lung: np.ndarray, affine: np.ndarray, masked: bool
) -> tuple[np.ndarray, list[str], list[tuple[float, float, float]]]:
    """The ranked regions of a map for other programs; arguments are as for :func:`ranked_regions`.

    Returns:
        the rank of each voxel as of :func:`region_ranks`; a name and a colour (red, green, blue, 0 to 1) of each rank.
    """
    regions = ranked_regions(heat, hu, lung, affine, masked)
    names = [
        f"Heat {rank}: {region.share:.0%} of the risk" + (f", {region.side}, {region.third} third" if region.side else "")
        for rank, region in enumerate(regions, 1)
    ]
    steps = np.linspace(255, 64, len(regions)).round().astype(int)
    return region_ranks(heat, lung, affine), names, [tuple(map(float, heat_colours()[step, :3])) for step in steps]


def _place(voxel: np.ndarray, lung: np.ndarray) -> tuple[str, str]:
    """Side and third of the lung of a voxel; the middle of the lungs' width parts left from right."""
    across = np.flatnonzero(lung.any((1, 2)))
    middle = (across[0] + across[-1]) / 2
    right = voxel[0] > middle
    own = lung[int(np.ceil(middle)) :] if right else lung[: int(middle) + 1]
    up = np.flatnonzero(own.any((0, 1)))
    third = 0 if not len(up) else int(np.clip(3 * (voxel[2] - up[0]) / (up[-1] - up[0] + 1), 0, 2))
    return "right" if right else "left", ("lower", "middle", "upper")[third]
