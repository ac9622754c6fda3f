# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The cohort: which scans, whose, how long they lived, their covariates, and what each is used for."""

from __future__ import annotations

from .clinical import clinical_names, encode_clinical, fit_clinical
from .cohort import patient_of, read_cohort, single_scan, split_cohort
from .folds import cross_validation_parts, stratified_folds

__all__ = [
    "clinical_names",
    "cross_validation_parts",
    "encode_clinical",
    "fit_clinical",
    "patient_of",
    "read_cohort",
    "single_scan",
    "split_cohort",
    "stratified_folds",
]
