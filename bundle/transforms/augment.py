# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Augmentation: let the patch grid begin anywhere, so that nothing can be learnt from where it falls."""

from collections.abc import Hashable, Mapping, Sequence

import torch
import torch.nn.functional as F
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform
from monai.utils import ensure_tuple_rep


class RandOrigind(RandomizableTransform, MapTransform):
    """Pad each axis in front by a random whole number of voxels, the same for all keys.

    Patches and windows of attention then begin elsewhere in the scan, and nothing of it is lost. In inference
    :class:`~bundle.maps.GridShiftInferer` pads in the same way. The affine is left as it is: this is for training only.

    Args:
        keys: tensors (C, D, H, W), all of one spatial shape.
        max_pad: the most voxels in front of an axis; their number is uniform in 0..max_pad.
        mode: of `torch.nn.functional.pad`, one for all keys or one for each.
        prob: share of the calls that pad.
    """

    def __init__(
        self, keys: KeysCollection, max_pad: int, mode: str | Sequence[str] = "replicate", prob: float = 1.0
    ) -> None:
        if max_pad < 0:
            raise ValueError(f"max_pad is {max_pad} (expected at least 0 voxels)")
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.max_pad = max_pad
        self.mode = ensure_tuple_rep(mode, len(self.keys))
        self.pad = (0, 0, 0)

    def randomize(self, data: object = None) -> None:
        super().randomize(None)
        self.pad = tuple(self.R.randint(self.max_pad + 1, size=3).tolist())

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        out = dict(data)
        self.randomize()
        if self._do_transform:
            z, y, x = self.pad
            for key, mode in self.key_iterator(out, self.mode):
                out[key] = F.pad(out[key], [x, 0, y, 0, z, 0], mode=mode)
        return out
