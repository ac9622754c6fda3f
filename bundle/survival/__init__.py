# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F401 -- what others use of this package
"""Readouts of a survival map and the objectives it is trained for."""

from bundle.errors import InputError
from bundle.survival.cox import Cox, CoxMemory
from bundle.survival.discrete import DeepHit, Logistic, LogisticHazard, seen_until
from bundle.survival.loss import SurvivalMapLoss
from bundle.survival.objectives import CenTime, Classical, Objective
from bundle.survival.priors import location_range, softmin_beta
from bundle.survival.readout import (
    check_horizon,
    death_by,
    log_pmf,
    mean_months,
    patient_numbers,
    quantile_months,
    restricted_mean_months,
    survival_curve,
)
from bundle.survival.severity import Severity, fit_severity, severity_from, severity_numbers

OBJECTIVES = {kind.name: kind for kind in (CenTime, Classical, Cox, CoxMemory, DeepHit, LogisticHazard, Logistic)}


def objective_from(settings: dict) -> Objective:
    """The objective of finished weights, learning no more, from ``settings["objective"]``: its name and arguments.

    Raises:
        InputError: there is no such objective.
    """
    arguments = dict(settings)
    name = arguments.pop("name", CenTime.name)
    if name not in OBJECTIVES:
        raise InputError(f"settings.json names the objective {name} (expected one of {', '.join(OBJECTIVES)}).")
    return OBJECTIVES[name](**arguments).requires_grad_(False)
