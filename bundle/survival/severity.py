# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""How bad it is: the patient's time from the amount and the shape of the disease on a finished map."""

from __future__ import annotations

import copy
import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Severity", "fit_severity", "minkowski_functionals"]


def larger_of_neighbours(x: Tensor, axis: int) -> Tensor:
    n = x.shape[axis] - 1
    return torch.maximum(x.narrow(axis, 0, n), x.narrow(axis, 1, n))


def minkowski_functionals(x: Tensor) -> Tensor:
    """Volume, surface, mean breadth (x 2) and Euler number of a body of unit cubes, (B, 4), from (B, d, h, w) in [0, 1].

    For values between 0 and 1 it is the mean over thresholds of the functionals of what lies above. By Hadwiger's theorem
    every continuous, additive measure of a body that doesn't depend on where it lies is a linear combination of these.

    Source: Legland et al., Image Analysis & Stereology 26 (2007) 83, the counts of vertices, edges, faces and cubes.
    """
    x = F.pad(x, [1, 1, 1, 1, 1, 1])
    faces = [larger_of_neighbours(x, axis) for axis in (1, 2, 3)]
    edges = [larger_of_neighbours(faces[0], 2), larger_of_neighbours(faces[0], 3), larger_of_neighbours(faces[1], 3)]
    vertices = larger_of_neighbours(edges[0], 3)
    n3 = x.sum((1, 2, 3))
    n2 = torch.stack([face.sum((1, 2, 3)) for face in faces]).sum(0)
    n1 = torch.stack([edge.sum((1, 2, 3)) for edge in edges]).sum(0)
    n0 = vertices.sum((1, 2, 3))
    return torch.stack([n3, 2 * n2 - 6 * n3, n1 - 2 * n2 + 3 * n3, n0 - n1 + n2 - n3], 1)


class Severity(nn.Module):
    """Months by which a patient's location is off, a linear function of eight numbers read off the map.

    The softmin says where the danger is; how its amount becomes months is a property of the disease: linear in volume,
    in the number of lesions, in their radius. The eight numbers are the patient's location, the Minkowski functionals of
    the patches that are in danger (relative to the lung's volume), the log of their share, and the weights' entropy and
    its exponential. The coefficients are fitted when training is over (:func:`bundle.survival.fit_severity`) and are 0
    until then. So it can't change the map, and patients whose map shows no danger are not moved. None of the others is moved
    to before `earliest`, the first death that the coefficients were fitted to: a line goes on below 0, life doesn't.

    Args:
        low, high: bounds of the locations that training began with, months.
    """

    NUMBERS = 8
    # The least standard deviation over patients at which a number says something: below is rounding, which a fit blows up.
    LEAST_SPREAD = (0.1, 1e-4, 1e-2, 1e-2, 0.1, 1e-2, 1e-3, 1e-3)
    NEVER = -1e6  # months, before anything: `earliest` until the fit; infinity isn't for weights

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low = low
        self.high = high
        self.register_buffer("centre", torch.zeros(self.NUMBERS))
        self.register_buffer("spread", torch.ones(self.NUMBERS))
        self.register_buffer("slope", torch.zeros(self.NUMBERS))
        self.register_buffer("offset", torch.zeros(()))
        self.register_buffer("earliest", torch.tensor(self.NEVER))

    def gate(self, patient: Tensor) -> Tensor:
        """0 for patients (B,) located in the last eighth of the range, 1 from the middle down."""
        return (3 * (0.87 - (patient - self.low) / (self.high - self.low))).clamp(0, 1)

    def numbers(self, danger: Tensor, lung: Tensor, location: Tensor, log_weight: Tensor) -> Tensor:
        """The eight numbers of each scan, (B, 8), from the patches' danger in (0, 1) and their share of lung.

        All arguments (B, d, h, w).
        """
        volume = lung.sum((1, 2, 3))
        diseased = (5 * (danger - 0.55)).clamp(0, 1) * lung  # from half a patch of lesion on, which is a danger of about 0.65
        functionals = minkowski_functionals(diseased)
        share = functionals[:, 0] / volume
        weight = log_weight.exp() * (lung > 0)
        entropy = -(weight * log_weight).sum((1, 2, 3)) - volume.log()
        return torch.stack(
            [
                (location * weight).sum((1, 2, 3)),
                share,
                functionals[:, 1] / volume ** (2 / 3),
                functionals[:, 2] / volume ** (1 / 3),
                functionals[:, 3],
                (share + 1e-3).log(),
                entropy,
                entropy.exp(),
            ],
            1,
        )

    def bounded(self, months: Tensor, patient: Tensor) -> Tensor:
        """Months to add, (B,), of those that the line gives (B,): by the gate, and not to before `earliest`."""
        gate = self.gate(patient)
        months = gate * months
        return torch.where(gate > 0, torch.maximum(months, self.earliest - patient), months)

    def forward(self, numbers: Tensor) -> Tensor:
        """Months to add to each patient's location, (B,), from :meth:`numbers`."""
        line = (numbers - self.centre) / self.spread @ self.slope + self.offset
        return self.bounded(line, numbers[:, 0])


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
