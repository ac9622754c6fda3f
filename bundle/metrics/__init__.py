# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""How right the predicted times are, and how right the maps are: metrics with bootstrap intervals."""

from .bootstrap import bootstrap, with_interval
from .distribution import MapDistribution
from .localisation import LocalisationMetric
from .survival import SurvivalMetric

__all__ = ["LocalisationMetric", "MapDistribution", "SurvivalMetric", "bootstrap", "with_interval"]
