# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Lung masks without weights: a threshold, the body's and the thorax's hull, airways out, two lungs, closing."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError
from skimage.draw import polygon
from skimage.morphology import isotropic_erosion, isotropic_opening
from torch import Tensor

_WORKING_MM = 3.0  # finer voxels tell nothing more about where the lung is, at many times the cost
_BODY_HU = -500.0
_LUNG_HU = -400.0  # about halfway between aerated lung (-850) and soft tissue (50)
_LUMEN_HU = -800.0  # air in an airway whose wall is thinner than a voxel
_BONE_HU = 200.0
_CLOSING_MM = 15.0  # wider than hilar vessels and most juxtapleural nodules
_MASS_MM = 25.0  # a ball of this radius doesn't get into the dent that a mass leaves, ...
_THICK_MM = 8.0  # ... nor into angles between the lung and the mediastinum, which are thinner than this
_LARGEST_HOLE_MM2 = 4000.0  # a mass of 7 cm is filled; the heart, which two touching lungs may enclose, is not
_LARGEST_DENT_ML = 270.0  # the same for a mass of 8 cm at the chest wall
_THIN_MM = 4.0  # what lies between a slice's lungs and their convex hull is thinner than this where nothing is wrong
_MEDIASTINUM_MM = 25.0  # half its width where it is narrow
_SMALLEST_LUNG_ML = 20.0
_NECK_MM = (2.0, 4.0, 6.0, 9.0, 12.0)  # half the width of where two lungs touch, tried in turn
_AIRWAY_MM2 = (25.0, 900.0)  # lumen of the trachea or the main bronchi in an axial slice
_AIRWAY_LENGTH_MM = 30.0  # shorter chains are apices of lungs or bubbles
_AIRWAY_WALL_MM = 3.0

_IN_PLANE = np.zeros((3, 3, 3), dtype=bool)  # neighbours within an axial slice
_IN_PLANE[:, 1, 1] = _IN_PLANE[1, :, 1] = True


def threshold_lung_mask(hu: Tensor, spacing: Sequence[float]) -> Tensor:
    """Both lungs from HU alone, without trachea and main bronchi, with vessels, nodules and most masses filled in.

    Air inside the body is parted into components; the largest two are the lungs. Each is closed by a ball of 15 mm
    radius, and in part by one of 25 mm. What dents the lungs at the chest wall is filled in up to a convex hull.

    A mass in a corner of the lung, and consolidation or effusion that takes a whole lobe, are left out
    (:func:`fill_thorax` brings them back). Measured in docs/results/lung_masks.md.

    Args:
        hu: (1, D, H, W) in RAS order: the first axis runs across the patient, the last from feet to head.
        spacing: of the three axes, in mm.

    Returns:
        (1, D, H, W) float32 in {0, 1}; 0 everywhere if there is no lung (no component of at least 20 mL).
    """
    # Radii are whole numbers of voxels of 3 mm: 1e-7 mm more would move what is just as far away in or out, 1 % of the lung.
    spacing = np.round(np.asarray(spacing, dtype=float), 3)
    block = [max(1, int(_WORKING_MM / mm + 1e-3)) for mm in spacing]
    means = F.avg_pool3d(hu.detach().cpu().float()[None], block, ceil_mode=True, count_include_pad=False)[0, 0]
    lungs = torch.from_numpy(_lungs(means.numpy(), spacing * block)).float()
    whole = F.interpolate(lungs[None, None], scale_factor=[float(n) for n in block], mode="trilinear")[0]
    return (whole[(..., *(slice(n) for n in hu.shape[1:]))] >= 0.5).float()


def fill_thorax(lungs: Tensor, hu: Tensor) -> Tensor:
    """A mask (1, D, H, W) with all that lies between the lungs, of which segmentation drops the sickest part.

    In each axial slice the convex hull of the mask and of its mirror image about the middle of the body, without bone
    and without air that the mask had left out. A lung that is white all over comes back, and with it come the
    mediastinum, the heart, and what lies under the diaphragm's dome.
    """
    values, mask = hu[0].detach().cpu().numpy(), lungs[0].detach().cpu().numpy() > 0.5
    hull = _hulls(mask, _middle(_largest(values > _BODY_HU)), mirror=True)
    filled = mask | (hull & (values > _LUMEN_HU) & (values < _BONE_HU))
    return torch.from_numpy(filled.astype(np.float32))[None]


def _lungs(values: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    pixel_mm2 = spacing[0] * spacing[1]
    tissue = _largest(values > _BODY_HU)
    body = _fill_slices(tissue)
    middle = _middle(body)
    # Where the body's wall has a gap, its hull has the lung; what is as small as an airway is one that the border cuts.
    gap, _ = ndimage.label(_hulls(tissue, middle, mirror=False) & ~body & (values < _LUNG_HU), _IN_PLANE)
    wide = _sizes(gap) * pixel_mm2 > _AIRWAY_MM2[1]
    air = (body & (values < _LUNG_HU)) | wide[gap]
    airways = _airways(values, air & body, spacing)

    labels, number = ndimage.label(air & ~airways)
    inside = ndimage.mean(body, labels, np.arange(number + 1)) >= 0.5
    labels *= inside[labels]  # air between the arms and the trunk isn't
    lungs = np.zeros_like(air)
    for lung in _two_lungs(labels, spacing):
        lungs |= _fill_slices(_close(lung, spacing), largest=_LARGEST_HOLE_MM2 / pixel_mm2)
    lungs |= _dents(lungs, middle, spacing)
    wall = max(1, round(_AIRWAY_WALL_MM / spacing[0]))
    return lungs & ~ndimage.binary_dilation(airways, _IN_PLANE, iterations=wall)  # closing had filled them


def _sizes(labels: np.ndarray) -> np.ndarray:
    """Voxels of each label; 0 for the background."""
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return sizes


def _largest(mask: np.ndarray) -> np.ndarray:
    labels, _ = ndimage.label(mask)
    return mask & (labels == _sizes(labels).argmax())


def _middle(body: np.ndarray) -> float:
    """Index of the sagittal plane in the middle of the body."""
    across = np.flatnonzero(body.any((1, 2)))
    return (across[0] + across[-1]) / 2 if len(across) else len(body) / 2


def _fill_slices(mask: np.ndarray, largest: float = np.inf) -> np.ndarray:
    """Fill the holes, of up to `largest` pixels, of each axial slice."""
    labels, _ = ndimage.label(~mask, _IN_PLANE)
    sizes = _sizes(labels)
    border = np.concatenate([edge.ravel() for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1])])
    contact = np.bincount(border, minlength=len(sizes))
    # A narrow field of view may cut a lung: up to half the side of a square of the hole's area may be on the border.
    hole = (contact <= 0.5 * np.sqrt(sizes)) & (sizes <= largest)
    hole[0] = False
    return mask | hole[labels]


def _hulls(mask: np.ndarray, middle: float, mirror: bool) -> np.ndarray:
    """Convex hull of each axial slice, with its mirror image about `middle` if `mirror` or if a side is all but empty."""
    out = np.zeros_like(mask)
    left = np.arange(len(mask)) < middle
    for k in np.flatnonzero(mask.any((0, 1))):
        plane = mask[:, :, k]
        rows = np.flatnonzero(plane.any(1))
        ends = plane[rows].argmax(1), plane.shape[1] - 1 - plane[rows, ::-1].argmax(1)
        points = np.concatenate([np.stack([rows, end], 1) for end in ends]).astype(float)
        sides = plane[left].sum(), plane[~left].sum()
        if mirror or min(sides) < 0.1 * max(sides):
            points = np.concatenate([points, np.stack([2 * middle - points[:, 0], points[:, 1]], 1)])
        try:
            corners = points[ConvexHull(points).vertices]
        except QhullError:  # all on one line
            continue
        out[(*polygon(corners[:, 0], corners[:, 1], plane.shape), k)] = True
    return out


def _two_lungs(labels: np.ndarray, spacing: np.ndarray) -> list[np.ndarray]:
    """The lungs among components of air, each a mask: the largest two, or the largest parted; one if it is alone."""

    def two_largest(labels: np.ndarray, share: float) -> list[int]:
        sizes = _sizes(labels)
        # A second one far smaller than the first is gas in the bowel or a part of the same lung, not the other lung.
        least = max(_SMALLEST_LUNG_ML * 1000 / spacing.prod(), share * sizes.max())
        return [n for n in np.argsort(sizes)[:-3:-1] if sizes[n] >= least]

    found = two_largest(labels, 0.1)
    if len(found) != 1:
        return [labels == n for n in found]
    # Lungs that touch are parted where they are thinnest, or closing would fill the mediastinum between them.
    whole = labels == found[0]
    box = ndimage.find_objects(whole.astype(np.uint8))[0]
    part = whole[box]
    depth = ndimage.distance_transform_edt(np.pad(part, 1), spacing)[1:-1, 1:-1, 1:-1]
    for neck in _NECK_MM:
        cores, _ = ndimage.label(depth > neck)
        sides = two_largest(cores, 0.2)
        if len(sides) == 2:
            near = ndimage.distance_transform_edt(~np.isin(cores, sides), spacing, False, True)
            halves = [np.zeros_like(whole), np.zeros_like(whole)]
            for half, side in zip(halves, sides, strict=True):
                half[box] = part & (cores[tuple(near)] == side)
            return halves
    return [whole]


def _close(mask: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Closing by a ball, and the thick parts of closing by a larger one; the same in mm at any spacing."""
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    margin = [int(np.ceil(_MASS_MM / s)) + 1 for s in spacing]
    part = np.pad(mask[box], [(m, m) for m in margin])
    distance = ndimage.distance_transform_edt(~part, spacing)  # the dilations of both closings
    closed = part | isotropic_erosion(distance <= _CLOSING_MM, _CLOSING_MM, spacing=spacing)
    more = isotropic_erosion(distance <= _MASS_MM, _MASS_MM, spacing=spacing) & ~closed
    closed |= more & isotropic_opening(more, _THICK_MM, spacing=spacing)
    out = mask.copy()
    out[box] |= closed[tuple(slice(m, -m) for m in margin)]
    return out


def _dents(lungs: np.ndarray, middle: float, spacing: np.ndarray) -> np.ndarray:
    """What lies between the convex hull of both lungs and the lungs in axial slices, but for the mediastinum."""
    found = np.zeros_like(lungs)
    for mirror, thin_mm in ((False, _THIN_MM), (True, 2 * _THIN_MM)):
        outside = _hulls(lungs, middle, mirror) & ~lungs
        thin = max(1, round(thin_mm / spacing[0]))
        labels, _ = ndimage.label(ndimage.binary_erosion(outside, _IN_PLANE, iterations=thin))
        dent = _sizes(labels) * spacing.prod() / 1000 <= _LARGEST_DENT_ML
        dent[np.unique(labels[abs(np.arange(len(lungs)) - middle) * spacing[0] <= _MEDIASTINUM_MM])] = False
        dent[0] = False
        found |= ndimage.binary_dilation(dent[labels], _IN_PLANE, iterations=thin + 1, mask=outside)
    return found


def _airways(values: np.ndarray, air: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """The trachea, the largest chain of tube-sized components of axial slices, and its lumen followed into the bronchi."""
    pixel_mm2 = spacing[0] * spacing[1]
    labels, _ = ndimage.label(air, _IN_PLANE)
    area = _sizes(labels) * pixel_mm2
    tube = (area >= _AIRWAY_MM2[0]) & (area <= _AIRWAY_MM2[1])
    widest = int(air.sum((0, 1)).argmax())  # below it, long tubes are bowel

    trachea: list[int] = []
    chains: dict[int, list[int]] = {}  # the chain that ends in each component of the slice above
    above = np.zeros_like(labels[:, :, 0])
    for k in range(air.shape[2] - 1, widest - 1, -1):
        here = labels[:, :, k]
        longer = {}
        for label in np.unique(here[tube[here]]):
            parents = [chains[parent] for parent in np.unique(above[here == label]) if parent in chains]
            longer[label] = max(parents, key=lambda chain: area[chain].sum(), default=[]) + [label]
            trachea = max(trachea, longer[label], key=lambda chain: area[chain].sum())
        chains, above = longer, here
    if len(trachea) * spacing[2] < _AIRWAY_LENGTH_MM:
        return np.zeros_like(air)

    airways = np.isin(labels, trachea)
    middle = labels == trachea[len(trachea) // 2]
    lumen = middle.any(2)
    for k in range(int(middle.any((0, 1)).argmax()) - 1, -1, -1):
        lumen = ndimage.binary_dilation(lumen) & (values[:, :, k] < _LUMEN_HU)
        if not _AIRWAY_MM2[0] <= lumen.sum() * pixel_mm2 <= _AIRWAY_MM2[1]:
            break
        airways[:, :, k] |= lumen
    return airways
