# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Where a prediction comes from: heat maps."""

from .grid_shift import GridShiftInferer
from .heat import patch_heat, to_voxels

__all__ = ["GridShiftInferer", "patch_heat", "to_voxels"]
