# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""How a batch goes into a network, and the main step of an inference and of an evaluation."""

import os
from typing import Any

import torch
from ignite.engine import Engine
from monai.engines import EnsembleEvaluator, SupervisedEvaluator
from monai.transforms import Transform

from bundle.data.stream import ScanStream
from bundle.errors import InputError, unforeseen
from bundle.handlers import score_maps
from bundle.metrics import LocalisationMetric


class GoesOn:
    """What makes a MONAI evaluator note a scan that can't be predicted (for lack of memory, perhaps) and go on.

    An :class:`InputError` is the run's fault rather than a scan's, and ends it.

    Args:
        stream: of the scans; it keeps what was wrong.
        postprocessing: of the predictions.
        kwargs: what else the evaluator takes.
    """

    def __init__(self, stream: ScanStream, postprocessing: Transform | None = None, **kwargs: Any) -> None:
        super().__init__(postprocessing=postprocessing, **kwargs)
        self.stream = stream
        self.postprocessing = postprocessing

    def _iteration(self, engine: Engine, batchdata: dict) -> list[dict]:
        try:
            return super()._iteration(engine, batchdata)
        except InputError:
            raise
        except Exception as e:
            for patient in batchdata["patient_id"]:
                self.stream.note(patient, unforeseen(patient, e, "predicting"))
            return []


class ScanEvaluator(GoesOn, SupervisedEvaluator):
    """The evaluator of one model; see :class:`GoesOn`."""


class ScanEnsembleEvaluator(GoesOn, EnsembleEvaluator):
    """The evaluator of an ensemble; see :class:`GoesOn`."""


def prepare_batch(
    batch: dict, device: torch.device | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None, tuple, dict]:
    """A collated batch as MONAI's engines take it: image, outcome (time, event) or None, more inputs of forward."""

    def move(x: Any) -> torch.Tensor:
        return torch.as_tensor(x).to(device, non_blocking=non_blocking)

    extra = {"lung": move(batch["lung"])}
    if len(batch.get("clinical", [])):
        extra["clinical"] = torch.stack([move(column) for column in batch["clinical"]], 1).float()
    outcome = None
    if "time" in batch:
        outcome = torch.stack([move(batch["time"]), move(batch["event"])], 1).float()
    return move(batch["image"]), outcome, (), extra


def prepare_images(
    batch: dict, device: torch.device | None = None, non_blocking: bool = False, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor, tuple, dict]:
    """A collated batch for a network that is to tell the image itself; see :func:`prepare_batch`."""
    image, _, args, inputs = prepare_batch({key: batch[key] for key in ("image", "lung")}, device)
    return image, image, args, inputs


def cores() -> int:
    """The processors of this machine."""
    return os.cpu_count() or 1


def evaluate(evaluator: ScanEvaluator, stream: ScanStream, maps_dir: str | None, localisation: LocalisationMetric) -> None:
    """Score a model's maps of the scans of a stream or, by `localisation`, another tool's.

    Args:
        evaluator: predicts and scores.
        stream: of the scans.
        maps_dir: folder of the other tool's `<patient_id>_heat.nii.gz`; None to predict.
        localisation: metric of the maps.
    """
    if maps_dir is None:
        evaluator.run()
    else:
        score_maps(stream, maps_dir, localisation)
