# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""DICOM series for tests: small, valid, and to be spoiled slice by slice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import itk
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import generate_frames
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid


def ct_slices(values: np.ndarray, spacing: Sequence[float], origin: Sequence[float], **tags) -> list[Dataset]:
    """A CT series: slice k of `values` (columns, rows, slices; HU) at z = origin + k * spacing; LPS, mm.

    Args:
        tags: set in every slice.
    """
    shared = {"SeriesInstanceUID": generate_uid(), "StudyInstanceUID": generate_uid(), "PatientID": "P7"}
    shared |= {"FrameOfReferenceUID": generate_uid(), "Modality": "CT", "PatientName": "Secret^Name"}
    shared |= {"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}
    shared |= {"PixelSpacing": [spacing[1], spacing[0]], "SliceThickness": spacing[2]}
    shared |= {"PatientBirthDate": "", "PatientSex": "", "StudyDate": "", "StudyTime": "", "StudyID": ""}
    shared |= {"AccessionNumber": "", "ReferringPhysicianName": ""}
    slices = []
    for k in range(values.shape[2]):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        ds = Dataset()
        ds.file_meta = meta
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        ds.InstanceNumber = values.shape[2] - k
        ds.ImagePositionPatient = [origin[0], origin[1], origin[2] + k * spacing[2]]
        for keyword, value in (shared | tags).items():
            setattr(ds, keyword, value)
        set_pixels(ds, values[:, :, k])
        slices.append(ds)
    return slices


def set_pixels(ds: Dataset, hu: np.ndarray, slope: float = 1.0, intercept: float = -1024.0) -> None:
    """Store HU (columns, rows) as 16 bits with that slope and intercept."""
    ds.Rows, ds.Columns, ds.SamplesPerPixel = hu.shape[1], hu.shape[0], 1
    ds.PhotometricInterpretation, ds.PixelRepresentation = "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
    ds.RescaleIntercept, ds.RescaleSlope = intercept, slope
    ds.PixelData = np.round((hu.T.astype(float) - intercept) / slope).astype(np.uint16).tobytes()


def gdcm_frame(ds: Dataset, kind, tmp_path) -> tuple[bytes, str]:
    """The pixels of a slice as ITK's GDCM compresses them, and the transfer syntax."""
    pixels = np.frombuffer(ds.PixelData, np.uint16).reshape(ds.Rows, ds.Columns)
    io = itk.GDCMImageIO.New()
    io.SetCompressionType(kind)
    itk.imwrite(itk.image_from_array(pixels), str(tmp_path / "frame.dcm"), compression=True, imageio=io)
    made = pydicom.dcmread(tmp_path / "frame.dcm")
    return next(generate_frames(made.PixelData, number_of_frames=1)), made.file_meta.TransferSyntaxUID


def enhanced(slices: Sequence[Dataset]) -> Dataset:
    """The same slices as one enhanced CT object, a frame each, in the order given."""

    def group(ds: Dataset, *keywords: str) -> list[Dataset]:
        item = Dataset()
        for keyword in keywords:
            setattr(item, keyword, ds[keyword].value)
        return [item]

    whole = copy.deepcopy(slices[0])
    whole.SOPClassUID = whole.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    whole.NumberOfFrames, whole.PixelData = len(slices), b"".join(ds.PixelData for ds in slices)
    whole.SharedFunctionalGroupsSequence, whole.PerFrameFunctionalGroupsSequence = [Dataset()], []
    shared = whole.SharedFunctionalGroupsSequence[0]
    shared.PixelMeasuresSequence = group(whole, "PixelSpacing", "SliceThickness")
    shared.PixelValueTransformationSequence = group(whole, "RescaleSlope", "RescaleIntercept")
    shared.PlaneOrientationSequence = group(whole, "ImageOrientationPatient")
    for ds in slices:
        frame = Dataset()
        frame.PlanePositionSequence = group(ds, "ImagePositionPatient")
        whole.PerFrameFunctionalGroupsSequence.append(frame)
    for group in (shared, frame):
        for sequence in group:
            for element in sequence.value[0]:
                del whole[element.tag]
    return whole


def write_slices(folder: Path, slices: Sequence[Dataset]) -> str:
    """Write them, the last first, under names that don't tell the order."""
    folder.mkdir(parents=True, exist_ok=True)
    for ds in reversed(slices):
        name = f"{ds.SeriesInstanceUID[-6:]}_{int(ds.InstanceNumber):03}_{len(list(folder.iterdir()))}.dcm"
        pydicom.dcmwrite(folder / name, ds, enforce_file_format=True)
    return str(folder)


def write_series(
    folder: Path,
    values: np.ndarray,
    spacing: Sequence[float],
    origin: Sequence[float],
    spoil: Callable[[list[Dataset]], object] = lambda slices: None,
    **tags,
) -> str:
    """Write :func:`ct_slices` after `spoil` has changed them; returns the folder."""
    slices = ct_slices(values, spacing, origin, **tags)
    spoil(slices)
    return write_slices(folder, slices)
