# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Several processes, one result: batches are shared out, maps are gathered, and the loss sees them all.

The mean of each process's loss is another loss: a partial likelihood needs everybody at risk, and the last batch is
uneven. Survival maps are small, so every process gathers those of the whole batch.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ignite.metrics import EpochMetric, Metric
from monai.inferers import Inferer
from monai.transforms import Compose, RandomizableTrait
from monai.utils import evenly_divisible_all_gather
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, Sampler

from bundle.errors import InputError
from bundle.run.engine import prepare_batch


def begin() -> None:
    """Join the other processes that torchrun started: by NCCL where there are GPUs, else by gloo.

    Raises:
        InputError: torchrun did not start this process.
    """
    if "RANK" not in os.environ:
        raise InputError("the multi_gpu configs need `torchrun --nproc_per_node=N -m monai.bundle run ...`.")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(device())
    # The first process may preprocess a whole cohort while the others wait.
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))
    if dist.get_rank() > 0:
        logging.disable(logging.INFO)


def end() -> None:
    """Leave the other processes."""
    dist.destroy_process_group()


def device() -> torch.device:
    """The GPU of this process, or the CPU."""
    return torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else "cpu")


def parallel(network: torch.nn.Module) -> DistributedDataParallel:
    """The network with gradients averaged over processes; buffers are the same anyhow."""
    return DistributedDataParallel(network, broadcast_buffers=False, find_unused_parameters=True)


def share(records: list[dict]) -> list[dict]:
    """This process's share of the scans to evaluate; where there are too few, one that another process has, too."""
    # Metrics score a patient once, whoever sends them, but need something from every process.
    return records[idist.get_rank() :: idist.get_world_size()] or records[:1]


class RankBatches(Sampler[list[int]]):
    """Batches of which each process loads its share, in the order and with the random numbers of one process alone.

    A process for which the last batch has no scan gets its first one, which doesn't count.

    Args:
        sampler: gives all processes the same order.
        batch_size: of the batch of all processes.
        transform: of the dataset; its random transforms draw for the scans of other processes, too.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, transform: Compose) -> None:
        self.batches = BatchSampler(sampler, batch_size, drop_last=False)
        self.random = [t for t in transform.flatten().transforms if isinstance(t, RandomizableTrait)]
        self.rows: deque[int] = deque()  # how many of this process's scans count, for each batch that was drawn up

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        rank, world = idist.get_rank(), idist.get_world_size()
        self.rows.clear()
        for batch in self.batches:
            shares = [part.tolist() for part in np.array_split(batch, world)]
            self.draw(sum(map(len, shares[:rank])))
            self.rows.append(len(shares[rank]))
            yield shares[rank] or batch[:1]
            self.draw(sum(map(len, shares[rank + 1 :])))

    def draw(self, scans: int) -> None:
        """The random numbers of scans that another process loads."""
        for _ in range(scans):
            for transform in self.random:
                transform.randomize()

    def prepare(self, batch: dict, device: torch.device | None = None, non_blocking: bool = False, **kwargs) -> tuple:
        """The `prepare_batch` of the engine, with all processes' outcomes, and the `rows` that count of this one's."""
        image, outcome, args, extra = prepare_batch(batch, device, non_blocking, **kwargs)
        rows = self.rows.popleft()
        return image, gather(outcome[:rows]), args, {**extra, "rows": rows}


def gather(part: Tensor) -> Tensor:
    """Concatenate the rows of all processes; the gradient reaches this one's rows."""
    world = idist.get_world_size()
    if world == 1:
        return part
    parts = evenly_divisible_all_gather(part.detach(), concat=False)
    if part.requires_grad:  # times `world`, because DistributedDataParallel takes the mean of all gradients
        parts[idist.get_rank()] = part.detach() + world * (part - part.detach())
    return torch.cat(list(parts))


class GatherInferer(Inferer):
    """The survival maps of all processes' scans, on the largest of their grids; see :meth:`RankBatches.prepare`."""

    def __call__(self, inputs: Tensor, network: torch.nn.Module, *args: Any, rows: int, **kwargs: Any) -> Tensor:
        survival_map = network(inputs, *args, **kwargs)[:rows]
        own = survival_map.shape[2:]
        grid = idist.all_reduce(torch.tensor(own, device=inputs.device), op="MAX").tolist()
        pad = [n for largest, size in zip(reversed(grid), reversed(own)) for n in (0, largest - size)]
        return gather(F.pad(survival_map, pad))


def on_all_scans(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Let metrics of an epoch look at one process's scans: they gather everybody's, and each has them all."""

    def first(compute: Callable) -> Callable:
        return lambda y_pred, y: compute(*(t[: len(t) // idist.get_world_size()] for t in (y_pred, y)))

    for metric in metrics.values():
        if isinstance(metric, EpochMetric):
            metric.compute_fn = first(metric.compute_fn)
    return dict(metrics)
