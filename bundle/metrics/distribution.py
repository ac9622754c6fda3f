# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""How locations and weights of survival maps are distributed, inside and outside the lesions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.metrics.metric import Cumulative
from torch import Tensor

from bundle.metrics.scan_metric import encode_ids, scans_once

__all__ = ["MapDistribution"]

NUM_QUANTILES = 201


class MapDistribution(Cumulative):
    """Quantiles of the locations and of the weights of each scan, inside and outside the lesions, to draw.

    Quantiles, because all cells of a cohort's maps don't fit in memory; every scan then counts the same. Each scan has
    as many (NaN where a group is empty). Scans that come twice, by `patient_id`, count once.
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
        quantiles = torch.stack([self._scan(each, cells) for each, cells in zip(maps, lesions, strict=True)])
        self.extend(quantiles, encode_ids(patient_id, len(maps)))

    def _scan(self, survival_map: Tensor, cells: Tensor | None) -> Tensor:
        """Quantiles of location and of weight of each group, (3, 2, NUM_QUANTILES)."""
        location, weight = survival_map[0].double().cpu(), survival_map[-1].double().cpu()
        lung = (weight > 0) | (location != 0)
        values = torch.stack([location[lung], weight[lung] * lung.sum()]).numpy()
        lesion = None if cells is None else (cells.cpu() >= 0.5)[lung].numpy()
        nothing = np.zeros(values.shape[1], bool)
        groups = [nothing, nothing, ~nothing] if lesion is None else [lesion, ~lesion, nothing]
        found = np.full((len(groups), 2, NUM_QUANTILES), np.nan)
        for quantiles, group in zip(found, groups, strict=True):
            if group.any():
                quantiles[:] = np.quantile(values[:, group], np.linspace(0, 1, NUM_QUANTILES), axis=1).T
        return torch.from_numpy(found)

    def aggregate(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Locations (months) and weights (1: an equal share of the map) of all scans, by group; for a figure."""
        values, _ = scans_once(self)
        groups = values[0].unbind(1) if values else [torch.full((1, 2, 1), torch.nan)] * len(self.GROUPS)
        known = [group[~group[:, 0, 0].isnan()] for group in groups]
        return {name: (v[:, 0].flatten(), v[:, 1].flatten()) for name, v in zip(self.GROUPS, known, strict=True)}
