# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""How locations and weights of survival maps are distributed, inside and outside the lesions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from monai.metrics.metric import Cumulative
from torch import Tensor

from bundle.metrics.patient_ids import encode_ids, unique_scans

__all__ = ["MapDistribution"]

NUM_QUANTILES = 201


class MapDistribution(Cumulative):
    """Quantiles of the locations and of the weights of each scan, inside and outside the lesions, to draw.

    Quantiles, because all cells of a cohort's maps don't fit in memory; every scan then counts the same. Each scan has
    as many (NaN where a group is empty), so MONAI's gather between processes works as it is. Scans that come twice, by
    `patient_id`, count once.
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
        quantiles = torch.stack([self._scan(each, cells) for each, cells in zip(maps, lesions)])
        self.extend(quantiles, encode_ids(patient_id, len(maps)))

    def _scan(self, survival_map: Tensor, cells: Tensor | None) -> Tensor:
        """Quantiles of location and of weight of each group, (3, 2, NUM_QUANTILES)."""
        location, weight = survival_map[0].double().cpu(), survival_map[-1].double().cpu()
        lung = (weight > 0) | (location != 0)
        values = torch.stack([location[lung], weight[lung] * lung.sum()])
        if cells is None:
            masks = [torch.zeros_like(lung), torch.zeros_like(lung), lung]
        else:
            lesion = cells.cpu() >= 0.5
            masks = [lesion, ~lesion, torch.zeros_like(lung)]
        at = np.linspace(0, 1, NUM_QUANTILES)
        empty = np.full((NUM_QUANTILES, 2), np.nan)
        groups = [values[:, mask[lung]].numpy() for mask in masks]
        found = [np.quantile(group, at, axis=1) if group.size else empty for group in groups]
        return torch.from_numpy(np.stack(found)).transpose(1, 2)

    def aggregate(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Locations (months) and weights (1: an equal share of the map) of all scans, by group; for a figure."""
        buffers = self.get_buffer()
        if buffers is None:
            return {name: (torch.zeros(0), torch.zeros(0)) for name in self.GROUPS}
        values = buffers[0].cpu()[unique_scans(buffers[1])]
        known = [values[:, g][~values[:, g, 0, 0].isnan()] for g in range(len(self.GROUPS))]
        return {name: (v[:, 0].flatten(), v[:, 1].flatten()) for name, v in zip(self.GROUPS, known)}
