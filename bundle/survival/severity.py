# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""How bad it is: the patient's time from the amount and the shape of the disease on a finished map."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bundle.survival.cox import minimise
from bundle.survival.loss import weight_entropy

# The least standard deviation over patients at which a number says something: below is rounding, which a fit blows up.
LEAST_SPREAD = (0.1, 1e-4, 1e-2, 1e-2, 0.1, 1e-2, 1e-3, 1e-3)
ROUNDS = 9  # in which slopes' priors settle; from 4 on months were the same
LEAST_MONTHS = 0.02  # of a slope's prior: none that counts
NEVER = -1e6  # months, before anything


def minkowski_functionals(x: Tensor) -> Tensor:
    """Volume, surface, mean breadth (x 2) and Euler number of a body of cubes, (B, 4), from (B, d, h, w) in [0, 1].

    For values between 0 and 1 the mean over thresholds. By Hadwiger's theorem every continuous, additive measure of a
    body that doesn't depend on where it lies is a linear combination of these.

    Source: Legland et al., Image Analysis & Stereology 26 (2007) 83.
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
    """The eight numbers by which severity is told, (B, 8), from one grid's map (B, C, d, h, w).

    The patient's location (months), the Minkowski functionals of the patches in danger (relative to the lung's volume),
    the log of their share, and the weights' entropy and its exponential. `danger`, see
    :meth:`bundle.networks.SurvivalMapNet.danger`, and `share` of lung are (B, d, h, w).
    """
    location, weight = survival_map[:, 0], survival_map[:, -1]
    volume = share.sum((1, 2, 3))
    diseased = (5 * (danger - 0.55)).clamp(0, 1) * share  # from half a patch of lesion on, a danger of about 0.65
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
    """

    low: float  # bounds of the locations that training began with, months
    high: float
    earliest: float  # months of the first death
    centre: list[float]  # mean of each number
    spread: list[float]  # its standard deviation
    slope: list[float]  # months per standard deviation
    offset: float  # months

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
    """The severity of finished weights, from ``settings["severity"]``: its fields as plain numbers, or None."""
    return None if settings is None else Severity(**settings)


def fit_severity(
    numbers: Tensor,
    outcome: Tensor,
    objective: nn.Module,
    loc_range: Sequence[float],
    months: float = 20.0,
    extra: Tensor | None = None,
) -> tuple[Severity | None, float]:
    """Fit :class:`Severity` to the training scans when training is over; None where fewer than two show any danger.

    Coefficients and variance are the most probable ones under the objective of the moved locations and a normal prior
    of each slope. The variance that training used made learning smooth; the one returned says how sure the times are:
    months squared, at least 1, for times are whole months.

    Args:
        numbers: of each training scan, (n, 8), from :func:`severity_numbers`.
        outcome: (time in months, event), (n, 2).
        objective: a module with a `variance`, such as :class:`~bundle.survival.CenTime`; it stays as it is.
        loc_range: bounds of the locations that training began with, months.
        months: standard deviation of the prior of a slope, at most.
        extra: extra numbers of the patients, (n, K), if the objective reads any.
    """
    numbers, outcome = numbers.double(), outcome.double()
    extra = numbers[:, :0] if extra is None else extra.double()
    earliest = min(outcome[outcome[:, 1] > 0, 0].tolist(), default=NEVER)
    severity = Severity(*loc_range, earliest, centre=[], spread=[], slope=[], offset=0.0)
    told = numbers[severity.gate(numbers[:, 0]) > 0]
    if len(told) < 2:
        return None, float(objective.variance)
    centre, spread = told.mean(0), told.std(0).maximum(told.new_tensor(LEAST_SPREAD))
    standard = (numbers - centre) / spread
    trial = copy.copy(objective)

    def loss(coefficients: Tensor) -> Tensor:
        line = standard @ coefficients[:-2] + coefficients[-2]
        location = numbers[:, 0] + severity.bounded(line, numbers[:, 0])
        trial.variance = coefficients[-1].exp() + 1
        channels = torch.cat([location.unsqueeze(1), extra, torch.ones_like(location).unsqueeze(1)], 1)
        return trial(channels.view(len(numbers), -1, 1, 1, 1), outcome)

    start = numbers.new_zeros(numbers.shape[1] + 2)
    start[-1] = math.log(objective.variance)
    *slope, offset, log_variance = relevant(loss, start, len(numbers), months).tolist()
    fitted = replace(severity, centre=centre.tolist(), spread=spread.tolist(), slope=slope, offset=offset)
    return fitted, math.exp(log_variance) + 1


def relevant(loss: Callable[[Tensor], Tensor], start: Tensor, num: int, months: float) -> Tensor:
    """The most probable coefficients by automatic relevance determination: all but the last two have a normal prior.

    The prior's standard deviation, at most `months`, is where the data are most probable, so that a number that tells
    nothing, or what others tell too, gets none. The posterior is taken as normal about its top. `loss` is minus the
    log-likelihood, a mean over `num` patients.

    Source: Tipping, Sparse Bayesian Learning and the Relevance Vector Machine, JMLR 1 (2001) 211, equations 16 and 17,
    after MacKay, Bayesian Interpolation, Neural Computation 4 (1992) 415.
    """
    deviation = torch.full_like(start[:-2], months)

    def posterior(coefficients: Tensor) -> Tensor:
        return loss(coefficients) + (coefficients[:-2] / deviation).square().sum() / (2 * num)

    found = minimise(posterior, start)
    for _ in range(ROUNDS):
        curvature = num * torch.autograd.functional.hessian(posterior, found)
        left = torch.linalg.pinv(curvature, hermitian=True).diagonal()[:-2]  # the variances after the data
        learnt = (1 - left / deviation**2).clamp(1e-6, 1)  # 0 where they are what they were before
        deviation = (found[:-2].square() / learnt).sqrt().clamp(LEAST_MONTHS, months)
        found = minimise(posterior, found)
    return found
