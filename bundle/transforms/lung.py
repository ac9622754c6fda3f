# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Where the lung is: a given mask, the lungmask network, or a threshold segmentation that needs no weights."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import MapTransform
from scipy import ndimage
from torch import Tensor

from bundle.errors import InputError

__all__ = ["LUNG_METHODS", "LungMaskd", "lungmask_network", "threshold_lung_mask"]

LUNG_METHODS = ("auto", "given", "lungmask", "threshold", "none")

_BODY_HU = -500.0
_LUNG_HU = -400.0  # about halfway between aerated lung (-850) and soft tissue (50)
_LUMEN_HU = -800.0  # air in an airway whose wall is thinner than a voxel
_CLOSING_MM = 10.0  # wider than hilar vessels and most juxtapleural nodules
_LARGEST_HOLE_MM2 = 4000.0  # a mass of 7 cm is filled; the heart, which two touching lungs may enclose, is not
_SMALLEST_LUNG_ML = 20.0
_AIRWAY_MM2 = (25.0, 900.0)  # lumen of the trachea or the main bronchi in an axial slice
_AIRWAY_LENGTH_MM = 30.0  # shorter chains are apices of lungs or bubbles
_AIRWAY_WALL_MM = 3.0


class LungMaskd(MapTransform):
    """Write `lung_key`: where the lung is, on the grid of the image, and `lung_mask_source`: how that is known.

    The image must be in HU and in RAS order (after `Orientationd`); a given mask must be on the image's grid (named in
    the same `Orientationd` and `Spacingd`) and leaves the data, as `lung_key` replaces it.

    Args:
        keys: the image; one key.
        lung_key: (1, D, H, W) float32 in {0, 1} with the image's affine and history of transforms (so that `Invertd`
            brings it back), written whatever the method.
        given_key: the mask that came with the scan, if it did.
        method: "given"; "lungmask" (:func:`lungmask_network`); "threshold" (:func:`threshold_lung_mask`); "none" (1
            everywhere, for phantoms without lungs); "auto": the given mask, else lungmask if there are `weights`, else
            threshold.
        weights: local file with lungmask's state dict (e.g. R231). Nothing is ever downloaded.

    Raises:
        InputError: unknown method; "given" for a scan without a mask; no `weights` or not lungmask's; an empty mask.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        lung_key: str = "lung",
        given_key: str = "lung_mask",
        method: str = "auto",
        weights: str | None = None,
    ) -> None:
        super().__init__(keys)
        if method not in LUNG_METHODS:
            raise InputError(f"lung_mask is '{method}' (expected one of {', '.join(LUNG_METHODS)})")
        if method == "lungmask" and not weights:
            raise InputError("lung_mask is 'lungmask' without weights (expected a local file, lungmask's state dict)")
        if method in ("auto", "lungmask") and weights and not Path(weights).is_file():
            raise InputError(f"lungmask weights {weights}: no such file (expected a local state dict)")
        self.lung_key = lung_key
        self.given_key = given_key
        self.method = method
        self.weights = weights

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        data = dict(data)
        image: MetaTensor = data[self.keys[0]]
        given = data.pop(self.given_key, None)
        source = self.method
        if source == "auto":
            source = "given" if given is not None else "lungmask" if self.weights else "threshold"
        patient = data.get("patient_id", "?")

        if source in ("lungmask", "threshold") and nib.aff2axcodes(image.affine.numpy()) != ("R", "A", "S"):
            raise ValueError("LungMaskd needs the image in RAS order: put Orientationd(axcodes='RAS') before it")
        if source == "none":
            mask = torch.ones(image.shape)
        elif source == "lungmask":
            mask = lungmask_network(image.as_tensor(), self.weights)
        elif source == "threshold":
            mask = threshold_lung_mask(image.as_tensor(), affine_to_spacing(image.affine))
        elif given is None:
            raise InputError(f"patient {patient}: no lung mask given (expected a file in column lung_mask)")
        else:
            mask = (given.as_tensor() > 0.5).float()
        if not mask.any():
            raise InputError(f"patient {patient}: the lung mask ({source}) is empty (expected some lung in the scan)")

        lung = MetaTensor(mask.to(image.device)).copy_meta_from(image)
        data[self.lung_key] = lung
        data["lung_mask_source"] = source
        return data


def lungmask_network(hu: Tensor, weights: str) -> Tensor:
    """Lungs by the U-net of Hofmanninger et al. (European Radiology Experimental 2020), slice by slice, on CPU.

    Args:
        hu: (1, D, H, W) in RAS order.
        weights: local file with lungmask's state dict.

    Returns:
        (1, D, H, W) float32 in {0, 1}.
    """
    # lungmask wants (slice, row, column) as a DICOM series has them: rows to the back, columns to the patient's left.
    slices = hu[0].detach().cpu().numpy().transpose(2, 1, 0)[:, ::-1, ::-1]
    labels = _lungmask(weights).apply(np.ascontiguousarray(slices))
    mask = (labels > 0)[:, ::-1, ::-1].transpose(2, 1, 0)
    return torch.from_numpy(mask.astype(np.float32))[None]


@lru_cache(maxsize=1)
def _lungmask(weights: str):
    from lungmask.mask import LMInferer  # here, as importing it silences every UserWarning of the process

    try:
        return LMInferer(modelpath=weights, force_cpu=True, tqdm_disable=True)
    except Exception as error:
        raise InputError(f"lungmask weights {weights}: not a state dict of lungmask's U-net") from error


def threshold_lung_mask(hu: Tensor, spacing: Sequence[float]) -> Tensor:
    """Both lungs from HU alone, without trachea and main bronchi, with vessels and small nodules filled in.

    Air inside the body (below -400 HU, and not the air around the body in its axial slice) is parted into components;
    the largest two are the lungs (one, where they are fused), closed by a ball of 10 mm radius. This needs aerated
    lung: consolidation, effusion and masses that reach the chest wall or the mediastinum over several cm are left out.

    Args:
        hu: (1, D, H, W) in RAS order: the first axis runs across the patient, the last from feet to head.
        spacing: of the three axes, in mm.

    Returns:
        (1, D, H, W) float32 in {0, 1}; 0 everywhere if there is no lung (no component of at least 20 mL).
    """
    values = hu[0].detach().cpu().numpy()
    spacing = np.asarray(spacing, dtype=float)
    pixel_mm2 = spacing[0] * spacing[1]

    air = _fill_slices(_largest(values > _BODY_HU)) & (values < _LUNG_HU)
    airways = _airways(values, air, spacing)
    labels, _ = ndimage.label(air & ~airways)
    size_ml = _sizes(labels) * spacing.prod() / 1000
    lungs = np.zeros_like(air)
    for label in np.argsort(size_ml)[::-1][:2]:
        # A second component far smaller than the first is gas in the bowel, not the other lung.
        if size_ml[label] >= max(_SMALLEST_LUNG_ML, 0.1 * size_ml.max()):
            lungs |= _fill_slices(_close(labels == label, spacing), largest=_LARGEST_HOLE_MM2 / pixel_mm2)

    wall = max(1, round(_AIRWAY_WALL_MM / spacing[0]))
    lungs &= ~ndimage.binary_dilation(airways, _IN_PLANE, iterations=wall)  # closing had filled them
    return torch.from_numpy(lungs.astype(np.float32))[None]


_IN_PLANE = np.zeros((3, 3, 3), dtype=bool)  # neighbours within an axial slice
_IN_PLANE[:, 1, 1] = _IN_PLANE[1, :, 1] = True


def _sizes(labels: np.ndarray) -> np.ndarray:
    """Voxels of each label; 0 for the background."""
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return sizes


def _largest(mask: np.ndarray) -> np.ndarray:
    """The largest component."""
    labels, _ = ndimage.label(mask)
    return mask & (labels == _sizes(labels).argmax())


def _fill_slices(mask: np.ndarray, largest: float = np.inf) -> np.ndarray:
    """Fill the holes, of up to `largest` pixels, of each axial slice.

    A hole may touch the slice's border along less than half the side of a square of its area: a narrow field of
    view may cut a lung.
    """
    labels, _ = ndimage.label(~mask, _IN_PLANE)
    sizes = _sizes(labels)
    border = np.concatenate([edge.ravel() for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1])])
    contact = np.bincount(border, minlength=len(sizes))
    hole = (contact <= 0.5 * np.sqrt(sizes)) & (sizes <= largest)
    hole[0] = False
    return mask | hole[labels]


def _close(mask: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Closing by a ball, with distance transforms: the same in mm at any spacing."""
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    margin = [int(np.ceil(_CLOSING_MM / s)) + 1 for s in spacing]
    part = np.pad(mask[box], [(m, m) for m in margin])
    grown = ndimage.distance_transform_edt(~part, spacing) <= _CLOSING_MM
    closed = ndimage.distance_transform_edt(grown, spacing) > _CLOSING_MM
    out = mask.copy()
    out[box] |= closed[tuple(slice(m, -m) for m in margin)]
    return out


def _airways(values: np.ndarray, air: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Trachea and main bronchi, from the head down.

    The largest chain of tube-sized components of axial slices is the trachea. Where it meets a lung (a thin wall is
    lost in partial volume), its lumen is followed on, one voxel aside a slice, until it ends or widens.
    """
    pixel_mm2 = spacing[0] * spacing[1]
    labels, _ = ndimage.label(air, _IN_PLANE)
    area = _sizes(labels) * pixel_mm2
    tube = (area >= _AIRWAY_MM2[0]) & (area <= _AIRWAY_MM2[1])
    widest = int(air.sum((0, 1)).argmax())  # below it, long tubes are bowel

    def volume(chain: list[int]) -> float:
        return float(area[chain].sum())

    trachea: list[int] = []
    chains: dict[int, list[int]] = {}  # the chain that ends in each component of the slice above
    above = np.zeros_like(labels[:, :, 0])
    for k in range(air.shape[2] - 1, widest - 1, -1):
        here = labels[:, :, k]
        longer = {}
        for label in np.unique(here[tube[here]]):
            parents = [chains[parent] for parent in np.unique(above[here == label]) if parent in chains]
            longer[label] = max(parents, key=volume, default=[]) + [label]
            trachea = max(trachea, longer[label], key=volume)
        chains, above = longer, here
    if len(trachea) * spacing[2] < _AIRWAY_LENGTH_MM:
        return np.zeros_like(air)

    airways = np.isin(labels, trachea)
    middle = labels == trachea[len(trachea) // 2]
    lumen = middle.any(2)
    for k in range(int(middle.any((0, 1)).argmax()) - 1, -1, -1):
        lumen = ndimage.binary_dilation(lumen) & (values[:, :, k] < _LUMEN_HU)
        if not _AIRWAY_MM2[0] <= lumen.sum() * pixel_mm2 <= _AIRWAY_MM2[1]:
            break
        airways[:, :, k] |= lumen
    return airways
