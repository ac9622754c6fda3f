# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The few steps of a job that JSON can't say well: start, read the cohort, feed the network, end."""

from __future__ import annotations

import copy
import ctypes
import logging
import math
import os
import signal
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator
from monai.transforms import Compose, RandomizableTrait
from monai.utils import set_determinism
from tqdm import tqdm

from bundle.data.clinical import clinical_kinds, encode_clinical
from bundle.data.cohort import patient_of, read_cohort, single_scan, split_cohort
from bundle.data.datasets import ScanCache, ScanStream, unforeseen
from bundle.errors import InputError, plain_errors
from bundle.explain import GridShiftInferer
from bundle.settings import patient_digest
from bundle.survival import fit_severity, objective_from, patient_numbers

__all__ = [
    "begin",
    "exit_on_sigterm",
    "fill_caches",
    "finish_training",
    "flag",
    "location_range",
    "make_folder",
    "margin_voxels",
    "outcomes",
    "prepare_batch",
    "require",
    "scans_to_evaluate",
    "scans_to_infer",
    "softmin_beta",
    "training_cohort",
]

logger = logging.getLogger(__name__)

_MALLOPT = {-4: 0, -1: 2**31 - 1}  # malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD in bytes


def begin(seed: int = 0) -> None:
    """First step of every config: plain error messages, an end by SIGTERM, memory and arithmetic that are fast, a seed."""
    plain_errors()
    exit_on_sigterm()
    keep_memory()
    torch.set_flush_denormal(True)  # the tails of a softmin are denormal, and denormals are slow
    set_determinism(seed)


def keep_memory() -> None:
    """Let glibc keep the memory of freed arrays for the next ones; nothing is done under other C libraries.

    It hands large arrays back to the kernel one by one, which clears every page of the next one: a sixth of the time of
    inference on a CT, half of that of a train step at 512 voxels a side. It is the main thread's memory that is kept; the
    arenas of other threads can't hold large arrays.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for option, value in _MALLOPT.items():
            mallopt(option, value)


def exit_on_sigterm() -> None:
    """Let SIGTERM, by which a cluster announces that it takes the machine away, end the process with exit code 143.

    Nothing is left to save by then: what is done is on disk whole, and what is not is done again by the same command.
    """

    def end(number: int, frame: Any) -> None:
        logger.warning("stopped by SIGTERM; the same command goes on.")
        sys.exit(128 + number)

    if threading.current_thread() is threading.main_thread():  # only there can handlers be set
        signal.signal(signal.SIGTERM, end)


def flag(value: Any) -> bool:
    """A switch as people write it on a command line: true/false, yes/no, 1/0."""
    text = str(value).strip().lower()
    if text in ("true", "yes", "1"):
        return True
    if text in ("false", "no", "0"):
        return False
    raise InputError(f"expected true or false, got {value}.")


def require(value: Any, option: str, what: str) -> None:
    """Raise an :class:`InputError` if an option that has no default was not given."""
    if value is None:
        raise InputError(f"{option} is missing: give {what}.")


def make_folder(path: str) -> str:
    """Create an output folder now, so that a fault in it shows before any work is done; returns the path."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        probe = Path(path) / f".write_test.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise InputError(f"can't write to the folder {path}: {e.strerror}.") from e
    return path


def margin_voxels(preprocessing: dict) -> list[int]:
    """Voxels an axis around the lung that cropping keeps, from ``margin`` (mm) and ``spacing`` (mm)."""
    return [round(preprocessing["margin"] / mm) for mm in preprocessing["spacing"]]


def training_cohort(
    cohort: str | None, *, fold: int | None, seed: int, clinical: dict[str, str], tmax: int, on_fault: str
) -> dict[str, list[dict]]:
    """Records by part (train, val, test) of a checked cohort; all empty while no cohort is named."""
    if cohort is None:
        return {"train": [], "val": [], "test": []}
    records = read_cohort(cohort, clinical=clinical, tmax=tmax, on_fault=on_fault)
    parts = split_cohort(records, fold=fold, seed=seed)
    logger.info("cohort: " + ", ".join(f"{len(rows)} {part}" for part, rows in parts.items()) + " scans.")
    return parts


def early_and_median_death(records: list[dict]) -> list[float]:
    """Tenth percentile and median of the months of those who died; quantiles, as one early death says nothing of others."""
    return np.quantile([r["time"] for r in records if r["event"]] or [0.0], [0.1, 0.5]).tolist()


def location_range(records: list[dict], tmax: int) -> list[float]:
    """Months between which a patch's location lies: a bound that follows the training scans' deaths, and 1.2 `tmax`.

    The softmin ties months to the log of the diseased share, so that a lesion's own location lies below the patient's.
    Where the lower bound leaves no room for that, all lesions lie at it, and a dangerous kind can't be told from a mild
    one. Where it leaves much, the patches of a lesion that are all as dangerous come out uneven. How much room lesions need
    grows with how far deaths lie apart, so the bound is twice the way from the median death to the tenth percentile below
    that percentile; between -0.6 and 0.3 `tmax`. With :func:`softmin_beta` a lesion at the bound kills at the median
    death if it is a share of exp(-3), 5 %, of the lung, and at the tenth percentile if it is 14 %.
    """
    early, median = early_and_median_death(records)
    return [float(np.clip(3 * early - 2 * median, -0.6 * tmax, 0.3 * tmax)), 1.2 * tmax]


def softmin_beta(records: list[dict], tmax: int) -> float:
    """Steepness of the softmin per month: one over the months from the tenth percentile to the median of the deaths.

    A scan with e times the disease of another dies 1/beta months earlier. If beta is steeper than the cohort's deaths are
    apart, the months of those who die first can't be reached by covering lesions, but only by covering lesions of the
    others in part. 1/beta is between 0.08 and 0.3 `tmax`.
    """
    early, median = early_and_median_death(records)
    return 1 / float(np.clip(median - early, 0.08 * tmax, 0.3 * tmax))


def share_of_window(hu: list[float] | None, hu_window: list[float]) -> list[float] | None:
    """Where the bounds `hu` of a narrower window lie in `hu_window`, from 0 to 1; None for none.

    Raises:
        InputError: it doesn't lie within.
    """
    if hu is None:
        return None
    low, high = hu_window
    if not (len(hu) == 2 and low <= hu[0] < hu[1] <= high):
        raise InputError(f"narrow_hu_window is {hu}; expected two ascending HU within hu_window, {low:g} to {high:g}, or null.")
    return [(bound - low) / (high - low) for bound in hu]


class ScanEvaluator(SupervisedEvaluator):
    """An evaluator of the scans of a stream that goes on when one can't be predicted, for lack of memory perhaps: the stream
    notes what was wrong. An :class:`InputError` is the run's fault rather than a scan's, and ends it.

    Args:
        stream: of the scans.
        kwargs: of `SupervisedEvaluator`.
    """

    def __init__(self, stream: ScanStream, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stream = stream

    def _iteration(self, engine: Engine, batchdata: dict) -> list[dict]:
        try:
            return super()._iteration(engine, batchdata)
        except InputError:
            raise
        except Exception as e:
            for patient in batchdata["patient_id"]:
                self.stream.note(patient, unforeseen(patient, e, "predicting"))
            return []


def fill_caches(*datasets: ScanCache, jobs: int = 0) -> None:
    """Preprocess all scans that are not in the cache yet, with a progress bar; a bad scan shows before training.

    Of several processes of a training the first one does, and the others find the cache filled.

    Args:
        jobs: processes that share the work; 0 for this one alone.
    """
    first = idist.get_rank() == 0
    if not first:
        idist.barrier()
    for dataset in datasets:
        dataset.fill(jobs, partial(tqdm, desc="preprocessing", unit="scan", disable=not first))
    if first:
        idist.barrier()


def outcomes(records: list[dict]) -> torch.Tensor:
    """(time in months, event) of each record, (N, 2)."""
    return torch.tensor([[r["time"], r["event"]] for r in records]).view(-1, 2)


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


def scans_to_evaluate(cohort: str | None, settings: dict | None, split: str | None, on_fault: str) -> list[dict]:
    """The scans of a cohort to evaluate: those of `split`, without any that the weights were trained on.

    Args:
        cohort: CSV file; None gives an empty list.
        settings: of the weights; None (maps of another tool) leaves no scan out.
        split: value of the column ``split`` to keep; None for ``test`` where the cohort has it, else all.
        on_fault: ``fail`` or ``skip``.
    """
    if cohort is None:
        return []
    encoding = settings["clinical"] if settings else {}
    tmax = settings["objective"]["tmax"] if settings else None
    kinds = clinical_kinds(encoding)
    records = read_cohort(cohort, clinical=kinds, need_clinical=False, tmax=tmax, on_fault=on_fault)
    splits = {r.get("split") for r in records}
    if split is None and "test" in splits:
        split = "test"
    if split is not None:
        if split not in splits:
            raise InputError(f'{cohort} has no scan with split "{split}".')
        records = [r for r in records if r.get("split") == split]
    seen = set(settings["trained_on"]) if settings else set()
    unseen = [r for r in records if patient_digest(patient_of(r)) not in seen]
    if len(unseen) < len(records):
        logger.info(f"evaluating {len(unseen)} of {len(records)} scans; the weights were trained on the others.")
    if not unseen:
        raise InputError(f"the weights were trained on every one of the {len(records)} scans to evaluate in {cohort}.")
    return encode_clinical(unseen, encoding)


def scans_to_infer(image: str | None, cohort: str | None, encoding: dict, series: str | None = None) -> list[dict]:
    """The scans to predict: one image (file or DICOM folder) or the rows of a cohort; empty while none is named.

    Args:
        image: its covariates are all missing.
        cohort: CSV file.
        encoding: of covariates, from the settings of the weights.
        series: SeriesInstanceUID to take from a DICOM folder; None lets the folder's chest CT be chosen.
    """
    if image is not None and cohort is not None:
        raise InputError("give --image or --cohort, not both.")
    if series is not None and not (image is not None and os.path.isdir(image)):
        raise InputError("--series names one of the DICOM series of a folder: give the folder as --image.")
    if image is not None:
        return encode_clinical([record | {"series": series} for record in single_scan(image)], encoding)
    if cohort is not None:
        kinds = clinical_kinds(encoding)
        records = read_cohort(cohort, need_outcome=False, clinical=kinds, need_clinical=False, on_fault="row")
        return encode_clinical(records, encoding)
    return []


def prepare_batch(
    batch: dict, device: torch.device | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None, tuple, dict]:
    """A collated batch as MONAI's engines take it: image, outcome (B, 2) = (time, event), and what else forward takes.

    Without time and event (inference) the outcome is None.
    """

    def move(x: Any) -> torch.Tensor:
        return torch.as_tensor(x).to(device, non_blocking=non_blocking)

    extra = {"lung": move(batch["lung"])}
    if len(batch.get("clinical", [])):
        extra["clinical"] = torch.stack([move(column) for column in batch["clinical"]], 1).float()
    outcome = None
    if "time" in batch:
        outcome = torch.stack([move(batch["time"]), move(batch["event"])], 1).float()
    return move(batch["image"]), outcome, (), extra
