# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Fit how much disease means how many months, once the map is learnt."""

from __future__ import annotations

import copy
import math
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor

__all__ = ["fit_severity"]

ROUNDS = 9  # in which slopes' priors settle; from 4 on months were the same
LEAST_MONTHS = 0.02  # of a slope's prior: none that counts


def fit_severity(
    severity: nn.Module,
    numbers: Tensor,
    outcome: Tensor,
    objective: nn.Module,
    months: float = 20.0,
    extra: Tensor | None = None,
) -> float:
    """Set the coefficients of a :class:`~bundle.networks.severity.Severity`, in place; returns the variance left.

    Coefficients and variance are the most probable ones under the objective of the moved locations and a normal prior of
    each slope. Its standard deviation is where the deaths are most probable, so that a number that tells nothing, or what
    others tell too, gets none: automatic relevance determination. Few unknowns, a smooth function: L-BFGS in float64, with
    the posterior taken as normal about its top. The variance that training used made learning smooth; the one returned
    says how sure the times are (at least 1, for times are whole months). A moved location counts as at the earliest death
    where it would come before it.

    Source: Tipping, Sparse Bayesian Learning and the Relevance Vector Machine, JMLR 1 (2001) 211, equations 16 and 17, after
    MacKay, Bayesian Interpolation, Neural Computation 4 (1992) 415.

    Args:
        severity: the module; its coefficients are per standard deviation of each number.
        numbers: what it reads off the map of each training scan, (n, 8).
        outcome: (time in months, event), (n, 2).
        objective: a module with a `variance`, such as :class:`~bundle.survival.CenTime`; it stays as it is.
        months: standard deviation of the prior of a slope, at most.
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
    trial = copy.copy(objective)

    def loss(coefficients: Tensor, deviation: Tensor) -> Tensor:
        """Minus the log of the posterior, over n, of slopes, offset and log of the variance above 1."""
        line = standard @ coefficients[:-2] + coefficients[-2]
        location = numbers[:, 0] + fitted.bounded(line, numbers[:, 0])
        trial.variance = coefficients[-1].exp() + 1
        channels = torch.cat([location.unsqueeze(1), extra, torch.ones_like(location).unsqueeze(1)], 1)
        prior = (coefficients[:-2] / deviation).square().sum() / 2
        return trial(channels.view(len(numbers), -1, 1, 1, 1), outcome) + prior / len(numbers)

    def most_probable(start: Tensor, deviation: Tensor) -> Tensor:
        coefficients = start.clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS([coefficients], max_iter=500, line_search_fn="strong_wolfe")

        def step() -> Tensor:
            optimizer.zero_grad()
            value = loss(coefficients, deviation)
            value.backward()
            return value

        optimizer.step(step)
        return coefficients.detach()

    coefficients = numbers.new_zeros(numbers.shape[1] + 2)
    coefficients[-1] = math.log(objective.variance)
    deviation = numbers.new_full((numbers.shape[1],), months)
    coefficients = most_probable(coefficients, deviation)
    for _ in range(ROUNDS):
        curvature = len(numbers) * torch.autograd.functional.hessian(partial(loss, deviation=deviation), coefficients)
        left = torch.linalg.pinv(curvature, hermitian=True).diagonal()[:-2]  # the slopes' variances after the deaths
        learnt = (1 - left / deviation**2).clamp(1e-6, 1)  # 0 where they are what they were before
        deviation = (coefficients[:-2].square() / learnt).sqrt().clamp(LEAST_MONTHS, months)
        coefficients = most_probable(coefficients, deviation)
    fitted.centre.copy_(centre)
    fitted.spread.copy_(spread)
    fitted.slope.copy_(coefficients[:-2])
    fitted.offset.copy_(coefficients[-2])
    severity.load_state_dict(fitted.state_dict())
    return float(coefficients[-1].exp() + 1)
