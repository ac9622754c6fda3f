# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F401 -- what others use of this package
"""What turns a survival map into a picture: a finer map, heat, and the scan's own space."""

from bundle.maps.familiarity import Familiarity, Familiarityd, fit_familiarity, look
from bundle.maps.heat import patch_heat, to_voxels
from bundle.maps.inferer import GridShiftInferer
from bundle.maps.scan_space import EnsembleToHeatd, HeatToScand, MapToHeatd, to_scan_space
