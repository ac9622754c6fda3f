# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A corpus of bad scans: each kind a small file or folder, and what inference says of it.

python -m tests.bad_scans              runs inference on it and writes the table docs/results/bad_input.md
python -m tests.bad_scans --out DIR    writes the scans and their cohort, corpus.csv
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLSLossless

from bundle.data import read_cohort
from bundle.errors import InputError
from bundle.metrics.survival import c_index_ipcw
from bundle.metrics.verdict import in_words
from bundle.transforms import LoadCTd, threshold_lung_mask
from scripts.research.real_scans import notes_of

from .dicom_files import ct_slices, enhanced, gdcm_frame, write_series, write_slices

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results" / "bad_input.md"
SCAN = np.diag([-2.0, -2.0, 3.0, 1.0])
UID = "1.2.826.0.1.3680043.8.498"

# --- what scans are made of: each function writes a file or a folder and returns its path ---------------------------


@cache
def chest() -> tuple[np.ndarray, np.ndarray]:
    """Every third column and row of the CT in demo/: HU and affine. Small, and like any other chest to the program."""
    image = nib.load(ROOT / "demo" / "chest_ct.nii.gz")
    return np.asarray(image.dataobj)[::3, ::3], image.affine @ np.diag([3.0, 3, 1, 1])


@cache
def lungs() -> np.ndarray:
    """Lung mask of :func:`chest`."""
    ras = torch.from_numpy(chest()[0][::-1, ::-1].astype(np.float32))[None]
    return threshold_lung_mask(ras, (6.6, 6.6, 5.0))[0].numpy()[::-1, ::-1].astype(np.uint8)


def mirror() -> np.ndarray:
    """From the columns of :func:`chest` to those of its mirror image."""
    matrix = np.diag([-1.0, 1, 1, 1])
    matrix[0, 3] = len(chest()[0]) - 1
    return matrix


def block(shape=(24, 20, 16)) -> np.ndarray:
    """Air around and within a box of soft tissue: HU enough to pass for a CT, too small for a chest. Compresses badly."""
    rng = np.random.default_rng(0)
    values = rng.normal(-1000, 10, shape)
    inside, cavity = (tuple(slice(n // k, n - n // k) for n in shape) for k in (5, 3))
    values[inside] = rng.normal(40, 10, values[inside].shape)
    values[cavity] = rng.normal(-850, 30, values[cavity].shape)
    return values.round().astype(np.int16)


def raw(folder: Path, name: str, data: bytes | str) -> Path:
    """A file of any content."""
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder / name


def nifti(folder: Path, values=None, affine: np.ndarray = SCAN, name: str = "scan.nii.gz", **header) -> Path:
    """A NIfTI; `header` sets fields afterwards, past nibabel's own checks."""
    path = folder / name
    nib.save(nib.Nifti1Image(block() if values is None else values, affine), path)
    if header:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        changed = nib.Nifti1Header(data[:348], check=False)
        for field, value in header.items():
            changed[field] = value
        data = changed.binaryblock + data[348:]
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def on_chest(folder: Path, change: Callable = lambda hu: hu, dtype: type = np.int16, name: str = "scan.nii.gz") -> Path:
    """The chest with other values."""
    hu, affine = chest()
    return nifti(folder, change(hu).astype(dtype), affine, name)


def by_itk(folder: Path, name: str, values=None, compressed: bool = False, **kwargs) -> Path:
    """NRRD or MetaImage; values in ITK's order of axes."""
    image = itk.image_from_array(np.ascontiguousarray(block() if values is None else values), **kwargs)
    image.SetSpacing([2.0] * image.GetImageDimension())
    itk.imwrite(image, str(folder / name), compression=compressed)
    return folder / name


def dicom(folder: Path, change: Callable[[int, Dataset], object] = lambda i, ds: None, values=None, **tags) -> Path:
    """A DICOM series; `change` edits each slice, the lowest first."""
    values, spacing = (block(), (2.0, 2.0, 3.0)) if values is None else (values, (6.6, 6.6, 5.0))
    tags = {"SeriesInstanceUID": f"{UID}.1", "PatientID": "SECRET-ID", "PatientName": "SECRET^NAME"} | tags

    def spoil(slices: list[Dataset]) -> None:
        for i, ds in enumerate(slices):
            change(i, ds)

    write_series(folder, values.clip(-1024), spacing, (0.0, 0.0, 0.0), spoil, **tags)
    return folder


def cut(path: Path, keep: float | int) -> Path:
    """Leave a share of the file, or so many bytes."""
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    return path


def flip_bit(path: Path, place: int) -> Path:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    return path


def replace(path: Path, old: str, new: str) -> Path:
    data = path.read_bytes()
    assert old.encode() in data
    path.write_bytes(data.replace(old.encode(), new.encode(), 1))
    return path


@cache
def zeros_gzipped(gigabytes: int) -> bytes:
    """A gzip stream of as many GiB of zeros: one member of 64 MiB, again and again."""
    return gzip.compress(bytes(2**26)) * (16 * gigabytes)


def bomb(path: Path, gigabytes: int) -> Path:
    """Append zeros to a compressed file."""
    path.write_bytes(path.read_bytes() + zeros_gzipped(gigabytes))
    return path


def with_mask(folder: Path, column: str, mask: np.ndarray, affine: np.ndarray | None = None) -> dict[str, str]:
    """The chest, and a mask that is by default on its grid."""
    path = nifti(folder, mask, chest()[1] if affine is None else affine, "mask.nii.gz")
    return {"image": str(on_chest(folder)), column: str(path)}


# --- kinds that take more than a line -------------------------------------------------------------------------------


def odd_name(folder):
    (folder / "Ärzte & 患者 'x'").mkdir()
    return on_chest(folder / "Ärzte & 患者 'x'", name="sçan 1,2.nii.gz")


def link_to_itself(folder):
    (folder / "scan.nii.gz").symlink_to("scan.nii.gz")
    return folder / "scan.nii.gz"


def named_pipe(folder):
    os.mkfifo(folder / "scan.nii.gz")
    return folder / "scan.nii.gz"


def folder_named_as_a_file(folder):
    (folder / "scan.nii.gz").mkdir()
    return folder / "scan.nii.gz"


def zipped(folder):
    np.savez(folder / "scan.npz", block())
    return (folder / "scan.npz").rename(folder / "scan.nii.gz")


def numpy_array(folder):
    file = io.BytesIO()
    np.save(file, block())
    return raw(folder, "scan.nii.gz", file.getvalue())


def bomb_by_header(folder):
    whole = nifti(folder, dim=[3, 2048, 2048, 1024, 1, 1, 1, 1])
    return bomb(raw(folder, "scan.nii.gz", gzip.compress(gzip.decompress(whole.read_bytes())[:352])), 8)


def without_voxels(folder):
    path = by_itk(folder, "scan.mhd")
    (folder / "scan.raw").unlink()
    return path


def sheared(folder):
    affine = SCAN.copy()
    affine[1, 2] = 9
    return nifti(folder, affine=affine)


def block_with(values):
    found = block().astype(np.float32)
    found[3, 4, 5 : 5 + len(values)] = values
    return found


def only_air(folder):
    return nifti(folder, np.random.default_rng(0).normal(-1000, 10, (60, 60, 40)).astype(np.int16))


def mr_signal(hu):
    rng = np.random.default_rng(0)
    signal = np.interp(hu, [-1000, -800, 0, 100, 400], [0, 60, 300, 900, 100])
    return np.hypot(signal + rng.normal(0, 15, hu.shape), rng.normal(0, 15, hu.shape))  # Rician


def abdomen(folder):
    values = np.full((70, 60, 40), -1000.0)
    x, y = np.meshgrid(np.linspace(-1, 1, 70), np.linspace(-1, 1, 60), indexing="ij")
    values[(x / 0.9) ** 2 + (y / 0.8) ** 2 < 1] = -100  # fat
    values[(x / 0.8) ** 2 + (y / 0.7) ** 2 < 1] = 50
    values[32:38, 40:46] = 500  # spine
    values[20:24, 12:16, 10:14] = -900  # bowel gas
    values += np.random.default_rng(0).normal(0, 12, values.shape)
    return nifti(folder, values.astype(np.int16), np.diag([-5.0, -5, 5, 1]))


def moved(slices: int) -> np.ndarray:
    matrix = np.eye(4)
    matrix[2, 3] = slices
    return matrix


def mirrored_qform(folder):
    image = nib.load(on_chest(folder))
    image.set_sform(chest()[1], 1)
    image.set_qform(np.diag([-1.0, 1, 1, 1]) @ chest()[1], 1)
    nib.save(image, folder / "mirrored.nii.gz")
    return folder / "mirrored.nii.gz"


def followed_by(path: Path, data: bytes) -> Path:
    path.write_bytes(path.read_bytes() + data)
    return path


def cut_mask(folder):
    row = with_mask(folder, "lung_mask", lungs())
    cut(Path(row["lung_mask"]), 0.5)
    return row


def no_dicom(folder):
    for name in ("readme.txt", "slice1.png", "slice2.png"):
        (folder / name).write_text("not DICOM")
    return folder


def cut_slice(folder):
    series = dicom(folder / "series")
    cut(sorted(series.iterdir())[7], 0.7)
    return series


def missing_slices(folder):
    series = dicom(folder / "series")
    for path in sorted(series.iterdir())[6:9]:
        path.unlink()
    return series


def shared_uids(folder):
    def change(i, ds):
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"{UID}.{i % 2}"

    return dicom(folder / "series", change, chest()[0])


def every_slice_twice(folder):
    series = dicom(folder / "series", values=chest()[0])
    for path in sorted(series.iterdir()):
        (series / f"copy_{path.name}").write_bytes(path.read_bytes())
    os.mkfifo(series / "pipe.dcm")
    (series / "loop").symlink_to(".")
    (series / "readme.txt").write_text("not DICOM")
    return series


def two_patients(folder):
    dicom(folder / "series" / "a")
    dicom(folder / "series" / "b", PatientID="SECRET-ID-2", SeriesInstanceUID=f"{UID}.2")
    return folder / "series"


def halve(ds):
    ds.Rows, ds.PixelData = ds.Rows // 2, ds.PixelData[: len(ds.PixelData) // 2]


def enlarge(i, ds):
    ds.Rows = ds.Columns = 65535


def spoilt(change, folder):
    """A series of which `change` edits each slice."""
    return dicom(folder / "series", change)


def one_spoilt(change, folder):
    """A series of which `change` edits one slice."""
    return dicom(folder / "series", lambda i, ds: change(ds) if i == 7 else None)


def without(tag, folder):
    return dicom(folder / "series", lambda i, ds: delattr(ds, tag))


def tagged(folder, **tags):
    return dicom(folder / "series", **tags)


# --- the kinds: what makes one, in a folder of its own; it returns the image, or columns of the cohort ----------------

HUGE, LARGE = [3, 10000, 10000, 10000, 1, 1, 1, 1], [3, 1000, 1000, 1000, 1, 1, 1, 1]
KINDS: dict[str, Callable[[Path], Path | dict[str, str]]] = {
    # good ones, however odd they look
    "good: NIfTI": on_chest,
    "good: path with spaces, quotes and letters of other scripts": odd_name,
    "good: stored mirrored, with an affine that says so": lambda f: nifti(
        f, chest()[0][::-1], chest()[1] @ mirror(), "scan.nii"
    ),
    "good: a lung mask with an affine that differs in the last digits": lambda f: with_mask(
        f, "lung_mask", lungs(), chest()[1] + 1e-4
    ),
    "good: a lung mask stored mirrored, with an affine that says so": lambda f: with_mask(
        f, "lung_mask", lungs()[::-1], chest()[1] @ mirror()
    ),
    "good: sform and qform that are mirror images": mirrored_qform,
    "good: bytes after the gzip stream": lambda f: followed_by(on_chest(f), b"# copied by a script"),
    "good: a leading axis of 1, scl_inter NaN": lambda f: nifti(
        f, chest()[0][None], chest()[1], scl_slope=1, scl_inter=np.nan
    ),
    # files
    "no such file": lambda f: f / "scan.nii.gz",
    "a suffix that is not a scan's": lambda f: raw(f, "scan.jpg", b"\xff\xd8\xff"),
    "a symbolic link to itself": link_to_itself,
    "a named pipe": named_pipe,
    "a folder with a file's name": folder_named_as_a_file,
    "an empty file": lambda f: raw(f, "scan.nii.gz", b""),
    "truncated .nii": lambda f: cut(nifti(f, name="scan.nii"), 0.6),
    "truncated .nii.gz": lambda f: cut(nifti(f), 0.6),
    "truncated .nrrd": lambda f: cut(by_itk(f, "scan.nrrd"), 0.6),
    "truncated .mha": lambda f: cut(by_itk(f, "scan.mha"), 0.6),
    "truncated .nrrd, compressed": lambda f: cut(by_itk(f, "scan.nrrd", compressed=True), 0.8),
    "truncated .mha, compressed": lambda f: cut(by_itk(f, "scan.mha", compressed=True), 0.8),
    "truncated within the header, .nii": lambda f: cut(nifti(f, name="scan.nii"), 100),
    "truncated within the header, .nii.gz": lambda f: cut(nifti(f), 40),
    # In the checksum: elsewhere, what becomes of the stream depends on the version of zlib that wrote it.
    "one bit flipped, .nii.gz": lambda f: flip_bit(nifti(f), -6),
    "one bit flipped, .nrrd": lambda f: flip_bit(by_itk(f, "scan.nrrd", compressed=True), -6),
    "one bit flipped, .mha": lambda f: flip_bit(by_itk(f, "scan.mha", compressed=True), -2),
    "wrong magic in a NIfTI header": lambda f: nifti(f, magic=b"xyz"),
    "header of an Analyze pair named .nii": lambda f: nifti(f, name="scan.nii", magic=b"ni1"),
    "a Python pickle named .nii.gz": lambda f: raw(f, "scan.nii.gz", pickle.dumps(block())),
    "a NumPy array named .nii.gz": numpy_array,
    "a ZIP archive named .nii.gz": zipped,
    "NIfTI without compression named .nii.gz": lambda f: nifti(f, name="scan.nii").rename(f / "scan.nii.gz"),
    "gzip named .nii": lambda f: nifti(f).rename(f / "scan.nii"),
    "text named .nii.gz": lambda f: raw(f, "scan.nii.gz", "not a scan"),
    "gzip of something else": lambda f: raw(f, "scan.nii.gz", gzip.compress(b"From: registry\nSubject: your scan\n" * 40)),
    "JSON named .nrrd": lambda f: raw(f, "scan.nrrd", '{"type": "short", "sizes": [24, 20, 16]}'),
    "a web page named .mha": lambda f: raw(f, "scan.mha", "<!doctype html><title>Please log in</title>"),
    "random bytes named .nrrd": lambda f: raw(f, "scan.nrrd", np.random.default_rng(0).bytes(999)),
    "zip bomb: the header claims 8 GiB, which 8 MB of gzip hold": bomb_by_header,
    "zip bomb: 4 GiB after a small volume, .nii.gz": lambda f: bomb(nifti(f), 4),
    "zip bomb: 4 GiB after a small volume, .nrrd": lambda f: bomb(by_itk(f, "scan.nrrd", compressed=True), 4),
    "10000 voxels each way in a few bytes, .nii": lambda f: nifti(f, name="scan.nii", dim=HUGE),
    "10000 voxels each way in a few bytes, .nrrd": lambda f: replace(
        by_itk(f, "scan.nrrd"), "sizes: 16 20 24", "sizes: 10000 10000 10000"
    ),
    "10000 voxels each way in a few bytes, .mha": lambda f: replace(
        by_itk(f, "scan.mha"), "DimSize = 16 20 24", "DimSize = 10000 10000 10000"
    ),
    "1000 voxels each way in a few bytes, .nii.gz": lambda f: nifti(f, dim=LARGE),
    "1000 voxels each way in a few bytes, .mha": lambda f: replace(
        by_itk(f, "scan.mha", compressed=True), "DimSize = 16 20 24", "DimSize = 1000 1000 1000"
    ),
    "a negative dimension": lambda f: nifti(f, dim=[3, 24, -20, 16, 1, 1, 1, 1]),
    "no slices, .nii.gz": lambda f: nifti(f, dim=[3, 24, 20, 0, 1, 1, 1, 1]),
    "no slices, .nrrd": lambda f: replace(by_itk(f, "scan.nrrd"), "sizes: 16 20 24", "sizes: 16 20 0"),
    "a header of 9 dimensions": lambda f: nifti(f, dim=[9, 24, 20, 16, 1, 1, 1, 1]),
    "a data type that does not exist": lambda f: nifti(f, datatype=4242),
    "voxels that begin beyond the end of the file": lambda f: nifti(f, name="scan.nii", vox_offset=1e6),
    "a NRRD header without sizes": lambda f: replace(by_itk(f, "scan.nrrd"), "sizes:", "# sizes:"),
    "a NRRD header that names a file elsewhere": lambda f: replace(
        by_itk(f, "scan.nrrd"), "encoding: raw", "encoding: raw\ndata file: ../../../../etc/passwd"
    ),
    "a MetaImage header that names a file elsewhere": lambda f: replace(
        by_itk(f, "scan.mhd"), "= scan.raw", "= ../../../../etc/passwd"
    ),
    "a MetaImage header with too few numbers": lambda f: replace(
        by_itk(f, "scan.mha"), "DimSize = 16 20 24", "DimSize = 16 20"
    ),
    "a MetaImage header whose voxels are missing": without_voxels,
    # shapes and types
    "2-D": lambda f: nifti(f, block()[:, :, 0]),
    "one slice": lambda f: nifti(f, block()[:, :, :1]),
    "two slices, .nrrd": lambda f: by_itk(f, "scan.nrrd", block()[:2]),
    "1 x 1 x 10000 voxels": lambda f: nifti(f, np.resize(block(), (1, 1, 10000))),
    "4-D, .nii.gz": lambda f: nifti(f, np.stack([block()] * 2, -1)),
    "4-D, .nrrd": lambda f: by_itk(f, "scan.nrrd", np.stack([block()] * 2)),
    "colours, .nii.gz": lambda f: nifti(f, np.zeros((24, 20, 16), [("R", "u1"), ("G", "u1"), ("B", "u1")])),
    "colours, .mha": lambda f: by_itk(f, "scan.mha", np.zeros((16, 20, 24, 3), np.uint8), is_vector=True),
    "complex numbers": lambda f: nifti(f, block().astype(np.complex64)),
    # space
    "NaN in the affine": lambda f: nifti(f, srow_x=[np.nan, 0, 0, 0]),
    "zero spacing": lambda f: nifti(f, srow_x=[0, 0, 0, 0], srow_y=[0, 2, 0, 0], srow_z=[0, 0, 3, 0]),
    "spacing in metres": lambda f: nifti(f, affine=np.diag([2e-3, 2e-3, 3e-3, 1])),
    "huge spacing": lambda f: nifti(f, affine=np.diag([2, 2, 300.0, 1])),
    "wider than a scanner": lambda f: nifti(f, block((70, 70, 60)), np.diag([18.0, 18, 18, 1])),
    "a sheared affine": sheared,
    "voxel sizes in pixdim and sform that differ": lambda f: nifti(f, pixdim=[1, 1.7, 1.7, 2.55, 1, 1, 1, 1]),
    "two axes that are the same": lambda f: nifti(f, srow_x=[2, 2, 0, 0], srow_y=[0, 0, 0, 0], srow_z=[0, 0, 3, 0]),
    # values
    "NaN among the voxels": lambda f: nifti(f, block_with([np.nan, np.nan])),
    "infinity among the voxels, .mha": lambda f: by_itk(f, "scan.mha", block_with([-np.inf])),
    "a constant image": lambda f: nifti(f, np.full((24, 20, 16), -1000, np.int16)),
    "nothing but air": only_air,
    "HU wrapped round in 8 bits": lambda f: on_chest(f, dtype=np.int8),
    "HU inverted": lambda f: on_chest(f, lambda hu: -hu),
    "HU + 1024": lambda f: on_chest(f, lambda hu: hu + 1024),
    "HU times 10": lambda f: on_chest(f, lambda hu: hu.astype(np.int32) * 10, np.int32),
    "HU divided by 10": lambda f: on_chest(f, lambda hu: hu / 10, np.float32),
    "HU windowed to a picture of 0 to 255": lambda f: on_chest(
        f, lambda hu: np.clip((hu + 1000) / 1400, 0, 1) * 255, np.uint8
    ),
    "MR in disguise": lambda f: on_chest(f, mr_signal),
    "abdomen only": abdomen,
    # masks
    "an empty lung mask": lambda f: with_mask(f, "lung_mask", np.zeros(chest()[0].shape, np.uint8)),
    "a lung mask of another shape": lambda f: with_mask(f, "lung_mask", lungs()[:, :, 1:]),
    "a lung mask of another space": lambda f: with_mask(f, "lung_mask", lungs(), chest()[1] @ moved(20)),
    "a ground-truth mask of another space": lambda f: with_mask(f, "gt_mask", lungs(), chest()[1] @ moved(10)),
    "a truncated lung mask": cut_mask,
    "a lung mask that is a folder": lambda f: {"image": str(nifti(f)), "lung_mask": str(f)},
    "a lung mask that does not exist": lambda f: {"image": str(nifti(f)), "lung_mask": str(f / "lung.nii.gz")},
    # DICOM folders
    "an empty folder": lambda f: f,
    "a folder without DICOM": no_dicom,
    "DICOM: one slice": lambda f: dicom(f / "series", values=block()[:, :, :1]),
    "DICOM: a slice truncated": cut_slice,
    "DICOM: a slice without voxels": partial(one_spoilt, lambda ds: delattr(ds, "PixelData")),
    "DICOM: slices missing in the middle": missing_slices,
    "good: DICOM whose slices share two SOPInstanceUIDs": shared_uids,
    "good: DICOM with every slice twice, a named pipe, a text and a link to its own folder": every_slice_twice,
    "DICOM: another slice at the place of one": partial(
        one_spoilt, lambda ds: setattr(ds, "ImagePositionPatient", [0, 0, 18])
    ),
    "DICOM: without ImagePositionPatient": partial(without, "ImagePositionPatient"),
    "DICOM: without ImageOrientationPatient": partial(without, "ImageOrientationPatient"),
    "DICOM: without PixelSpacing": partial(without, "PixelSpacing"),
    "DICOM: without RescaleIntercept": partial(without, "RescaleIntercept"),
    "DICOM: without Rows": partial(without, "Rows"),
    "DICOM: two patients in a folder": two_patients,
    "DICOM: two patients in one series": partial(spoilt, lambda i, ds: setattr(ds, "PatientID", f"SECRET-ID-{i % 2}")),
    "DICOM: slices of different sizes": partial(one_spoilt, halve),
    "DICOM: 65535 x 65535 pixels in a few bytes": partial(spoilt, enlarge),
    "DICOM: MR": partial(tagged, Modality="MR"),
    "DICOM: localisers alone": partial(tagged, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
}

TABLES = {  # patient ids that stop a run before any scan is read
    "two ids that differ by case": ("P1", "p1"),
    "two ids that differ by Unicode form": ("Jos\u00e9", "Jose\u0301"),
    "an id that climbs out of the folder": ("../x",),
    "an id with a path": ("a/b",),
    "an id with a line break": ("a\nb",),
    "an id too long for a file's name": ("x" * 201,),
    "an empty id": ("",),
}

OUTCOME = "patient_id,image,time,event"
GOOD = f"{OUTCOME}\nA,a.nii.gz,5,1\nB,b.nii.gz,6,0\n"


def rows(*lines: str, more: str = "") -> str:
    """A cohort with these rows."""
    return "\n".join([OUTCOME + more, *lines, ""])


CSVS: dict[str, str | bytes] = {  # cohorts after public reports on tables; `age` is numeric there, `sex` categorical
    "a byte order mark, twice": "\ufeff\ufeff" + GOOD,
    "UTF-16 with its mark": GOOD.encode("utf-16"),
    "UTF-16 without its mark": GOOD.encode("utf-16-le"),
    "Latin-1": GOOD.replace("B", "M\u00fcller").encode("latin-1"),
    "a no-break and a zero-width space in the header": GOOD.replace("image", "image\u00a0").replace("id,", "id\u200b,"),
    "an Excel workbook": b"PK\x03\x04 xl/workbook.xml",
    "a web page": "<!doctype html><title>Please log in</title>",
    "a pointer of Git LFS": "version https://git-lfs.github.com/spec/v1\nsize 12345\n",
    "gzip": gzip.compress(GOOD.encode()),
    "semicolons": GOOD.replace(",", ";"),
    "tabs": GOOD.replace(",", "\t"),
    "a first line that says sep=,": "sep=,\n" + GOOD,
    "a title above the header": "Exported 2024\n" + GOOD,
    "the header a second time": GOOD + GOOD,
    "two empty columns at the end": GOOD.replace("\n", ",,\n"),
    "a comma too many in each row": GOOD.replace("\n", ",\n").replace("event,", "event"),
    "a value too few": rows("A,a.nii.gz,5"),
    "a quote that is not closed": rows("A,a.nii.gz,5,1", '"B,b.nii.gz,6,0', "C,c.nii.gz,7,1"),
    "a quote that joins two rows": rows('"A,a.nii.gz,5,1', 'B",b.nii.gz,6,0,1'),
    "a note over two lines": rows('A,a.nii.gz,5,1,"two\nlines"', "B,b.nii.gz,0,0,", more=",note"),
    "time of 0": rows("A,a.nii.gz,0,1"),
    "time in days": rows("A,a.nii.gz,2165,1"),
    "a decimal comma": rows('A,a.nii.gz,"12,5",1'),
    "digits with an underscore": rows("A,a.nii.gz,9_9,1"),
    "a date": rows("A,a.nii.gz,2015-03-01,1"),
    "event as True and False": rows("A,a.nii.gz,5,True", "B,b.nii.gz,6,False"),
    "event as 1:DECEASED and 0:LIVING": rows("A,a.nii.gz,5,1:DECEASED", "B,b.nii.gz,6,0:LIVING"),
    "event as 1 and 2": rows("A,a.nii.gz,5,2", "B,b.nii.gz,6,1"),
    "event empty for the censored": rows("A,a.nii.gz,5,1", "B,b.nii.gz,6,"),
    "nobody died": rows("A,a.nii.gz,5,0"),
    "words for missing": rows("A,a.nii.gz,5,1,NA,unknown", "B,b.nii.gz,6,0,N/A,f", more=",age,sex"),
    "an id that says it is missing": rows("NA,a.nii.gz,5,1", "NA,b.nii.gz,6,0"),
    "a category in two spellings": rows("A,a.nii.gz,5,1,Male", "B,b.nii.gz,6,0,male", more=",sex"),
    "a formula that failed": rows("A,a.nii.gz,5,1,#VALUE!", more=",sex"),
    "an age of 65Y": rows("A,a.nii.gz,5,1,65Y", more=",age"),
    "long ids that a spreadsheet made alike": rows("1.23E+11,a.nii.gz,5,1", "1.23E+11,b.nii.gz,6,0"),
    "ids that differ by zeros": rows("00123,a.nii.gz,5,1", "123,b.nii.gz,6,0"),
    "one image of two patients": rows("A,a.nii.gz,5,1", "B,a.nii.gz,6,0"),
    "a patient who died in one row alone": rows("A,a.nii.gz,5,1", "A,b.nii.gz,6,0"),
    "split as Train, and as valid": rows("A,a.nii.gz,5,1,Train", "B,b.nii.gz,6,0,valid", more=",split"),
}


# --- scans after public reports on readers: the block with something that made others go wrong, read alone ------------


def nrrd(folder: Path, space: str = "LPS", more: str = "", directions: str = "(2,0,0) (0,2,0) (0,0,3)", **fields) -> Path:
    """The block as a NRRD with other fields."""
    fields = {"type": "short", "dimension": 3, "sizes": "24 20 16", "endian": "little", "encoding": "raw"} | fields
    fields |= {"space": space, "space directions": directions} if space else {}
    lines = [f"{name}: {value}" for name, value in fields.items()]
    return raw(folder, "scan.nrrd", "\n".join(["NRRD0005", *lines, "\n"]).encode() + more.encode() + block().tobytes("F"))


def mha(folder: Path, **fields) -> Path:
    """The block as a MetaImage with other fields."""
    fields = {"ObjectType": "Image", "NDims": 3, "BinaryData": True, "TransformMatrix": "1 0 0 0 1 0 0 0 1"} | fields
    fields |= {"DimSize": "24 20 16", "ElementType": "MET_SHORT", "ElementDataFile": "LOCAL"}
    return raw(folder, "scan.mha", "".join(f"{k} = {v}\n" for k, v in fields.items()).encode() + block().tobytes("F"))


def stored(ds: Dataset, change: Callable[[np.ndarray], np.ndarray], bits: int = 16, signed: bool = False, **tags) -> None:
    """Other stored values of a slice, made of its HU."""
    hu = np.frombuffer(ds.PixelData, np.uint16).astype(np.int32).reshape(ds.Rows, ds.Columns) - 1024
    ds.BitsStored, ds.HighBit, ds.PixelRepresentation = bits, bits - 1, int(signed)
    ds.RescaleIntercept = 0 if signed else -1024
    ds.PixelData = change(hu if signed else hu + 1024).astype(np.uint16).tobytes()
    for keyword, value in tags.items():
        setattr(ds, keyword, value)


def jpeg(i: int, ds: Dataset) -> None:
    """Signed values in a JPEG 2000 stream that says they have no sign."""
    stored(ds, lambda hu: hu, signed=True)
    with tempfile.TemporaryDirectory() as folder:
        frame, ds.file_meta.TransferSyntaxUID = gdcm_frame(ds, itk.GDCMImageIOEnums.Compression_JPEG2000, Path(folder))
    ds.PixelData = encapsulate([frame])
    ds["PixelData"].is_undefined_length = True


def jpeg_ls(i: int, ds: Dataset) -> None:
    stored(ds, lambda hu: hu, 12, signed=True)
    ds.compress(JPEGLSLossless, generate_instance_uid=False)


def second_scan(folder: Path) -> Path:
    """A second acquisition under one SeriesInstanceUID, half a slice above the first."""
    dicom(folder / "series" / "a", AcquisitionNumber=1, FrameOfReferenceUID=f"{UID}.8")
    place = lambda i, ds: setattr(ds, "ImagePositionPatient", [0, 0, 3 * i + 1.5])  # noqa: E731
    dicom(folder / "series" / "b", place, AcquisitionNumber=2, FrameOfReferenceUID=f"{UID}.8")
    return folder / "series"


def iodine_map(folder: Path) -> Path:
    """A CT and, after it in the alphabet, an iodine map of the same slices."""
    dicom(folder / "series" / "a")
    dicom(folder / "series" / "b", SeriesInstanceUID=f"{UID}.9", RescaleType="MGML")
    return folder / "series"


def shuffled_frames(folder: Path) -> Path:
    slices = ct_slices(block().clip(-1024), (2.0, 2.0, 3.0), (0.0, 0.0, 0.0), SeriesInstanceUID=f"{UID}.1")
    write_slices(folder / "series", [enhanced(slices[1::2] + slices[::2])])
    return folder / "series"


def qform_alone(folder: Path, **header) -> Path:
    return nifti(folder, sform_code=0, qform_code=1, **header)


def block_mask(values: np.ndarray, folder: Path) -> dict[str, str]:
    return {"image": str(nifti(folder)), "lung_mask": str(nifti(folder, values, name="mask.nii.gz"))}


MASK = np.pad(np.ones((8, 6, 6), np.float32), ((8, 8), (7, 7), (5, 5)))
ORGANS = np.arange(block().size, dtype=np.uint8).reshape(block().shape) % 118
MICRONS, METRES = (np.diag([-2.0 * n, -2 * n, 3 * n, 1]) for n in (1000, 0.001))

REPORTS: dict[str, tuple[str, Callable[[Path], Path | dict[str, str]]]] = {  # a kind: the report, and what makes one
    "DICOM: 12 bits with a sign, none above": (
        "rordenlab/dcm2niix/issues/688",
        partial(spoilt, lambda i, ds: stored(ds, lambda hu: hu & 0xFFF, 12, signed=True)),
    ),
    "DICOM: anything in the bits that are not used": (
        "dgobbi/vtk-dicom/issues/134",
        partial(spoilt, lambda i, ds: stored(ds, lambda v: v | 0x4000, 12)),
    ),
    "DICOM: 12 bits in the upper part of 16": (
        "fo-dicom/fo-dicom/issues/187",
        partial(spoilt, lambda i, ds: stored(ds, lambda v: v << 4, 12, HighBit=15)),
    ),
    "DICOM: JPEG-LS of 12 bits with a sign": ("pydicom/pydicom/issues/2009", partial(spoilt, jpeg_ls)),
    "DICOM: JPEG 2000 whose stream says another sign": ("pydicom/pydicom/issues/1149", partial(spoilt, jpeg)),
    "DICOM: MONOCHROME1, which ITK inverts": (
        "SimpleITK/SimpleITK/issues/1795",
        partial(spoilt, lambda i, ds: setattr(ds, "PhotometricInterpretation", "MONOCHROME1")),
    ),
    "DICOM: a palette that is missing, which ended the process": (
        "fo-dicom/fo-dicom/issues/817",
        partial(spoilt, lambda i, ds: setattr(ds, "PhotometricInterpretation", "PALETTE COLOR")),
    ),
    "DICOM: values that are not HU (RescaleType)": (
        "MeshInspector/MeshLib/pull/3636",
        partial(tagged, RescaleType="MGML"),
    ),
    "DICOM: an iodine map beside the CT": ("MeshInspector/MeshLib/pull/3636", iodine_map),
    "DICOM: two scans in one series, slices in turn": ("rordenlab/dcm2niix/issues/590", second_scan),
    "DICOM: exposure that differs from slice to slice": (
        "rordenlab/dcm2niix/issues/468",
        partial(spoilt, lambda i, ds: setattr(ds, "Exposure", 14 + i % 3)),
    ),
    "DICOM: positions rounded": (
        "icometrix/dicom2nifti/issues/36",
        partial(spoilt, lambda i, ds: setattr(ds, "ImagePositionPatient", [0, 0, 3 * i + 0.02 * (i % 2)])),
    ),
    "DICOM: 114 slices missing amid the scan": (
        "rordenlab/dcm2niix/issues/248",
        partial(spoilt, lambda i, ds: setattr(ds, "ImagePositionPatient", [0, 0, 3 * i + 342 * (i > 7)])),
    ),
    "DICOM: an enhanced CT with frames in no order": ("horosproject/horos/issues/543", shuffled_frames),
    "NIfTI: sizes in micrometres": (
        "InsightSoftwareConsortium/ITK/pull/4595",
        lambda f: nifti(f, affine=MICRONS, xyzt_units=3),
    ),
    "NIfTI: sizes in metres": ("nipreps/fmriprep/issues/786", lambda f: nifti(f, affine=METRES, xyzt_units=1)),
    "NIfTI: sizes in mm that are said to be micrometres": ("khanlab/zarrnii/issues/180", lambda f: nifti(f, xyzt_units=3)),
    "NIfTI: a quaternion of length 1.0000005": (
        "nipy/nibabel/issues/626",
        lambda f: qform_alone(f, quatern_b=0, quatern_c=0, quatern_d=1.0000005),
    ),
    "NIfTI: qfac 0": ("nipy/nibabel/issues/1394", lambda f: nifti(f, pixdim=[0, 2, 2, 3, 1, 1, 1, 1])),
    "NIfTI: axes at right angles but for rounding": (
        "MIC-DKFZ/nnUNet/issues/2265",
        lambda f: nifti(f, srow_x=[-2, 1e-4, 0, 0]),
    ),
    "NIfTI: no voxel size": ("UCL/STIR/issues/456", lambda f: qform_alone(f, pixdim=[1, 0, 0, 0, 1, 1, 1, 1])),
    "NIfTI: a pointer of Git LFS": (
        "neheller/kits19/issues/5",
        lambda f: raw(f, "scan.nii.gz", "version https://git-lfs.github.com/spec/v1\nsize 12345\n"),
    ),
    "NRRD: left-anterior-superior": (
        "InsightSoftwareConsortium/ITK/issues/5207",
        lambda f: nrrd(f, "left-anterior-superior", directions="(2,0,0) (0,-2,0) (0,0,3)"),
    ),
    "NRRD: sizes in micrometres": (
        "ANTsX/ANTsPy/issues/514",
        lambda f: nrrd(f, **{"space units": '"microns" "microns" "microns"'}),
    ),
    "NRRD: byte skip -1": ("mhe/pynrrd/issues/70", lambda f: nrrd(f, more="to be skipped", **{"byte skip": -1})),
    "NRRD: no voxel size": ("cornerstonejs/cornerstoneWADOImageLoader/issues/207", lambda f: nrrd(f, "")),
    "NRRD: bzip2": ("DIAGNijmegen/rse-panimg/pull/47", lambda f: nrrd(f, encoding="bzip2")),
    "MetaImage: no voxel size": ("PlusToolkit/PlusLib/issues/829", mha),
    "MetaImage: sizes in micrometres": (
        "ANTsX/ANTsPy/issues/514",
        lambda f: mha(f, ElementSpacing="2 2 3", DistanceUnits="um"),
    ),
    "a lung mask that was interpolated": (
        "BioMedIA/dhcp-structural-pipeline/issues/3",
        partial(block_mask, (MASK + np.roll(MASK, 1, 0)) / 2),
    ),
    "a lung mask of probabilities": ("MIC-DKFZ/nnUNet/issues/2868", partial(block_mask, 0.01 + 0.9 * MASK)),
    "a lung mask of floating-point labels": ("MIC-DKFZ/nnUNet/issues/2868", partial(block_mask, 3 * MASK)),
    "a lung mask of 117 organs": ("MIC-DKFZ/nnUNet/issues/1007", partial(block_mask, ORGANS)),
}


def read_report(name: str, folder: Path) -> tuple[dict | None, str]:
    """What the reader makes of a kind, and that in words."""
    place = folder / patient_of(name)
    place.mkdir()
    made = REPORTS[name][1](place)
    try:
        found = LoadCTd()({"patient_id": "P", **(made if isinstance(made, dict) else {"image": str(made)})})
    except InputError as fault:
        return None, str(fault).replace(f"{place}{os.sep}", "")
    return found, f"read{'; noted: ' if found['notes'] else ''}{found['notes']}"


def ipcw(time: list, event: list, risk: list) -> str:
    """Uno's concordance of a few patients, in words."""
    value = c_index_ipcw(*(torch.tensor(values, dtype=torch.float64) for values in (risk, time, event)))
    return "no value" if value is None else f"c_index_ipcw {value:.4f}"


OUTCOMES: dict[str, Callable[[], str]] = {  # cohorts after public reports on survival metrics
    "a death tied with a censoring": lambda: ipcw([1, 2, 2, 3, 4], [1, 1, 0, 1, 0], [1, 4, 5, 2, 3]),
    "a death tied with the last censoring": lambda: ipcw([1, 2, 3, 3], [1, 0, 1, 0], [4, 1, 3, 2]),
    "all predictions alike": lambda: ipcw([1, 2, 3, 4], [1, 1, 0, 1], [1, 1, 1, 1]),
    "no pair that can be compared": lambda: ipcw([5, 5], [1, 1], [1, 2]),
    "nobody died": lambda: ipcw([1, 2, 3], [0, 0, 0], [1, 2, 3]),
}

# --- the corpus and its page ----------------------------------------------------------------------------------------


def patient_of(kind: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")


def write_corpus(folder: Path) -> Path:
    """One folder a kind, and the cohort of all, `corpus.csv`; the kinds come in an order that mixes good and bad."""
    rows = []
    for kind, make in KINDS.items():
        place = folder / patient_of(kind)
        place.mkdir(parents=True)
        made = make(place)
        rows.append({"patient_id": place.name, **(made if isinstance(made, dict) else {"image": str(made)})})
    pd.DataFrame(rows, columns=["patient_id", "image", "lung_mask", "gt_mask"]).to_csv(folder / "corpus.csv", index=False)
    return folder / "corpus.csv"


def infer(corpus: Path, output: Path) -> tuple[pd.DataFrame, int, str, float]:
    """Run inference on the corpus in a process of its own.

    Returns:
        predictions, exit code, log, peak memory in MiB (0 where /proc is not).
    """
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    # Inference needs no ground truth; it is read here so that its faults are in the table too.
    command += ["--cohort", str(corpus), "--output_dir", str(output)]
    command += ["--load_transforms#0#mask_keys", "['lung_mask','gt_mask']", "--shifts", "1"]  # coarse maps will do
    peak = 0.0
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        # The kernel's high-water mark of the process itself: getrusage would count what its parent took before it.
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            if status.exists() and (mark := re.search(r"VmHWM:\s+(\d+)", status.read_text())):
                peak = max(peak, int(mark[1]) / 1024)
            time.sleep(0.05)
        log.seek(0)
        text = log.read().decode()
    return pd.read_csv(output / "predictions.csv", keep_default_na=False), process.returncode, text, peak


def table_message(ids: tuple[str, ...], folder: Path) -> str:
    """What is said of a cohort with these patient ids."""
    path = folder / "table.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("patient_id", "image"), *((name, "scan.nii.gz") for name in ids)])
    try:
        read_cohort(path, need_outcome=False, on_fault="row")
    except InputError as fault:
        return " ".join(str(fault).replace(f"{folder}{os.sep}", "").split())
    return "ok"


def csv_message(content: str | bytes, folder: Path) -> str:
    """What is said of a cohort: its faults, or what is logged as it is read."""
    path, said = folder / "table.csv", []
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    kinds = {c: kind for c, kind in (("age", "numeric"), ("sex", "categorical")) if f",{c}".encode() in path.read_bytes()}
    handler, logger = logging.Handler(), logging.getLogger("bundle")
    handler.emit, level = lambda record: said.append(record.getMessage()), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        read_cohort(path, clinical=kinds, check_files=False)
    except InputError as fault:
        said = [str(fault)]
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    text = " ".join(" ".join(said or ["read"]).replace(f"{folder}{os.sep}", "").split())
    return text.replace("|", "\\|").replace("<", "&lt;")


def page(predictions: pd.DataFrame, corpus: Path) -> str:
    """Each kind and its message, without what differs between machines, and the weights' verdict, which all scans have."""
    verdict = in_words(json.loads((ROOT / "models" / "settings.json").read_text(encoding="utf-8"))["learnt"])

    def cell(text: str, patient: str) -> str:
        place, text = str(corpus.parent / patient), notes_of(text, verdict)
        short = text.replace(f"{place}{os.sep}", "").replace(place, "folder").replace(f"patient {patient}", "patient P")
        short = re.sub(r"end after \d+ of", "end after N of", short)  # as versions of zlib compress differently
        return " ".join(short.replace("|", "\\|").split())

    scans = predictions.set_index("patient_id")
    lines = ["# Bad scans and bad tables, each with its message", "", "Made by `python -m tests.bad_scans`.", ""]
    lines += ["| scan | status | message |", "|---|---|---|"]
    for kind in KINDS:
        status, message = scans.loc[patient_of(kind), ["status", "message"]]
        lines.append(f"| {kind} | {status} | {cell(message, patient_of(kind))} |")
    lines += ["", "Scans after public reports on readers, the report beside what happens here:", ""]
    lines += ["| scan | what happens | report |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for name, (report, _) in REPORTS.items():
            words = read_report(name, Path(folder))[1].replace("|", "\\|")
            lines.append(f"| {name} | {words} | [{report}](https://github.com/{report}) |")
    lines += ["", "These tables stop a run before any scan is read:", "", "| table | message |", "|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        lines += [f"| {name} | {table_message(ids, Path(folder))} |" for name, ids in TABLES.items()]
        lines += ["", "Cohorts as spreadsheets and other programs leave them:", "", "| table | what happens |", "|---|---|"]
        lines += [f"| {name} | {csv_message(content, Path(folder))} |" for name, content in CSVS.items()]
    lines += ["", "Outcomes that are hard to score:", "", "| patients | what happens |", "|---|---|"]
    lines += [f"| {name} | {score()} |" for name, score in OUTCOMES.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder to write the scans to, without running inference")
    args = parser.parse_args()
    if args.out:
        print(write_corpus(args.out.absolute()))
        return
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder) / "corpus")
        predictions, _, _, peak = infer(corpus, Path(folder) / "output")
    PAGE.write_text(page(predictions, corpus), encoding="utf-8")
    print(f"{PAGE}: {len(KINDS)} kinds, peak memory {peak:.0f} MiB")


if __name__ == "__main__":
    main()
