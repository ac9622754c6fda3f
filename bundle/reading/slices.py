# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What the header of one DICOM file says of its slice, read by pydicom: a few tags, and never the pixels."""

import math
import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pydicom

_TAGS = (
    "PatientID PatientName SOPInstanceUID SeriesInstanceUID FrameOfReferenceUID Modality SeriesDescription ProtocolName "
    "BodyPartExamined ConvolutionKernel ImageType SliceThickness AcquisitionNumber TemporalPositionIdentifier "
    "ImagePositionPatient ImageOrientationPatient PixelSpacing Rows Columns SamplesPerPixel NumberOfFrames "
    "BitsAllocated ContrastBolusAgent"
).split()


@dataclass(frozen=True)
class Slice:
    """One file. A text is "" and a number is None where the header lacks it or has it in no usable form."""

    path: str
    uid: str  # SOPInstanceUID
    series: str  # SeriesInstanceUID
    patient: str
    modality: str
    description: str
    kernel: str
    body_part: str
    image_type: tuple[str, ...]
    frame_of_reference: str
    contrast: str
    acquisition: str
    phase: str
    rows: int
    columns: int
    colours: int
    frames: int
    spacing: tuple[float, ...] | None  # mm between rows, between columns
    orientation: tuple[float, ...] | None  # of a row and of a column, LPS
    position: tuple[float, ...] | None  # of the first pixel's centre, LPS, mm
    thickness: float | None  # mm
    whole: bool  # the file is long enough for its pixels, or they are compressed

    @property
    def stack(self) -> tuple:
        """Equal for slices that may be neighbours in one volume."""
        rounded = [tuple(round(v, 3) for v in values or ()) for values in (self.orientation, self.spacing)]
        localiser = "LOCALIZER" in self.image_type
        size = (self.rows, self.columns, self.colours)
        return self.series, self.modality, *rounded, *size, self.kernel, localiser


def read_slice(path: str) -> Slice | None:
    """What a file says of itself; None if it is no DICOM image."""
    if not os.path.isfile(path):  # a pipe would never end
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, about values that break the standard
        bare = path.lower().endswith((".dcm", ".ima"))  # old files may lack the preamble that says DICM
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS, force=bare)
        except Exception:  # whatever a damaged file makes of it
            return None
        if not (_text(header, "SeriesInstanceUID") or _text(header, "Modality")):
            return None  # DICOMDIR and the like
        orientation = _numbers(header, "ImageOrientationPatient", 6)
        spacing = _numbers(header, "PixelSpacing", 2)
        thickness = _numbers(header, "SliceThickness", 1)
        return Slice(
            path=path,
            uid=_text(header, "SOPInstanceUID"),
            series=_text(header, "SeriesInstanceUID"),
            patient=_text(header, "PatientID"),
            modality=_text(header, "Modality"),
            description=without_name(_text(header, "SeriesDescription"), _text(header, "PatientName")),
            kernel=_text(header, "ConvolutionKernel"),
            body_part=f"{_text(header, 'BodyPartExamined')} {_text(header, 'ProtocolName')}".strip(),
            image_type=tuple(_text(header, "ImageType").upper().split("\\")),
            frame_of_reference=_text(header, "FrameOfReferenceUID"),
            contrast=_text(header, "ContrastBolusAgent"),
            acquisition=_text(header, "AcquisitionNumber"),
            phase=_text(header, "TemporalPositionIdentifier"),
            rows=_integer(header, "Rows", 0),
            columns=_integer(header, "Columns", 0),
            colours=_integer(header, "SamplesPerPixel", 1),
            frames=_integer(header, "NumberOfFrames", 1),
            spacing=spacing if spacing and min(spacing) > 0 else None,
            orientation=orientation if orientation and _orthonormal(orientation) else None,
            position=_numbers(header, "ImagePositionPatient", 3),
            thickness=thickness[0] if thickness else None,
            whole=_is_whole(header, path),
        )


def without_name(text: str, name: str) -> str:
    """Free text, which is shown, without the words of the patient's name, which must not be.

    Example::

        >>> without_name("Thorax DOE_JOHN", "Doe^John")
        'Thorax ***_***'
    """
    words = [re.escape(word) for word in re.split(r"[\^=,\s]+", name) if len(word) > 1]
    letter = r"[^\W\d_]"  # a digit or an underscore ends a word, too
    return re.sub(rf"(?<!{letter})({'|'.join(words)})(?!{letter})", "***", text, flags=re.IGNORECASE) if words else text


def _is_whole(header: pydicom.Dataset, path: str) -> bool:
    syntax = getattr(header.file_meta, "TransferSyntaxUID", None)
    if syntax is not None and (syntax.is_private or not syntax.is_transfer_syntax or syntax.is_compressed):
        return True
    pixels = _integer(header, "Rows", 0) * _integer(header, "Columns", 0) * _integer(header, "SamplesPerPixel", 1)
    return os.path.getsize(path) >= pixels * _integer(header, "BitsAllocated", 16) // 8


def _text(header: pydicom.Dataset, keyword: str) -> str:
    try:
        value = header.get(keyword)
    except Exception:  # pydicom converts values as they are asked for
        return ""
    if value is None:
        return ""
    text = "\\".join(map(str, value)) if isinstance(value, pydicom.multival.MultiValue) else str(value)
    return "".join(c for c in text if c.isprintable()).strip()[:64]


def _numbers(header: pydicom.Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    try:
        numbers = tuple(map(float, np.atleast_1d(header.get(keyword))))
    except Exception:
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _integer(header: pydicom.Dataset, keyword: str, default: int) -> int:
    number = _numbers(header, keyword, 1)
    return int(number[0]) if number else default


def _orthonormal(orientation: Sequence[float]) -> bool:
    row, column = np.array(orientation[:3]), np.array(orientation[3:])
    return bool(np.allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=1e-2))
