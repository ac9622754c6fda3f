# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Whether a file is the scan that its name and header say, found out in bounded memory; the voxels of a NIfTI."""

import gzip
import math
import os
import re
import stat
import zlib
from collections.abc import Iterator, Sequence
from itertools import product
from typing import BinaryIO, NamedTuple

import itk
import nibabel as nib
import numpy as np
from isal import isal_zlib
from nibabel.volumeutils import apply_read_scaling

from bundle.errors import InputError

IMAGE_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")

# 1024 x 1024 x 1024: four times a CT of 1000 slices of 512 x 512. As float32 that is 4 GiB, what one scan may take.
MOST_VOXELS = 2**30

_HEADER_BYTES = 2**16  # text headers are far shorter
_CHUNK_BYTES = 2**20
_TRAILING_BYTES = 4096  # padding that some programs leave after the voxels
_NIFTI_BYTES = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_EXPECTED = "(expected a whole scan)"
_SCALES = 0.01  # what voxel sizes may differ by rounding, as a share
_APART_MM = 1.0  # what sform and qform may
_QUATERNION = -1e-5  # what rounding to float32 leaves of the square of a number that is 0
_UNITS_MM = {"meter": 1000.0, "micron": 0.001}  # as nibabel calls them
_NRRD_SPACES = ("left-posterior-superior", "right-anterior-superior", "left-anterior-superior", "lps", "ras", "las")  # ITK's
_AS_TEXT = ("text", "txt", "ascii", "hex")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")

_MAGIC = {
    rb"\x1f\x8b": "compressed by gzip",
    rb"NRRD": "NRRD",
    rb"PK\x03\x04": "a ZIP archive",
    rb"\x93NUMPY": "a NumPy array",
    rb"\x89PNG": "a PNG picture",
    rb"\xff\xd8\xff": "a JPEG picture",
    rb"%PDF": "a PDF",
    rb"\x89HDF": "HDF5",
    rb"\x80[\x02-\x05]": "a Python pickle",
    rb"version https://git-lfs": "a pointer of Git LFS, which fetches the file by: git lfs pull",
    rb"(?s:.{128})DICM": "one DICOM file",
    rb"(?s:.{344})n[+i]1": "NIfTI without compression",
    rb"\s*[{[]": "JSON",
    rb"\s*<": "HTML or XML",
    rb"\s*(ObjectType|NDims) *=": "MetaImage",
}


class _Claim(NamedTuple):
    """What a header says of the voxels."""

    shape: tuple[int, ...]
    size: int  # bytes of all voxels
    source: str  # file which holds them
    offset: int | None  # byte where their stream begins; None: they are written as text
    skip: int  # bytes of the (inflated) stream before the voxels
    compressed: bool
    notes: list[str]  # on what the header leaves open
    nifti: nib.Nifti1Header | None = None


def scan_stem(name: str) -> str | None:
    """The name of a scan's file without its suffix; None if the suffix is not one of :data:`IMAGE_SUFFIXES`."""
    suffix = next((s for s in IMAGE_SUFFIXES if name.lower().endswith(s)), None)
    return name[: -len(suffix)] if suffix else None


def check_scan_file(path: str | os.PathLike) -> list[str]:
    """Refuse a file that isn't a whole NIfTI, NRRD or MetaImage of at most :data:`MOST_VOXELS` real numbers.

    Compressed voxels are inflated once, a megabyte at a time and never beyond what the header claims: not all readers
    notice a flipped bit, and neither a small file that inflates to many gigabytes nor a header that claims them may
    cost memory.

    Returns:
        notes on what the header leaves open, or says in two ways.

    Raises:
        InputError: what is wrong with the file and what was expected, without its name.
    """
    return _checked(os.fspath(path))[0].notes


def read_nifti(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The voxels of a NIfTI, scaled as its header says, its affine (RAS, mm), and notes; checked on the way.

    Raises:
        InputError: as :func:`check_scan_file`.
    """
    claim, data = _checked(os.fspath(path), keep=True)
    array = np.require(data[claim.skip :].view(claim.nifti.get_data_dtype()), requirements="A")
    array = array.reshape(claim.shape, order="F")
    if array.ndim == 4 and len(array) == 1 < array.shape[3]:
        array = array[0]
        claim.notes.append("the NIfTI has a leading axis of 1, which was dropped; its affine is of the three others")
    affine = claim.nifti.get_best_affine()
    affine[:3] *= _millimetres(claim.nifti, affine)
    return apply_read_scaling(array, *claim.nifti.get_slope_inter()), affine, claim.notes


def _checked(path: str, keep: bool = False) -> tuple[_Claim, np.ndarray | None]:
    """What the header claims; with `keep` the bytes of the (inflated) stream as well, up to the last voxel."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise InputError("is neither a regular file nor a folder (expected a scan)")
    if status.st_size == 0:
        raise InputError(f"is empty, 0 bytes {_EXPECTED}")
    try:
        with open(path, "rb") as file:
            start = file.read(_HEADER_BYTES)
        parse = {".nii": _nifti, ".gz": _nifti, ".nrrd": _nrrd}.get(os.path.splitext(path.lower())[1], _meta)
        claim = parse(path, start)
        if fault := size_fault(claim.shape):
            raise InputError(fault)
        return claim, _check_voxels(claim, keep)
    except OSError as error:
        raise InputError(f"cannot be opened: {error.strerror or error} {_EXPECTED}") from error


def size_fault(shape: Sequence[int]) -> str | None:
    """That a header claims no voxels, or more than :data:`MOST_VOXELS`."""
    if not shape or min(shape) < 1:
        return f"its header claims {_by(shape)} voxels (expected at least 1 each way)"
    if math.prod(shape) > MOST_VOXELS:
        return f"its header claims {_by(shape)} voxels (expected at most {MOST_VOXELS} in all)"
    return None


def _nifti(path: str, start: bytes) -> _Claim:
    zipped = path.lower().endswith(".gz")
    if zipped != start.startswith(b"\x1f\x8b"):
        raise InputError(f"is {_looks_like(start)} (expected {'gzip-compressed ' if zipped else ''}NIfTI)")
    if zipped:
        try:
            with gzip.open(path) as file:
                start = file.read(max(_NIFTI_BYTES))
        except (EOFError, OSError, zlib.error) as error:
            what = "its gzip stream ends or breaks within the header"
            raise InputError(f"{what}: truncated or damaged {_EXPECTED}") from error
    # Its first number says which NIfTI it is and in which order its bytes are; nibabel would guess that from others.
    first = {int.from_bytes(start[:4], order): order for order in ("big", "little")}
    size = next((size for size in _NIFTI_BYTES if size in first), None)
    if size is None:
        raise InputError(f"holds {_looks_like(start)} (expected NIfTI)")
    if len(start) < size:
        raise InputError(f"ends within its header, after {len(start)} bytes: truncated {_EXPECTED}")
    header = _NIFTI_BYTES[size](start[:size], endianness=first[size], check=False)
    if not bytes(header["magic"]).startswith(b"n+"):
        raise InputError(f"its header has the magic {bytes(header['magic'])!r} (expected n+1 or n+2, NIfTI in one file)")
    rank = int(header["dim"][0])
    if not 1 <= rank <= 7:
        raise InputError(f"its header claims {rank} dimensions (expected 3)")
    shape = tuple(int(n) for n in header["dim"][1 : rank + 1])
    try:
        dtype = header.get_data_dtype()
    except (nib.spatialimages.HeaderDataError, KeyError) as error:
        what = f"its header has the data type {int(header['datatype'])}, which NIfTI has not"
        raise InputError(f"{what} (expected one of real numbers)") from error
    if dtype.kind not in "iuf":
        what = "complex numbers" if dtype.kind == "c" else "colours (RGB)"
        raise InputError(f"its voxels are {what} (expected one real number each, HU)")
    offset = float(header["vox_offset"])
    if not size <= offset < 2**31:
        raise InputError(f"its header says that voxels begin at byte {offset:g} (expected {size + 4} or a little more)")
    notes = _nifti_notes(header, shape)
    return _Claim(shape, math.prod(shape) * dtype.itemsize, path, 0, int(offset), zipped, notes, header)


def _nifti_notes(header: nib.Nifti1Header, shape: Sequence[int]) -> list[str]:
    """Where a header says in two ways how large voxels are and how they lie, or in none; it is mended as nibabel does."""
    if not header["pixdim"][1:4].all():
        raise InputError(f"its pixdim is {_by(header['pixdim'][1:4])} (expected the size of a voxel, mm)")
    header.check_fix(error_level=100)  # all that it would refuse is refused by now
    header.quaternion_threshold = _QUATERNION
    notes = []
    unit = header.get_xyzt_units()[0]
    if unit in _UNITS_MM:
        mm = _millimetres(header, header.get_base_affine())
        notes.append(f"the NIfTI's unit of length is {unit}; its sizes were {'converted to' if mm != 1 else 'taken for'} mm")
    if math.isfinite(header["scl_slope"]) and header["scl_slope"] and not math.isfinite(header["scl_inter"]):
        header["scl_inter"] = 0
        notes.append("the NIfTI's scl_inter is no number and was taken for 0")
    if not header["sform_code"]:
        if not header["qform_code"]:
            notes.append(_guess("NIfTI", "sform and qform code 0"))
        try:
            header.get_best_affine()
        except ValueError as error:
            raise InputError(f"its qform is no rotation: {error} (expected a unit quaternion)") from error
        return notes
    sform, pixdim = header.get_sform(), header["pixdim"][1:4].astype(float)
    if not np.isfinite(sform).all() or not np.linalg.det(sform[:3, :3]):
        return notes  # the reader says so
    # The slices of a tilted gantry are as far apart as the sform's column is long, or as their planes are.
    sizes = np.linalg.norm(sform[:3, :3], axis=0), 1 / np.linalg.norm(np.linalg.inv(sform[:3, :3]), axis=1)
    off = np.abs(np.array(sizes) - pixdim).min(0)
    if not (off <= _SCALES * pixdim)[: len(shape)].all():
        by_pixdim, by_sform = (" x ".join(f"{mm:.3g}" for mm in each) for each in (pixdim, sizes[0]))
        raise InputError(f"its voxels are {by_pixdim} mm by pixdim, {by_sform} mm by the sform (expected the same)")
    if header["qform_code"]:
        try:
            qform = header.get_qform()
        except ValueError:
            return [*notes, "the NIfTI's qform is no rotation; the sform was taken"]
        corners = list(product(*((0, n - 1) for n in (*shape, 1, 1)[:3])))
        apart = nib.affines.apply_affine(sform, corners) - nib.affines.apply_affine(qform, corners)
        if (mm := np.linalg.norm(apart, axis=1).max()) > _APART_MM:
            mirrored = " and mirror images" if np.linalg.det(sform) * np.linalg.det(qform) < 0 else ""
            notes.append(f"the NIfTI's sform and qform are up to {mm:.0f} mm apart{mirrored}; the sform was taken")
    return notes


def _millimetres(header: nib.Nifti1Header, affine: np.ndarray) -> float:
    """How many mm the header's unit of length is; 1 where voxels of that unit would be no scan's, but mm are."""
    mm = _UNITS_MM.get(header.get_xyzt_units()[0], 1.0)
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    return mm if 0.1 <= sizes.max() * mm <= 100 or not 0.1 <= sizes.max() <= 100 else 1.0


def _guess(kind: str, why: str) -> str:
    return f"the {kind} doesn't say how the scan lies ({why}): left and right are a guess"


def _nrrd(path: str, start: bytes) -> _Claim:
    if not start.startswith(b"NRRD"):
        raise InputError(f"is {_looks_like(start)} (expected NRRD)")
    text, end, _ = re.split(rb"(\r?\n\r?\n)", start, maxsplit=1) if re.search(rb"\n\r?\n", start) else (start, b"", b"")
    fields = dict(re.findall(r"^([a-z ]+): *(.*?)\r?$", text.decode("latin-1").lower(), re.MULTILINE))
    if other := fields.get("data file", fields.get("datafile")):
        raise InputError(f"its voxels are in another file, {other[:80]!r} (expected header and voxels in one file)")
    if lacking := [name for name in ("type", "dimension", "sizes", "encoding") if name not in fields]:
        raise InputError(f"its NRRD header lacks {', '.join(lacking)} {_EXPECTED}")
    if not end:
        raise InputError(f"ends within its header: truncated {_EXPECTED}")
    encoding = fields["encoding"]
    if encoding not in ("raw", "gzip", "gz", *_AS_TEXT):
        raise InputError(f"its NRRD encoding is {encoding[:80]} (expected raw, gzip or text)")
    if (units := set(re.findall(r'"(.*?)"', fields.get("space units", "")))) - {"", "mm", "millimeter", "millimeters"}:
        raise InputError(f"its NRRD space units are {', '.join(sorted(units))[:80]} (expected mm)")
    sized = fields.get("space directions") if "space" in fields or "space dimension" in fields else fields.get("spacings")
    if not sized or "nan" in sized:
        raise InputError("its NRRD header gives no voxel size (expected space directions with a space, or spacings)")
    shape, size = _itk_claim(path, f"NRRD, sizes {fields['sizes'][:80]}")
    oriented = "space directions" in fields and fields.get("space") in _NRRD_SPACES
    notes = [] if oriented else [_guess("NRRD", "no space, or one that names no sides")]
    offset = None if encoding in _AS_TEXT else len(text) + len(end)
    return _Claim(shape, size, path, offset, 0, encoding in ("gzip", "gz"), notes)


def _meta(path: str, start: bytes) -> _Claim:
    found = re.search(rb"^ElementDataFile *= *(.*?) *\r?\n?$", start, re.MULTILINE)
    text = start[: found.end()] if found else start
    fields = dict(re.findall(r"^(\w+) *= *(.*?) *\r?$", text.decode("latin-1"), re.MULTILINE))
    if not {"NDims", "ObjectType"} & fields.keys():
        raise InputError(f"is {_looks_like(start)} (expected MetaImage)")
    if lacking := [name for name in ("NDims", "DimSize", "ElementType", "ElementDataFile") if name not in fields]:
        raise InputError(f"its MetaImage header lacks {', '.join(lacking)} {_EXPECTED}")
    if fault := _meta_fault(fields):
        raise InputError(f"its MetaImage header has {fault} (expected NDims, then numbers for each axis)")
    spacing = fields.get("ElementSpacing", fields.get("ElementSize", ""))
    if not spacing or min(map(float, spacing.split())) <= 0:
        raise InputError(f"its MetaImage ElementSpacing is {spacing or 'missing'} (expected the size of a voxel, mm)")
    if (unit := fields.get("DistanceUnits", "mm")) not in ("mm", "?"):
        raise InputError(f"its MetaImage DistanceUnits are {unit[:80]} (expected mm)")
    source, offset = fields["ElementDataFile"], found.end()
    if source.upper() != "LOCAL":
        if source != os.path.basename(source) or re.match("LIST|$", source.upper()) or "%" in source:
            what = f"its voxels are in another place, {source[:80]!r}"
            raise InputError(f"{what} (expected LOCAL, or one file beside the header)")
        beside = os.path.join(os.path.dirname(path), source)
        if not os.path.isfile(beside):
            raise InputError(f"its voxels are in {source[:80]!r}, which is not beside it {_EXPECTED}")
        source, offset = beside, max(0, int(float(fields.get("HeaderSize", 0))))
    else:
        source = path
        offset += start[offset : offset + 1] == b"\n"
    shape, size = _itk_claim(path, f"MetaImage, DimSize {fields['DimSize'][:80]}")
    compressed = fields.get("CompressedData", "False").lower() == "true"
    as_text = fields.get("BinaryData", "True").lower() == "false"
    notes = (
        [] if {"TransformMatrix", "Rotation", "Orientation"} & fields.keys() else [_guess("MetaImage", "no TransformMatrix")]
    )
    return _Claim(shape, size, source, None if as_text else offset, 0, compressed, notes)


def _meta_fault(fields: dict[str, str]) -> str | None:
    """A field that isn't one number, or as many as there are axes: ITK's parser crashes on some such headers."""
    order = list(fields)
    rank = int(fields["NDims"]) if fields["NDims"] in ("2", "3", "4") else 0
    counts = dict.fromkeys(("NDims", "ElementNumberOfChannels", "HeaderSize"), 1)
    counts |= dict.fromkeys(("DimSize", "ElementSpacing", "ElementSize", "CenterOfRotation"), rank)
    counts |= dict.fromkeys(("Offset", "Position", "Origin"), rank)
    counts |= dict.fromkeys(("TransformMatrix", "Rotation", "Orientation"), rank**2)
    for name, count in counts.items():
        words = fields.get(name, "").split()
        if name in fields and not (rank and len(words) == count and all(map(_NUMBER.fullmatch, words))):
            return f"{name} = {fields[name][:80]}"
        if name in fields and order.index(name) < order.index("NDims"):
            return f"{name} before NDims"
    return None


def _itk_claim(path: str, what: str) -> tuple[tuple[int, ...], int]:
    """Shape and bytes of the voxels, by ITK's own parser of the header."""
    try:
        header = itk.ImageIOFactory.CreateImageIO(path, itk.CommonEnums.IOFileMode_ReadMode)
        header.SetFileName(path)
        header.ReadImageInformation()
        shape = tuple(int(header.GetDimensions(i)) for i in range(header.GetNumberOfDimensions()))
        channels, pixel = header.GetNumberOfComponents(), header.GetPixelTypeAsString(header.GetPixelType())
        size = math.prod(shape) * header.GetComponentSize()
    except Exception as error:  # ITK has kinds of its own, and None where no reader takes the file
        raise InputError(f"its header cannot be understood ({what}): damaged {_EXPECTED}") from error
    if channels != 1:
        raise InputError(f"its voxels are {channels} values each, {pixel} (expected one real number each, HU)")
    return shape, size


def _check_voxels(claim: _Claim, keep: bool) -> np.ndarray | None:
    """Refuse voxels that aren't there, or more than were claimed; `keep` returns the stream up to the last of them."""
    if claim.offset is None:
        return None  # text may write a voxel in any number of characters; the reader counts them
    expected = claim.skip + claim.size
    data = np.empty(expected, np.uint8) if keep else None  # takes no memory before it is written to
    with open(claim.source, "rb") as file:
        held = os.fstat(file.fileno()).st_size - claim.offset
        file.seek(claim.offset)
        if claim.compressed:
            held = 0
            try:
                for piece in _inflated(file, expected):
                    wanted = min(len(piece), expected - held)
                    if keep and wanted > 0:
                        data[held : held + wanted] = np.frombuffer(piece, np.uint8, wanted)
                    held += len(piece)
                    if held > expected + _TRAILING_BYTES:
                        break
            except EOFError as error:
                what = f"its compressed voxels end after {max(0, held - claim.skip)} of {claim.size} bytes"
                raise InputError(f"{what}: truncated {_EXPECTED}") from error
            except isal_zlib.error as error:
                raise InputError(f"its compressed voxels do not decode: damaged {_EXPECTED}") from error
        elif keep and held >= expected:
            file.readinto(data)
    if held < expected:
        what = f"holds {max(0, held - claim.skip)} of the {claim.size} bytes that {_by(claim.shape)} voxels take"
        raise InputError(f"{what}: truncated, or a wrong header {_EXPECTED}")
    if held > expected + _TRAILING_BYTES:
        what = f"holds more than the {claim.size} bytes that the {_by(claim.shape)} voxels of its header take"
        raise InputError(f"{what}: a wrong header, or made to fill the memory {_EXPECTED}")
    return data


def _inflated(file: BinaryIO, expected: int) -> Iterator[bytes]:
    """The inflated pieces of a gzip (any number of members) or zlib stream, whose checksums are verified.

    What follows the `expected` bytes and begins like another member, but isn't one, is padding.
    """
    data, held = file.read(_CHUNK_BYTES), 0
    while data:
        inflate = isal_zlib.decompressobj(wbits=47)  # gzip or zlib, whichever its header says
        enough = held >= expected
        while not inflate.eof:
            try:
                piece = inflate.decompress(data, _CHUNK_BYTES)
            except isal_zlib.error:
                if enough:
                    return
                raise
            yield piece
            held += len(piece)
            data = inflate.unconsumed_tail or (b"" if inflate.eof else file.read(_CHUNK_BYTES))
            if not data and not inflate.eof and len(piece) < _CHUNK_BYTES:
                if enough:
                    return
                raise EOFError
        data = inflate.unused_data
        data += file.read(_CHUNK_BYTES) if len(data) < 2 else b""
        if not data.startswith(b"\x1f\x8b"):
            return  # padding after the last member


def _looks_like(start: bytes) -> str:
    otherwise = "text" if start.isascii() and b"\0" not in start else "no format that is known"
    return next((what for magic, what in _MAGIC.items() if re.match(magic, start)), otherwise)


def _by(sizes) -> str:
    return " x ".join(str(size) for size in sizes)
