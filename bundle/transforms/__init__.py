# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What MONAI's transforms do not have: loading CT with checks, the lung mask, the quality gate, random origins."""

from bundle.transforms.augment import RandOrigind
from bundle.transforms.load import LoadCTd, check_hu
from bundle.transforms.lung import LUNG_METHODS, LungMaskd, lungmask_digests, lungmask_network
from bundle.transforms.lung_threshold import fill_thorax, threshold_lung_mask
from bundle.transforms.preprocessing import check_preprocessing
from bundle.transforms.quality import QualityGated, check_quality

__all__ = [
    "LUNG_METHODS",
    "LoadCTd",
    "LungMaskd",
    "QualityGated",
    "RandOrigind",
    "check_hu",
    "check_preprocessing",
    "check_quality",
    "fill_thorax",
    "lungmask_digests",
    "lungmask_network",
    "threshold_lung_mask",
]
