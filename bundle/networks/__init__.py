# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The network that turns a CT into a survival map."""

from .survival_map_net import SurvivalMapNet

__all__ = ["SurvivalMapNet"]
