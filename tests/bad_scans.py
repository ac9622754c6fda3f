# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A corpus of bad scans: each kind a small file or folder, and what inference says of it.

    python -m tests.bad_scans --out DIR                      writes the corpus and its `corpus.csv`
    python -m tests.bad_scans --markdown docs/bad_input.md   runs inference on it and writes the table of messages
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from pydicom.dataset import Dataset

from bundle.data import read_cohort
from bundle.errors import InputError
from bundle.reading.scan_file import MOST_VOXELS
from bundle.transforms import threshold_lung_mask

from .dicom_files import write_series

ROOT = Path(__file__).resolve().parents[1]
SCAN = np.diag([-2.0, -2.0, 3.0, 1.0])
Columns = dict[str, str]
Kind = Callable[[Path], Path | Columns]
KINDS: dict[str, Kind] = {}

# --- what scans are made of ----------------------------------------------------------------------------------------


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


def block(shape=(24, 20, 16)) -> np.ndarray:
    """Air around and within a box of soft tissue: HU enough to pass for a CT, too small for a chest. Compresses badly."""
    rng = np.random.default_rng(0)
    values = rng.normal(-1000, 10, shape)
    inside, cavity = (tuple(slice(n // k, n - n // k) for n in shape) for k in (5, 3))
    values[inside] = rng.normal(40, 10, values[inside].shape)
    values[cavity] = rng.normal(-850, 30, values[cavity].shape)
    return values.round().astype(np.int16)


def nifti(path: Path, values: np.ndarray, affine: np.ndarray = SCAN, **header) -> Path:
    """Write a NIfTI; `header` sets fields afterwards, past nibabel's own checks."""
    nib.save(nib.Nifti1Image(values, affine), path)
    if header:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        changed = nib.Nifti1Header(data[:348], check=False)
        for name, value in header.items():
            changed[name] = value
        data = changed.binaryblock + data[348:]
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def by_itk(path: Path, values: np.ndarray, compressed: bool = False, **kwargs) -> Path:
    """Write NRRD or MetaImage; values in ITK's order of axes."""
    image = itk.image_from_array(np.ascontiguousarray(values), **kwargs)
    image.SetSpacing([2.0] * image.GetImageDimension())
    itk.imwrite(image, str(path), compression=compressed)
    return path


def cut(path: Path, keep: float) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
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


def with_mask(folder: Path, column: str, mask: np.ndarray, affine: np.ndarray | None = None) -> Columns:
    values, own = chest()
    image = nifti(folder / "scan.nii.gz", values, own)
    return {"image": str(image), column: str(nifti(folder / "mask.nii.gz", mask, own if affine is None else affine))}


def dicom(folder: Path, change: Callable[[int, Dataset], None] = lambda i, slice_: None, values=None, **tags) -> Path:
    """A DICOM series; `change` edits each slice, the lowest first."""
    values, spacing = (block(), (2.0, 2.0, 3.0)) if values is None else (values, (6.6, 6.6, 5.0))
    tags = {"SeriesInstanceUID": "1.2.826.0.1.3680043.8.498.1", "PatientID": "SECRET-ID", "PatientName": "SECRET^NAME"} | tags

    def spoil(slices: list[Dataset]) -> None:
        for i, slice_ in enumerate(slices):
            change(i, slice_)

    write_series(folder, values.clip(-1024), spacing, (0.0, 0.0, 0.0), spoil, **tags)
    return folder


def kind(name: str) -> Callable[[Kind], Kind]:
    """Register what makes a kind of bad scan: into a folder of its own; returns the image, or columns of the cohort."""

    def register(make: Kind) -> Kind:
        assert name not in KINDS
        KINDS[name] = make
        return make

    return register


# --- scans that are good, however odd they look --------------------------------------------------------------------


@kind("good: NIfTI")
def _(folder):
    return nifti(folder / "scan.nii.gz", *chest())


@kind("good: path with spaces, quotes and letters of other scripts")
def _(folder):
    (folder / "Ärzte & 患者 'x'").mkdir()
    return nifti(folder / "Ärzte & 患者 'x'" / "sçan 1,2.nii.gz", *chest())


@kind("good: stored mirrored, with an affine that says so")
def _(folder):
    values, affine = chest()
    return nifti(folder / "scan.nii", values[::-1], affine @ _mirror(len(values)))


@kind("good: a lung mask with an affine that differs in the last digits")
def _(folder):
    return with_mask(folder, "lung_mask", lungs(), chest()[1] + 1e-4)


def _mirror(columns: int) -> np.ndarray:
    matrix = np.diag([-1.0, 1, 1, 1])
    matrix[0, 3] = columns - 1
    return matrix


# --- files ---------------------------------------------------------------------------------------------------------


@kind("no such file")
def _(folder):
    return folder / "scan.nii.gz"


@kind("a suffix that is not a scan's")
def _(folder):
    (folder / "scan.jpg").write_bytes(b"\xff\xd8\xff")
    return folder / "scan.jpg"


@kind("a symbolic link to itself")
def _(folder):
    (folder / "scan.nii.gz").symlink_to("scan.nii.gz")
    return folder / "scan.nii.gz"


@kind("a named pipe")
def _(folder):
    os.mkfifo(folder / "scan.nii.gz")
    return folder / "scan.nii.gz"


@kind("a folder with a file's name")
def _(folder):
    (folder / "scan.nii.gz").mkdir()
    return folder / "scan.nii.gz"


@kind("an empty file")
def _(folder):
    (folder / "scan.nii.gz").touch()
    return folder / "scan.nii.gz"


for suffix, compressed in ((".nii", False), (".nii.gz", True), (".nrrd", False), (".mha", False)):

    @kind(f"truncated {suffix}")
    def _(folder, suffix=suffix):
        path = folder / f"scan{suffix}"
        return cut(nifti(path, block()) if "nii" in suffix else by_itk(path, block()), 0.6)


for suffix in (".nrrd", ".mha"):

    @kind(f"truncated {suffix}, compressed")
    def _(folder, suffix=suffix):
        return cut(by_itk(folder / f"scan{suffix}", block(), compressed=True), 0.8)


@kind("truncated within the header, .nii")
def _(folder):
    path = nifti(folder / "scan.nii", block())
    path.write_bytes(path.read_bytes()[:100])
    return path


@kind("truncated within the header, .nii.gz")
def _(folder):
    path = nifti(folder / "scan.nii.gz", block())
    path.write_bytes(path.read_bytes()[:40])
    return path


for suffix in (".nii.gz", ".nrrd", ".mha"):

    @kind(f"one bit flipped, {suffix}")
    def _(folder, suffix=suffix):
        path = folder / f"scan{suffix}"
        made = nifti(path, block()) if "nii" in suffix else by_itk(path, block(), compressed=True)
        # In the checksum: elsewhere, what becomes of the stream depends on the version of zlib that wrote it.
        return flip_bit(made, -6 if suffix != ".mha" else -2)


@kind("wrong magic in a NIfTI header")
def _(folder):
    return nifti(folder / "scan.nii.gz", block(), magic=b"xyz")


@kind("header of an Analyze pair named .nii")
def _(folder):
    return nifti(folder / "scan.nii", block(), magic=b"ni1")


@kind("a Python pickle named .nii.gz")
def _(folder):
    (folder / "scan.nii.gz").write_bytes(pickle.dumps(block()))
    return folder / "scan.nii.gz"


@kind("a NumPy array named .nii.gz")
def _(folder):
    with open(folder / "scan.nii.gz", "wb") as file:
        np.save(file, block())
    return folder / "scan.nii.gz"


@kind("a ZIP archive named .nii.gz")
def _(folder):
    np.savez(folder / "scan.npz", block())
    return (folder / "scan.npz").rename(folder / "scan.nii.gz")


@kind("NIfTI without compression named .nii.gz")
def _(folder):
    return nifti(folder / "scan.nii", block()).rename(folder / "scan.nii.gz")


@kind("gzip named .nii")
def _(folder):
    return nifti(folder / "scan.nii.gz", block()).rename(folder / "scan.nii")


@kind("gzip of something else")
def _(folder):
    (folder / "scan.nii.gz").write_bytes(gzip.compress(b"From: registry\nSubject: your scan\n" * 40))
    return folder / "scan.nii.gz"


@kind("JSON named .nrrd")
def _(folder):
    (folder / "scan.nrrd").write_text(json.dumps({"type": "short", "sizes": [24, 20, 16]}))
    return folder / "scan.nrrd"


@kind("a web page named .mha")
def _(folder):
    (folder / "scan.mha").write_text("<!doctype html><title>Please log in</title>")
    return folder / "scan.mha"


@kind("random bytes named .nrrd")
def _(folder):
    (folder / "scan.nrrd").write_bytes(np.random.default_rng(0).bytes(999))
    return folder / "scan.nrrd"


@kind("zip bomb: the header claims 8 GiB, which 8 MB of gzip hold")
def _(folder):
    path = nifti(folder / "scan.nii.gz", block(), dim=[3, 2048, 2048, 1024, 1, 1, 1, 1])
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:352]) + zeros_gzipped(8))
    return path


@kind("zip bomb: 4 GiB after a small volume, .nii.gz")
def _(folder):
    path = nifti(folder / "scan.nii.gz", block())
    path.write_bytes(path.read_bytes() + zeros_gzipped(4))
    return path


@kind("zip bomb: 4 GiB after a small volume, .nrrd")
def _(folder):
    path = by_itk(folder / "scan.nrrd", block(), compressed=True)
    path.write_bytes(path.read_bytes() + zeros_gzipped(4))
    return path


@kind("10000 voxels each way in a few bytes, .nii")
def _(folder):
    return nifti(folder / "scan.nii", block(), dim=[3, 10000, 10000, 10000, 1, 1, 1, 1])


@kind("10000 voxels each way in a few bytes, .nrrd")
def _(folder):
    return replace(by_itk(folder / "scan.nrrd", block()), "sizes: 16 20 24", "sizes: 10000 10000 10000")


@kind("10000 voxels each way in a few bytes, .mha")
def _(folder):
    return replace(by_itk(folder / "scan.mha", block()), "DimSize = 16 20 24", "DimSize = 10000 10000 10000")


@kind("1000 voxels each way in a few bytes, .nii.gz")
def _(folder):
    return nifti(folder / "scan.nii.gz", block(), dim=[3, 1000, 1000, 1000, 1, 1, 1, 1])


@kind("1000 voxels each way in a few bytes, .mha")
def _(folder):
    return replace(by_itk(folder / "scan.mha", block(), True), "DimSize = 16 20 24", "DimSize = 1000 1000 1000")


@kind("a negative dimension")
def _(folder):
    return nifti(folder / "scan.nii.gz", block(), dim=[3, 24, -20, 16, 1, 1, 1, 1])


@kind("no slices, .nii.gz")
def _(folder):
    return nifti(folder / "scan.nii.gz", block(), dim=[3, 24, 20, 0, 1, 1, 1, 1])


@kind("no slices, .nrrd")
def _(folder):
    return replace(by_itk(folder / "scan.nrrd", block()), "sizes: 16 20 24", "sizes: 16 20 0")


@kind("a header of 9 dimensions")
def _(folder):
    return nifti(folder / "scan.nii.gz", block(), dim=[9, 24, 20, 16, 1, 1, 1, 1])


@kind("a data type that does not exist")
def _(folder):
    return nifti(folder / "scan.nii.gz", block(), datatype=4242)


@kind("voxels that begin beyond the end of the file")
def _(folder):
    return nifti(folder / "scan.nii", block(), vox_offset=1e6)


@kind("a NRRD header without sizes")
def _(folder):
    return replace(by_itk(folder / "scan.nrrd", block()), "sizes:", "# sizes:")


@kind("a NRRD header that names a file elsewhere")
def _(folder):
    path = by_itk(folder / "scan.nrrd", block())
    return replace(path, "encoding: raw", "encoding: raw\ndata file: ../../../../etc/passwd")


@kind("a MetaImage header that names a file elsewhere")
def _(folder):
    return replace(by_itk(folder / "scan.mhd", block()), "= scan.raw", "= ../../../../etc/passwd")


@kind("a MetaImage header with too few numbers")
def _(folder):
    return replace(by_itk(folder / "scan.mha", block()), "DimSize = 16 20 24", "DimSize = 16 20")


@kind("a MetaImage header whose voxels are missing")
def _(folder):
    path = by_itk(folder / "scan.mhd", block())
    (folder / "scan.raw").unlink()
    return path


# --- shapes and types ----------------------------------------------------------------------------------------------


@kind("2-D")
def _(folder):
    return nifti(folder / "scan.nii.gz", block()[:, :, 0])


@kind("one slice")
def _(folder):
    return nifti(folder / "scan.nii.gz", block()[:, :, :1])


@kind("two slices, .nrrd")
def _(folder):
    return by_itk(folder / "scan.nrrd", block()[:2])


@kind("1 x 1 x 10000 voxels")
def _(folder):
    return nifti(folder / "scan.nii.gz", np.resize(block(), (1, 1, 10000)))


@kind("4-D, .nii.gz")
def _(folder):
    return nifti(folder / "scan.nii.gz", np.stack([block()] * 2, -1))


@kind("4-D, .nrrd")
def _(folder):
    return by_itk(folder / "scan.nrrd", np.stack([block()] * 2))


@kind("colours, .nii.gz")
def _(folder):
    colours = np.zeros((24, 20, 16), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    return nifti(folder / "scan.nii.gz", colours)


@kind("colours, .mha")
def _(folder):
    return by_itk(folder / "scan.mha", np.zeros((16, 20, 24, 3), np.uint8), is_vector=True)


@kind("complex numbers")
def _(folder):
    return nifti(folder / "scan.nii.gz", block().astype(np.complex64))


# --- space ---------------------------------------------------------------------------------------------------------


@kind("NaN in the affine")
def _(folder):
    return nifti(folder / "scan.nii.gz", block(), srow_x=[np.nan, 0, 0, 0])


@kind("zero spacing")
def _(folder):
    return nifti(folder / "scan.nii.gz", block(), srow_x=[0, 0, 0, 0], srow_y=[0, 2, 0, 0], srow_z=[0, 0, 3, 0])


@kind("spacing in metres")
def _(folder):
    return nifti(folder / "scan.nii.gz", block(), np.diag([2e-3, 2e-3, 3e-3, 1]))


@kind("huge spacing")
def _(folder):
    return nifti(folder / "scan.nii.gz", block(), np.diag([2, 2, 300.0, 1]))


@kind("wider than a scanner")
def _(folder):
    return nifti(folder / "scan.nii.gz", block((70, 70, 60)), np.diag([18.0, 18, 18, 1]))


@kind("a sheared affine")
def _(folder):
    sheared = SCAN.copy()
    sheared[1, 2] = 9
    return nifti(folder / "scan.nii.gz", block(), sheared)


@kind("two axes that are the same")
def _(folder):
    return nifti(folder / "scan.nii.gz", block(), srow_x=[2, 2, 0, 0], srow_y=[0, 0, 0, 0], srow_z=[0, 0, 3, 0])


# --- values --------------------------------------------------------------------------------------------------------


@kind("NaN among the voxels")
def _(folder):
    values = block().astype(np.float32)
    values[3, 4, 5:7] = np.nan
    return nifti(folder / "scan.nii.gz", values)


@kind("infinity among the voxels, .mha")
def _(folder):
    values = block().astype(np.float32)
    values[3, 4, 5] = -np.inf
    return by_itk(folder / "scan.mha", values)


@kind("a constant image")
def _(folder):
    return nifti(folder / "scan.nii.gz", np.full((24, 20, 16), -1000, np.int16))


@kind("nothing but air")
def _(folder):
    return nifti(folder / "scan.nii.gz", np.random.default_rng(0).normal(-1000, 10, (60, 60, 40)).astype(np.int16))


@kind("HU wrapped round in 8 bits")
def _(folder):
    values, affine = chest()
    return nifti(folder / "scan.nii.gz", values.astype(np.int8), affine)


@kind("HU inverted")
def _(folder):
    values, affine = chest()
    return nifti(folder / "scan.nii.gz", -values, affine)


@kind("HU + 1024")
def _(folder):
    values, affine = chest()
    return nifti(folder / "scan.nii.gz", values + 1024, affine)


@kind("HU times 10")
def _(folder):
    values, affine = chest()
    return nifti(folder / "scan.nii.gz", values.astype(np.int32) * 10, affine)


@kind("HU divided by 10")
def _(folder):
    values, affine = chest()
    return nifti(folder / "scan.nii.gz", (values / 10).astype(np.float32), affine)


@kind("HU windowed to a picture of 0 to 255")
def _(folder):
    values, affine = chest()
    return nifti(folder / "scan.nii.gz", (np.clip((values + 1000) / 1400, 0, 1) * 255).astype(np.uint8), affine)


@kind("MR in disguise")
def _(folder):
    rng = np.random.default_rng(0)
    values, affine = chest()
    signal = np.interp(values, [-1000, -800, 0, 100, 400], [0, 60, 300, 900, 100])
    noisy = np.hypot(signal + rng.normal(0, 15, values.shape), rng.normal(0, 15, values.shape))  # Rician
    return nifti(folder / "scan.nii.gz", noisy.astype(np.int16), affine)


@kind("abdomen only")
def _(folder):
    values = np.full((70, 60, 40), -1000.0)
    x, y = np.meshgrid(np.linspace(-1, 1, 70), np.linspace(-1, 1, 60), indexing="ij")
    values[(x / 0.9) ** 2 + (y / 0.8) ** 2 < 1] = -100  # fat
    values[(x / 0.8) ** 2 + (y / 0.7) ** 2 < 1] = 50
    values[32:38, 40:46] = 500  # spine
    values[20:24, 12:16, 10:14] = -900  # bowel gas
    values += np.random.default_rng(0).normal(0, 12, values.shape)
    return nifti(folder / "scan.nii.gz", values.astype(np.int16), np.diag([-5.0, -5, 5, 1]))


# --- masks ---------------------------------------------------------------------------------------------------------


@kind("an empty lung mask")
def _(folder):
    return with_mask(folder, "lung_mask", np.zeros(chest()[0].shape, np.uint8))


@kind("a lung mask of another shape")
def _(folder):
    return with_mask(folder, "lung_mask", lungs()[:, :, 1:])


@kind("a lung mask of another space")
def _(folder):
    return with_mask(folder, "lung_mask", lungs(), chest()[1] @ _mirror(len(lungs())))


@kind("a ground-truth mask of another space")
def _(folder):
    values, affine = chest()
    moved = affine.copy()
    moved[2, 3] += 50
    return with_mask(folder, "gt_mask", (values > 200).astype(np.uint8), moved)


@kind("a truncated lung mask")
def _(folder):
    row = with_mask(folder, "lung_mask", lungs())
    cut(Path(row["lung_mask"]), 0.5)
    return row


@kind("a lung mask that is a folder")
def _(folder):
    return {"image": str(nifti(folder / "scan.nii.gz", block())), "lung_mask": str(folder)}


@kind("a lung mask that does not exist")
def _(folder):
    return {"image": str(nifti(folder / "scan.nii.gz", block())), "lung_mask": str(folder / "lung.nii.gz")}


# --- DICOM folders -------------------------------------------------------------------------------------------------


@kind("an empty folder")
def _(folder):
    return folder


@kind("a folder without DICOM")
def _(folder):
    for name in ("readme.txt", "slice1.png", "slice2.png"):
        (folder / name).write_text("not DICOM")
    return folder


@kind("DICOM: one slice")
def _(folder):
    return dicom(folder / "series", values=block()[:, :, :1])


@kind("DICOM: a slice truncated")
def _(folder):
    series = dicom(folder / "series")
    cut(sorted(series.iterdir())[7], 0.7)
    return series


@kind("DICOM: a slice without voxels")
def _(folder):
    def change(i, slice_):
        if i == 7:
            del slice_.PixelData

    return dicom(folder / "series", change)


@kind("DICOM: slices missing in the middle")
def _(folder):
    series = dicom(folder / "series")
    for path in sorted(series.iterdir())[6:9]:
        path.unlink()
    return series


@kind("good: DICOM whose slices share two SOPInstanceUIDs")
def _(folder):
    def change(i, slice_):
        slice_.SOPInstanceUID = slice_.file_meta.MediaStorageSOPInstanceUID = f"1.2.826.0.1.3680043.8.498.{i % 2}"

    return dicom(folder / "series", change, chest()[0])


@kind("good: DICOM with every slice twice, a named pipe, a text and a link to its own folder")
def _(folder):
    series = dicom(folder / "series", values=chest()[0])
    for path in sorted(series.iterdir()):
        (series / f"copy_{path.name}").write_bytes(path.read_bytes())
    os.mkfifo(series / "pipe.dcm")
    (series / "loop").symlink_to(".")
    (series / "readme.txt").write_text("not DICOM")
    return series


@kind("DICOM: another slice at the place of one")
def _(folder):
    def change(i, slice_):
        if i == 7:
            slice_.ImagePositionPatient = [0, 0, 18]

    return dicom(folder / "series", change)


def _without(tag: str) -> Kind:
    return lambda folder: dicom(folder / "series", lambda i, slice_: delattr(slice_, tag))


for tag in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleIntercept", "Rows"):
    kind(f"DICOM: without {tag}")(_without(tag))


@kind("DICOM: two patients in a folder")
def _(folder):
    dicom(folder / "series" / "a")
    dicom(folder / "series" / "b", PatientID="SECRET-ID-2", SeriesInstanceUID="1.2.826.0.1.3680043.8.498.2")
    return folder / "series"


@kind("DICOM: two patients in one series")
def _(folder):
    return dicom(folder / "series", lambda i, slice_: setattr(slice_, "PatientID", f"SECRET-ID-{i % 2}"))


@kind("DICOM: slices of different sizes")
def _(folder):
    def change(i, slice_):
        if i == 7:
            slice_.Rows, slice_.PixelData = slice_.Rows // 2, slice_.PixelData[: len(slice_.PixelData) // 2]

    return dicom(folder / "series", change)


@kind("DICOM: 65535 x 65535 pixels in a few bytes")
def _(folder):
    def change(i, slice_):
        slice_.Rows = slice_.Columns = 65535

    return dicom(folder / "series", change)


@kind("DICOM: MR")
def _(folder):
    return dicom(folder / "series", Modality="MR")


@kind("DICOM: localisers alone")
def _(folder):
    return dicom(folder / "series", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])


# --- tables: these stop a run before any scan is read --------------------------------------------------------------

TABLES = {
    "two ids that differ by case": ("P1", "p1"),
    "two ids that differ by Unicode form": ("Jos\u00e9", "Jose\u0301"),
    "an id that climbs out of the folder": ("../x",),
    "an id with a path": ("a/b",),
    "an id with a line break": ("a\nb",),
    "an id too long for a file's name": ("x" * 201,),
    "an empty id": ("",),
}


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


# --- the corpus and its page ---------------------------------------------------------------------------------------


def patient_of(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def write_corpus(folder: Path) -> Path:
    """One folder a kind, and the cohort of all, `corpus.csv`; the kinds come in an order that mixes good and bad."""
    rows = []
    for name, make in KINDS.items():
        place = folder / patient_of(name)
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
    command += ["--cohort", str(corpus), "--output_dir", str(output), "--mask_keys", "['lung_mask','gt_mask']"]
    command += ["--shifts", "1"]  # coarse maps will do
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


def page(predictions: pd.DataFrame, corpus: Path) -> str:
    """docs/bad_input.md: each kind and its message, without what differs between machines."""

    def cell(text: str, patient: str = "") -> str:
        place = str(corpus.parent / patient)
        short = text.replace(f"{place}{os.sep}", "").replace(place, "folder").replace(f"patient {patient}", "patient P")
        short = re.sub(r"end after \d+ of", "end after N of", short)  # as versions of zlib compress differently
        return " ".join(short.replace("|", "\\|").split())

    scans = predictions.set_index("patient_id")
    lines = [
        "# Bad input, and what is said of it",
        "",
        "Made by `python -m tests.bad_scans --markdown docs/bad_input.md`: each kind of scan is written to a file or a folder,",
        "and all go through `configs/inference.json` in one run. A bad scan costs its own row of `predictions.csv` only; the",
        "exit code is then 1. In training the same sentences stop the run before the first epoch, or, with `--on_fault skip`,",
        "leave the scans out.",
        "",
        "Files are checked before they are read (`bundle/data/scan_file.py`): from the header, and by inflating what is",
        f"compressed a megabyte at a time. So a scan takes no more memory than one of {MOST_VOXELS} voxels, the most that is",
        "allowed, and one cubic metre bounds what it takes once resampled.",
        "",
        "A scan stored mirrored is not at fault if its affine says so: the map comes back on the same grid. A wrong affine that",
        "is a possible one cannot be told from a right one: a patient may lie either way, and have the heart on the right.",
        "",
        "| scan | status | message |",
        "|---|---|---|",
    ]
    for name in KINDS:
        patient = patient_of(name)
        status, message = scans.loc[patient, ["status", "message"]]
        lines.append(f"| {cell(name)} | {status} | {cell(message, patient)} |")
    lines += [
        "",
        "A fault of the table itself stops the run before any scan is read:",
        "",
        "| table | message |",
        "|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        lines += [f"| {name} | {table_message(ids, Path(folder))} |" for name, ids in TABLES.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder to write the corpus to")
    what.add_argument("--markdown", type=Path, help="file to write the table of messages to")
    args = parser.parse_args()
    if args.out:
        print(write_corpus(args.out.absolute()))
        return
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder) / "corpus")
        predictions, _, _, peak = infer(corpus, Path(folder) / "output")
        args.markdown.write_text(page(predictions, corpus), encoding="utf-8")
    print(f"{len(KINDS)} kinds, peak memory {peak:.0f} MiB")


if __name__ == "__main__":
    main()
