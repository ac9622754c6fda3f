# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Scans in which it is known where death comes from, to train on, to test with and to measure maps.

A new phantom is one function that draws it and one entry of `PHANTOMS` in `cohort.py`.
"""

from .chest import Chest
from .cohort import PHANTOMS, PhantomCohort, PhantomKind, make_phantom, phantom_name
from .phantom import CENSORED_AT, Phantom, PhantomParams, ball, smooth_noise

__all__ = [
    "CENSORED_AT",
    "PHANTOMS",
    "Chest",
    "Phantom",
    "PhantomCohort",
    "PhantomKind",
    "PhantomParams",
    "ball",
    "make_phantom",
    "phantom_name",
    "smooth_noise",
]
