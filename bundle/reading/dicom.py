# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Find the chest CT among the DICOM files of a folder, check that its slices make a volume, and read it in HU.

ITK (GDCM) decodes JPEG, JPEG-LS, JPEG 2000 and RLE, and applies each slice's own rescale slope and intercept.
"""

import itertools
import logging
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import itk
import nibabel as nib
import numpy as np
import pydicom
import torch
from monai.data import ITKReader, MetaTensor
from monai.transforms import SpatialResample

from bundle.errors import InputError
from bundle.reading.scan_file import size_fault
from bundle.reading.series import Series, plural
from bundle.reading.slices import Slice, files_in, read_header, read_slices, several_patients
from bundle.reading.zipped import is_archive, unzip

_AIR_HU = -1024.0
_CT_HU = (-4000.0, 3071.0)  # padding that the header names is no HU where it lies beyond
_PROJECTIONS = {"MIP", "MINIP", "MAX_IP", "MIN_IP", "PROJECTION IMAGE"}  # in ImageType
_SCANS = ("frame_of_reference", "acquisition", "phase")  # what tells one scan of a patient from the next
_log = logging.getLogger(__name__)


def is_dicom(path: str | os.PathLike) -> bool:
    """Whether a scan is given as DICOM: a folder or a ZIP archive of its slices."""
    return os.path.isdir(path) or is_archive(path)


def list_series(folder: str | os.PathLike) -> list[Series]:
    """Every stack of slices in a folder and the folders in it, links to folders included, from the headers alone."""
    slices, others = [], 0
    for path in files_in(folder):
        found = read_slices(path)
        slices += found
        others += not found
    if others:
        _log.info("%s: %s not DICOM images", folder, f"{plural(others, 'file')} {'are' if others > 1 else 'is'}")
    stacks = [volume for stack in _alike(slices, lambda s: s.series or s.study) for volume in _volumes(stack)]
    # Some exports give each slice a series of its own: they are one where together they make a whole volume.
    alone = [s.head for s in stacks if len(s.slices) == 1 and s.head.series and s.head.study]
    for stack in _alike(alone, lambda s: s.study):
        if not stack.unfit and not (stack := stack.with_slices(stack.slices)).fault and not stack.repeated:
            together = {s.path for s in stack.slices}
            stacks = [s for s in stacks if s.head.path not in together] + [stack]
    return stacks


def _alike(slices: Iterable[Slice], series: Callable[[Slice], str]) -> list[Series]:
    """Slices that may be neighbours in one volume, by what they have in common."""
    groups: dict[tuple, list[list[Slice]]] = defaultdict(list)
    for s in slices:
        size = (s.rows, s.columns, s.colours, s.coded, s.quantity, s.frames > 1)
        stacks = groups[series(s), s.modality, *size, "LOCALIZER" in s.image_type, s.position is None]
        near = next((stack for stack in stacks if stack[0].near(s)), None)
        if near is None:
            stacks.append([s])
        else:
            near.append(s)
    found = []
    for stack in (stack for stacks in groups.values() for stack in stacks):
        # Of several values the first names the kernel; where a slice doesn't say, it is the one of the others.
        kernels = {s.kernel.split("\\")[0].upper(): None for s in stack if s.kernel} or {"": None}
        usual = next(iter(kernels)) if len(kernels) == 1 else ""
        parts: dict[str, list[Slice]] = defaultdict(list)
        for s in stack:
            parts[s.kernel.split("\\")[0].upper() or usual].append(s)
        found += [Series(tuple(part)) for part in parts.values()]
    return found


def _volumes(stack: Series) -> list[Series]:
    """A stack in order; its volumes, if a tag tells several apart that are at the same places or in turn."""
    if stack.unfit:
        return [stack]
    stack = stack.with_slices(stack.slices)
    keys = ["kernel", "image_type", "thickness", *_SCANS]
    if not stack.fault and not stack.repeated:
        keys = [key for key in _SCANS if stack.woven(key)]  # a second scan between the slices of the first
    for key in keys:
        members: dict[object, list[Slice]] = defaultdict(list)
        for s in stack.slices:
            members[getattr(s, key)].append(s)
        parts = [stack.with_slices(slices) for slices in members.values()]
        whole = [p for p in parts if len(p.slices) > 2 and not p.fault and not p.repeated]
        covers = any(len(p.places) == len(stack.places) for p in whole)
        if len(parts) > 1 and (covers or (len(whole) == len(parts) and key not in ("kernel", "image_type"))):
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
    if uid is None and several_patients(s for stack in fit for s in stack.slices):
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


def _choice_notes(best: Series, stacks: Sequence[Series], named: bool) -> list[str]:
    """What was left out, guessed or chosen among as a series was taken, for the report."""
    notes = []
    parts = [s for s in stacks if s is not best and s.uid == best.uid and "LOCALIZER" not in s.head.image_type]
    for part in parts:
        notes.append(f"{plural(len(part.slices), 'slice')} of this series left out ({_difference(part, best)})")
    if (count := len({s.series for s in best.slices})) > 1:
        notes.append(f"{count} SeriesInstanceUIDs, taken as one series by study, orientation and position")
    elif not best.uid:
        notes.append("no SeriesInstanceUID, taken as one series by study, orientation and position")
    others = [s for s in stacks if s.uid != best.uid and not s.unfit]
    if others and not named:
        notes.append(f"{len(others) + 1} CT series are there, taken: {best}")
        good = [s for s in others if not s.fault and list(s.merits.items())[:-1] == list(best.merits.items())[:-1]]
        if good:
            more = f" and {len(good) - 2} more" if len(good) > 2 else ""
            notes.append(f"as good: {'; '.join(map(str, good[:2]))}{more}")
        first = max(others, key=lambda s: list(s.merits.values()))
        if first.fault and list(first.merits.values()) > list(best.merits.values()):
            notes.append(f"passed over: {first}: {first.fault}")
        shown = [s for stack in (best, *others) for s in stack.slices]
        if not all(s.patient for s in shown) and (studies := len({s.study for s in shown})) > 1:
            notes.append(f"{studies} studies, and PatientID is blank: that they are of one patient is a guess")
    return notes


def _difference(part: Series, best: Series) -> str:
    """What tells slices from the others of their series."""
    a, b = part.head, best.head
    if a.colours != 1:
        return "colour pictures"
    if a.position is None:
        return "ImagePositionPatient is missing or not valid"
    if (a.rows, a.columns) != (b.rows, b.columns):
        return f"{a.columns} x {a.rows} pixels"
    if not b.near(a):
        return "another orientation or pixel size"
    names = {"kernel": "kernel", "image_type": "ImageType", "thickness": "slice thickness"}
    names |= {
        "frame_of_reference": "frame of reference",
        "acquisition": "acquisition",
        "phase": "phase",
        "modality": "modality",
    }
    return next((f"another {name}" for key, name in names.items() if getattr(a, key) != getattr(b, key)), "another volume")


@contextmanager
def _all_series(path: str | os.PathLike, where: str) -> Iterator[list[Series]]:
    """The stacks of a folder, or of a ZIP archive, or of the archives in a folder without other DICOM images."""
    archives = [path]
    if os.path.isdir(path):
        if stacks := list_series(path):
            yield stacks
            return
        archives = [file for file in files_in(path) if is_archive(file)]
    with tempfile.TemporaryDirectory(prefix="survival_map_") as folder:
        if archives:
            unzip(archives, folder, where)
        yield list_series(folder)


def read_dicom(path: str | os.PathLike, where: str, uid: str | None = None) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The chest CT of a folder or a ZIP archive, as :func:`choose_series` chooses it.

    Returns:
        (D, H, W) float32 in HU, indexed by column, row and position; its affine to RAS mm; notes for the report.

    Raises:
        InputError: as :func:`choose_series`; a file is damaged; slices at one position that differ; a ZIP archive that is
            too large, damaged or encrypted.
    """
    with _all_series(path, where) as stacks:
        series = choose_series(stacks, where, uid)
        held = (series.head.columns, series.head.rows, series.head.frames)
        if fault := size_fault(series.shape) or size_fault(held):
            raise InputError(f"{where}: {fault}")
        notes = _choice_notes(series, stacks, named=uid is not None)
        if series.repeated:
            _check_repeated(series, where)
        array = _hounsfield(series, where)
    affine = series.affine
    if series.tilted:
        image = straighten(array, affine)
        array, affine = image[0].numpy(), image.affine.numpy()
    return array, affine, notes + _series_notes(series)


def read_source(
    path: str | os.PathLike, where: str, uid: str | None, keywords: Sequence[str]
) -> tuple[Series, np.ndarray, pydicom.Dataset]:
    """The CT that :func:`read_dicom` reads, slice by slice as it is stored, for what goes back to where it came from.

    Args:
        keywords: tags to read of the first slice.

    Returns:
        the series; its HU on the grid of its own `affine`, (D, H, W) float32, sheared if the gantry was tilted; those tags.

    Raises:
        InputError: as :func:`read_dicom`.
    """
    with _all_series(path, where) as stacks:
        series = choose_series(stacks, where, uid)
        header = read_header(series.head.path, keywords)
        return series, _hounsfield(series, where), header


def _hounsfield(series: Series, where: str) -> np.ndarray:
    """(columns, rows, positions) float32 in HU, with air where there is padding."""
    array = _pixels([place[0] for place in series.places], where)
    if array.shape != series.shape:
        raise InputError(f"{where}: pixels are {array.shape}, headers say {series.shape} (expected the same)")
    for low, high in {s.padding for s in series.slices} - {None}:
        if high < _CT_HU[0] or low > _CT_HU[1]:
            array[(array >= low) & (array <= high)] = _AIR_HU
    return array


def _series_notes(series: Series) -> list[str]:
    """What a reader should know of the slices that were taken."""
    head, slices = series.head, series.slices
    turn = np.abs(np.subtract([s.orientation for s in slices], head.orientation)).max()
    files = {(s.uid, s.frame) for s in slices}
    projection = ", ".join(sorted(_PROJECTIONS.intersection(head.image_type)))
    notes = {
        f"{plural(series.repeated, 'slice')} repeated another and left out": series.repeated,
        "several slices share one SOPInstanceUID; their positions were used": len(files) < len(series.places),
        "slices of several frames of reference, taken as one volume": len({s.frame_of_reference for s in slices}) > 1,
        f"a projection ({projection}), not the CT itself": projection,
        "slice thickness varies within the series": len({s.thickness for s in slices}) > 1,
        "the kernel varies within the series": len({s.kernel for s in slices}) > 1,
        f"the slices' orientation varies by {np.degrees(turn):.2g} degrees, the median was taken": turn > 1e-4,
        "no rescale slope or intercept in the headers: values were taken as HU": head.intercept is None,
        "compressed with loss": any(s.lossy for s in slices),
        f"gantry tilt of {series.tilt:.1f} degrees straightened by resampling": series.tilted,
        "contrast agent given": head.contrast,
    }
    return [note for note, wanted in notes.items() if wanted]


def _check_repeated(series: Series, where: str) -> None:
    for place in series.places:
        first, *copies = (_pixels([s], where) for s in place)
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


def _pixels(slices: Sequence[Slice], where: str) -> np.ndarray:
    """(columns, rows, slices) float32 in HU."""
    if slices[0].frames == 1:
        return _decode([s.path for s in slices], where)
    frames: list[np.ndarray] = [np.empty(0)] * len(slices)
    for path in {s.path for s in slices}:
        volume = _decode([path], where).T  # the slowest axis first, as it lies in memory
        for k, s in enumerate(slices):
            if s.path == path and s.frame < len(volume):
                frames[k] = volume[s.frame]
    if any(frame.size == 0 for frame in frames):
        raise InputError(f"{where}: a multi-frame object holds fewer frames than its header says (expected a whole file)")
    return np.stack(frames).T


def _decode(paths: list[str], where: str) -> np.ndarray:
    try:
        image = itk.imread(paths if len(paths) > 1 else paths[0], pixel_type=itk.F)
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
