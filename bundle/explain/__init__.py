# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Where a prediction comes from: heat maps."""

from .grid_shift import GridShiftInferer
from .heat import patch_heat, to_voxels
from .maps import EnsembleToHeatd, HeatToScand, MapToHeatd, mask_to_scan_space, to_scan_space

__all__ = [
    "EnsembleToHeatd",
    "GridShiftInferer",
    "HeatToScand",
    "MapToHeatd",
    "mask_to_scan_space",
    "patch_heat",
    "to_scan_space",
    "to_voxels",
]
