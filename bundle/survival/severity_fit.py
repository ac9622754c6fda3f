# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Fit how much disease means how many months, once the map is learnt."""

from __future__ import annotations

import copy
import math

import torch
import torch.nn as nn
from torch import Tensor

__all__ = ["fit_severity"]


def fit_severity(
    severity: nn.Module,
    numbers: Tensor,
    outcome: Tensor,
    objective: nn.Module,
    months: float = 20.0,
    extra: Tensor | None = None,
) -> float:
    """Set the coefficients of a :class:`~bundle.networks.severity.Severity`, in place; returns the variance left.

    Coefficients and variance are where the objective of the moved locations plus ``|slope|^2 / (2 months^2)`` is least:
    the largest posterior under a normal prior. Few unknowns, a smooth function: L-BFGS from zero in float64. The
    variance that training used made learning smooth; the one returned says how sure the times are (at least 1, for
    times are whole months). A moved location counts as at the earliest death where it would come before it.

    Args:
        severity: the module; its coefficients are per standard deviation of each number.
        numbers: what it reads off the map of each training scan, (n, 8).
        outcome: (time in months, event), (n, 2).
        objective: a module with a `variance`, such as :class:`~bundle.survival.CenTime`; it stays as it is.
        months: standard deviation of the prior of a slope.
        extra: extra numbers of the patients, (n, K), if the objective reads any.
    """
    numbers, outcome = numbers.double(), outcome.double()
    fitted = copy.deepcopy(severity).to(numbers.device)  # the network may be on a GPU; where the numbers are is fast enough
    extra = numbers[:, :0] if extra is None else extra.double()
    told = fitted.gate(numbers[:, 0]) > 0
    if told.sum() < 2:
        return float(objective.variance)  # nobody to learn from: nobody is moved
    centre, spread = numbers[told].mean(0), numbers[told].std(0).maximum(numbers.new_tensor(fitted.LEAST_SPREAD))
    standard = (numbers - centre) / spread
    deaths = outcome[outcome[:, 1] > 0, 0]
    fitted.earliest.fill_(float(deaths.min()) if len(deaths) else fitted.NEVER)
    coefficients = torch.zeros(numbers.shape[1] + 2, dtype=torch.float64)
    coefficients[-1] = math.log(objective.variance)
    coefficients.requires_grad_(True)
    trial = copy.copy(objective)
    optimizer = torch.optim.LBFGS([coefficients], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        line = standard @ coefficients[:-2] + coefficients[-2]
        location = numbers[:, 0] + fitted.bounded(line, numbers[:, 0])
        trial.variance = coefficients[-1].exp() + 1
        channels = torch.cat([location.unsqueeze(1), extra, torch.ones_like(location).unsqueeze(1)], 1)
        survival_map = channels.view(len(numbers), -1, 1, 1, 1)
        prior = coefficients[:-2].square().sum() / (2 * months**2)
        value = trial(survival_map, outcome) + prior / len(numbers)
        value.backward()
        return value

    optimizer.step(loss)
    fitted.centre.copy_(centre)
    fitted.spread.copy_(spread)
    fitted.slope.copy_(coefficients[:-2].detach())
    fitted.offset.copy_(coefficients[-2].detach())
    severity.load_state_dict(fitted.state_dict())
    return float(coefficients[-1].detach().exp() + 1)
