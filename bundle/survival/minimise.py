# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Where a smooth function of few unknowns is lowest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["minimise"]


def minimise(function: Callable[[Tensor], Tensor], start: Tensor, max_iter: int) -> Tensor:
    """The unknowns (K,) at a minimum of the function, by L-BFGS from `start`, in its type.

    Example::

        >>> minimise(lambda x: (x - 3).square().sum(), torch.zeros(2), max_iter=20)
        tensor([3., 3.])
    """
    unknowns = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([unknowns], max_iter=max_iter, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        value = function(unknowns)
        value.backward()
        return value

    optimizer.step(step)
    return unknowns.detach()
