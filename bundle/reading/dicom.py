# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Find the chest CT among the DICOM files of a folder, check that its slices make a volume, and read it in HU.

Headers are read by pydicom, which can be asked for a few tags and leaves the pixels alone. Pixels are read by ITK
(GDCM), as MONAI's `ITKReader` does: it decodes JPEG, JPEG-LS, JPEG 2000 and RLE without further packages, and applies
each slice's own rescale slope and intercept.
"""

from __future__ import annotations

import logging
import math
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import itk
import numpy as np
import pydicom
import torch
from monai.data import ITKReader, MetaTensor
from monai.transforms import SpatialResample

from bundle.errors import InputError
from bundle.reading.scan_file import check_size

__all__ = ["Series", "choose_series", "find_series", "list_series", "read_dicom", "straighten"]

_log = logging.getLogger(__name__)

_TAGS = (
    "PatientID PatientName SOPInstanceUID SeriesInstanceUID FrameOfReferenceUID Modality SeriesDescription ProtocolName "
    "BodyPartExamined ConvolutionKernel ImageType SliceThickness AcquisitionNumber TemporalPositionIdentifier "
    "ImagePositionPatient ImageOrientationPatient PixelSpacing Rows Columns SamplesPerPixel NumberOfFrames "
    "BitsAllocated ContrastBolusAgent"
).split()
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_AIR_HU = -1024.0
_OFF_STEP = 0.1  # of the slice spacing: what a position may be off
_TILT_DEGREES = 0.5  # less moves the ends of a chest by 2 mm
LARGEST_TILT = 31.0  # the gantry of a scanner tilts by up to 30
_LARGEST_PIXELS = 4096  # a side; more than any CT has, and few enough to allocate
_LUNGS_MM = 200.0  # a shorter stack doesn't hold the lungs of an adult
_FINE_MM = 1.0  # thinner slices gain nothing
_CHEST = re.compile("chest|thora|torax", re.IGNORECASE)  # not lung, which names kernels too
_ELSEWHERE = re.compile("abd|pelvi|head|brain|skull|neck|spine|knee|hip|leg|foot|arm|heart|cardiac", re.IGNORECASE)


@dataclass(frozen=True)
class Slice:
    """What the header of one file says about its slice; None where it doesn't, or not in a usable form."""

    path: str
    uid: str
    patient: str
    position: tuple[float, ...] | None  # of the first pixel's centre, LPS, mm
    thickness: float | None
    acquisition: str
    phase: str
    whole: bool  # the file is long enough for its pixels, or they are compressed


@dataclass(frozen=True)
class Series:
    """Slices of one DICOM series that share orientation, pixel size and kernel, in order along their normal.

    A series that mixes these is several `Series` with one `uid`.
    """

    uid: str
    modality: str
    description: str
    kernel: str
    body_part: str
    image_type: tuple[str, ...]
    frame_of_reference: str
    contrast: str
    rows: int
    columns: int
    colours: int
    frames: int
    spacing: tuple[float, ...] | None  # mm between rows, between columns
    orientation: tuple[float, ...] | None
    slices: tuple[Slice, ...]

    @cached_property
    def normal(self) -> np.ndarray:
        """Unit vector across the slices, LPS."""
        return np.cross(self.orientation[:3], self.orientation[3:])

    @cached_property
    def plane(self) -> str:
        """axial, coronal, sagittal, or ? where the orientation is unknown."""
        if self.orientation is None:
            return "?"
        return ("sagittal", "coronal", "axial")[int(np.abs(self.normal).argmax())]

    @cached_property
    def places(self) -> tuple[tuple[Slice, ...], ...]:
        """The slices at each position: more than one where a position is there more than once."""
        places: list[list[Slice]] = []
        for s in self.slices:
            if places and math.dist(places[-1][0].position, s.position) < 0.01:
                places[-1].append(s)
            else:
                places.append([s])
        return tuple(map(tuple, places))

    @cached_property
    def step(self) -> np.ndarray:
        """Mean vector from one position to the next, LPS, mm."""
        first, last = (np.array(self.places[i][0].position) for i in (0, -1))
        return (last - first) / (len(self.places) - 1)

    @cached_property
    def tilt(self) -> float:
        """Degrees between the slices' normal and the direction they advance in."""
        cosine = self.step @ self.normal / np.linalg.norm(self.step)
        return math.degrees(math.acos(min(1.0, cosine)))

    @property
    def tilted(self) -> bool:
        """Whether slices advance so far off their normal that the volume is sheared."""
        return self.tilt > _TILT_DEGREES

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels: columns, rows, positions."""
        return self.columns, self.rows, len(self.places)

    @cached_property
    def affine(self) -> np.ndarray:
        """From indices (column, row, position) to RAS mm; sheared if the gantry was tilted."""
        affine = np.eye(4)
        affine[:3, 0] = np.array(self.orientation[:3]) * self.spacing[1]
        affine[:3, 1] = np.array(self.orientation[3:]) * self.spacing[0]
        affine[:3, 2] = self.step if self.tilted else self.normal * np.linalg.norm(self.step)
        affine[:3, 3] = self.places[0][0].position
        return _LPS_TO_RAS @ affine

    @cached_property
    def unfit(self) -> str | None:
        """Why this is no stack of CT slices with a known place; None if it is one."""
        if self.modality != "CT":
            return f"modality {self.modality or 'missing'}, not CT"
        if "LOCALIZER" in self.image_type:
            return "a localiser"
        if self.colours != 1:
            return "colour pictures"
        if self.frames > 1:
            return "a multi-frame object (expected one file a slice)"
        for name, value in (("ImageOrientationPatient", self.orientation), ("PixelSpacing", self.spacing)):
            if value is None:
                return f"{name} is missing or not valid"
        if not 1 <= min(self.rows, self.columns) <= max(self.rows, self.columns) <= _LARGEST_PIXELS:
            return f"{self.columns} x {self.rows} pixels (expected Columns and Rows of 1 to {_LARGEST_PIXELS})"
        if cut := sum(not s.whole for s in self.slices):
            return f"{cut} of {_count(len(self.slices), 'file')} truncated (expected whole ones)"
        if lost := sum(s.position is None for s in self.slices):
            return f"ImagePositionPatient is missing or not valid in {lost} of {len(self.slices)} slices"
        if len(self.slices) < 3:
            return f"{_count(len(self.slices), 'slice')} (expected at least 3)"
        return None

    @cached_property
    def fault(self) -> str | None:
        """What keeps the slices of a fit stack from being one whole volume; None if nothing does."""
        if len({s.patient for s in self.slices} - {""}) > 1:
            return "its slices are of different patients (expected one)"
        if len(self.places) < 3:
            return f"its {len(self.slices)} slices are at {_count(len(self.places), 'position')} (expected at least 3)"
        if self.tilt > LARGEST_TILT:
            return (
                f"ImagePositionPatient advances at {self.tilt:.0f} degrees to the slices' normal by ImageOrientationPatient "
                f"(expected at most {LARGEST_TILT:g}, a tilted gantry)"
            )
        positions = np.array([place[0].position for place in self.places])
        along = positions @ self.normal
        gaps = np.diff(along)
        usual = float(np.median(gaps))
        wide = np.flatnonzero(gaps > 1.5 * usual)
        if len(wide) and np.allclose(gaps / usual, np.round(gaps / usual), atol=_OFF_STEP):
            lost = int(np.round(gaps / usual).sum()) - len(gaps)
            where = ", ".join(f"{along[k]:.1f} and {along[k + 1]:.1f} mm" for k in wide[:3])
            more = f" and {len(wide) - 3} more places" if len(wide) > 3 else ""
            return (
                f"{_count(lost, 'slice')} missing between {where}{more} along the scan (expected one every "
                f"{usual:g} mm)"
            )
        if np.abs(gaps - usual).max() > _OFF_STEP * usual:
            k = int(np.abs(gaps - usual).argmax())
            return (
                f"slices are {gaps.min():g} to {gaps.max():g} mm apart, the oddest between {along[k]:.1f} and "
                f"{along[k + 1]:.1f} mm (expected one spacing)"
            )
        line = positions[0] + np.arange(len(positions))[:, None] * self.step
        off = float(np.linalg.norm(positions - line, axis=1).max())
        if off > max(_OFF_STEP * usual, 0.5 * min(self.spacing)):
            return f"slices are up to {off:.1f} mm off a straight line (expected evenly spaced ones along one)"
        return None

    @property
    def repeated(self) -> int:
        """Slices that are at the position of another one."""
        return len(self.slices) - len(self.places)

    @cached_property
    def merits(self) -> dict[str, float]:
        """What makes one CT better than another for this purpose, the weightiest first; large is good."""
        words = f"{self.body_part} {self.description}"
        extent = float(np.linalg.norm(self.step)) * len(self.places) if len(self.places) > 1 else 0.0
        apart = extent / max(1, len(self.places))
        kernel, rank = {False: ("soft", 2), None: ("unknown", 1), True: ("sharp", 0)}[sharp_kernel(self.kernel)]
        chest = 1 if _CHEST.search(words) else -1 if _ELSEWHERE.search(words) else 0
        return {
            f"{self.plane}": float(self.plane == "axial"),
            f"{extent:.0f} mm long": min(extent, _LUNGS_MM) // 50,
            {1: "chest", 0: "no body part", -1: "other body part"}[chest]: chest,
            "derived" if "DERIVED" in self.image_type else "original": -float("DERIVED" in self.image_type),
            f"{kernel} kernel": rank,
            f"{apart:g} mm apart": -max(_FINE_MM, round(apart, 2)),
            f"{len(self.places)} slices": len(self.places),
        }

    def __str__(self) -> str:
        thick = sorted({s.thickness for s in self.slices} - {None})
        parts = [
            self.modality or "no modality",
            f"'{self.description}'" if self.description else "no description",
            f"kernel {self.kernel}" if self.kernel else "",
            _count(len(self.slices), "slice"),
            f"{' and '.join(f'{mm:g}' for mm in thick[:3])} mm thick" if thick else "",
            self.plane if self.plane != "?" else "",
            f"{self.columns} x {self.rows}" if self.rows else "",
        ]
        return f"{', '.join(filter(None, parts))} (series {self.uid or 'without UID'})"


def sharp_kernel(kernel: str) -> bool | None:
    """Whether a convolution kernel is one for lung or bone (edges overshoot, noise is high); None if it isn't known.

    Siemens and Canon number their kernels (B31f, Br40, FC08), GE names them, Philips has letters.
    """
    name = kernel.upper()
    if re.search("LUNG|BONE|EDGE|SHARP|DETAIL", name) or name in ("D", "E", "L", "YA", "YB", "YC", "YD"):
        return True
    if re.search("SOFT|STAND|STND|CHST|SMOOTH", name) or name in ("A", "B", "C"):
        return False
    if canon := re.match(r"FC(\d+)", name):
        return int(canon[1]) >= 30
    if siemens := re.match(r"[A-Z]{1,2}(\d\d)", name):
        return int(siemens[1]) >= 50
    return None


def list_series(folder: str | os.PathLike) -> list[Series]:
    """Every stack of slices in a folder and the folders in it, from the headers alone.

    Files that aren't DICOM are passed over. Links to folders aren't followed, as they may lead round in a circle.
    """
    groups: dict[tuple, list[tuple[Series, Slice]]] = defaultdict(list)
    others = 0
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            found = _read_header(os.path.join(root, name))
            if found is None:
                others += 1
            else:
                groups[_same_stack(found[0])].append(found)
    if others:
        _log.info("%s: %s not DICOM images", folder, f"{_count(others, 'file')} {'are' if others > 1 else 'is'}")
    stacks = []
    for members in groups.values():
        stacks += _parts(replace(members[0][0], slices=tuple(s for _, s in members)))
    return stacks


def choose_series(stacks: Sequence[Series], where: str, uid: str | None = None) -> Series:
    """The chest CT among the stacks of a folder; what was found, and why this one, goes to the log.

    Of CT stacks with at least 3 slices, the first by: axial; long enough for lungs (200 mm); said to be of the chest;
    original, not derived; soft rather than sharp kernel; thin slices (down to 1 mm); many. One that lacks slices or has
    another fault gives way to a whole one that is axial and as long, and is refused if there is none.

    Args:
        stacks: from :func:`list_series`.
        where: what to call the folder in messages.
        uid: SeriesInstanceUID to take instead; still it must be a CT.

    Raises:
        InputError: no CT among them; several patients; no series `uid`; the one chosen is no whole volume.
    """
    if uid is not None:
        found = [s for s in stacks if s.uid == uid]
        if not found:
            have = ", ".join(sorted({s.uid for s in stacks})[:8]) or "none"
            raise InputError(f"{where}: there is no DICOM series {uid} (found: {have})")
        stacks = found
    if not stacks:
        raise InputError(f"{where}: the folder holds no DICOM series (expected the slices of one scan)")
    fit = sorted((s for s in stacks if not s.unfit), key=lambda s: (tuple(s.merits.values()), s.uid), reverse=True)
    if not fit:
        for stack in stacks:
            _log.info("%s: %s: %s", where, stack, stack.unfit)
        reasons = Counter(s.unfit for s in stacks).most_common()
        listed = "; ".join(f"{_count(n, 'series')}: {reason}" for reason, n in reasons[:8])
        raise InputError(f"{where}: no CT volume among the DICOM files, {listed} (expected slices of a chest CT)")
    if uid is None and len({s.patient for stack in fit for s in stack.slices} - {""}) > 1:
        raise InputError(
            f"{where}: the folder holds scans of several patients (expected one; or name one with --series)"
        )

    best = fit[0]
    if best.fault:
        level = list(best.merits.values())[:2]
        best = next((s for s in fit if not s.fault and list(s.merits.values())[:2] >= level), best)
    if best.fault:
        raise InputError(f"{where}: {best}: {best.fault}")
    if len(stacks) > 1:
        _log.info("%s: %d DICOM series are there", where, len(stacks))
        for stack in stacks:
            if stack is best:
                why = f"taken ({'named by --series' if uid else ', '.join(best.merits)})"
            else:
                why = f"left: {stack.unfit or stack.fault or _worse(stack, best)}"
            _log.info("  %s: %s", stack, why)
    return best


def find_series(folder: str | os.PathLike, where: str, uid: str | None = None) -> Series:
    """:func:`list_series` and :func:`choose_series`."""
    return choose_series(list_series(folder), where, uid)


def read_dicom(
    folder: str | os.PathLike, where: str, uid: str | None = None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The chest CT of a folder, in HU.

    Args:
        folder: with the slices, in it or in folders within.
        where: what to call it in messages.
        uid: SeriesInstanceUID to take; None for :func:`choose_series`'s choice.

    Returns:
        (D, H, W) float32, indexed by column, row and position; its affine to RAS mm; notes for who reads the results.

    Raises:
        InputError: as :func:`choose_series`; a file is damaged; slices at one position that differ.
    """
    series = find_series(folder, where, uid)
    try:
        check_size(series.shape)
    except InputError as fault:
        raise InputError(f"{where}: {fault}") from fault
    notes = []
    if series.repeated:
        for place in series.places:
            first, *copies = (_pixels([s.path], where) for s in place)
            if not all(np.array_equal(first, copy) for copy in copies):
                at = float(np.array(place[0].position) @ series.normal)
                raise InputError(
                    f"{where}: {len(place)} different slices are at one position, {at:.1f} mm (expected one; {series})"
                )
        notes.append(f"{_count(series.repeated, 'slice')} repeated another and left out")
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
    if series.contrast:
        notes.append("contrast agent given")
    return array, affine, notes


def straighten(array: np.ndarray, affine: np.ndarray, mode: str = "bilinear", outside: float = _AIR_HU) -> MetaTensor:
    """Resample slices of a tilted gantry to a grid with right angles around them, of the same spacing.

    Args:
        array: (D, H, W).
        affine: RAS, with a third column that isn't perpendicular to the slices.
        mode: "bilinear" or "nearest".
        outside: value where there was no slice.

    Returns:
        (1, D', H', W') float32 with its affine.
    """
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    z = affine[:3, 2] / spacing[2]
    x = affine[:3, 0] / spacing[0]
    x = x - (x @ z) * z
    x /= np.linalg.norm(x)
    axes = np.stack([x, np.cross(z, x), z], 1)
    if axes[:, 1] @ affine[:3, 1] < 0:
        axes[:, 1] *= -1
    corners = np.stack(np.meshgrid(*((0, n - 1) for n in array.shape)), -1).reshape(-1, 3)
    corners = (corners @ affine[:3, :3].T + affine[:3, 3]) @ axes / spacing
    low, high = corners.min(0), corners.max(0)
    straight = np.eye(4)
    straight[:3, :3] = axes * spacing
    straight[:3, 3] = axes @ (low * spacing)
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
    """Whether ITK can read the pixels of one slice."""
    try:
        itk.imread(path, pixel_type=itk.F)
    except Exception:
        return False
    return True


def _read_header(path: str) -> tuple[Series, Slice] | None:
    """The slice in a file, and a series that is said to hold it alone; None if the file is no DICOM image."""
    if not os.path.isfile(path):  # a pipe would never end
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, about values that break the standard
        bare = path.lower().endswith((".dcm", ".ima"))  # old files may lack the preamble that says DICM
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS, force=bare)
        except Exception:  # whatever a damaged file makes of it
            return None
        series_uid = _text(header, "SeriesInstanceUID")
        if not (series_uid or _text(header, "Modality")):
            return None  # DICOMDIR and the like
        orientation = _numbers(header, "ImageOrientationPatient", 6)
        if orientation and not _orthonormal(orientation):
            orientation = None
        spacing = _numbers(header, "PixelSpacing", 2)
        thickness = _numbers(header, "SliceThickness", 1)
        found = Slice(
            path=path,
            uid=_text(header, "SOPInstanceUID"),
            patient=_text(header, "PatientID"),
            position=_numbers(header, "ImagePositionPatient", 3),
            thickness=thickness[0] if thickness else None,
            acquisition=_text(header, "AcquisitionNumber"),
            phase=_text(header, "TemporalPositionIdentifier"),
            whole=_is_whole(header, path),
        )
        series = Series(
            uid=series_uid,
            modality=_text(header, "Modality"),
            description=_without_name(_text(header, "SeriesDescription"), _text(header, "PatientName")),
            kernel=_text(header, "ConvolutionKernel"),
            body_part=f"{_text(header, 'BodyPartExamined')} {_text(header, 'ProtocolName')}".strip(),
            image_type=tuple(_text(header, "ImageType").upper().split("\\")),
            frame_of_reference=_text(header, "FrameOfReferenceUID"),
            contrast=_text(header, "ContrastBolusAgent"),
            rows=_integer(header, "Rows", 0),
            columns=_integer(header, "Columns", 0),
            colours=_integer(header, "SamplesPerPixel", 1),
            frames=_integer(header, "NumberOfFrames", 1),
            spacing=spacing if spacing and min(spacing) > 0 else None,
            orientation=orientation,
            slices=(found,),
        )
    return series, found


def _is_whole(header: pydicom.Dataset, path: str) -> bool:
    syntax = getattr(header.file_meta, "TransferSyntaxUID", None)
    if syntax is not None and (syntax.is_private or not syntax.is_transfer_syntax or syntax.is_compressed):
        return True
    pixels = _integer(header, "Rows", 0) * _integer(header, "Columns", 0) * _integer(header, "SamplesPerPixel", 1)
    return os.path.getsize(path) >= pixels * _integer(header, "BitsAllocated", 16) // 8


def _same_stack(series: Series) -> tuple:
    """Equal for slices that may be neighbours in one volume."""
    rounded = [tuple(round(v, 3) for v in values or ()) for values in (series.orientation, series.spacing)]
    localiser = "LOCALIZER" in series.image_type
    return (
        series.uid,
        series.modality,
        *rounded,
        series.rows,
        series.columns,
        series.kernel,
        localiser,
        series.colours,
    )


def _parts(stack: Series) -> list[Series]:
    """A stack in order; in parts, if it holds several volumes that thickness, acquisition or phase tells apart."""
    if stack.unfit:
        return [stack]
    stack = _ordered(stack, stack.slices)
    if not stack.fault and not stack.repeated:
        return [stack]
    splits: tuple[Callable[[Slice], object], ...] = (lambda s: s.thickness, lambda s: s.acquisition, lambda s: s.phase)
    for split in splits:
        members = defaultdict(list)
        for s in stack.slices:
            members[split(s)].append(s)
        parts = [_ordered(stack, slices) for slices in members.values()]
        if len(parts) > 1 and all(len(p.slices) > 2 and not p.fault and not p.repeated for p in parts):
            return parts
    return [stack]


def _ordered(stack: Series, slices: Iterable[Slice]) -> Series:
    return replace(stack, slices=tuple(sorted(slices, key=lambda s: (float(np.dot(s.position, stack.normal)), s.path))))


def _worse(stack: Series, best: Series) -> str:
    """The weightiest merit that a stack has less of."""
    pairs = zip(stack.merits.items(), best.merits.items())
    return next((f"{mine}, not {its}" for (mine, a), (its, b) in pairs if a < b), "as good")


def _text(header: pydicom.Dataset, keyword: str) -> str:
    """A value as printable text, "" if it is missing or not valid."""
    try:
        value = header.get(keyword)
    except Exception:  # pydicom converts values as they are asked for
        return ""
    if value is None:
        return ""
    text = "\\".join(map(str, value)) if isinstance(value, pydicom.multival.MultiValue) else str(value)
    return "".join(c for c in text if c.isprintable()).strip()[:64]


def _without_name(text: str, name: str) -> str:
    """Free text, which is shown, without the words of the patient's name, which must not be."""
    words = [re.escape(word) for word in re.split(r"[\^=,\s]+", name) if len(word) > 1]
    letter = r"[^\W\d_]"  # a digit or an underscore ends a word, too
    return re.sub(rf"(?<!{letter})({'|'.join(words)})(?!{letter})", "***", text, flags=re.IGNORECASE) if words else text


def _numbers(header: pydicom.Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    """That many finite numbers, or None."""
    try:
        value = header.get(keyword)
        numbers = tuple(float(v) for v in np.atleast_1d(value))
    except Exception:
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _integer(header: pydicom.Dataset, keyword: str, default: int) -> int:
    number = _numbers(header, keyword, 1)
    return int(number[0]) if number else default


def _orthonormal(orientation: Sequence[float]) -> bool:
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    return bool(np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=1e-2))


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 or what == 'series' else 's'}"
