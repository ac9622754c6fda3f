# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What MONAI's transforms do not have: loading CT with checks, the lung mask, whole-voxel shifts."""

from __future__ import annotations

from .augment import RandShiftd
from .load import LoadCTd, check_hu
from .lung import LUNG_METHODS, LungMaskd, lungmask_digests, lungmask_network
from .lung_threshold import fill_thorax, threshold_lung_mask

__all__ = [
    "LUNG_METHODS",
    "LoadCTd",
    "LungMaskd",
    "RandShiftd",
    "check_hu",
    "fill_thorax",
    "lungmask_digests",
    "lungmask_network",
    "threshold_lung_mask",
]
