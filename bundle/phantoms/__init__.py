# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Scans in which it is known where death comes from, to train on, to test with and to measure maps."""

from .chest import Chest
from .cohort import COMPLEXITIES, PhantomCohort, fibrosis_covariates, make_phantom
from .cubes import Phantom, PhantomParams

__all__ = [
    "COMPLEXITIES",
    "Chest",
    "Phantom",
    "PhantomCohort",
    "PhantomParams",
    "fibrosis_covariates",
    "make_phantom",
]
