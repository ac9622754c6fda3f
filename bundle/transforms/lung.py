# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Where the lung is: a given mask, the lungmask network, or a threshold segmentation that needs no weights."""

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
from monai.utils import ensure_tuple
from torch import Tensor

from bundle.errors import InputError
from bundle.files import file_sha256
from bundle.grids import mask_on_grid
from bundle.transforms.lung_threshold import fill_thorax, threshold_lung_mask

LUNG_METHODS = ("auto", "given", "lungmask", "threshold", "none")


class LungMaskd(MapTransform):
    """Write `lung`, where the lung is, on the grid of the image, and `lung_mask_source`, how that is known.

    `lung` is (1, D, H, W) float32 in {0, 1} with the image's affine and history of transforms, so that `Invertd` brings
    it back. The image must be in HU and in RAS order.

    `lung_mask`, uint8 on the grid of the file, comes with the scan or is made of the mask that was found; `lung` is its
    nearest voxels either way, so that a mask that a run wrote gives the same `lung` when it is given.

    Args:
        keys: the image; one key.
        method: "given"; "lungmask" (:func:`lungmask_network`); "threshold" (:func:`threshold_lung_mask`); "none" (1
            everywhere, for phantoms without lungs); "auto": the given mask, else lungmask if there are `weights`, else
            threshold.
        weights: local file with lungmask's state dict, or two (lungmask's fused model). Nothing is ever downloaded.
        fill: add what the mask drops inside the thorax (:func:`fill_thorax`), for very sick lungs.

    Raises:
        InputError: unknown method; "given" for a scan without a mask; no `weights` or not lungmask's; an empty mask.
    """

    def __init__(
        self,
        keys: KeysCollection = "image",
        method: str = "auto",
        weights: str | Sequence[str] | None = None,
        fill: bool = False,
    ) -> None:
        super().__init__(keys)
        check_method(method)
        if method == "lungmask" and not weights:
            raise InputError("lung_mask is 'lungmask' without weights (expected a local file, lungmask's state dict)")
        self.weights = _files(weights) if method in ("auto", "lungmask") else ()
        self.method = method
        self.fill = fill

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        data = dict(data)
        image: MetaTensor = data[self.keys[0]]
        given = data.pop("lung_mask", None)
        source = self.method
        if source == "auto":
            source = "given" if given is not None else "lungmask" if self.weights else "threshold"
        patient = data.get("patient_id", "?")
        if (source in ("lungmask", "threshold") or self.fill) and nib.aff2axcodes(image.affine.numpy()) != ("R", "A", "S"):
            raise ValueError("LungMaskd needs the image in RAS order: put Orientationd(axcodes='RAS') before it")
        if source == "given" and given is None:
            raise InputError(f"patient {patient}: no lung mask given (expected a file in column lung_mask)")
        mask = torch.ones(image.shape)
        if source != "none":
            mask, data["lung_mask"] = self._mask(image, source, given)
        if not mask.any():
            raise InputError(f"patient {patient}: the lung mask ({source}) is empty (expected some lung in the scan)")
        if self.fill and source != "none":
            source += ", thorax filled"
        return data | {"lung": MetaTensor(mask.to(image.device)).copy_meta_from(image), "lung_mask_source": source}

    def _mask(self, image: MetaTensor, source: str, given: MetaTensor | None) -> tuple[Tensor, MetaTensor]:
        """The mask on the grid of the image, float32, and on that of the file, uint8."""

        def on_image(on_file: MetaTensor) -> Tensor:
            nearest = mask_on_grid(on_file, image.affine, image.shape[1:], clamp=True)
            return torch.from_numpy(np.ascontiguousarray(nearest))[None].float()

        if source == "given":
            mask = on_image(given)
        elif source == "lungmask":
            mask = lungmask_network(image.as_tensor(), *self.weights)
        else:
            mask = threshold_lung_mask(image.as_tensor(), affine_to_spacing(image.affine))
        if self.fill:
            mask = fill_thorax(mask, image.as_tensor())
        if source == "given" and not self.fill:
            return mask, given
        affine = image.meta.get("original_affine", image.affine)
        shape = image.meta.get("spatial_shape", image.shape[1:])
        found = mask_on_grid(MetaTensor(mask, affine=image.affine), affine, shape, clamp=True)
        on_file = MetaTensor(torch.from_numpy(found)[None], affine=affine)
        return on_image(on_file), on_file


def check_method(method: str) -> str:
    """Refuse a method of lung masking that is none of :data:`LUNG_METHODS`."""
    if method not in LUNG_METHODS:
        raise InputError(f"lung_mask is {method!r} (expected one of {', '.join(LUNG_METHODS)})")
    return method


def lungmask_digests(weights: str | Sequence[str] | None) -> list[str]:
    """SHA-256 of each file of lungmask's weights, so that masks of other weights are told apart."""
    return [file_sha256(path) for path in _files(weights)]


def _files(weights: str | Sequence[str] | None) -> tuple[str, ...]:
    files = tuple(map(str, ensure_tuple(weights))) if weights else ()
    if len(files) > 2:
        raise InputError(f"lungmask weights: {len(files)} files (expected one, or two to fuse: lobes, then R231)")
    for path in files:
        if not Path(path).is_file():
            raise InputError(f"lungmask weights {path}: no such file (expected a local state dict)")
    return files


def lungmask_network(hu: Tensor, weights: str, fill_weights: str | None = None) -> Tensor:
    """Lungs by the U-net of Hofmanninger et al. (European Radiology Experimental 2020), slice by slice, on CPU.

    Args:
        hu: (1, D, H, W) in RAS order.
        weights: local file with lungmask's state dict (R231, LTRCLobes, R231CovidWeb).
        fill_weights: another (R231), for what the first (LTRCLobes) drops: lungmask's fused model.
    """
    # lungmask wants (slice, row, column) as a DICOM series has them: rows to the back, columns to the patient's left.
    slices = hu[0].detach().cpu().numpy().transpose(2, 1, 0)[:, ::-1, ::-1]
    labels = _lungmask(weights, fill_weights).apply(np.ascontiguousarray(slices))
    mask = (labels > 0)[:, ::-1, ::-1].transpose(2, 1, 0)
    return torch.from_numpy(mask.astype(np.float32))[None]


@lru_cache(maxsize=1)
def _lungmask(weights: str, fill_weights: str | None):
    from lungmask.mask import LMInferer  # here, as importing it silences every UserWarning of the process

    files = list(filter(None, (weights, fill_weights)))
    for path in files:
        try:
            # lungmask leaves it to torch's default, which the environment can change, whether a file may run code.
            torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise InputError(f"lungmask weights {path}: not a state dict of lungmask's U-net") from error
    try:
        return LMInferer(modelpath=weights, fillmodel_path=fill_weights, force_cpu=True, tqdm_disable=True)
    except Exception as error:
        raise InputError(f"lungmask weights {' or '.join(files)}: not a state dict of lungmask's U-net") from error
