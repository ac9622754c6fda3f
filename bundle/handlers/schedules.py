# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Value calculators for MONAI's `ParamSchedulerHandler`, as functions of the current step."""

from __future__ import annotations

__all__ = ["geometric", "step"]


def geometric(start: float, end: float, num_steps: int, current_step: int) -> float:
    """From `start` to `end` at a constant ratio over `num_steps`, then `end`."""
    share = min(1.0, current_step / max(1, num_steps))
    return start * (end / start) ** share


def step(start: float, end: float, num_steps: int, current_step: int) -> float:
    """`start` for `num_steps`, then `end`."""
    return start if current_step < num_steps else end
