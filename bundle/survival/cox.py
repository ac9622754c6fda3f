# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Proportional hazards: the order of deaths, not their months, is what the map is trained for."""

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from bundle.errors import InputError
from bundle.survival.objectives import Objective, learnt_factor, whole_months
from bundle.survival.readout import months, patient_numbers


def partial_log_likelihood(log_hazard: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Cox's log partial likelihood with Efron's ties, the sum over deaths, of (N,) patients; 0 without deaths.

    A death i gives ``log_hazard_i - log sum_{j at risk} exp(log_hazard_j)``; at risk is who has a time of at least i's.
    Of m deaths at the same time the l-th, l = 0..m-1, has that sum less l / m of what the m deaths bring to it. All in
    log space and of the type of its input, which torchsurv's is not.

    Source: Cox, JRSS B 1972; Efron, JASA 1977.
    """
    order = time.argsort(descending=True)
    log_hazard, died = log_hazard[order], event[order] > 0
    _, group, sizes = torch.unique_consecutive(time[order], return_inverse=True, return_counts=True)
    at_risk = log_hazard.logcumsumexp(0)[sizes.cumsum(0) - 1]
    groups, rank = group[died], torch.arange(int(died.sum()), device=time.device)
    risk = at_risk[groups]
    deaths = torch.zeros_like(sizes).index_add(0, groups, torch.ones_like(groups))
    before = (rank - (deaths.cumsum(0) - deaths)[groups]).to(risk.dtype) / deaths[groups]
    # The deaths' part of the risk, in (0, 1]: a difference of two sums of exponentials would cancel.
    part = torch.zeros_like(at_risk).index_add(0, groups, (log_hazard[died] - risk).exp())
    return (log_hazard[died] - risk - torch.log1p(-before * part[groups].clamp_max(1))).sum()


def minimise(function: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """The unknowns (K,) at a minimum of the function, by L-BFGS from `start`, in its type."""
    unknowns = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([unknowns], max_iter=500, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        value = function(unknowns)
        value.backward()
        return value

    optimizer.step(step)
    return unknowns.detach()


def cox_regression(x: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Coefficients (K,) of covariates (N, K), of about one spread, at the highest :func:`partial_log_likelihood`."""
    return minimise(lambda slopes: -partial_log_likelihood(x @ slopes, time, event) / len(x), torch.zeros_like(x[0]))


def breslow_baseline(log_hazard: Tensor, time: Tensor, event: Tensor, tmax: int) -> Tensor:
    """Cumulative baseline hazard at t = 1..tmax months, (tmax,); arguments (N,), times in whole months.

    ``H0(t)``: the sum over deaths up to month t of 1 / (sum of exp(log_hazard) over those at risk at that death).

    Source: Breslow, discussion of Cox, JRSS B 1972.
    """
    t = months(tmax, time).unsqueeze(1)
    at_risk = torch.where(time >= t, log_hazard, -torch.inf).logsumexp(1)
    deaths = ((time == t) & (event > 0)).sum(1)
    return torch.where(deaths > 0, deaths * (-at_risk).exp(), 0.0).cumsum(0)


class Cox(Objective):
    """Cox's partial likelihood: the loss is -:func:`partial_log_likelihood` over the number of patients of a batch.

    The log hazard of a patient is ``(tmax / 2 - location) / scale``, and the readout ``S(t) = exp(-H0(t) exp(log
    hazard))``. H0 is fitted when training is over; until then it is Gompertz's ``exp((t - tmax / 2) / scale)``, by
    which a patient's cumulative hazard is 1 at the location. Beyond the last death of the training scans H0 stays as it
    is, and what is left of the probability lies in the last month.

    Args:
        tmax: last month of the distribution; above the largest time in the cohort.
        scale: months of location in which the hazard changes by a factor e, where learning starts.
        baseline: H0 at t = 1..tmax, where it is fitted.
    """

    name = "cox"

    def __init__(self, tmax: int = 100, scale: float = 15.0, baseline: Sequence[float] | None = None) -> None:
        super().__init__(tmax)
        if scale <= 0:
            raise InputError(f"scale must be above 0 months, got {scale}.")
        if baseline is not None and len(baseline) != tmax:
            raise InputError(f"baseline must have {tmax} numbers, one a month up to tmax, got {len(baseline)}.")
        self.scale = scale
        self.baseline = None if baseline is None else [float(hazard) for hazard in baseline]
        self.log_factor = nn.Parameter(torch.zeros(()))

    @property
    def arguments(self) -> dict:
        return {**super().arguments, "scale": self.scale * learnt_factor(self.log_factor).item()}

    def log_hazard(self, location: Tensor) -> Tensor:
        return (self.tmax / 2 - location) / (self.scale * learnt_factor(self.log_factor))

    def log_pmf(self, survival_map: Tensor) -> Tensor:
        pmf = self.pmf(survival_map)
        return pmf.clamp_min(torch.finfo(pmf.dtype).tiny).log()

    def pmf(self, survival_map: Tensor) -> Tensor:
        location, _ = patient_numbers(survival_map)
        # A sum of logs rather than a product, of which one factor could overflow while the other is 0.
        if self.baseline is None:
            log_baseline = -self.log_hazard(months(self.tmax, location))
        else:
            log_baseline = torch.tensor(self.baseline, dtype=location.dtype, device=location.device).log()
        alive = torch.exp(-torch.exp(log_baseline + self.log_hazard(location).unsqueeze(1)))
        first, last = torch.ones_like(alive[:, :1]), torch.zeros_like(alive[:, :1])
        return -torch.cat([first, alive[:, :-1], last], 1).diff(dim=1)

    def likelihood(self, location: Tensor, time: Tensor, event: Tensor) -> Tensor:
        """:func:`partial_log_likelihood` of patients located at `location` months."""
        return partial_log_likelihood(self.log_hazard(location), time, event)

    def forward(self, survival_map: Tensor, outcome: Tensor) -> Tensor:
        location, _ = patient_numbers(survival_map)
        return -self.likelihood(location, *outcome.unbind(1)) / len(outcome)

    @torch.no_grad()
    def fit_baseline(self, location: Tensor, outcome: Tensor) -> None:
        """Fit H0 by :func:`breslow_baseline` to the training patients' locations (N,) and their outcome (N, 2)."""
        time, event = outcome.double().unbind(1)
        bins = whole_months(time, event, self.tmax).double()
        self.baseline = breslow_baseline(self.log_hazard(location.double()), bins, event, self.tmax).tolist()


class CoxMemory(Cox):
    """Risk sets of :class:`Cox` that reach across batches: the last `memory` patients are remembered.

    In training the loss is what the batch adds to the partial likelihood: ``-(pl(remembered and batch) -
    pl(remembered)) / B``. Those remembered have no gradient, and their locations are those of their last visit. Were
    nobody forgotten and no location out of date, the mean gradient over batches would be that of the whole cohort. Maps
    without a gradient (validation) are not remembered.

    Source: the difference is the cross-validated partial likelihood of Verweij and van Houwelingen, Statistics in
    Medicine 1993; a bank of past outputs as in He et al., MoCo, CVPR 2020.
    """

    name = "cox_memory"

    def __init__(
        self, tmax: int = 100, scale: float = 15.0, baseline: Sequence[float] | None = None, memory: int = 64
    ) -> None:
        super().__init__(tmax, scale, baseline)
        if memory < 1:
            raise InputError(f"memory must hold at least 1 patient, got {memory}.")
        self.memory = memory
        # (location, time, event); NaN until a place is taken
        self.register_buffer("remembered", torch.full((memory, 3), torch.nan))

    def forward(self, survival_map: Tensor, outcome: Tensor) -> Tensor:
        location, _ = patient_numbers(survival_map)
        batch = torch.cat([location.unsqueeze(1), outcome.to(location)], 1)
        before = self.remembered[self.remembered[:, 0].isfinite()].to(location)
        together = torch.cat([before, batch])
        loss = (self.likelihood(*before.unbind(1)) - self.likelihood(*together.unbind(1))) / len(batch)
        if survival_map.requires_grad:
            self.remembered = torch.cat([self.remembered, batch.detach().to(self.remembered)])[-self.memory :]
        return loss
