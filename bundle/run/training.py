# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Small pieces of a training that its config names."""

from __future__ import annotations

import math

import torch
import torch.nn as nn

from bundle.run.scans import outcomes
from bundle.survival import Objective, seen_until

__all__ = ["censoring_weights", "check_outcomes", "parameter_groups", "usual_epochs"]

OBJECTIVE_SPEED = 5  # an objective has few parameters, which are far from where they start


def usual_epochs(records: list[dict], batch_size: int) -> int:
    """Epochs of about 700 steps in all, at least 20.

    Example::

        >>> usual_epochs([{}] * 100, batch_size=4), usual_epochs([{}] * 1000, batch_size=4)
        (28, 20)
    """
    return max(20, math.ceil(700 * batch_size / max(1, len(records))))


def parameter_groups(network: nn.Module, objective: nn.Module, learning_rate: float) -> list[dict]:
    """The optimizer's parameters: the network's, and the objective's own at a higher rate."""
    own = {"params": objective.parameters(), "lr": OBJECTIVE_SPEED * learning_rate}
    return [{"params": network.parameters()}, own]


def check_outcomes(objective: Objective, network: nn.Module, records: list[dict]) -> torch.Tensor:
    """The outcomes of the training scans, (N, 2), from which this objective can learn with this network's head.

    Raises:
        InputError: it can't.
    """
    known = outcomes(records)
    objective.check(known, getattr(network, "head", None))
    return known


def censoring_weights(records: list[dict], tmax: int, ipcw: bool) -> list[float] | None:
    """P(C >= t) at t = 1..tmax months of the training scans, for weights against censoring; None without `ipcw`."""
    return seen_until(outcomes(records), tmax) if ipcw else None
