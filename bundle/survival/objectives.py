# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What a survival map is trained for: a readout of the map and a loss for censored times."""

import inspect

import torch
import torch.nn as nn
from torch import Tensor

from bundle.errors import InputError
from bundle.survival.readout import log_pmf, months, patient_numbers


def whole_months(time: Tensor, event: Tensor, tmax: int) -> Tensor:
    """The month, 1..tmax, of each time, (B,); who is censored in the half month below tmax, is so at tmax - 1.

    Raises:
        InputError: a death after tmax, or a censoring time at or above it, for which no likelihood exists.
    """
    bins = time.round().clamp_min(1).long()
    bins = torch.where((event == 0) & (time < tmax), bins.clamp_max(tmax - 1), bins)
    if bool((bins > tmax - 1 + event).any()):
        raise InputError(f"times must lie below tmax = {tmax} months, got {float(time.max())}.")
    return bins


def classical_log_likelihood(log_p: Tensor, time: Tensor, event: Tensor, log_share: Tensor | None = None) -> Tensor:
    """Log-likelihood of each patient, (B,), of log P(T = 1..tmax), (B, tmax), if censoring says nothing of the death.

    A death at t gives log p(t); a patient censored at c gives log P(T > c) = log sum_{t > c} p(t). To log p(t) in that
    sum `log_share` (tmax,) is added. Errors as of :func:`whole_months`.

    Source: Kalbfleisch and Prentice, The Statistical Analysis of Failure Time Data, 2002, section 3.2.
    """
    tmax = log_p.shape[-1]
    bins = whole_months(time, event, tmax).unsqueeze(1)
    death = log_p.gather(1, bins - 1).squeeze(1)
    share = log_p if log_share is None else log_p + log_share
    share = share.masked_fill(months(tmax, log_p) <= bins, -torch.inf)
    # The row of a death may have no bin left above it: its logsumexp is never used, but its gradient must be finite.
    share = torch.where((event > 0).unsqueeze(1), log_p, share)
    return torch.where(event > 0, death, torch.logsumexp(share, 1))


def centime_log_likelihood(log_p: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Log-likelihood of each patient under CenTime's event-conditional censoring, (B,).

    A death at t gives log p(t); a patient censored at c gives log sum_{t > c} p(t) / (t - 1): the censoring time is
    uniform on 1..t-1 when death comes at t. Arguments and errors as in :func:`classical_log_likelihood`.

    Source: Shahin et al., CenTime, Medical Image Analysis 2024.
    """
    t = months(log_p.shape[-1], log_p)
    return classical_log_likelihood(log_p, time, event, -(t - 1).clamp_min(1).log())


def learnt_factor(x: Tensor) -> Tensor:
    """exp(x) for small x, but between exp(-3) and exp(3): what is learnt can't run away from where it started."""
    return torch.exp(3 * torch.tanh(x / 3))


class Objective(nn.Module):
    """A readout of survival maps (B, C, d, h, w), and in `forward` a loss to train them by.

    The loss is the mean over patients, given `outcome` (B, 2) = (time in months, event).
    """

    name = ""  # of the objective in settings.json and of its file in configs/objective
    extra = 0  # channels that it needs between location and weight

    def __init__(self, tmax: int) -> None:
        super().__init__()
        if tmax < 2:
            raise InputError(f"tmax must be at least 2 months, got {tmax}.")
        self.tmax = tmax

    @property
    def arguments(self) -> dict:
        """Constructor arguments, as JSON can hold them, that make this objective again with all it learnt."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def log_pmf(self, survival_map: Tensor) -> Tensor:
        """log P(T = 1..tmax months), (B, tmax)."""
        raise NotImplementedError

    def pmf(self, survival_map: Tensor) -> Tensor:
        """P(T = 1..tmax months), (B, tmax)."""
        return self.log_pmf(survival_map).exp()

    def check(self, outcome: Tensor, head: nn.Module | None = None) -> None:
        """Raise an InputError for training scans, by `outcome`, that can't be learnt from, or not by the `head`."""
        if not bool((outcome[:, 1] > 0).any()):
            raise InputError(f"none of the {len(outcome)} training scans has event 1; {self.name} learns from deaths.")


class MonthsObjective(Objective):
    """An objective that says when: the location is the middle of a distribution over months, of some variance."""

    def __init__(self, tmax: int, variance: float, learn_variance: bool) -> None:
        super().__init__(tmax)
        if variance <= 0:
            raise InputError(f"variance must be above 0 months squared, got {variance}.")
        self.variance = variance
        self.learn_variance = learn_variance
        self.log_factor = nn.Parameter(torch.zeros(())) if learn_variance else None

    @property
    def arguments(self) -> dict:
        return {**super().arguments, "variance": float(self.spread())}

    def spread(self) -> Tensor | float:
        """The variance as it stands, months squared."""
        return self.variance if self.log_factor is None else self.variance * learnt_factor(self.log_factor)


class CenTime(MonthsObjective):
    """CenTime objective: the loss is the mean negative log-likelihood, the readout a discretised normal.

    See :func:`centime_log_likelihood` and :func:`~bundle.survival.readout.normal_log_pmf`.

    Args:
        tmax: last month of the distribution; above the largest time in the cohort.
        variance: months squared.
        alpha_censored: weight of censored patients in the mean; a death has weight 1.
        mixture: read a mixture over patches off the map instead of one normal; see :func:`log_pmf`.
        learn_variance: learn one variance for all, starting there, of up to 20 times more or less.
        predict_variance: a variance for each patient, `variance * exp(x)` with x the map's extra channel.

    Raises:
        InputError: an argument is out of range.

    Example::

        >>> survival_map = torch.tensor([[20.0, 1.0], [70.0, 1.0]]).view(2, 2, 1, 1, 1)  # one patch each
        >>> CenTime()(survival_map, torch.tensor([[24.0, 1.0], [60.0, 0.0]]))
        tensor(3.6146)
    """

    name = "centime"
    log_likelihood = staticmethod(centime_log_likelihood)

    def __init__(
        self,
        tmax: int = 100,
        variance: float = 36.0,
        alpha_censored: float = 1.0,
        mixture: bool = False,
        learn_variance: bool = False,
        predict_variance: bool = False,
    ) -> None:
        super().__init__(tmax, variance, learn_variance)
        if alpha_censored < 0:
            raise InputError(f"alpha_censored can't be negative, got {alpha_censored}.")
        if mixture and predict_variance:
            raise InputError("mixture and predict_variance exclude each other: patches have one variance in a mixture.")
        self.alpha_censored = alpha_censored
        self.mixture = mixture
        self.predict_variance = predict_variance
        self.extra = int(predict_variance)

    def log_pmf(self, survival_map: Tensor) -> Tensor:
        variance = self.spread()
        if self.predict_variance:
            variance = variance * patient_numbers(survival_map)[1][:, 0].exp()
        return log_pmf(survival_map, self.tmax, variance, self.mixture)

    def forward(self, survival_map: Tensor, outcome: Tensor) -> Tensor:
        time, event = outcome.unbind(1)
        likelihood = self.log_likelihood(self.log_pmf(survival_map), time, event)
        weight = torch.where(event > 0, 1.0, self.alpha_censored)
        return -(weight * likelihood).mean()

    def check(self, outcome: Tensor, head: nn.Module | None = None) -> None:
        super().check(outcome, head)
        if self.mixture and not getattr(head, "mixes", True):
            raise InputError(
                f"mixture has no meaning with the head {type(head).__name__}, which adds up or averages what patches say: "
                'they have no distributions to mix (expected the head "softmin", "lse" or "attention").'
            )


class Classical(CenTime):
    """As :class:`CenTime`, with the usual likelihood of the censored, P(T > c): :func:`classical_log_likelihood`."""

    name = "classical"
    log_likelihood = staticmethod(classical_log_likelihood)
