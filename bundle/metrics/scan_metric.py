# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What the metrics of a cohort share: patient ids that travel with the scores, and bootstrap intervals over scans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.metrics.metric import Cumulative, CumulativeIterationMetric
from torch import Tensor

from bundle.errors import InputError
from bundle.metrics.bootstrap import with_interval

__all__ = ["ScanMetric", "Statistic", "decode_ids", "encode_ids", "scans_once", "unique_scans"]

ID_BYTES = 256
Statistic = Callable[[np.ndarray], float | None]  # of the indices of the scans that count, which may repeat


def encode_ids(patient_id: Sequence[str] | None, count: int) -> Tensor:
    """UTF-8 bytes of each id, padded with zeros: (count, 256), uint8; all zeros for no ids (None).

    As tensors, ids go through MONAI's gather between processes like scores.

    Raises:
        InputError: not one id a scan, an empty id, or one too long to be part of a file name.
    """
    if patient_id is None:
        return torch.zeros(count, ID_BYTES, dtype=torch.uint8)
    if len(patient_id) != count:
        raise InputError(f"{len(patient_id)} patient ids were given for {count} scans; expected one a scan.")
    names = [str(name).encode() for name in patient_id]
    for name in names:
        if not 0 < len(name) < ID_BYTES:
            raise InputError(f"patient_id {name.decode()[:40]!r} has {len(name)} bytes; expected 1 to {ID_BYTES - 1}.")
    return torch.from_numpy(np.array(names, f"S{ID_BYTES}").view(np.uint8).reshape(count, ID_BYTES))


def _names(codes: Tensor) -> np.ndarray:
    return np.ascontiguousarray(codes.cpu().numpy()).view(f"S{ID_BYTES}")[:, 0]


def decode_ids(codes: Tensor) -> list[str | None]:
    """The ids behind :func:`encode_ids`; None for a scan without one."""
    return [name.decode() or None for name in _names(codes)]


def unique_scans(codes: Tensor) -> np.ndarray:
    """Indices of the scans to score, sorted by patient id, each patient once; all as they came if an id is missing.

    A distributed sampler may repeat scans to give every process the same number. The fixed order makes results, and the
    bootstrap's draws, the same for any order of the scans and any number of processes.
    """
    names = _names(codes)
    if (names == b"").any():
        return np.arange(len(names))
    return np.unique(names, return_index=True)[1]


def scans_once(metric: Cumulative) -> tuple[list[Tensor], list[str | None]]:
    """The buffers of a metric, of all processes, with the scans of :func:`unique_scans`, and their patient ids.

    Args:
        metric: its last buffer is from :func:`encode_ids`.

    Returns:
        nothing and no ids before the first scan.
    """
    buffers = metric.get_buffer()
    if buffers is None:
        return [], []
    keep = unique_scans(buffers[-1])
    *values, codes = (buffer.cpu()[keep] for buffer in buffers)
    return values, decode_ids(codes)


class ScanMetric(CumulativeIterationMetric):
    """A metric of a cohort that keeps one row a scan. Scans that come twice, by `patient_id`, count once.

    Subclasses keep tensors of a fixed size a scan, ids last, so that MONAI's gather between processes works as it is.

    Args:
        num_resamples: of the bootstrap; 0 for no intervals, which is what a metric in every epoch wants.
        seed: of the bootstrap.
    """

    def __init__(self, num_resamples: int, seed: int = 0) -> None:
        super().__init__()
        self.num_resamples = num_resamples
        self.seed = seed

    def _compute_tensor(self, y_pred: Tensor, y: Tensor | None = None, **kwargs: Any) -> list[Tensor]:
        return self._compute_list(y_pred, y, **kwargs)

    def intervals(self, statistics: Mapping[str, tuple[Statistic, int]], rows: int | None = None) -> dict[str, dict]:
        """Each statistic as ``{"value", "lower", "upper", "num_scans"}``, with its 95 % bootstrap interval.

        Args:
            statistics: by name, with the number of scans that each stands on.
            rows: number of scans to draw from; None for those that the statistic stands on.
        """
        return {
            name: with_interval(count if rows is None else rows, statistic, count, self.num_resamples, self.seed)
            for name, (statistic, count) in statistics.items()
        }
