# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The cohort: which scans, whose, how long they lived, their covariates, and what each is used for."""

from .cache import ScanCache, fill_caches
from .clinical import clinical_names, encode_clinical, fit_clinical
from .cohort import longest_follow_up, patient_of, read_cohort, single_scan
from .sampler import EventSampler
from .splits import cross_validation_parts, split_cohort, stratified_folds
from .stream import ScanStream

__all__ = [
    "EventSampler",
    "ScanCache",
    "ScanStream",
    "clinical_names",
    "cross_validation_parts",
    "encode_clinical",
    "fill_caches",
    "fit_clinical",
    "longest_follow_up",
    "patient_of",
    "read_cohort",
    "single_scan",
    "split_cohort",
    "stratified_folds",
]
