# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The cohort: which scans, whose, how long they lived, and what each is used for."""

from __future__ import annotations

from .cohort import read_cohort, single_scan, split_cohort

__all__ = ["read_cohort", "single_scan", "split_cohort"]
