# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The networks that turn a CT, clinical covariates or both into a survival map."""

from __future__ import annotations

import torch.nn as nn

from bundle.errors import InputError
from bundle.networks.clinical_net import ClinicalNet
from bundle.networks.survival_map_net import SurvivalMapNet

__all__ = ["ClinicalNet", "SurvivalMapNet", "network_from"]

NETWORKS = {"ClinicalNet": ClinicalNet, "SurvivalMapNet": SurvivalMapNet}


def network_from(settings: dict) -> nn.Module:
    """The network of weights, from ``settings["network"]``: its name (SurvivalMapNet without one) and its arguments.

    Raises:
        InputError: there is no such network.
    """
    arguments = dict(settings)
    name = arguments.pop("name", "SurvivalMapNet")
    if name not in NETWORKS:
        raise InputError(f"settings.json names the network {name} (expected one of {', '.join(NETWORKS)}).")
    return NETWORKS[name](**arguments)
