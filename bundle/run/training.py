# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Pieces of a training that its config names: epochs, parameters, checks of the outcomes, and the last step."""

import copy
import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence

import ignite.distributed as idist
import torch
import torch.nn as nn
from monai.data import DataLoader
from monai.transforms import Compose, RandomizableTrait
from torch import Tensor
from tqdm import tqdm

from bundle.data import ScanCache
from bundle.errors import InputError
from bundle.handlers.tracking import write_verdict
from bundle.maps import GridShiftInferer
from bundle.metrics.verdict import in_words, prediction_accuracy, verdict
from bundle.run.codebooks import CodebookStage, as_maps
from bundle.run.engine import prepare_batch
from bundle.run.scans import outcomes
from bundle.survival import Objective, Severity, fit_severity, objective_from, patient_numbers, seen_until, severity_from
from bundle.survival.calibration import LEVELS, cohort_pmf, interval_levels, last_death
from bundle.survival.objectives import classical_log_likelihood
from bundle.survival.readout import mean_months

logger = logging.getLogger(__name__)

LEAST_SCANS = 5  # of a validation that can choose
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
    """What surrounds the epochs: the codebooks before them, and the choice, the readout and the verdict after them.

    1. Severity, or the baseline hazard of proportional hazards, is fitted to the finished maps of the training scans.
       Severity is for objectives whose locations are months, but not for a mixture over patches, which is as wide as
       these differ. The variance is at least what the validation scans ask for.
    2. The network is kept if it gives the validation scans a higher log-likelihood than the codebooks, by more than
       twice its standard error. Else the codebooks are: they need far fewer patients.
    3. What is kept is tested: out of fold for codebooks, on the validation scans for the network.

    Scans are read without random transforms, from 8 origins of the patch grid.

    Args:
        network: trained.
        dataset: training scans.
        val: validation scans.
        device: of the network.
        codebooks: what is learnt before the first epoch.
        severity: fit it where it has a meaning.

    Raises:
        InputError: severity can't be read off the maps of this network's head.
    """

    def __init__(
        self,
        network: nn.Module,
        dataset: ScanCache,
        val: ScanCache,
        device: torch.device,
        codebooks: CodebookStage,
        severity: bool = True,
    ) -> None:
        self.network = network
        self.dataset = dataset
        self.val = val
        self.device = device
        self.codebooks = codebooks
        head = getattr(network, "head", None)  # there is none, and no disease on the map, without a look at the scan
        self.severity = severity and head is not None
        if self.severity and not hasattr(head, "danger"):
            name = network.arguments["head"]
            raise InputError(f"severity can't be read off the maps of the head {name}: add --severity false.")

    def prepare(self) -> bool:
        """Learn what comes before the first epoch; False if the recipe has no epochs."""
        self.codebooks.run()
        return self.codebooks.recipe != "codebook"

    def __call__(self, objective: dict) -> tuple[nn.Module, dict]:
        """The network to keep and what its `settings.json` gains, from the settings of the objective as learnt."""
        self.codebooks.run()
        trained_on = outcomes(self.dataset.data)
        found, outcome, levels, by = None, outcomes(self.val.data), list(LEVELS), "validation"
        if self.codebooks.recipe != "codebook":
            found = self.fitted(objective)
            pmf, log_likelihood = self.validated(found)
            risk = -mean_months(pmf)
        network: nn.Module = self.network
        if self.codebooks.fitted and (found is None or not self.network_wins(log_likelihood)):
            network, readout = self.codebooks.network, self.codebooks.objective
            found = {"objective": {"name": readout.name, **readout.arguments}, "severity": None}
            pmf, outcome, by = readout.pmf(as_maps(self.codebooks.location)), trained_on, "out of fold"
            risk = -self.codebooks.location  # mean months may tie, locations don't
            levels = interval_levels(pmf, outcome)
        cohort = {"pmf": cohort_pmf(trained_on, found["objective"]["tmax"])}
        learnt = verdict(risk, *outcome.unbind(1), by=by)
        learnt["ipa"] = prediction_accuracy(pmf, cohort["pmf"], *outcome.unbind(1))
        if any(record.get("simulated") for record in [*self.dataset.data, *self.val.data]):
            learnt["simulated"] = True
        logger.log(logging.INFO if learnt["verdict"] == "yes" else logging.WARNING, f"verdict: {in_words(learnt)}.")
        write_verdict(self.codebooks.path.with_name("history.csv"), learnt["verdict"])
        cohort |= {"last_death": last_death(trained_on), "interval_levels": levels}
        familiarity = dataclasses.asdict(self.codebooks.familiarity)
        name = {"name": type(network).__name__, **network.arguments}
        return network, {**found, "network": name, "learnt": learnt, "outcomes": cohort, "familiarity": familiarity}

    def network_wins(self, log_likelihood: Tensor) -> bool:
        """Whether validation scans, by their log-likelihoods (N,), speak for the network against the codebooks."""
        if self.codebooks.recipe == "network":
            return True
        maps = as_maps(self.codebooks.predict(self.codebooks.val))
        gain = log_likelihood - log_likelihood_of(self.codebooks.objective, maps, outcomes(self.val.data))
        error = gain.std() / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
        wins = bool(len(gain) >= LEAST_SCANS and gain.mean() > 2 * error)
        logger.info(
            f"recipe: {'network' if wins else 'codebook'}. On {len(gain)} validation scans the network's "
            f"log-likelihood is {float(gain.mean()):+.2f} a scan (standard error {float(error):.2f}) against the codebooks'."
        )
        return wins

    def fitted(self, objective: dict) -> dict:
        """``objective`` and ``severity`` of the network, fitted to the training scans."""
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

    def validated(self, found: dict) -> tuple[Tensor, Tensor]:
        """P(T = 1..tmax months) (N, tmax) and log-likelihood (N,) of the validation scans, by the network as `found`.

        Where the scans ask for a larger variance than the training scans did, `found` gets it.
        """
        objective, severity = objective_from(found["objective"]), severity_from(found["severity"])
        maps = [row[0] for row in self.maps(self.val, severity=severity)]
        outcome = outcomes(self.val.data)
        if severity is not None and len(maps) >= LEAST_SCANS:
            objective.variance = found["objective"]["variance"] = least_variance(objective, maps, outcome)
        one = [log_likelihood_of(objective, m, o[None]) for m, o in zip(maps, outcome, strict=True)]
        return torch.cat([objective.pmf(m) for m in maps]).detach(), torch.cat(one)

    def read(self, severe: bool) -> tuple[Tensor, ...]:
        """Location, extra numbers, outcome and, if severe, the numbers that tell severity, of each training scan."""
        rows = []
        for survival_map, outcome, numbers in self.maps(self.dataset, severe):
            rows.append([*patient_numbers(survival_map), outcome, *numbers])
        return tuple(map(torch.cat, zip(*rows, strict=True)))

    def maps(self, dataset: ScanCache, severe: bool = False, severity: Severity | None = None) -> Iterator[tuple]:
        """Map, outcome and, if severe, the numbers that tell severity, of each scan of a dataset; on CPU."""
        self.network.eval()
        plain = copy.copy(dataset)
        fixed = [t for t in dataset.transform.flatten().transforms if not isinstance(t, RandomizableTrait)]
        plain.transform = Compose(fixed)
        stride = self.network.stride
        shifts = math.gcd(4, stride)
        inferer = GridShiftInferer(shifts, stride, sigma=0, refine=False, few_origins=True, severity=severity)
        loader = DataLoader(plain, batch_size=1)
        for batch in tqdm(loader, desc="finishing", unit="scan", disable=idist.get_rank() > 0):
            image, outcome, _, inputs = prepare_batch(batch, self.device)
            if severe:
                survival_map, *numbers = inferer.read(image, self.network, **inputs)
            else:
                survival_map, numbers = inferer(image, self.network, **inputs), []
            yield survival_map.cpu(), outcome.cpu(), [part.cpu() for part in numbers]


def log_likelihood_of(objective: Objective, survival_map: Tensor, outcome: Tensor) -> Tensor:
    """Log-likelihood of each patient, (B,), by the readout alone, whatever the objective trains for.

    Times beyond the last month that the objective has are censored there.
    """
    time, event = outcome.unbind(1)
    late = time >= objective.tmax
    time, event = torch.where(late, objective.tmax - 1.0, time), torch.where(late, 0.0, event)
    with torch.no_grad():
        return classical_log_likelihood(objective.log_pmf(survival_map), time, event)


def least_variance(objective: Objective, maps: Sequence[Tensor], outcome: Tensor) -> float:
    """The variance, months squared, of the highest likelihood of validation scans, but at least the objective's own."""
    trial = copy.copy(objective)

    def fit(factor: float) -> float:
        trial.variance = objective.variance * factor
        return sum(float(log_likelihood_of(trial, m, o[None])) for m, o in zip(maps, outcome, strict=True))

    return objective.variance * max((1.25**k for k in range(25)), key=fit)
