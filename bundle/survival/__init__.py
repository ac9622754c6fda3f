# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Readouts of a survival map and the objectives it is trained for."""

from .objectives import CenTime, SurvivalMapLoss
from .readout import death_by, log_pmf, mean_months, quantile_months, restricted_mean_months, survival_curve
from .severity_fit import fit_severity

__all__ = [
    "CenTime",
    "SurvivalMapLoss",
    "death_by",
    "fit_severity",
    "log_pmf",
    "mean_months",
    "quantile_months",
    "restricted_mean_months",
    "survival_curve",
]
