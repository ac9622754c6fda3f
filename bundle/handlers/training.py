# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Handlers of a training run: reproducible epochs, gradient clipping."""

import math
import statistics
from collections import deque

import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from monai.transforms import Randomizable
from monai.utils import set_determinism

from bundle.errors import InputError


class EpochSeed:
    """Seed torch, numpy, python and the random transforms from (seed, epoch) as each epoch starts.

    An epoch is then the same whether the run was resumed before it or not.

    Args:
        seed: of the run.
        transform: the training dataset's transform.
    """

    def __init__(self, seed: int, transform: Randomizable) -> None:
        self.seed = seed
        self.transform = transform

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        seed = (self.seed * 1_000_003 + engine.state.epoch) % 2**32
        set_determinism(seed)
        self.transform.set_random_state(seed)


class GradientClip:
    """Clip the norm of all gradients before each optimizer step; stop on a loss or a gradient that can't be used.

    Where lesions are found and locations lie at their bounds, gradients are a thousandth of what they were, and a single
    patch on its way from one bound to the other has one that is thousands of times as large. Adam would follow that one
    for a dozen steps. So a gradient is also clipped to what is usual: the median norm of the last 50 steps, as in
    AutoClip (Seetharaman et al., MLSP 2020), which takes a percentile of all steps.

    When training stops, the weights are those of the step before, and `last.pt` those of the epoch before.

    Args:
        network: whose gradients to clip.
        max_norm: largest norm of all gradients together, whatever is usual.
        objective: whose gradients are checked, not clipped.
        exploded: norm above which training stops, far above what clipping can help.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        max_norm: float,
        objective: torch.nn.Module | None = None,
        exploded: float = 1e9,
    ) -> None:
        self.network = network
        self.max_norm = max_norm
        self.objective = objective
        self.exploded = exploded
        self.norms: deque[float] = deque(maxlen=50)

    def state_dict(self) -> dict:
        return {"norms": list(self.norms)}

    def load_state_dict(self, state: dict) -> None:
        self.norms = deque(state["norms"], maxlen=50)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        loss = float(engine.state.output["loss"])
        own = [p.grad for p in self.objective.parameters() if p.grad is not None] if self.objective else []
        usual = statistics.median(norms) if (norms := [n for n in self.norms if n > 0]) else math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.network.parameters(), min(self.max_norm, usual)))
        self.norms.append(norm)  # 0 for a batch that teaches nothing, such as survivors under Cox's likelihood
        norm = math.hypot(norm, float(torch.nn.utils.get_total_norm(own)))
        if math.isfinite(loss) and norm <= self.exploded:
            return
        what = f"the loss is {loss:.3g}" if not math.isfinite(loss) else f"the gradient's norm is {norm:.3g}"
        patients = ", ".join(map(str, engine.state.batch["patient_id"]))
        raise InputError(
            f"{what} in epoch {engine.state.epoch} for the patients {patients}; training stops, and last.pt keeps the "
            "weights of the epoch before. A smaller --learning_rate, or a look at these scans, may help."
        )


def geometric(start: float, end: float, num_steps: int, current_step: int) -> float:
    """From `start` to `end` at a constant ratio over `num_steps`, then `end`; for MONAI's `ParamSchedulerHandler`."""
    share = min(1.0, current_step / max(1, num_steps))
    return start * (end / start) ** share
