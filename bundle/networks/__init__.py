# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The networks that turn a CT, clinical covariates or both into a survival map, and one that learns from scans alone."""

# ruff: noqa: F401
import inspect

import torch.nn as nn

from bundle.errors import InputError
from bundle.networks.clinical_net import ClinicalNet
from bundle.networks.codebook_net import CodebookNet
from bundle.networks.masked_autoencoder import MaskedAutoencoder, ReconstructionLoss
from bundle.networks.survival_map_net import SurvivalMapNet

NETWORKS = {kind.__name__: kind for kind in (ClinicalNet, CodebookNet, MaskedAutoencoder, SurvivalMapNet)}


def network_from(settings: dict) -> nn.Module:
    """The network of weights, from ``settings["network"]``: its name (SurvivalMapNet without one) and its arguments.

    Raises:
        InputError: there is no such network, or it has no such arguments.
    """
    arguments = dict(settings)
    name = arguments.pop("name", "SurvivalMapNet")
    if name not in NETWORKS:
        raise InputError(f"settings.json names the network {name} (expected one of {', '.join(NETWORKS)}).")
    known = inspect.signature(NETWORKS[name]).parameters
    if unknown := sorted(arguments.keys() - known):
        raise InputError(f"settings.json is of another version: {name} has no {', '.join(unknown)} (train again).")
    return NETWORKS[name](**arguments)
