# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""How a run is watched: a progress bar and Weights & Biases."""

from __future__ import annotations

import hashlib
import os

import wandb
from ignite.engine import Engine, Events
from tqdm import tqdm

__all__ = ["Progress", "WandbHandler"]


class Progress:
    """One progress bar over all epochs of an engine's run, with the loss where there is one.

    Args:
        desc: text before the bar.
        total: iterations of the whole run, if the engine can't know.
    """

    def __init__(self, desc: str, total: int | None = None) -> None:
        self.desc = desc
        self.total = total
        self.bar: tqdm | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.step)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def start(self, engine: Engine) -> None:
        total = self.total
        if total is None and engine.state.epoch_length:
            total = engine.state.max_epochs * engine.state.epoch_length
        self.bar = tqdm(desc=self.desc, total=total, mininterval=1.0, dynamic_ncols=True)

    def step(self, engine: Engine) -> None:
        output = engine.state.output
        if isinstance(output, dict) and "loss" in output:
            self.bar.set_postfix(epoch=engine.state.epoch, loss=f"{output['loss'].item():.3f}", refresh=False)
        self.bar.n = engine.state.iteration
        self.bar.update(0)

    def finish(self, engine: Engine) -> None:
        self.bar.close()


class WandbHandler:
    """Log a run to Weights & Biases: the loss of every iteration of a trainer, the metrics of every validation.

    Trainer and validator log into one run, which a resumed training continues. The default mode needs neither an
    account nor a network; `wandb sync` uploads such a run later.

    Args:
        output_dir: folder of the run, which also identifies it.
        project: name of the project.
        mode: ``offline``, ``online`` or ``disabled``.
    """

    def __init__(self, output_dir: str, project: str = "survival-map", mode: str = "offline") -> None:
        self.output_dir = output_dir
        self.project = project
        self.mode = mode

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.log_loss)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.log_metrics)

    def start(self, engine: Engine) -> None:
        if wandb.run is None:
            os.makedirs(self.output_dir, exist_ok=True)
            identity = hashlib.sha256(os.path.abspath(self.output_dir).encode()).hexdigest()[:16]
            wandb.init(project=self.project, dir=self.output_dir, mode=self.mode, id=identity, resume="allow")

    def log_loss(self, engine: Engine) -> None:
        if "loss" in engine.state.output:
            wandb.log({"train_loss": engine.state.output["loss"].item(), "epoch": engine.state.epoch})

    def log_metrics(self, engine: Engine) -> None:
        if engine.state.metrics:
            wandb.log({name: value for name, value in engine.state.metrics.items() if isinstance(value, (int, float))})
