# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What a validation measures while a network trains: one number for all its scans, whatever batches they came in.

The metrics take what MONAI's evaluators leave without decollating: `pred`, survival maps (B, C, d, h, w), and `label`,
outcomes (B, 2) = (time in months, event). :class:`~bundle.metrics.SurvivalMetric` is for the evaluation afterwards. The
last two are for a training without outcomes.
"""

import math

import torch
from ignite.metrics import EpochMetric, Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from torch import Tensor

from bundle.metrics.survival import c_index
from bundle.survival import Cox, Objective, mean_months, patient_numbers


class MeanLogLikelihood(Metric):
    """Log-likelihood that an objective gives a scan, on average over the scans; larger is better.

    A batch counts as often as it has scans, so the scans of a short last batch don't count more than others.

    Args:
        objective: its loss is minus the mean log-likelihood of the batch.

    Example:
        >>> from bundle.survival import CenTime
        >>> survival_map, outcome = torch.ones(5, 2, 1, 1, 1), torch.tensor([[10.0, 1.0]] * 5)
        >>> metric = MeanLogLikelihood(CenTime())
        >>> for batch in (slice(0, 4), slice(4, 5)):
        ...     metric.update((survival_map[batch], outcome[batch]))
        >>> abs(metric.compute() + CenTime()(survival_map, outcome).item()) < 1e-5
        True
    """

    required_output_keys = ("pred", "label")

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        super().__init__()

    @reinit__is_reduced
    def reset(self) -> None:
        self.total = 0.0
        self.scans = 0

    @torch.no_grad()
    @reinit__is_reduced
    def update(self, output: tuple[Tensor, Tensor]) -> None:
        survival_map, outcome = output
        self.total -= float(self.objective(survival_map, outcome)) * len(outcome)
        self.scans += len(outcome)

    @sync_all_reduce("total", "scans")
    def compute(self) -> float:
        return self.total / self.scans


class _CohortMetric(EpochMetric):
    """A metric of all scans together, from one number that is read off each map.

    Args:
        objective: of the training.
    """

    required_output_keys = ("pred", "label")

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        super().__init__(self.of_scans, check_compute_fn=False)

    def update(self, output: tuple[Tensor, Tensor]) -> None:
        survival_map, outcome = output
        super().update((self.read(survival_map), outcome))


class PartialLogLikelihood(_CohortMetric):
    """Cox's log partial likelihood of all scans together, over their number; larger is better.

    The risk set of a death is everybody who lived as long, so a mean over batches would be another number.
    """

    objective: Cox

    def read(self, survival_map: Tensor) -> Tensor:
        return patient_numbers(survival_map)[0]

    @torch.no_grad()
    def of_scans(self, location: Tensor, outcome: Tensor) -> float:
        location, outcome = (values.to(self.objective.log_factor) for values in (location, outcome))
        return float(self.objective.likelihood(location, *outcome.unbind(1))) / len(outcome)


class ConcordanceIndex(_CohortMetric):
    """:func:`~bundle.metrics.survival.c_index` of the mean predicted times of all scans; NaN where it has no value."""

    def read(self, survival_map: Tensor) -> Tensor:
        return mean_months(self.objective.pmf(survival_map))

    def of_scans(self, mean: Tensor, outcome: Tensor) -> float:
        value = c_index(-mean, *outcome.unbind(1))
        return math.nan if value is None else value


class ExplainedShare(Metric):
    """Share of the variance of hidden voxels that a :class:`~bundle.networks.MaskedAutoencoder` explains, at most 1.

    The variance is about the mean of the scan's own hidden voxels: at 0, one number a scan would have told as much.
    `label` is the image, (B, 1, D, H, W).
    """

    required_output_keys = ("pred", "label")

    @reinit__is_reduced
    def reset(self) -> None:
        self.error = 0.0
        self.variance = 0.0

    @torch.no_grad()
    @reinit__is_reduced
    def update(self, output: tuple[Tensor, Tensor]) -> None:
        for found, image in zip(*output, strict=True):
            hidden = image[0][found[1] > 0].double()
            self.error += float((found[0][found[1] > 0] - hidden).square().sum())
            self.variance += float((hidden - hidden.mean()).square().sum())

    @sync_all_reduce("error", "variance")
    def compute(self) -> float:
        return 1 - self.error / self.variance if self.variance > 0 else math.nan


class CodeUse(Metric):
    """How many codes the patches of all scans have in use: any, or by `perplexity` (the exponential of their entropy)."""

    required_output_keys = ("pred", "label")

    def __init__(self, perplexity: bool) -> None:
        self.perplexity = perplexity
        super().__init__()

    @reinit__is_reduced
    def reset(self) -> None:
        self.count = torch.zeros(0)

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, Tensor]) -> None:
        code = output[0][:, 2]
        count = torch.bincount(code[code >= 0].long().flatten().cpu(), minlength=len(self.count)).double()
        count[: len(self.count)] += self.count
        self.count = count

    def compute(self) -> float:
        share = self.count[self.count > 0] / self.count.sum()
        return float((-share * share.log()).sum().exp()) if self.perplexity else float(len(share))


def code_metrics(quantised: bool) -> dict[str, Metric]:
    """What a validation tells of the codes, if there are any."""
    return {"val_codes_used": CodeUse(False), "val_code_perplexity": CodeUse(True)} if quantised else {}
