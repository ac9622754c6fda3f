# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Survival Map: survival times and where in the lung they come from, learnt from CT and censored times alone."""

from bundle import fast_gzip
