# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Readouts of a survival map and the objectives it is trained for."""

from .cox import Cox, CoxMemory
from .discrete import DeepHit, Logistic, LogisticHazard, seen_until
from .objectives import CenTime, Classical, Objective, SurvivalMapLoss
from .readout import (
    death_by,
    log_pmf,
    mean_months,
    patient_numbers,
    quantile_months,
    restricted_mean_months,
    survival_curve,
)
from .severity_fit import fit_severity

__all__ = [
    "OBJECTIVES",
    "CenTime",
    "Classical",
    "Cox",
    "CoxMemory",
    "DeepHit",
    "Logistic",
    "LogisticHazard",
    "Objective",
    "SurvivalMapLoss",
    "death_by",
    "fit_severity",
    "log_pmf",
    "mean_months",
    "objective_from",
    "patient_numbers",
    "quantile_months",
    "restricted_mean_months",
    "seen_until",
    "survival_curve",
]

OBJECTIVES = {kind.name: kind for kind in (CenTime, Classical, Cox, CoxMemory, DeepHit, LogisticHazard, Logistic)}


def objective_from(settings: dict) -> Objective:
    """The objective of finished weights, which learns no more.

    Args:
        settings: ``settings["objective"]`` of the weights: its name (CenTime without one) and its arguments.
    """
    arguments = dict(settings)
    return OBJECTIVES[arguments.pop("name", CenTime.name)](**arguments).requires_grad_(False)
