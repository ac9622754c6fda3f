# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""How bad it is: the patient's time from the amount and the shape of the disease on a finished map."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bundle.survival.loss import weight_entropy
from bundle.survival.minimise import minimise

__all__ = ["Severity", "fit_severity", "minkowski_functionals", "severity_from", "severity_numbers"]

# The least standard deviation over patients at which a number says something: below is rounding, which a fit blows up.
LEAST_SPREAD = (0.1, 1e-4, 1e-2, 1e-2, 0.1, 1e-2, 1e-3, 1e-3)
ROUNDS = 9  # in which slopes' priors settle; from 4 on months were the same
LEAST_MONTHS = 0.02  # of a slope's prior: none that counts
NEVER = -1e6  # months, before anything


def minkowski_functionals(x: Tensor) -> Tensor:
    """Volume, surface, mean breadth (x 2) and Euler number of a body of unit cubes, (B, 4), from (B, d, h, w) in [0, 1].

    For values between 0 and 1 the mean over thresholds. By Hadwiger's theorem every continuous, additive measure of a body
    that doesn't depend on where it lies is a linear combination of these.

    Source: Legland et al., Image Analysis & Stereology 26 (2007) 83, the counts of vertices, edges, faces and cubes.

    Example::

        >>> minkowski_functionals(torch.ones(1, 2, 1, 1))
        tensor([[ 2., 10.,  4.,  1.]])
    """
    x = F.pad(x, [1, 1, 1, 1, 1, 1])
    counts = [x.new_zeros(len(x)) for _ in range(4)]  # of cubes, faces, edges and vertices: between 1, 2, 4 or 8 cubes
    for kernel in product((1, 2), repeat=3):
        counts[sum(kernel) - 3] += F.max_pool3d(x, kernel, 1).sum((1, 2, 3))
    cubes, faces, edges, vertices = counts
    surface = 2 * faces - 6 * cubes
    breadth = edges - 2 * faces + 3 * cubes
    return torch.stack([cubes, surface, breadth, vertices - edges + faces - cubes], 1)


def severity_numbers(survival_map: Tensor, danger: Tensor, share: Tensor) -> Tensor:
    """The eight numbers by which severity is told, (B, 8), from one grid's map.

    The patient's location (months), the Minkowski functionals of the patches in danger (relative to the lung's volume), the
    log of their share, and the weights' entropy and its exponential.

    Args:
        survival_map: (B, C, d, h, w), as the network gives it.
        danger: of each patch, in (0, 1), (B, d, h, w); see :meth:`bundle.networks.SurvivalMapNet.danger`.
        share: share of lung in each patch, (B, d, h, w).
    """
    location, weight = survival_map[:, 0], survival_map[:, -1]
    volume = share.sum((1, 2, 3))
    diseased = (5 * (danger - 0.55)).clamp(0, 1) * share  # from half a patch of lesion on, which is a danger of about 0.65
    amount, surface, breadth, euler = minkowski_functionals(diseased).unbind(1)
    share_diseased, entropy = amount / volume, weight_entropy(weight) - volume.log()
    numbers = [
        (location * weight).sum((1, 2, 3)),
        share_diseased,
        surface / volume ** (2 / 3),
        breadth / volume ** (1 / 3),
        euler,
        (share_diseased + 1e-3).log(),
        entropy,
        entropy.exp(),
    ]
    return torch.stack(numbers, 1)


@dataclass(frozen=True)
class Severity:
    """Months by which a patient's location is off, a linear function of :func:`severity_numbers`.

    The softmin says where the danger is; how its amount becomes months is a property of the disease. Patients whose map
    shows no danger are not moved, and nobody is moved to before the first death that the coefficients were fitted to.

    Args:
        low, high: bounds of the locations that training began with, months.
        earliest: months of the first death.
        centre, spread: mean and standard deviation of each number.
        slope: months per standard deviation of each number.
        offset: months.

    Example::

        >>> severity = Severity(-5.0, 120.0, 2.0, [0.0] * 8, [1.0] * 8, [0.0] * 8, offset=5.0)
        >>> severity(torch.tensor([[115.0], [20.0]]).expand(2, 8))
        tensor([0., 5.])
    """

    low: float
    high: float
    earliest: float
    centre: list[float]
    spread: list[float]
    slope: list[float]
    offset: float

    def gate(self, patient: Tensor) -> Tensor:
        """0 for patients (B,) located in the last eighth of the range, 1 from the middle down."""
        return (3 * (0.87 - (patient - self.low) / (self.high - self.low))).clamp(0, 1)

    def bounded(self, months: Tensor, patient: Tensor) -> Tensor:
        """Months to add, (B,), of those that the line gives (B,): by the gate, and not to before `earliest`."""
        gate = self.gate(patient)
        months = gate * months
        return torch.where(gate > 0, torch.maximum(months, self.earliest - patient), months)

    def __call__(self, numbers: Tensor) -> Tensor:
        """Months to add to each patient's location, (B,), from their numbers, (B, 8)."""
        exact = numbers.double()
        centre, spread, slope = (exact.new_tensor(x) for x in (self.centre, self.spread, self.slope))
        line = (exact - centre) / spread @ slope + self.offset
        return self.bounded(line, exact[:, 0]).to(numbers.dtype)


def severity_from(settings: dict | None) -> Severity | None:
    """The severity of finished weights, from ``settings["severity"]``: its fields as plain numbers, or None for none."""
    return None if settings is None else Severity(**settings)


def fit_severity(
    numbers: Tensor,
    outcome: Tensor,
    objective: nn.Module,
    loc_range: Sequence[float],
    months: float = 20.0,
    extra: Tensor | None = None,
) -> tuple[Severity | None, float]:
    """Fit :class:`Severity` to the training scans when training is over.

    Coefficients and variance are the most probable ones under the objective of the moved locations and a normal prior of
    each slope. The variance that training used made learning smooth; the one returned says how sure the times are.

    Args:
        numbers: of each training scan, (n, 8), from :func:`severity_numbers`.
        outcome: (time in months, event), (n, 2).
        objective: a module with a `variance`, such as :class:`~bundle.survival.CenTime`; it stays as it is.
        loc_range: bounds of the locations that training began with, months.
        months: standard deviation of the prior of a slope, at most.
        extra: extra numbers of the patients, (n, K), if the objective reads any.

    Returns:
        the severity, None where fewer than two scans show any danger; and the variance left, months squared, at least 1, for
        times are whole months.
    """
    numbers, outcome = numbers.double(), outcome.double()
    extra = numbers[:, :0] if extra is None else extra.double()
    severity = unfitted(numbers, outcome, loc_range)
    if severity is None:
        return None, float(objective.variance)
    standard = (numbers - numbers.new_tensor(severity.centre)) / numbers.new_tensor(severity.spread)
    trial = copy.copy(objective)

    def loss(coefficients: Tensor) -> Tensor:
        """The objective, given slopes, offset and the log of the variance above 1."""
        line = standard @ coefficients[:-2] + coefficients[-2]
        location = numbers[:, 0] + severity.bounded(line, numbers[:, 0])
        trial.variance = coefficients[-1].exp() + 1
        channels = torch.cat([location.unsqueeze(1), extra, torch.ones_like(location).unsqueeze(1)], 1)
        return trial(channels.view(len(numbers), -1, 1, 1, 1), outcome)

    start = numbers.new_zeros(numbers.shape[1] + 2)
    start[-1] = math.log(objective.variance)
    *slope, offset, log_variance = relevant(loss, start, len(numbers), months).tolist()
    return replace(severity, slope=slope, offset=offset), math.exp(log_variance) + 1


def unfitted(numbers: Tensor, outcome: Tensor, loc_range: Sequence[float]) -> Severity | None:
    """A severity that moves nobody, with the numbers' mean and spread; None where fewer than two scans show any danger."""
    zero = [0.0] * numbers.shape[1]
    deaths = outcome[outcome[:, 1] > 0, 0]
    earliest = float(deaths.min()) if len(deaths) else NEVER
    severity = Severity(*loc_range, earliest, centre=zero, spread=zero, slope=zero, offset=0.0)
    told = severity.gate(numbers[:, 0]) > 0
    if told.sum() < 2:
        return None
    spread = numbers[told].std(0).maximum(numbers.new_tensor(LEAST_SPREAD))
    return replace(severity, centre=numbers[told].mean(0).tolist(), spread=spread.tolist())


def relevant(loss: Callable[[Tensor], Tensor], start: Tensor, num: int, months: float) -> Tensor:
    """The most probable coefficients by automatic relevance determination: all but the last two have a normal prior.

    The prior's standard deviation is where the data are most probable, so that a number that tells nothing, or what others
    tell too, gets none. The posterior is taken as normal about its top.

    Source: Tipping, Sparse Bayesian Learning and the Relevance Vector Machine, JMLR 1 (2001) 211, equations 16 and 17, after
    MacKay, Bayesian Interpolation, Neural Computation 4 (1992) 415.

    Args:
        loss: minus the log-likelihood of the coefficients, a mean over `num` patients.
        start: coefficients to start from.
        num: number of patients.
        months: standard deviation of a prior, at most.
    """

    def posterior(coefficients: Tensor, deviation: Tensor) -> Tensor:
        return loss(coefficients) + (coefficients[:-2] / deviation).square().sum() / (2 * num)

    deviation = torch.full_like(start[:-2], months)
    found = minimise(partial(posterior, deviation=deviation), start, max_iter=500)
    for _ in range(ROUNDS):
        curvature = num * torch.autograd.functional.hessian(partial(posterior, deviation=deviation), found)
        left = torch.linalg.pinv(curvature, hermitian=True).diagonal()[:-2]  # the variances after the data
        learnt = (1 - left / deviation**2).clamp(1e-6, 1)  # 0 where they are what they were before
        deviation = (found[:-2].square() / learnt).sqrt().clamp(LEAST_MONTHS, months)
        found = minimise(partial(posterior, deviation=deviation), found, max_iter=500)
    return found
