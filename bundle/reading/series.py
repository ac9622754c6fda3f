# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A stack of DICOM slices: where it lies, whether it is one whole CT volume, and how fit it is for a survival map."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from nibabel.affines import from_matvec

from bundle.reading.slices import GREY, Slice, several_patients

LARGEST_TILT = 31.0  # degrees; the gantry of a scanner tilts by up to 30
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
_OFF_STEP = 0.1  # of the slice spacing: what a position may be off
_ROUNDED_MM = 0.1  # what a gap between slices may be off in any case: some scanners write positions to 0.1 mm
_TILT_DEGREES = 0.5  # less moves the ends of a chest by 2 mm
_LARGEST_PIXELS = 4096  # a side; more than any CT has, and few enough to allocate
_LUNGS_MM = 200.0  # a shorter stack doesn't hold the lungs of an adult
_FINE_MM = 1.0  # thinner slices gain nothing
_CHEST = re.compile("chest|thora|torax", re.IGNORECASE)  # not lung, which names kernels too
_ELSEWHERE = re.compile("abd|pelvi|head|brain|skull|neck|spine|knee|hip|leg|foot|arm|heart|cardiac", re.IGNORECASE)


def plural(number: int, what: str) -> str:
    """A number of things in words: 1 slice, 2 slices, 2 series."""
    return f"{number} {what}{'' if number == 1 or what == 'series' else 's'}"


@dataclass(frozen=True)
class Series:
    """Slices of one DICOM series that share orientation, pixel size and kernel, but for noise in the headers.

    A series that mixes these is several `Series` with one `uid`. Positions and vectors are in mm, LPS, as in DICOM;
    :attr:`affine` alone is RAS.
    """

    slices: tuple[Slice, ...]  # at least one; in order along their normal if the stack is not unfit

    @property
    def head(self) -> Slice:
        """The first slice, for what all have in common."""
        return self.slices[0]

    @property
    def uid(self) -> str:
        """SeriesInstanceUID."""
        return self.head.series

    @cached_property
    def rows_and_columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Unit vectors along a row and along a column: the median of the slices', at right angles."""
        row, column = np.median([s.orientation for s in self.slices], 0).reshape(2, 3)
        row = row / np.linalg.norm(row)
        column = column - (column @ row) * row
        return row, column / np.linalg.norm(column)

    @cached_property
    def spacing(self) -> np.ndarray:
        """Between rows and between columns, mm: the median of the slices'."""
        return np.median([s.spacing for s in self.slices], 0)

    @cached_property
    def normal(self) -> np.ndarray:
        """Unit vector across the slices."""
        return np.cross(*self.rows_and_columns)

    @cached_property
    def plane(self) -> str:
        """axial, coronal, sagittal, or ? where the orientation is unknown."""
        if self.head.orientation is None:
            return "?"
        return ("sagittal", "coronal", "axial")[int(np.abs(self.normal).argmax())]

    def with_slices(self, slices: Iterable[Slice]) -> "Series":
        """A stack of these slices, in order along this one's normal."""
        return Series(tuple(sorted(slices, key=lambda s: (float(np.dot(s.position, self.normal)), s.path, s.frame))))

    @cached_property
    def places(self) -> tuple[tuple[Slice, ...], ...]:
        """The slices at each position."""
        places: list[tuple[Slice, ...]] = []
        for s in self.slices:
            near = places and math.dist(places[-1][0].position, s.position) < 0.01
            places.append((*places.pop(), s) if near else (s,))
        return tuple(places)

    @property
    def repeated(self) -> int:
        """Slices that are at the position of another one."""
        return len(self.slices) - len(self.places)

    def woven(self, key: str) -> bool:
        """Whether slices of one value of a tag lie between slices of another one."""
        values = [getattr(s, key) for s in self.slices]
        return sum(a != b for a, b in pairwise(values)) >= len(set(values)) > 1

    @cached_property
    def step(self) -> np.ndarray:
        """Mean vector from one position to the next."""
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
        return self.head.columns, self.head.rows, len(self.places)

    @cached_property
    def affine(self) -> np.ndarray:
        """From indices (column, row, position) to RAS mm; sheared if the gantry was tilted."""
        row, column = self.rows_and_columns
        step = self.step if self.tilted else self.normal * np.linalg.norm(self.step)
        axes = np.stack([row * self.spacing[1], column * self.spacing[0], step], 1)
        return _LPS_TO_RAS @ from_matvec(axes, self.places[0][0].position)

    @cached_property
    def unfit(self) -> str | None:
        """Why this is no stack of CT slices with a known place; None if it is one."""
        head, count = self.head, len(self.slices)
        cut = sum(not s.whole for s in self.slices)
        lost = sum(s.position is None for s in self.slices)
        sized = all(1 <= side <= _LARGEST_PIXELS for side in (head.rows, head.columns))
        size = f"{head.columns} x {head.rows} pixels (expected Columns and Rows of 1 to {_LARGEST_PIXELS})"
        checks = (
            (head.modality != "CT", f"modality {head.modality or 'missing'}, not CT"),
            ("LOCALIZER" in head.image_type, "a localiser"),
            (head.colours != 1, "colour pictures"),
            # GDCM inverts MONOCHROME1, and ends the process where a palette is missing.
            (head.coded != GREY, f"PhotometricInterpretation {head.coded} (expected {GREY})"),
            (head.quantity, f"RescaleType {head.quantity}, not HU"),
            (head.frames > 1 and lost, f"a multi-frame object with no place for {lost} of {plural(count, 'frame')}"),
            (head.orientation is None, "ImageOrientationPatient is missing or not valid"),
            (head.spacing is None, "PixelSpacing is missing or not valid"),
            (not sized, size),
            (cut, f"{cut} of {plural(count, 'file')} truncated, or longer than said (expected whole ones)"),
            (any(s.shifted for s in self.slices), "HighBit is not BitsStored - 1 (expected pixels in the lowest bits)"),
            (lost, f"ImagePositionPatient is missing or not valid in {lost} of {count} slices"),
            (count < 3, f"{plural(count, 'slice')} (expected at least 3)"),
        )
        return next((fault for wrong, fault in checks if wrong), None)

    @cached_property
    def fault(self) -> str | None:
        """What keeps the slices of a fit stack from being one whole volume; None if nothing does."""
        if several_patients(self.slices):
            return "its slices are of different patients (expected one)"
        for tag, values in (("RescaleSlope", "slope"), ("RescaleIntercept", "intercept")):
            found = [getattr(s, values) for s in self.slices]
            if 0 < (lacking := found.count(None)) < len(found):
                return f"{tag} is missing or not valid in {lacking} of {len(found)} slices (expected in all)"
            if self.head.frames > 1 and len(set(found)) > 1:
                return f"{tag} differs between frames (expected one for all)"
        if len(self.places) < 3:
            return f"its {len(self.slices)} slices are at {plural(len(self.places), 'position')} (expected at least 3)"
        if self.tilt > LARGEST_TILT:
            return (
                f"ImagePositionPatient advances at {self.tilt:.0f} degrees to the slices' normal by ImageOrientationPatient "
                f"(expected at most {LARGEST_TILT:g}, a tilted gantry)"
            )
        return self._uneven()

    def _uneven(self) -> str | None:
        """Where positions are not evenly spaced along a straight line."""
        positions = np.array([place[0].position for place in self.places])
        along = positions @ self.normal
        gaps = np.diff(along)
        usual = float(np.median(gaps))
        wide = np.flatnonzero(gaps > 1.5 * usual)
        if len(wide) and np.allclose(gaps / usual, np.round(gaps / usual), atol=_OFF_STEP):
            lost = plural(int(np.round(gaps / usual).sum()) - len(gaps), "slice")
            where = ", ".join(f"{along[k]:.1f} and {along[k + 1]:.1f} mm" for k in wide[:3])
            more = f" and {len(wide) - 3} more places" if len(wide) > 3 else ""
            return f"{lost} missing between {where}{more} along the scan (expected one every {usual:g} mm)"
        if np.abs(gaps - usual).max() > max(_OFF_STEP * usual, 1.01 * _ROUNDED_MM):
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

    @cached_property
    def merits(self) -> dict[str, float]:
        """What makes one CT better than another for a survival map, the weightiest first; large is good."""
        head = self.head
        words = f"{head.body_part} {head.description}"
        apart = float(np.linalg.norm(self.step)) if len(self.places) > 1 else 0.0
        extent = apart * len(self.places)
        kernel, rank = {False: ("soft", 2), None: ("unknown", 1), True: ("sharp", 0)}[sharp_kernel(head.kernel)]
        chest = 1 if _CHEST.search(words) else -1 if _ELSEWHERE.search(words) else 0
        derived = "DERIVED" in head.image_type
        return {
            self.plane: float(self.plane == "axial"),
            f"{extent:.0f} mm long": min(extent, _LUNGS_MM) // 50,
            {1: "chest", 0: "no body part", -1: "other body part"}[chest]: chest,
            "derived" if derived else "original": -float(derived),
            f"{kernel} kernel": rank,
            f"{apart:g} mm apart": -max(_FINE_MM, round(apart, 2)),
            f"{len(self.places)} slices": len(self.places),
        }

    def __str__(self) -> str:
        head = self.head
        thick = sorted({s.thickness for s in self.slices} - {None})
        parts = [
            head.modality or "no modality",
            f"'{head.description}'" if head.description else "no description",
            f"kernel {head.kernel}" if head.kernel else "",
            plural(len(self.slices), "slice"),
            f"{' and '.join(f'{mm:g}' for mm in thick[:3])} mm thick" if thick else "",
            self.plane.strip("?"),
            f"{head.columns} x {head.rows}" if head.rows else "",
        ]
        return f"{', '.join(filter(None, parts))} (series {self.uid or 'without UID'})"


def sharp_kernel(kernel: str) -> bool | None:
    """Whether a convolution kernel is one for lung or bone (edges overshoot, noise is high); None if it isn't known.

    Example::

        >>> sharp_kernel("B31f"), sharp_kernel("FC52"), sharp_kernel("LUNG"), sharp_kernel("")
        (False, True, True, None)
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
