# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Benchmarks that others published, on their data or by their rules: `python -m scripts.research.benchmarks`."""
