# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What comes before and after the epochs of a training."""

from __future__ import annotations

import copy
import math

import ignite.distributed as idist
import torch
from monai.data import DataLoader
from monai.transforms import Compose, RandomizableTrait
from tqdm import tqdm

from bundle.data.cache import ScanCache
from bundle.maps import GridShiftInferer
from bundle.run.engine import prepare_batch
from bundle.survival import fit_severity, objective_from, patient_numbers

__all__ = ["fill_caches", "finish_training"]


def finish_training(network: torch.nn.Module, settings: dict, dataset: ScanCache, device: torch.device) -> dict:
    """Last step of a training: what can only be fitted to finished maps of the training scans.

    That is severity (the months that the disease on the maps stands for, and how sure that is) for an objective whose
    locations are months, unless it is a mixture over patches, which is as wide as these differ; and the baseline hazard of
    proportional hazards. What maps say of a patient is the median over 8 origins of the patch grid, as in inference over
    all: each axis begins where it does there, and equally often, lest disease that lies along a face of the scan be given
    other months in inference than here.

    Args:
        network: trained; its severity is set.
        settings: name and arguments of the objective, as learnt.
        dataset: training scans; read without random transforms.
        device: of the network.

    Returns:
        the settings of the objective with what was fitted.
    """
    objective = objective_from(settings)
    severity = network.severity if hasattr(objective, "variance") and not getattr(objective, "mixture", False) else None
    if severity is None and not hasattr(objective, "fit_baseline"):
        return settings
    network.eval()
    plain = copy.copy(dataset)
    fixed = [t for t in dataset.transform.flatten().transforms if not isinstance(t, RandomizableTrait)]
    plain.transform = Compose(fixed)
    loader = DataLoader(plain, batch_size=1)
    inferer = GridShiftInferer(math.gcd(4, network.stride), network.stride, origins=8)
    read: list[torch.Tensor] = []
    hook = severity and severity.register_forward_pre_hook(lambda module, args: read.append(args[0].cpu()))
    numbers, patients, known = [], [], []
    try:
        for batch in tqdm(loader, desc="finishing", unit="scan", disable=idist.get_rank() > 0):
            image, outcome, _, extra = prepare_batch(batch, device)
            with torch.no_grad():
                survival_map = inferer(image, network, **extra)
            patients.append(patient_numbers(survival_map.cpu()))
            known.append(outcome.cpu())
            if severity:
                numbers.append(torch.stack(read).quantile(0.5, 0))
                read.clear()
    finally:
        if hook:
            hook.remove()
    (location, extra), outcome = map(torch.cat, zip(*patients)), torch.cat(known)
    if severity:
        return {**settings, "variance": fit_severity(severity, torch.cat(numbers), outcome, objective, extra=extra)}
    objective.fit_baseline(location, outcome)
    return {**settings, **objective.arguments}
