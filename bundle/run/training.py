# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Pieces of a training that its config names: epochs, parameters, checks of the outcomes, and the last step."""

import copy
import dataclasses
import math

import ignite.distributed as idist
import torch
import torch.nn as nn
from monai.data import DataLoader
from monai.transforms import Compose, RandomizableTrait
from torch import Tensor
from tqdm import tqdm

from bundle.data import ScanCache
from bundle.errors import InputError
from bundle.maps import GridShiftInferer
from bundle.run.engine import prepare_batch
from bundle.run.scans import outcomes
from bundle.survival import Objective, fit_severity, objective_from, patient_numbers, seen_until

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


def check_outcomes(objective: Objective, network: nn.Module, records: list[dict]) -> None:
    """Raise an :class:`InputError` if the objective can't learn from these training scans with this network's head."""
    objective.check(outcomes(records), getattr(network, "head", None))


def censoring_weights(records: list[dict], tmax: int, ipcw: bool) -> list[float] | None:
    """P(C >= t) at t = 1..tmax months of the training scans, for weights against censoring; None without `ipcw`."""
    return seen_until(outcomes(records), tmax) if ipcw else None


class Finish:
    """Fit severity, or the baseline hazard of proportional hazards, to the finished maps of the training scans.

    Severity is for objectives whose locations are months, but not for a mixture over patches, which is as wide as these
    differ. Scans are read without random transforms, from 8 origins of the patch grid.

    Args:
        network: trained.
        dataset: training scans.
        device: of the network.
        severity: fit it where it has a meaning.

    Raises:
        InputError: severity can't be read off the maps of this network's head.
    """

    def __init__(self, network: nn.Module, dataset: ScanCache, device: torch.device, severity: bool = True) -> None:
        self.network = network
        self.dataset = dataset
        self.device = device
        head = getattr(network, "head", None)  # there is none, and no disease on the map, without a look at the scan
        self.severity = severity and head is not None
        if self.severity and not hasattr(head, "danger"):
            name = network.arguments["head"]
            raise InputError(f"severity can't be read off the maps of the head {name}: add --severity false.")

    def __call__(self, objective: dict) -> dict:
        """``objective`` and ``severity`` of `settings.json`, from the settings of the objective as learnt."""
        fitted = objective_from(objective)
        severe = self.severity and hasattr(fitted, "variance") and not getattr(fitted, "mixture", False)
        if not severe and not hasattr(fitted, "fit_baseline"):
            return {"objective": objective, "severity": None}
        location, extra, outcome, *numbers = self.read(severe)
        if not severe:
            fitted.fit_baseline(location, outcome)
            return {"objective": {**objective, **fitted.arguments}, "severity": None}
        severity, variance = fit_severity(*numbers, outcome, fitted, self.network.arguments["loc_range"], extra=extra)
        return {"objective": {**objective, "variance": variance}, "severity": severity and dataclasses.asdict(severity)}

    def read(self, severe: bool) -> tuple[Tensor, ...]:
        """Location, extra numbers, outcome and, if severe, the numbers that tell severity, of each training scan."""
        self.network.eval()
        plain = copy.copy(self.dataset)
        fixed = [t for t in self.dataset.transform.flatten().transforms if not isinstance(t, RandomizableTrait)]
        plain.transform = Compose(fixed)
        loader = DataLoader(plain, batch_size=1)
        stride = self.network.stride
        inferer = GridShiftInferer(math.gcd(4, stride), stride, sigma=0, refine=False, few_origins=True)
        rows = []
        for batch in tqdm(loader, desc="finishing", unit="scan", disable=idist.get_rank() > 0):
            image, outcome, _, inputs = prepare_batch(batch, self.device)
            if severe:
                survival_map, *numbers = inferer.read(image, self.network, **inputs)
            else:
                survival_map, numbers = inferer(image, self.network, **inputs), []
            rows.append([part.cpu() for part in (*patient_numbers(survival_map), outcome, *numbers)])
        return tuple(map(torch.cat, zip(*rows, strict=True)))
