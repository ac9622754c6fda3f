# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The order in which training scans are shown."""

import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from bundle.data.cache import ScanCache
from bundle.errors import checked_numbers


class EventSampler(Sampler[int]):
    """A random order with the deaths spread evenly, so that every batch has the same share of them.

    The ups and downs of that share would be most of the gradient's noise: they move the locations of all patches alike.

    Where fewer than `min_event_share` died, their scans come several times an epoch, and some others wait for another
    epoch: else most batches have no death, and the network learns that nobody dies. How many die is then learnt too
    high; severity and Cox's baseline hazard, which are fitted to all scans once, correct it.

    Args:
        dataset: whose records have `event`.
        min_event_share: smallest share of an epoch that died, in [0, 1).
    """

    def __init__(self, dataset: ScanCache, min_event_share: float) -> None:
        checked_numbers("min_event_share", min_event_share, 1, "a share in [0, 1)", lambda share: 0 <= share < 1)
        self.dataset = dataset
        self.min_event_share = min_event_share

    def __len__(self) -> int:
        return len(self.dataset.data)

    def __iter__(self) -> Iterator[int]:
        event = torch.tensor([int(record["event"]) for record in self.dataset.data])
        deaths = int(event.sum())
        if deaths > 0:
            deaths = max(deaths, math.ceil(self.min_event_share * len(event)))
        order: list[tuple[float, int]] = []
        for value, places in ((0, len(event) - deaths), (1, deaths)):
            (rows,) = torch.nonzero(event == value, as_tuple=True)
            drawn: list[int] = []
            while len(drawn) < places:
                # The inverse of a permutation is as random. With it, a seed gives the order that it always gave.
                drawn += rows[torch.randperm(len(rows)).argsort()].tolist()
            order += [((i + 0.5) / places, row) for i, row in enumerate(drawn[:places])]
        return iter([row for _, row in sorted(order)])
