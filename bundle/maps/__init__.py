# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What turns a survival map into a picture: a finer map, heat, and the scan's own space."""

from .heat import patch_heat, to_voxels
from .inferer import GridShiftInferer
from .scan_space import EnsembleToHeatd, HeatToScand, MapToHeatd, mask_to_scan_space, to_scan_space

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
