# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The last look at a scan before a network sees it: is it a CT of a chest, whole, in HU, fine enough?"""

import logging
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache

import numpy as np
from monai.config import KeysCollection
from monai.data.utils import affine_to_spacing
from monai.transforms import MapTransform
from monai.utils import convert_to_numpy

from bundle.errors import InputError, checked_numbers

_log = logging.getLogger(__name__)

_LUNG_LITRES = (0.8, 10.0)
_LEFT = 0.2  # of the voxels of a scan without a lung mask: noted if resampling keeps less
_SPACING_MM = (5.0, 10.0)  # voxels larger than this: noted, refused
_CUT_SIDE = (0.05, 0.25)  # share of the lungs' outline on a face of the volume: noted, refused
_CUT_END = (0.05, 0.5)  # lung in the first or last slice, of the widest slice: noted, refused
_NEAR_WATER_HU, _NEAR_WATER_SHARE = (-300.0, 300.0), 0.05
_SOFT_HU = (-150.0, 150.0)  # where the peak of fat (-100) or of soft tissue (40) must be
_LUNG_MEDIAN_HU = (-985.0, -250.0)  # of emphysema to fibrosis
_METAL_HU, _METAL_ML = 2500.0, 0.2
_JUMP = 2.0  # difference between two slices, in units of the median of the seven around it


class QualityGated(MapTransform):
    """Refuse a scan that no survival map can be drawn from, and add what its reader should know to `notes`.

    It comes after :class:`~bundle.transforms.LungMaskd`. A scan whose lungs aren't masked (phantoms) passes unchecked, but
    what of its voxels resampling loses is noted.

    Args:
        keys: the image, in HU and in RAS order; one key.
        lung_litres: volume that the lungs may have.
        max_spacing: largest voxel side of the scan on file, mm.

    Raises:
        InputError: naming the patient and every fault of :func:`check_quality`; or the limits can't be limits.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        lung_litres: Sequence[float] = _LUNG_LITRES,
        max_spacing: float = _SPACING_MM[1],
    ) -> None:
        super().__init__(keys)
        litres = "two ascending volumes in litres, such as [0.8, 10]"
        self.lung_litres = checked_numbers("lung_litres", lung_litres, 2, litres, lambda low, high: 0 <= low < high)
        (self.max_spacing,) = checked_numbers("max_spacing", max_spacing, 1, "a number of mm above 0", lambda mm: mm > 0)

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        image = data[self.keys[0]]
        if data["lung_mask_source"] == "none":
            kept = image[0].numel() / np.prod(image.meta.get("spatial_shape", image.shape[1:]))
            return dict(data) if kept >= _LEFT else {**data, "notes": _lost(kept, data.get("notes", ""))}
        faults, notes = check_quality(
            convert_to_numpy(image[0]),
            convert_to_numpy(data["lung"][0]) > 0,
            affine_to_spacing(image.affine).tolist(),
            affine_to_spacing(image.meta["original_affine"]).tolist(),
            lung_litres=self.lung_litres,
            max_spacing=self.max_spacing,
        )
        if faults:
            where = f"patient {data.get('patient_id', '?')}, image {image.meta.get('filename_or_obj', '')}"
            what = f"not a chest CT fit for a survival map: {'; '.join(faults)}"
            raise InputError(f"{where}: {what} (lung mask: {data['lung_mask_source']})")
        known = data.get("notes", "")
        if "contrast" not in known:
            notes.append("contrast phase unknown")
        return {**data, "notes": "; ".join(filter(None, [known, *notes]))}


def _lost(kept: float, notes: str) -> str:
    """Notes on a scan of which resampling kept little; in a training, too, they are to be seen, once."""
    note = f"resampling keeps {100 * kept:.2g} % of the voxels, fine lesions are lost: --spacing native keeps them all"
    _warn_once(note)
    return "; ".join(filter(None, [notes, note]))


@lru_cache
def _warn_once(text: str) -> None:
    _log.warning(text)


def check_quality(
    hu: np.ndarray,
    lung: np.ndarray,
    spacing: Sequence[float],
    on_file: Sequence[float],
    *,
    lung_litres: Sequence[float] = _LUNG_LITRES,
    max_spacing: float = _SPACING_MM[1],
) -> tuple[list[str], list[str]]:
    """What speaks against a chest CT: faults, for which it is to be refused, and notes, which its reader should know.

    Args:
        hu: (D, H, W) from the patient's left to right, back to front, feet to head.
        lung: of the same shape, true in the lungs, not empty.
        spacing: of both, mm.
        on_file: spacing of the scan before resampling, mm.

    Returns:
        (faults, notes), each a list of phrases; docs/data.md has the thresholds and their reasons.
    """
    faults, notes = [], []
    coarsest = float(max(on_file))
    if coarsest > max_spacing:
        faults.append(f"voxels are {coarsest:g} mm long (expected at most {max_spacing:g} mm)")
    elif coarsest > _SPACING_MM[0]:
        notes.append(f"slices {coarsest:.3g} mm apart, small lesions may be missed")
    faults += _value_faults(hu, lung)
    litres = float(lung.sum() * np.prod(spacing) / 1e6)
    if not lung_litres[0] <= litres <= lung_litres[1]:
        faults.append(f"lung volume is {litres:.2f} L (expected {lung_litres[0]:g} to {lung_litres[1]:g} L)")
    slight, severe = _cuts(lung)
    if slight:
        notes.append(f"the lungs are cut at {', '.join(slight)}")
    if severe:
        faults.append(f"the lungs are cut at {', '.join(severe)} (expected them whole)")
    return faults, notes + _hints(hu, lung, spacing)


def _value_faults(hu: np.ndarray, lung: np.ndarray) -> list[str]:
    faults = []
    low, high = _NEAR_WATER_HU
    near = float(((hu > low) & (hu < high)).mean())
    if near < _NEAR_WATER_SHARE:
        what = f"{100 * near:.1f} % of the voxels are in {low:g} to {high:g} HU, where fat and soft tissue are"
        faults.append(f"{what} (expected at least {100 * _NEAR_WATER_SHARE:g} %)")
    count, edges = np.histogram(hu, bins=np.arange(low, high + 1, 20))
    peak = edges[count.argmax()] + 10
    if near >= _NEAR_WATER_SHARE and not _SOFT_HU[0] < peak < _SOFT_HU[1]:
        faults.append(f"fat and soft tissue peak at {peak:.0f} HU (expected {_SOFT_HU[0]:g} to {_SOFT_HU[1]:g} HU)")
    median = float(np.median(hu[lung]))
    if not _LUNG_MEDIAN_HU[0] < median < _LUNG_MEDIAN_HU[1]:
        expected = f"{_LUNG_MEDIAN_HU[0]:g} to {_LUNG_MEDIAN_HU[1]:g} HU"
        faults.append(f"the median in the lung mask is {median:.0f} HU (expected lung, {expected})")
    return faults


def _hints(hu: np.ndarray, lung: np.ndarray, spacing: Sequence[float]) -> list[str]:
    notes = []
    width, depth = (float(np.ptp(np.flatnonzero(lung.any(axes)))) for axes in ((1, 2), (0, 2)))
    if width * spacing[0] < depth * spacing[1]:
        notes.append("only one lung is seen")
    metal = float((hu > _METAL_HU).sum() * np.prod(spacing) / 1000)
    if metal >= _METAL_ML:
        notes.append(f"metal ({metal:.1f} mL above {_METAL_HU:g} HU), streaks may mislead the map")
    difference = np.abs(np.diff(hu, axis=2)).mean((0, 1))
    usual = [np.median(difference[max(0, k - 3) : k + 4]) for k in range(len(difference))]
    jump = float((difference / np.maximum(usual, 1.0)).max(initial=0.0))
    if jump > _JUMP:
        times = f"{jump:.1f} times the usual difference"
        notes.append(f"a jump between neighbouring slices ({times}): motion, or slices are missing")
    return notes


def _cuts(lung: np.ndarray) -> tuple[list[str], list[str]]:
    """The faces of the volume that cut the lungs slightly, and severely."""
    cuts: tuple[list[str], list[str]] = [], []
    for axis, names in enumerate((("left side", "right side"), ("back", "front"), ("lower end", "upper end"))):
        note, fault = _CUT_END if axis == 2 else _CUT_SIDE
        whole = lung.sum((0, 1)).max() if axis == 2 else lung.any(axis).sum()
        for end, name in zip((0, -1), names):
            share = float(lung.take(end, axis).sum() / whole)
            if share > note:
                cuts[share > fault].append(f"the {name} ({100 * share:.0f} % of their cross-section)")
    return cuts
