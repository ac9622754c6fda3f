# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The main step of an inference and of an evaluation."""

from __future__ import annotations

import os

from monai.engines import Evaluator

from bundle.data.stream import ScanStream
from bundle.errors import InputError
from bundle.handlers import score_maps
from bundle.metrics import LocalisationMetric
from bundle.run.engine import ScanEvaluator
from bundle.run.parallel import run_parallel
from bundle.run.results import PredictionWriter

__all__ = ["cores", "evaluate", "predict"]


def cores() -> int:
    """The processors of this machine."""
    return os.cpu_count() or 1


def predict(engine: str, evaluator: Evaluator, writer: PredictionWriter, jobs: int) -> None:
    """Predict the scans of an evaluator's stream.

    Args:
        engine: ``local``, one scan after the other; ``processes`` or ``ray``, several at a time, see
            :func:`~bundle.run.run_parallel`.
        evaluator: of `configs/inference.json`.
        writer: among the evaluator's handlers.
        jobs: scans at a time, for ``processes``.

    Raises:
        InputError: several at a time by an ensemble.
    """
    if engine == "local":
        evaluator.run()
    elif not isinstance(evaluator, ScanEvaluator):
        raise InputError(f"--engine {engine} predicts by one model; leave it out for an ensemble.")
    else:
        parts = (evaluator.stream, evaluator.network, evaluator.inferer, evaluator.postprocessing)
        run_parallel(engine, *parts, writer, jobs)


def evaluate(evaluator: ScanEvaluator, stream: ScanStream, maps_dir: str | None, localisation: LocalisationMetric) -> None:
    """Score a model's maps of the scans of a stream, or those of any other tool in a folder.

    Args:
        evaluator: of `configs/evaluate.json`.
        stream: of the scans.
        maps_dir: folder of `<patient_id>_heat.nii.gz`; None to predict.
        localisation: the metric of the maps.
    """
    if maps_dir is None:
        evaluator.run()
    else:
        score_maps(stream, maps_dir, localisation)
