# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Load a CT and its masks, and refuse what is not a volume in HU with a known place in space."""

import os
from collections.abc import Hashable, Mapping, Sequence

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import ITKReader, MetaTensor
from monai.transforms import MapTransform, Orientation
from monai.utils import SpaceKeys, convert_to_tensor, ensure_tuple
from torch import Tensor

from bundle.errors import InputError
from bundle.reading.dicom import is_dicom, read_dicom
from bundle.reading.scan_file import check_scan_file, read_nifti
from bundle.reading.series import LARGEST_TILT

_AIR_HU = -1024  # padding outside the field of view (-2048, -3024) becomes air
SPACING_MM = (0.1, 20.0)
_LARGEST_M3 = 1.0  # a table's width, height and length; what a scan takes once resampled is bounded by it
_HU_RANGE = (-4000.0, 32000.0)
_LOBES = 5  # a lung mask has no more labels
_SAMPLE = 1_000_000  # voxels that the histogram checks look at


class LoadCTd(MapTransform):
    """Read scans (NIfTI, NRRD, MHA, DICOM folder or its ZIP) and their masks, and check them.

    An image becomes a MetaTensor (1, D, H, W) in HU, at least -1024, with its affine in RAS, as int16 where the file has
    16 bits (a chest CT then takes half the memory and time until it is resampled), else as float32; a mask becomes 0/1
    (1 where the file is > 0) as uint8 on the same grid, whatever the order of its axes.

    Args:
        keys: images; the masks must be on the grid of the first.
        mask_keys: masks; those which a record lacks are passed over.
        hounsfield: whether the images are CT; false for heat maps, which are read as they are, as float32.

    Raises:
        InputError: naming the patient, the file and what is wrong with it; a mask is on another grid than the image.
    """

    def __init__(
        self,
        keys: KeysCollection = ("image",),
        mask_keys: KeysCollection = ("lung_mask", "gt_mask", "confounder_mask"),
        hounsfield: bool = True,
    ) -> None:
        super().__init__(keys)
        self.hounsfield = hounsfield
        self.mask_keys = ensure_tuple(mask_keys)

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        out = dict(data)
        patient = out.get("patient_id", "?")
        for key in self.keys:
            where = f"patient {patient}, {key} {out[key]}"
            image = _read(out[key], where, out.get("series"))
            if self.hounsfield:
                out["notes"] = image.meta.pop("notes")
                if fault := check_hu(image):
                    raise InputError(f"{where}: {fault}")
                if (low := float(image.min())) < _HU_RANGE[0]:
                    out["notes"] = "; ".join(filter(None, [out["notes"], f"voxels of {low:g} HU taken as padding"]))
                out[key] = image.clamp_min(_AIR_HU)
            else:
                out[key] = image.float()
        for key in [key for key in self.mask_keys if key in out]:
            where = f"patient {patient}, {key} {out[key]}"
            image, mask = out[self.keys[0]], _read(out[key], where)
            if (axes := nib.aff2axcodes(image.affine)) != nib.aff2axcodes(mask.affine):
                mask = Orientation("".join(axes), labels=None)(mask)  # the same grid, perhaps, with other axes first
            if mask.shape != image.shape:
                shapes = f"{_by(mask.shape[1:])} voxels, the image {_by(image.shape[1:])}"
                raise InputError(f"{where}: the mask has {shapes} (expected the same)")
            if not np.allclose(mask.affine, image.affine, rtol=1e-3, atol=1e-3):
                affines = f"{_rows(mask.affine)}, the image's is {_rows(image.affine)}"
                raise InputError(f"{where}: the mask's affine is {affines} (expected the same)")
            labels = _labels(mask, where)
            if key == "lung_mask" and labels > _LOBES:
                note = f"the lung mask holds {labels} labels or more, all were taken as lung"
                out["notes"] = "; ".join(filter(None, [out.get("notes"), note]))
            out[key] = (mask > 0).byte()
            out[key].affine = image.affine  # to the last digit, so that nearest voxels are the same
        return out


def _labels(mask: MetaTensor, where: str) -> int:
    """How many labels a sample of a mask's voxels has; probabilities, and what was interpolated, are refused."""
    values = convert_to_tensor(mask, track_meta=False)
    if values.is_floating_point() and (off := float((values - values.round()).abs().max())) > 1e-3:
        raise InputError(f"{where}: the mask's values are up to {off:.2g} off whole numbers (expected labels, 0 outside)")
    return int((values.flatten()[:: max(1, values.numel() // _SAMPLE)].unique() > 0).sum())


def check_hu(image: Tensor) -> str | None:
    """What shows that an image (finite values of any shape) is not a CT in Hounsfield units; None if nothing does.

    A chest CT has air near -1000 HU (at least one voxel in a thousand from -1500 to -700 HU), stays within
    -4000..32000, and has hardly anything but constant padding below -1500. Padding alone may lie below -4000.

    Example::

        >>> check_hu(torch.full((4, 4), 7.0))
        'every voxel is 7 (expected HU of a patient)'
    """
    values = convert_to_tensor(image, track_meta=False).flatten()
    low, high = float(values.min()), float(values.max())
    if low == high:
        return f"every voxel is {low:g} (expected HU of a patient)"
    lowest = low if low >= _HU_RANGE[0] else float(values[values > low].min())  # the extended CT scale pads with -10240
    values = values[:: max(1, values.numel() // _SAMPLE)].float()

    def share(start: float, end: float) -> float:
        return float(((values >= start) & (values <= end)).float().mean())

    too_low = values[values < -1500]
    off_padding = (too_low != too_low.mode().values).sum() if len(too_low) else 0  # the commonest is padding
    no_air, bright = share(-1500, -700) < 1e-3, share(900, 1224) >= 1e-2
    # Lung is at 150-350 if 1024 was added and at 650-850 if the sign was turned; bodies have little else there.
    checks = (
        (low > -300 and high - low <= 256, " and look like an 8-bit picture or scaled intensities"),
        (lowest < _HU_RANGE[0] or high > _HU_RANGE[1], f", beyond {_HU_RANGE[0]:g}..{_HU_RANGE[1]:g}"),
        (off_padding > 0.02 * len(values), ", much of it below -1500: slope or intercept look wrong or applied twice"),
        (no_air and bright and share(650, 850) > share(150, 350), " and look inverted: air is bright"),
        (no_air and bright and share(-100, 324) >= 1e-3, " and look like HU + 1024: the rescale intercept was not applied"),
        (no_air, " with no air in them"),
    )
    fault = next((what for wrong, what in checks if wrong), None)
    return f"values run from {low:g} to {high:g}{fault} (expected HU: air near -1000, water 0)" if fault else None


def _read(path: str, where: str, series: str | None = None) -> MetaTensor:
    """One volume as (1, D, H, W) with its affine in RAS, and notes on it in its metadata."""
    if not os.path.exists(path):
        raise InputError(f"{where}: does not exist (expected a scan)")
    array, affine, notes = read_dicom(path, where, series) if is_dicom(path) else _read_file(path, where)
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    # As NIfTI keeps it: 1e-7 mm, by which formats differ, turns voxels of a threshold and with them the months.
    affine = np.asarray(affine, dtype=np.float32).astype(float)
    if fault := _volume_fault(array) or _affine_fault(affine, array.shape):
        raise InputError(f"{where}: {fault}")
    affine = torch.as_tensor(affine)
    meta = {"filename_or_obj": str(path), "space": SpaceKeys.RAS, "spatial_shape": np.asarray(array.shape)}
    meta |= {"original_affine": affine.clone(), "notes": "; ".join(notes)}
    return MetaTensor(_last_axis_fastest(array)[None], affine=affine, meta=meta)


def _read_file(path: str, where: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    try:
        if str(path).lower().endswith((".nii", ".nii.gz")):
            array, affine, notes = read_nifti(path)
        else:
            notes = check_scan_file(path)
            reader = ITKReader()
            array, meta = reader.get_data(reader.read(path))
            affine = meta["affine"]
        if array.dtype not in (np.int16, np.uint8):  # CTs and masks as stored, a half and a quarter of float32
            array = np.asarray(array, dtype=np.float32)
    except InputError as fault:
        raise InputError(f"{where}: {fault}") from fault
    except MemoryError:  # no fault of the file
        raise
    except Exception as error:  # each reader has its own kinds
        raise InputError(f"{where}: cannot be read, truncated or damaged (expected a whole scan)") from error
    return array, affine, notes


def _volume_fault(array: np.ndarray) -> str | None:
    if array.ndim != 3:
        what = "is 2-D" if array.ndim < 3 else "holds several volumes or channels"
        return f"{what}, {_by(array.shape)} (expected one 3-D volume)"
    if min(array.shape) < 3:
        return f"has {_by(array.shape)} voxels (expected at least 3 slices, rows and columns)"
    if array.dtype.kind == "f" and (count := np.count_nonzero(~np.isfinite(array))):
        return f"{'1 voxel is' if count == 1 else f'{count} voxels are'} NaN or infinite (expected finite numbers)"
    return None


def _affine_fault(affine: np.ndarray, shape: Sequence[int]) -> str | None:
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        return f"its affine is {_rows(affine)} (expected 4 x 4 finite numbers)"
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not (spacing.min() >= SPACING_MM[0] and spacing.max() <= SPACING_MM[1]):
        return f"its spacing is {_by(spacing)} mm (expected {SPACING_MM[0]:g} to {SPACING_MM[1]:g} mm)"
    shear = np.degrees(np.arccos(min(1.0, abs(np.linalg.det(affine[:3, :3] / spacing)))))
    if shear > LARGEST_TILT:
        sheared = f"its affine {_rows(affine)} is sheared by {shear:.0f} degrees"
        return f"{sheared} (expected at most {LARGEST_TILT:g}, a tilted gantry)"
    extent = spacing * shape
    if extent.prod() > _LARGEST_M3 * 1e9:
        return f"it spans {_by(extent.round())} mm (expected at most {_LARGEST_M3:g} cubic metre)"
    return None


def _last_axis_fastest(array: np.ndarray) -> Tensor:
    """The volume as torch likes it in memory: ten times as fast plane by plane, and as float32, exact for what is held."""
    volume = torch.from_numpy(array)
    out = torch.empty(volume.shape, dtype=volume.dtype)
    for index in range(volume.shape[1]):
        out[:, index] = volume[:, index].float().contiguous()
    return out


def _by(sizes) -> str:
    return " x ".join(f"{float(size):g}" for size in sizes)


def _rows(affine) -> str:
    return str(np.round(np.asarray(affine), 4).tolist())
