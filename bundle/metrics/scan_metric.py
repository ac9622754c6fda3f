# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What the metrics of a cohort share: a row a scan, gathered from all processes, and bootstrap intervals over scans."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import numpy as np

from bundle.errors import InputError
from bundle.metrics.bootstrap import with_interval

Statistic = Callable[[np.ndarray], float | None]  # of the indices of the scans that count, which may repeat


class ScanMetric:
    """A metric of a cohort that keeps one row a scan; to be used like MONAI's `CumulativeIterationMetric`.

    Call it with every batch, then `aggregate`, and `reset` before the next epoch. A scan that comes twice, by
    `patient_id`, counts once: a distributed sampler may repeat scans to give every process the same number. MONAI's
    class keeps tensors of one size, and waits for ever for a process that has no scan.

    Args:
        num_resamples: of the bootstrap; 0 for no intervals, which is what a metric in every epoch wants.
        seed: of the bootstrap.
    """

    def __init__(self, num_resamples: int = 0, seed: int = 0) -> None:
        self.num_resamples = num_resamples
        self.seed = seed
        self.reset()

    def reset(self) -> None:
        """Forget all scans."""
        self._own: dict[Any, dict] = {}
        self._all: list[dict] | None = None

    def keep(self, patient_id: Sequence[str] | None, rows: Sequence[dict]) -> None:
        """Keep the rows of a batch, by patient id; without ids (None) every scan is another one."""
        if patient_id is not None and len(patient_id) != len(rows):
            raise InputError(f"{len(patient_id)} patient ids were given for {len(rows)} scans; expected one a scan.")
        for i, row in enumerate(rows):
            name = None if patient_id is None else str(patient_id[i])
            key = (idist.get_rank(), len(self._own)) if name is None else name
            self._own[key] = {"patient_id": name, **row}
        self._all = None

    def get_buffer(self) -> list[dict]:
        """The rows of all processes, by patient id, or as they came if one has none. Every process must call this first.

        The order makes results, and the bootstrap's draws, the same for any order of the scans and number of processes.
        """
        if self._all is None:
            shares = idist.all_gather(self._own) if idist.get_world_size() > 1 else [self._own]
            rows = list({key: row for share in shares for key, row in share.items()}.values())
            named = all(row["patient_id"] is not None for row in rows)
            self._all = sorted(rows, key=lambda row: row["patient_id"]) if named else rows
        return self._all

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
