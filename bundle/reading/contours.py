# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Regions that were drawn on a CT, as DICOM keeps them (RTSTRUCT, SEG), turned into masks on the CT's own grid."""

import re

import highdicom
import nibabel as nib
import numpy as np
import pydicom
from skimage.draw import polygon2mask

from bundle.errors import InputError
from bundle.reading.dicom import straighten
from bundle.reading.series import Series

_OFF_PLANE = 0.3  # of the slice spacing: what a contour may be off the slice it was drawn on


def region_names(dataset: pydicom.Dataset) -> dict[int, str]:
    """Name of each region of an RTSTRUCT or SEG by its number."""
    if dataset.Modality == "RTSTRUCT":
        return {int(r.ROINumber): str(r.get("ROIName", "")) for r in dataset.StructureSetROISequence}
    return {int(s.SegmentNumber): str(s.get("SegmentLabel", "")) for s in dataset.SegmentSequence}


def region_numbers(dataset: pydicom.Dataset, name: str) -> list[int]:
    """Numbers of the regions of that name, compared without case, spaces and punctuation."""

    def plain(text: str) -> str:
        return re.sub(r"[\W_]+", "", text).lower()

    return [number for number, found in region_names(dataset).items() if plain(found) == plain(name)]


def referenced_series(dataset: pydicom.Dataset) -> str | None:
    """SeriesInstanceUID of the images that an RTSTRUCT or SEG was drawn on, if it says."""
    try:
        if dataset.Modality == "RTSTRUCT":
            dataset = dataset.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
            return str(dataset.RTReferencedSeriesSequence[0].SeriesInstanceUID)
        return str(dataset.ReferencedSeriesSequence[0].SeriesInstanceUID)
    except (AttributeError, IndexError):
        return None


def read_region(dataset: pydicom.Dataset, name: str, series: Series) -> nib.Nifti1Image:
    """The mask (0 or 1) of the region(s) of that name in an RTSTRUCT or SEG, on the grid that the CT is read on.

    A polygon covers the pixels whose centre is in it; one within another on the same slice is a hole.

    Raises:
        InputError: drawn in another frame of reference; off the CT's slices; empty.
    """
    frames = {_frame(dataset), series.head.frame_of_reference} - {""}
    if len(frames) > 1:
        raise InputError(f"{name} was drawn in another frame of reference than the CT's (expected the same)")
    rasterise = _contours if dataset.Modality == "RTSTRUCT" else _segments
    mask = rasterise(dataset, name, series)
    if not mask.any():
        raise InputError(f"{name} covers no voxel of the CT (expected some)")
    affine = series.affine
    if series.tilted:
        straight = straighten(mask, affine, mode="nearest", outside=0.0)
        mask, affine = straight[0].numpy().round().astype(np.uint8), straight.affine.numpy()
    return nib.Nifti1Image(mask, affine)


def _contours(dataset: pydicom.Dataset, name: str, series: Series) -> np.ndarray:
    """(columns, rows, slices) from polygons in mm."""
    mask = np.zeros(series.shape, dtype=np.uint8)
    numbers = region_numbers(dataset, name)
    to_index = np.linalg.inv(series.affine) @ np.diag([-1.0, -1.0, 1.0, 1.0])  # from LPS
    for region in dataset.ROIContourSequence:
        if int(region.ReferencedROINumber) not in numbers:
            continue
        drawn = np.zeros(series.shape, dtype=bool)
        for contour in region.get("ContourSequence", []):
            if contour.ContourGeometricType != "CLOSED_PLANAR":
                continue
            points = np.array(contour.ContourData, dtype=float).reshape(-1, 3)
            index = points @ to_index[:3, :3].T + to_index[:3, 3]
            k = int(np.round(index[:, 2].mean()))
            if not 0 <= k < series.shape[2] or np.abs(index[:, 2] - k).max() > _OFF_PLANE:
                raise InputError(f"a contour of {name} lies off the CT's slices (expected each on one)")
            drawn[:, :, k] ^= polygon2mask(series.shape[:2], index[:, :2])
        mask |= drawn
    return mask


def _segments(dataset: pydicom.Dataset, name: str, series: Series) -> np.ndarray:
    """(columns, rows, slices) from frames of pixels."""
    try:
        axes = series.affine[:, [2, 1, 0, 3]]
        grid = highdicom.VolumeGeometry(axes, series.shape[::-1], "PATIENT", from_reference_convention="RAS")
        volume = highdicom.seg.Segmentation.from_dataset(dataset, copy=False).get_volume(
            segment_numbers=region_numbers(dataset, name), combine_segments=True, skip_overlap_checks=True
        )
        on_grid = volume.match_geometry(grid, tol=1e-2)
    except (ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"{name} is not on the CT's grid: {error} (expected its voxels)") from error
    return np.ascontiguousarray(on_grid.array.transpose(2, 1, 0) > 0).astype(np.uint8)


def _frame(dataset: pydicom.Dataset) -> str:
    """FrameOfReferenceUID; "" if it isn't said."""
    if uid := dataset.get("FrameOfReferenceUID"):
        return str(uid)
    uids = {str(r.get("ReferencedFrameOfReferenceUID", "")) for r in dataset.get("StructureSetROISequence", [])}
    return uids.pop() if len(uids) == 1 else ""
