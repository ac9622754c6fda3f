# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Other ways to learn from survival times where risk comes from, measured on real chests with implanted disease.

Each method is one file with `fit(cohort, seed)`. It gives `predict(scan)`, which gives the risk and the heat on the scan's
grid. The command `python -m scripts.research.peers` makes the cohorts, fits, measures, and writes a page.
"""
