# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Augmentation: shift scans by whole voxels, so that nothing can be learnt from where the patch grid falls."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, RandomizableTransform

__all__ = ["RandShiftd"]


class RandShiftd(RandomizableTransform, MapTransform):
    """Translate by a random whole number of voxels along each axis, the same for all keys; borders are repeated.

    The affine is left as it is: this is for training only, where nothing goes back to the scan's own grid.

    Args:
        keys: tensors (C, D, H, W), all of one spatial shape.
        max_shift: the largest shift along an axis, in voxels; shifts are uniform in -max_shift..max_shift.
        prob: share of the calls that shift.
        allow_missing_keys: do not raise if a key is missing.
    """

    def __init__(
        self, keys: KeysCollection, max_shift: int, prob: float = 1.0, allow_missing_keys: bool = False
    ) -> None:
        if max_shift < 0:
            raise ValueError(f"max_shift is {max_shift} (expected at least 0 voxels)")
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.max_shift = max_shift
        self.shift = (0, 0, 0)

    def randomize(self, data: object = None) -> None:
        super().randomize(None)
        self.shift = tuple(self.R.randint(-self.max_shift, self.max_shift + 1, size=3).tolist())

    def __call__(self, data: Mapping[Hashable, torch.Tensor]) -> dict[Hashable, torch.Tensor]:
        out = dict(data)
        self.randomize()
        if self._do_transform:
            for key in self.key_iterator(out):
                for axis, shift in enumerate(self.shift, start=1):
                    size = out[key].shape[axis]
                    index = torch.arange(size, device=out[key].device).sub(shift).clamp(0, size - 1)
                    out[key] = out[key].index_select(axis, index)
        return out
