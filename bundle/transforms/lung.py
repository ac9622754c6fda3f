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
from bundle.transforms.lung_threshold import fill_thorax, threshold_lung_mask

LUNG_METHODS = ("auto", "given", "lungmask", "threshold", "none")


class LungMaskd(MapTransform):
    """Write `lung`, where the lung is, on the grid of the image, and `lung_mask_source`, how that is known.

    `lung` is (1, D, H, W) float32 in {0, 1} with the image's affine and history of transforms, so that `Invertd` brings
    it back. The image must be in HU and in RAS order. A mask that came with the scan, `lung_mask`, must be on the
    image's grid; it leaves the data.

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
        if source == "none":
            mask = torch.ones(image.shape)
        elif source == "lungmask":
            mask = lungmask_network(image.as_tensor(), *self.weights)
        elif source == "threshold":
            mask = threshold_lung_mask(image.as_tensor(), affine_to_spacing(image.affine))
        elif given is None:
            raise InputError(f"patient {patient}: no lung mask given (expected a file in column lung_mask)")
        else:
            mask = (given.as_tensor() > 0.5).float()
        if not mask.any():
            raise InputError(f"patient {patient}: the lung mask ({source}) is empty (expected some lung in the scan)")
        if self.fill and source != "none":
            mask = fill_thorax(mask, image.as_tensor())
            source += ", thorax filled"
        return data | {"lung": MetaTensor(mask.to(image.device)).copy_meta_from(image), "lung_mask_source": source}


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
