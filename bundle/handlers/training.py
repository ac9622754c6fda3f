# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Handlers of a training run: reproducible epochs, gradient clipping, checkpoints that survive a kill."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents
from monai.transforms import Randomizable
from monai.utils import set_determinism

from bundle.errors import InputError
from bundle.settings import differences, file_sha256, settings_file, write_json

__all__ = ["EpochSeed", "GradientClip", "RunCheckpoint"]

logger = logging.getLogger(__name__)


def save_atomically(content: dict, path: Path) -> None:
    """`torch.save` to a temporary name beside `path`, flush to disk, rename: a kill leaves the old or the new file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise InputError(f"could not write {path} ({e.strerror}); free space or choose another --ckpt_dir.") from e


class EpochSeed:
    """Seed torch, numpy, python and the random transforms from (seed, epoch) as each epoch starts.

    Every epoch is then the same whether the run was resumed before it or not.

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
    """Clip the norm of all gradients before each optimizer step; stop on a loss that is no number.

    Args:
        network: whose gradients to clip.
        max_norm: largest norm of all gradients together.
    """

    def __init__(self, network: torch.nn.Module, max_norm: float) -> None:
        self.network = network
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)
        if not torch.isfinite(norm):
            patients = ", ".join(engine.state.batch["patient_id"])
            raise InputError(
                f"the loss or its gradient is not finite in epoch {engine.state.epoch} for the patients {patients}; "
                "the last good weights are kept in last.pt. A smaller learning rate, or a look at these scans, may help."
            )


class RunCheckpoint:
    """Keep the best weights and all that is needed to go on; resume a run that was stopped.

    After every epoch `last.pt` holds network, objective, optimizer, scheduler, epoch and best metric; whenever the
    validation metric is at its best `model.pt` holds the network's plain state dict and `settings.json` its settings
    with the SHA-256 of the weights. After the last epoch the best weights go through `finish`. Every file is written
    under another name and renamed, by the first of several processes. MONAI's `CheckpointSaver` writes in place, which a kill in the wrong moment turns
    into a torn file.

    Args:
        ckpt_dir: folder of the run.
        settings: of the run; see :func:`bundle.settings.training_settings`.
        network, objective, optimizer, lr_scheduler: what has a state; the objective's arguments, as learnt by then, go
            into `settings.json`.
        validator: the evaluator that `ValidationHandler` runs, earlier in the list of handlers.
        metric: its metric that is largest for the best weights.
        val_interval: epochs between two validations.
        settled: first epoch whose weights may be the best for good. The likelihood of a few validation scans is often
            best while the map is still forming; until then `model.pt` holds the best so far, and is replaced after.
        finish: called once with the best weights in the network and the settings of the objective that belong to them,
            before they are saved for the last time; returns the settings of the objective to be saved with them.
        patience: stop after so many epochs without a better validation; None to go through all epochs.
        resume: go on with an unfinished run of the same settings; if false, start anew.
    """

    def __init__(
        self,
        ckpt_dir: str,
        settings: dict,
        network: torch.nn.Module,
        objective: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        validator: Engine,
        metric: str,
        val_interval: int,
        settled: int = 1,
        finish: Callable[[dict], dict] | None = None,
        patience: int | None = None,
        resume: bool = True,
    ) -> None:
        self.ckpt_dir = Path(ckpt_dir)
        self.settings = settings
        self.objects = {"network": network, "objective": objective, "optimizer": optimizer}
        self.objects["lr_scheduler"] = lr_scheduler
        self.validator = validator
        self.metric = metric
        self.val_interval = val_interval
        self.settled = settled
        self.finish = finish
        self.patience = patience
        self.resume = resume
        self.best: float | None = None
        self.best_epoch = 0
        self.best_objective: dict = settings["objective"]

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.load)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def load(self, engine: Engine) -> None:
        """Prepare the folder, and go on where a run of the same settings stopped."""
        last = self.ckpt_dir / "last.pt"
        found = self.resume and last.is_file()
        idist.barrier()  # every process has looked
        if not found:
            if idist.get_rank() == 0:
                last.unlink(missing_ok=True)
            return
        state = torch.load(last, map_location="cpu", weights_only=True)
        changed = differences(state["settings"], self.settings)
        if changed:
            raise InputError(
                f"{self.ckpt_dir} holds a run with other settings ({'; '.join(changed)}); "
                "repeat them, choose another --ckpt_dir, or start anew with --resume false."
            )
        for name, target in self.objects.items():
            target.load_state_dict(state[name])
        engine.state.epoch, engine.state.iteration = state["epoch"], state["iteration"]
        self.best, self.best_epoch, self.best_objective = state["best"], state["best_epoch"], state["best_objective"]
        if state["finished"]:
            logger.info(f"{self.ckpt_dir} is a finished run of {state['epoch']} epochs: nothing to do.")
            engine.terminate()
        elif self.over(engine):
            self.end(engine)
            engine.terminate()
        else:
            logger.info(f"going on after epoch {state['epoch']} of {engine.state.max_epochs} in {self.ckpt_dir}.")

    def over(self, engine: Engine) -> bool:
        epoch = engine.state.epoch
        return epoch >= engine.state.max_epochs or (
            self.patience is not None and epoch - self.best_epoch >= self.patience
        )

    def save(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        if epoch == self.settled:
            self.best = None
        value = self.validator.state.metrics[self.metric] if epoch % self.val_interval == 0 else -math.inf
        if value > (-math.inf if self.best is None else self.best):
            self.best, self.best_epoch = float(value), epoch
            self.best_objective = {**self.settings["objective"], **self.objects["objective"].arguments}
            self.save_model(self.best_objective)
        self.save_state(engine, finished=False)
        if self.over(engine):
            if epoch < engine.state.max_epochs:
                logger.info(f"no better validation since epoch {self.best_epoch}: stopping early.")
                engine.terminate()
            self.end(engine)

    def save_model(self, objective: dict) -> None:
        if idist.get_rank() != 0:
            return
        model = self.ckpt_dir / "model.pt"
        save_atomically(self.objects["network"].state_dict(), model)
        changes = {"objective": objective, "weights_sha256": file_sha256(model)}
        write_json(settings_file(model), {**self.settings, **changes})

    def save_state(self, engine: Engine, finished: bool) -> None:
        if idist.get_rank() != 0:
            return
        state = {name: target.state_dict() for name, target in self.objects.items()}
        state.update(settings=self.settings, epoch=engine.state.epoch, iteration=engine.state.iteration)
        state.update(best=self.best, best_epoch=self.best_epoch, best_objective=self.best_objective, finished=finished)
        save_atomically(state, self.ckpt_dir / "last.pt")

    def end(self, engine: Engine) -> None:
        """The best weights, finished."""
        model = self.ckpt_dir / "model.pt"
        idist.barrier()  # the first process has written it
        if self.finish is not None and model.is_file():
            best = torch.load(model, map_location="cpu", weights_only=True)
            idist.barrier()  # every process has read it
            self.objects["network"].load_state_dict(best)
            self.save_model(self.finish(self.best_objective))
        self.save_state(engine, finished=True)
