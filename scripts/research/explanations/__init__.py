# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Every way of looking at a network, measured by the same numbers on phantoms and on implants.

`python -m scripts.research.explanations` makes the cohorts, trains, measures, and writes tables and a picture.
"""
