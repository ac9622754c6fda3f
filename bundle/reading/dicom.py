# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Find the chest CT among the DICOM files of a folder, check that its slices make a volume, and read it in HU.

ITK (GDCM) decodes JPEG, JPEG-LS, JPEG 2000 and RLE, and applies each slice's own rescale slope and intercept.
"""

import itertools
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Sequence

import itk
import nibabel as nib
import numpy as np
import torch
from monai.data import ITKReader, MetaTensor
from monai.transforms import SpatialResample

from bundle.errors import InputError
from bundle.reading.scan_file import size_fault
from bundle.reading.series import Series, plural
from bundle.reading.slices import Slice, read_slice

_AIR_HU = -1024.0
_log = logging.getLogger(__name__)


def list_series(folder: str | os.PathLike) -> list[Series]:
    """Every stack of slices in a folder and the folders in it, from the headers alone, without following links."""
    stacks: dict[tuple, list[Slice]] = defaultdict(list)
    others = 0
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if found := read_slice(os.path.join(root, name)):
                stacks[found.stack].append(found)
            else:
                others += 1
    if others:
        _log.info("%s: %s not DICOM images", folder, f"{plural(others, 'file')} {'are' if others > 1 else 'is'}")
    return [part for slices in stacks.values() for part in _volumes(Series(tuple(slices)))]


def _volumes(stack: Series) -> list[Series]:
    """A stack in order; its volumes, if thickness, acquisition or phase tells several apart."""
    if stack.unfit:
        return [stack]
    stack = stack.with_slices(stack.slices)
    if not stack.fault and not stack.repeated:
        return [stack]
    for key in ("thickness", "acquisition", "phase"):
        members: dict[object, list[Slice]] = defaultdict(list)
        for s in stack.slices:
            members[getattr(s, key)].append(s)
        parts = [stack.with_slices(slices) for slices in members.values()]
        if len(parts) > 1 and all(len(p.slices) > 2 and not p.fault and not p.repeated for p in parts):
            return parts
    return [stack]


def choose_series(stacks: Sequence[Series], where: str, uid: str | None = None) -> Series:
    """The chest CT among the stacks of a folder; what was found, and why this one, goes to the log.

    Of CT stacks with at least 3 slices, the first by :attr:`Series.merits`. One that lacks slices or has another fault
    gives way to a whole one that is axial and as long, and is refused if there is none.

    Args:
        where: what to call the folder in messages.
        uid: SeriesInstanceUID to take instead; still it must be a CT.

    Raises:
        InputError: no CT among them; several patients; no series `uid`; the one chosen is no whole volume.
    """
    if uid is not None:
        have = ", ".join(sorted({s.uid for s in stacks})[:8]) or "none"
        stacks = [s for s in stacks if s.uid == uid]
        if not stacks:
            raise InputError(f"{where}: there is no DICOM series {uid} (found: {have})")
    if not stacks:
        raise InputError(f"{where}: the folder holds no DICOM series (expected the slices of one scan)")
    fit = sorted((s for s in stacks if not s.unfit), key=lambda s: (*s.merits.values(), s.uid), reverse=True)
    if not fit:
        for stack in stacks:
            _log.info("%s: %s: %s", where, stack, stack.unfit)
        reasons = Counter(s.unfit for s in stacks).most_common(8)
        listed = "; ".join(f"{plural(n, 'series')}: {reason}" for reason, n in reasons)
        raise InputError(f"{where}: no CT volume among the DICOM files, {listed} (expected slices of a chest CT)")
    if uid is None and len({s.patient for stack in fit for s in stack.slices} - {""}) > 1:
        raise InputError(f"{where}: the folder holds scans of several patients (expected one; or name one with --series)")

    level = list(fit[0].merits.values())[:2]
    best = next((s for s in fit if not s.fault and list(s.merits.values())[:2] >= level), fit[0])
    if best.fault:
        raise InputError(f"{where}: {best}: {best.fault}")
    if len(stacks) > 1:
        _log.info("%s: %d DICOM series are there", where, len(stacks))
        for stack in stacks:
            taken = f"taken ({'named by --series' if uid else ', '.join(best.merits)})"
            left = f"left: {stack.unfit or stack.fault or _worse(stack, best)}"
            _log.info("  %s: %s", stack, taken if stack is best else left)
    return best


def _worse(stack: Series, best: Series) -> str:
    """The weightiest merit that a stack has less of."""
    pairs = zip(stack.merits.items(), best.merits.items(), strict=True)
    return next((f"{mine}, not {its}" for (mine, a), (its, b) in pairs if a < b), "as good")


def read_dicom(folder: str | os.PathLike, where: str, uid: str | None = None) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The chest CT of a folder, as :func:`choose_series` chooses it.

    Returns:
        (D, H, W) float32 in HU, indexed by column, row and position; its affine to RAS mm; notes for the report.

    Raises:
        InputError: as :func:`choose_series`; a file is damaged; slices at one position that differ.
    """
    series = choose_series(list_series(folder), where, uid)
    if fault := size_fault(series.shape):
        raise InputError(f"{where}: {fault}")
    notes = []
    if series.repeated:
        _check_repeated(series, where)
        notes.append(f"{plural(series.repeated, 'slice')} repeated another and left out")
    if len({s.uid for s in series.slices}) < len(series.places):
        notes.append("several slices share one SOPInstanceUID; their positions were used")
    if len({s.thickness for s in series.slices}) > 1:
        notes.append("slice thickness varies within the series")
    array = _pixels([place[0].path for place in series.places], where)
    if array.shape != series.shape:
        raise InputError(f"{where}: pixels are {array.shape}, headers say {series.shape} (expected the same)")
    affine = series.affine
    if series.tilted:
        notes.append(f"gantry tilt of {series.tilt:.1f} degrees straightened by resampling")
        image = straighten(array, affine)
        array, affine = image[0].numpy(), image.affine.numpy()
    if series.head.contrast:
        notes.append("contrast agent given")
    return array, affine, notes


def _check_repeated(series: Series, where: str) -> None:
    for place in series.places:
        first, *copies = (_pixels([s.path], where) for s in place)
        if not all(np.array_equal(first, copy) for copy in copies):
            at = float(np.array(place[0].position) @ series.normal)
            raise InputError(
                f"{where}: {len(place)} different slices are at one position, {at:.1f} mm (expected one; {series})"
            )


def straighten(array: np.ndarray, affine: np.ndarray, mode: str = "bilinear", outside: float = _AIR_HU) -> MetaTensor:
    """Resample slices (D, H, W) of a tilted gantry to a grid with right angles around them, of the same spacing.

    Args:
        affine: RAS, with a third column that isn't perpendicular to the slices.
        mode: "bilinear" or "nearest".
        outside: value where there was no slice.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    z = affine[:3, 2] / spacing[2]
    x = affine[:3, 0] / spacing[0]
    x = x - (x @ z) * z
    x /= np.linalg.norm(x)
    axes = np.stack([x, np.cross(z, x), z], 1)
    if axes[:, 1] @ affine[:3, 1] < 0:
        axes[:, 1] *= -1
    corners = list(itertools.product(*((0, n - 1) for n in array.shape)))
    corners = nib.affines.apply_affine(affine, corners) @ axes / spacing
    low, high = corners.min(0), corners.max(0)
    straight = nib.affines.from_matvec(axes * spacing, axes @ (low * spacing))
    size = (np.ceil(high - low - 1e-3) + 1).astype(int)
    image = MetaTensor(torch.from_numpy(array.astype(np.float32))[None] - outside, affine=torch.as_tensor(affine))
    resample = SpatialResample(mode=mode, padding_mode="zeros", align_corners=True)
    return resample(image, dst_affine=torch.as_tensor(straight), spatial_size=size.tolist()) + outside


def _pixels(paths: list[str], where: str) -> np.ndarray:
    """(columns, rows, slices) float32 in HU."""
    try:
        image = itk.imread(paths, pixel_type=itk.F)
        array = np.asarray(ITKReader().get_data(image)[0], dtype=np.float32)
    except Exception as error:  # ITK has many kinds
        broken = [k for k, path in enumerate(paths, 1) if len(paths) > 1 and not _readable(path)]
        which = f"slice {broken[0]} of {len(paths)}" if len(broken) == 1 else f"{len(broken) or 1} of {len(paths)} slices"
        raise InputError(f"{where}: the pixels of {which} are truncated or damaged (expected whole files)") from error
    return array[..., None] if array.ndim == 2 else array


def _readable(path: str) -> bool:
    try:
        itk.imread(path, pixel_type=itk.F)
    except Exception:
        return False
    return True
