# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""How a batch goes into a network, and an evaluator that a bad scan doesn't stop."""

from __future__ import annotations

from typing import Any

import torch
from ignite.engine import Engine
from monai.engines import SupervisedEvaluator
from monai.transforms import Transform

from bundle.data.stream import ScanStream
from bundle.errors import InputError, unforeseen

__all__ = ["ScanEvaluator", "prepare_batch"]


class ScanEvaluator(SupervisedEvaluator):
    """MONAI's evaluator for the scans of a stream, which goes on when one can't be predicted, for lack of memory perhaps.

    The stream keeps what was wrong. An :class:`InputError` is the run's fault rather than a scan's, and ends it.

    Args:
        stream: of the scans.
        postprocessing: of the predictions.
        kwargs: what else `SupervisedEvaluator` takes.
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
