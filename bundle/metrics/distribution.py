# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""How locations and weights of survival maps are distributed, inside and outside the lesions."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bundle.metrics.scan_metric import ScanMetric

NUM_QUANTILES = 201


class MapDistribution(ScanMetric):
    """Quantiles of the locations and of the weights of each scan, inside and outside the lesions, to draw.

    Quantiles, because all cells of a cohort's maps don't fit in memory; every scan then counts the same.
    """

    GROUPS = ("inside a lesion", "outside, in scans with a lesion", "scans without a marked lesion")

    def __call__(
        self, maps: Sequence[Tensor], lesions: Sequence[Tensor | None], patient_id: Sequence[str] | None = None
    ) -> None:
        """Keep a batch's maps.

        Args:
            maps: survival maps (C, d, h, w): location in months first, weight last.
            lesions: share of each cell that is lesion, (d, h, w); None for a scan with no mask, or an empty one.
            patient_id: (B,).
        """
        self.keep(patient_id, [self._scan(each, cells) for each, cells in zip(maps, lesions)])

    def _scan(self, survival_map: Tensor, cells: Tensor | None) -> dict[str, np.ndarray]:
        """Quantiles of location and of weight of each group that isn't empty, (2, NUM_QUANTILES)."""
        location, weight = survival_map[0].double().cpu(), survival_map[-1].double().cpu()
        lung = (weight > 0) | (location != 0)
        values = torch.stack([location[lung], weight[lung] * lung.sum()]).numpy()
        if cells is None:
            groups = {self.GROUPS[2]: np.ones(values.shape[1], bool)}
        else:
            lesion = (cells.cpu() >= 0.5)[lung].numpy()
            groups = {self.GROUPS[0]: lesion, self.GROUPS[1]: ~lesion}
        at = np.linspace(0, 1, NUM_QUANTILES)
        return {name: np.quantile(values[:, mask], at, axis=1).T for name, mask in groups.items() if mask.any()}

    def aggregate(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Locations (months) and weights (1: an equal share of the map) of all scans, by group; for a figure."""
        rows = self.get_buffer()
        groups = {name: [row[name] for row in rows if name in row] for name in self.GROUPS}
        return {name: tuple(np.concatenate([np.zeros((2, 0)), *found], 1)) for name, found in groups.items()}
