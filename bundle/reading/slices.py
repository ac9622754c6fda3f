# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What the header of a DICOM file says of its slices, read by pydicom: a few tags, and never the pixels."""

import io
import math
import operator
import os
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pydicom
from pydicom.tag import BaseTag, Tag
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage

from bundle.errors import InputError

_TAGS = [
    Tag(keyword)
    for keyword in (
        "PatientID PatientName SOPClassUID SOPInstanceUID SeriesInstanceUID StudyInstanceUID FrameOfReferenceUID Modality "
        "SeriesDescription ProtocolName BodyPartExamined ConvolutionKernel ImageType SliceThickness AcquisitionNumber "
        "TemporalPositionIdentifier ImagePositionPatient ImageOrientationPatient PixelSpacing Rows Columns SamplesPerPixel "
        "NumberOfFrames BitsAllocated PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit RescaleSlope "
        "RescaleIntercept RescaleType BitsStored HighBit PhotometricInterpretation LossyImageCompression "
        "ContrastBolusAgent ContrastBolusAgentSequence"
    ).split()
]
GREY = "MONOCHROME2"
_NOT_HU = {"OD", "MGML", "Z_EFF", "ED", "EDW", "PCT"}  # iodine maps and the like, of scanners with several energies
_ENHANCED = (EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
_MODALITY = dict.fromkeys((CTImageStorage, *_ENHANCED), "CT")
_FRAME_TAGS = [Tag("SharedFunctionalGroupsSequence"), Tag("PerFrameFunctionalGroupsSequence")]
# DICM after the preamble; or, in old files without one, the first element: group 2 or 8, and a VR or a short length.
_DICOM = re.compile(rb"(?s).{128}DICM|[\x02\x08]\x00..([A-Z]{2}|..\x00\x00)|\x00[\x02\x08]..[A-Z]{2}")
_TURN = 2e-3  # of a direction cosine, as noise: a corner of the image moves by less than a millimetre
_STRETCH = 1e-3  # of a pixel's side, as noise: likewise
_HEADER_BYTES = 2**24  # what a deflated header is inflated to at most
_MOST_FILES = 100_000  # links may lead to whole disks


@dataclass(frozen=True)
class Slice:
    """One file, or one frame of one. A text is "" and a number is None where the header lacks it or has no usable one."""

    path: str
    frame: int  # from 0
    uid: str  # SOPInstanceUID
    series: str  # SeriesInstanceUID
    study: str  # StudyInstanceUID
    patient: str  # PatientID
    name: str  # PatientName, which is never shown
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
    frames: int  # in the file
    spacing: tuple[float, ...] | None  # mm between rows, between columns
    orientation: tuple[float, ...] | None  # of a row and of a column, LPS
    position: tuple[float, ...] | None  # of the first pixel's centre, LPS, mm
    thickness: float | None  # mm
    slope: float | None  # RescaleSlope
    intercept: float | None  # RescaleIntercept
    quantity: str  # RescaleType if it isn't HU
    coded: str  # PhotometricInterpretation
    shifted: bool  # the bits of a pixel aren't its lowest ones
    padding: tuple[float, float] | None  # HU from and to which pixels are no part of the image, as the header says
    lossy: bool  # compressed with loss at any time
    whole: bool  # the file is as long as its pixels need, or they are compressed

    def near(self, other: "Slice") -> bool:
        """Whether orientation and pixel size are those of another slice, but for noise."""
        side = min(self.spacing or (0.0,))
        turned = _close(self.orientation, other.orientation, _TURN)
        return turned and _close(self.spacing, other.spacing, _STRETCH * side)


def _close(a: Sequence[float] | None, b: Sequence[float] | None, tolerance: float) -> bool:
    if a is None or b is None:
        return a is b
    return a == b or max(abs(x - y) for x, y in zip(a, b, strict=True)) <= tolerance


def several_patients(slices: Iterable[Slice]) -> bool:
    """Whether slices are of several patients, by PatientID, and by PatientName where that is blank."""
    slices = list(slices)
    ids = {s.patient for s in slices if s.patient}
    others = {s.name for s in slices if not s.patient} - {s.name for s in slices if s.patient} - {""}
    return len(ids) + len(others) > 1


def files_in(folder: str | os.PathLike) -> Iterator[str]:
    """Every file in a folder and the folders in it, each folder once, whether it is there or a link to it is.

    Raises:
        InputError: more files than the scans of one patient have.
    """
    seen, count = set(), 0
    for root, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        count += len(names)
        if count > _MOST_FILES:
            raise InputError(f"{folder}: holds more than {_MOST_FILES} files (expected the scans of one patient)")
        yield from (os.path.join(root, name) for name in sorted(names))


def read_slices(path: str) -> list[Slice]:
    """What a file says of itself: a slice, or one for each frame; none if it is no DICOM image."""
    if not os.path.isfile(path):  # a pipe would never end
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom's, about values that break the standard
        try:
            header, whole = _header(path, _TAGS)
            if not (_text(header, "SeriesInstanceUID") or _text(header, "Modality")):
                return []  # DICOMDIR and the like
            many = _integer(header, "NumberOfFrames", 1) > 1 or _text(header, "SOPClassUID") in _ENHANCED
            frames = _frames(path, header) if many else [header]
        except Exception:  # whatever a damaged file makes of it
            return []
        return [_slice(path, frame, number, whole) for number, frame in enumerate(frames)]


def read_header(path: str, keywords: Iterable[str]) -> pydicom.Dataset:
    """Tags of a DICOM file, as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _header(path, [Tag(keyword) for keyword in keywords])[0]


def _slice(path: str, header: pydicom.Dataset, number: int, whole: bool) -> Slice:
    orientation = _numbers(header, "ImageOrientationPatient", 6)
    spacing = _numbers(header, "PixelSpacing", 2)
    return Slice(
        path=path,
        frame=number,
        uid=_text(header, "SOPInstanceUID"),
        series=_text(header, "SeriesInstanceUID"),
        study=_text(header, "StudyInstanceUID"),
        patient=_text(header, "PatientID"),
        name=_text(header, "PatientName"),
        modality=_text(header, "Modality").upper() or _MODALITY.get(_text(header, "SOPClassUID"), ""),
        description=without_name(_text(header, "SeriesDescription"), _text(header, "PatientName")),
        kernel=_text(header, "ConvolutionKernel"),
        body_part=f"{_text(header, 'BodyPartExamined')} {_text(header, 'ProtocolName')}".strip(),
        image_type=tuple((_text(header, "FrameType") or _text(header, "ImageType")).upper().split("\\")),
        frame_of_reference=_text(header, "FrameOfReferenceUID"),
        contrast=_text(header, "ContrastBolusAgent") or ("given" if header.get("ContrastBolusAgentSequence") else ""),
        acquisition=_text(header, "AcquisitionNumber") or _text(header, "FrameAcquisitionNumber"),
        phase=_text(header, "TemporalPositionIdentifier") or _text(header, "TemporalPositionIndex"),
        rows=_integer(header, "Rows", 0),
        columns=_integer(header, "Columns", 0),
        colours=_integer(header, "SamplesPerPixel", 1),
        frames=_integer(header, "NumberOfFrames", 1),
        spacing=spacing if spacing and min(spacing) > 0 else None,
        orientation=orientation if orientation and _orthonormal(orientation) else None,
        position=_numbers(header, "ImagePositionPatient", 3),
        thickness=_number(header, "SliceThickness"),
        slope=_number(header, "RescaleSlope"),
        intercept=_number(header, "RescaleIntercept"),
        quantity=quantity if (quantity := _text(header, "RescaleType").upper()) in _NOT_HU else "",
        coded=_text(header, "PhotometricInterpretation").upper() or GREY,
        shifted=(stored := _integer(header, "BitsStored", 0)) > 0 and _integer(header, "HighBit", stored - 1) != stored - 1,
        padding=_padding(header),
        lossy=_text(header, "LossyImageCompression") == "01",
        whole=whole,
    )


class _Bounded(io.BufferedReader):
    """A file that pydicom can't be made to inflate to more than a header: it reads what is deflated at once, and all."""

    deflated_from: int | None = None

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size >= 0:
            return super().read(size)
        self.deflated_from = self.tell()
        start = zlib.decompressobj(-zlib.MAX_WBITS).decompress(super().read(_HEADER_BYTES), _HEADER_BYTES)
        return zlib.compress(start, 0, -zlib.MAX_WBITS)


def _header(path: str, tags: list[BaseTag]) -> tuple[pydicom.Dataset, bool]:
    """The tags of a file, and whether the file is as long as its pixels need; ValueError where it is no DICOM."""
    with _Bounded(io.FileIO(path)) as file:
        if not _DICOM.match(file.peek(140)):
            raise ValueError(path)
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags, force=True)
        return header, _is_whole(header, file)


def _frames(path: str, header: pydicom.Dataset) -> list[pydicom.Dataset]:
    """A header for each frame of an enhanced object; the file's own where no place is given for each frame."""
    groups, _ = _header(path, _FRAME_TAGS)
    per_frame = groups.get("PerFrameFunctionalGroupsSequence") or []
    if len(per_frame) != _integer(header, "NumberOfFrames", 1):
        header.ImagePositionPatient = None
        return [header]
    frames = []
    for frame in per_frame:
        flat = pydicom.Dataset()
        flat.update(header)
        for group in (*(groups.get("SharedFunctionalGroupsSequence") or []), frame):
            for sequence in group:
                if sequence.VR == "SQ" and len(sequence.value):
                    flat.update(sequence.value[0])
        frames.append(flat)
    return frames


def _padding(header: pydicom.Dataset) -> tuple[float, float] | None:
    """Its values are stored like pixels, signed or not, whatever their VR says."""
    ends = [_number(header, keyword) for keyword in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if ends[0] is None:
        return None
    stored = [int(end) % 2**16 for end in ends if end is not None]
    if _integer(header, "PixelRepresentation", 0):
        stored = [end - 2**16 if end >= 2**15 else end for end in stored]
    slope, intercept = _number(header, "RescaleSlope") or 1.0, _number(header, "RescaleIntercept") or 0.0
    return min(stored) * slope + intercept, max(stored) * slope + intercept


def without_name(text: str, name: str) -> str:
    """Free text, which is shown, without the words of the patient's name, which must not be.

    Example::

        >>> without_name("Thorax DOE_JOHN", "Doe^John")
        'Thorax ***_***'
    """
    words = [re.escape(word) for word in re.split(r"[\^=,\s]+", name) if len(word) > 1]
    letter = r"[^\W\d_]"  # a digit or an underscore ends a word, too
    return re.sub(rf"(?<!{letter})({'|'.join(words)})(?!{letter})", "***", text, flags=re.IGNORECASE) if words else text


def _is_whole(header: pydicom.Dataset, file: _Bounded) -> bool:
    syntax = getattr(header.file_meta, "TransferSyntaxUID", None)
    if syntax is not None and (syntax.is_private or not syntax.is_transfer_syntax or syntax.is_compressed):
        return True
    pixels = math.prod(_integer(header, k, 1) for k in ("Rows", "Columns", "SamplesPerPixel", "NumberOfFrames"))
    size = pixels * _integer(header, "BitsAllocated", 16) // 8
    if file.deflated_from is None:
        return os.fstat(file.fileno()).st_size >= size
    file.seek(file.deflated_from)
    inflate, held = zlib.decompressobj(-zlib.MAX_WBITS), 0
    data = file.read(_HEADER_BYTES)
    while data and not inflate.eof and held <= size + _HEADER_BYTES:
        held += len(inflate.decompress(data, _HEADER_BYTES))
        data = inflate.unconsumed_tail or file.read(_HEADER_BYTES)
    return size <= held <= size + _HEADER_BYTES and inflate.eof


def _text(header: pydicom.Dataset, keyword: str) -> str:
    try:
        value = header.get(keyword)
    except Exception:  # pydicom converts values as they are asked for
        return ""
    if value is None:
        return ""
    text = "\\".join(map(str, value)) if isinstance(value, pydicom.multival.MultiValue) else str(value)
    text = text if text.isprintable() else "".join(c for c in text if c.isprintable())
    return text.strip()[:64]


def _numbers(header: pydicom.Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    try:
        if (value := header.get(keyword)) is None:
            return None
        numbers = tuple(map(float, value)) if isinstance(value, Sequence) else (float(value),)
    except Exception:
        return None
    return numbers if len(numbers) == count and all(map(math.isfinite, numbers)) else None


def _number(header: pydicom.Dataset, keyword: str) -> float | None:
    numbers = _numbers(header, keyword, 1)
    return numbers[0] if numbers else None


def _integer(header: pydicom.Dataset, keyword: str, default: int) -> int:
    number = _number(header, keyword)
    return default if number is None else int(number)


def _orthonormal(orientation: Sequence[float]) -> bool:
    row, column = orientation[:3], orientation[3:]
    pairs = ((row, row, 1), (column, column, 1), (row, column, 0))
    return all(abs(sum(map(operator.mul, a, b)) - product) <= 1e-2 for a, b, product in pairs)
