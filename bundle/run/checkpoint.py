# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that survive a kill, and a run that goes on where it was stopped."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import ignite.distributed as idist
import torch
from filelock import FileLock, Timeout
from ignite.engine import Engine, Events

from bundle.errors import InputError
from bundle.files import DamagedFile, file_sha256, load_checked, remove_leftovers, save_checked, write_atomically, write_json
from bundle.handlers.tracking import HistoryWriter
from bundle.handlers.training import GradientClip, logger
from bundle.run.settings import differences, read_settings, settings_file

__all__ = ["RunCheckpoint"]


@lru_cache(maxsize=None)
def folder_lock(folder: Path) -> FileLock:
    """The lock of a run's folder in this process, which holds it until it ends, however that comes about."""
    return FileLock(folder / ".lock", thread_local=False)


class RunCheckpoint:
    """Keep the best weights and all that is needed to go on; resume a run that was stopped.

    After every epoch `last.pt` holds network, objective, optimizer, scheduler, epoch, best metric and best weights, with
    a checksum; the one before it is `previous.pt`, which is used if `last.pt` turns out damaged. Whenever the
    validation metric is at its best `model.pt` holds the network's plain state dict and `settings.json` its settings
    with the SHA-256 of the weights. After the last epoch the best weights go through `finish`. All of this is in
    `last.pt` too, so that `model.pt` needs no more than it to be right. Every file is written under another name,
    flushed and renamed, by the first of several processes; ignite's `Checkpoint` neither flushes nor has a checksum, and
    MONAI's `CheckpointSaver` writes in place.

    A second run that trains in the same folder waits until the first has ended: one that outlived its killed parent,
    for instance.

    A softmin over thousands of patches has sharp edges: now and then a step takes a network over one, all patches come
    out alike, and what has no gradient doesn't come back. An epoch whose mean loss is more than `collapsed` above the
    first one's has undone what was learnt: training goes on with the state that the best epoch so far began with.

    Args:
        ckpt_dir: folder of the run.
        settings: of the run; see :func:`bundle.run.training_settings`.
        network, objective, optimizer, lr_scheduler, gradient_clip: what has a state; the objective's arguments, as learnt
            by then, go into `settings.json`.
        history: what keeps the losses of an epoch, earlier in the list of handlers.
        validator: the evaluator that `ValidationHandler` runs, earlier in the list of handlers.
        metric: its metric that is largest for the best weights.
        val_interval: epochs between two validations.
        settled: first epoch whose weights may be the best for good. The likelihood of a few validation scans is often
            best while the map is still forming; until then `model.pt` holds the best so far, and is replaced after.
        finish: called once with the best weights in the network and the settings of the objective that belong to them,
            before they are saved for the last time; returns the settings of the objective to be saved with them.
        patience: stop at the first validation so many epochs or more after the best one; None to go through all epochs.
        resume: go on with an unfinished run of the same settings; if false, start anew.
        collapsed: see above; of a loss that is a log-likelihood, in nats. Easing the regularisers adds 3 to 4.5.
    """

    def __init__(
        self,
        ckpt_dir: str,
        settings: dict,
        network: torch.nn.Module,
        objective: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        gradient_clip: GradientClip,
        history: HistoryWriter,
        validator: Engine,
        metric: str,
        val_interval: int,
        settled: int = 1,
        finish: Callable[[dict], dict] | None = None,
        patience: int | None = None,
        resume: bool = True,
        collapsed: float = 5.0,
    ) -> None:
        self.ckpt_dir = Path(ckpt_dir)
        self.settings = settings
        self.objects = {"network": network, "objective": objective, "optimizer": optimizer}
        self.objects |= {"lr_scheduler": lr_scheduler, "gradient_clip": gradient_clip}
        self.history = history
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
        self.best_network: dict[str, torch.Tensor] | None = None
        self.collapsed = collapsed
        self.first_loss, self.least_loss = math.inf, math.inf
        self.before: dict = {}  # what this epoch began with
        self.sound: dict = {}  # what the epoch of the least loss began with

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.load)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.pass_on)

    def pass_on(self, engine: Engine, error: BaseException) -> None:
        """Ahead of `StatsHandler`, which would log the traceback of what is one sentence."""
        raise error

    def lock(self) -> None:
        lock = folder_lock(self.ckpt_dir.resolve())
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning(f"another process is training in {self.ckpt_dir}; waiting until it has ended.")
            lock.acquire()
        except NotImplementedError:
            logger.warning(f"the file system of {self.ckpt_dir} has no locks: nothing else may train there.")

    def read(self) -> dict | None:
        """The newest state that is whole; None if there is none.

        Raises:
            InputError: there are states, and all are damaged.
        """
        damaged = []
        for path in (self.ckpt_dir / "last.pt", self.ckpt_dir / "previous.pt"):
            if path.is_file():
                try:
                    state = load_checked(path)
                except DamagedFile as e:
                    damaged.append(path)
                    logger.warning(f"{e}; going back to the epoch before.")
                    continue
                for worse in damaged:
                    worse.unlink(missing_ok=True)  # lest it becomes the previous one
                return state
        if damaged:
            names = " and ".join(map(str, damaged))
            raise InputError(f"{names}: damaged (the checksum is wrong or missing); --resume false starts anew.")
        return None

    def load(self, engine: Engine) -> None:
        """Prepare the folder, and go on where a run of the same settings stopped."""
        first = idist.get_rank() == 0
        if first:
            self.lock()
            remove_leftovers(self.ckpt_dir)
            if not self.resume:
                for name in ("last.pt", "previous.pt"):
                    (self.ckpt_dir / name).unlink(missing_ok=True)
            state = self.read()
        idist.barrier()  # what is damaged is gone
        if not first:
            state = self.read()
        idist.barrier()  # every process has read it
        if state is None:
            self.before = self.copy_of_state()
            return
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
        self.best_network = state["best_network"]
        self.first_loss, self.least_loss, self.sound = state["first_loss"], state["least_loss"], state["sound"]
        self.before = self.copy_of_state()
        if state["finished"] and self.model_is_whole():
            logger.info(f"{self.ckpt_dir} is a finished run of {state['epoch']} epochs: nothing to do.")
            engine.terminate()
        elif self.over(engine):
            self.end(engine)
            engine.terminate()
        else:
            logger.info(f"going on after epoch {state['epoch']} of {engine.state.max_epochs} in {self.ckpt_dir}.")

    def model_is_whole(self) -> bool:
        """Whether `model.pt` and `settings.json` are there and belong together."""
        try:
            read_settings(self.ckpt_dir / "model.pt")
        except InputError as e:
            logger.warning(f"{e} They are made anew.")
            return False
        return True

    def over(self, engine: Engine) -> bool:
        epoch = engine.state.epoch
        if epoch >= engine.state.max_epochs or self.patience is None:
            return epoch >= engine.state.max_epochs
        validated = self.best is not None and epoch % self.val_interval == 0
        return validated and epoch - self.best_epoch >= self.patience

    def save(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        if epoch == self.settled:
            self.best = None
        value = self.validator.state.metrics[self.metric] if epoch % self.val_interval == 0 else -math.inf
        if value > (-math.inf if self.best is None else self.best):
            self.best, self.best_epoch = float(value), epoch
            self.best_objective = {**self.settings["objective"], **self.objects["objective"].arguments}
            weights = self.objects["network"].state_dict()
            self.best_network = {name: value.detach().cpu().clone() for name, value in weights.items()}
            self.save_model(self.best_objective)
        self.take_back_a_collapse(epoch)
        self.save_state(engine, finished=False)
        if self.over(engine):
            if epoch < engine.state.max_epochs:
                logger.info(f"no better validation since epoch {self.best_epoch}: stopping early.")
                engine.terminate()
            self.end(engine)

    def copy_of_state(self) -> dict:
        return {name: copy.deepcopy(self.objects[name].state_dict()) for name in ("network", "objective", "optimizer")}

    def take_back_a_collapse(self, epoch: int) -> None:
        """Go back to the last state that is known to be sound, if this epoch has undone what was learnt."""
        losses = self.history.losses
        loss = float(idist.all_reduce(sum(losses)) / idist.all_reduce(len(losses)))
        if epoch == 1:
            self.first_loss = loss
        if loss > self.first_loss + self.collapsed:
            logger.warning(
                f"epoch {epoch} undid what was learnt (mean loss {loss:.3g}, {self.least_loss:.3g} at its best); "
                "going on from where it was best."
            )
            for name, state in self.sound.items():
                self.objects[name].load_state_dict(copy.deepcopy(state))
        elif loss < self.least_loss:
            self.least_loss, self.sound = loss, self.before
        self.before = self.copy_of_state()

    def save_model(self, objective: dict) -> None:
        if idist.get_rank() != 0:
            return
        model, weights = self.ckpt_dir / "model.pt", self.objects["network"].state_dict()
        weights = {name: value.cpu() for name, value in weights.items()}  # to be read where there is no GPU

        def write(path: Path) -> None:
            with open(path, "wb") as f:  # by its name, torch would put that into the file
                torch.save(weights, f)

        write_atomically(model, write)
        changes = {"objective": objective, "weights_sha256": file_sha256(model)}
        write_json(settings_file(model), {**self.settings, **changes})

    def save_state(self, engine: Engine, finished: bool) -> None:
        if idist.get_rank() != 0:
            return
        state = {name: target.state_dict() for name, target in self.objects.items()}
        state.update(settings=self.settings, epoch=engine.state.epoch, iteration=engine.state.iteration)
        state.update(best=self.best, best_epoch=self.best_epoch, best_objective=self.best_objective, finished=finished)
        state["best_network"] = self.best_network
        state.update(first_loss=self.first_loss, least_loss=self.least_loss, sound=self.sound)
        last = self.ckpt_dir / "last.pt"
        if last.is_file():
            os.replace(last, self.ckpt_dir / "previous.pt")
        save_checked(state, last)

    def end(self, engine: Engine) -> None:
        """The best weights, finished."""
        if self.best_network is not None:
            self.objects["network"].load_state_dict(self.best_network)
            finish = self.finish or (lambda objective: objective)
            self.save_model(finish(self.best_objective))
        self.save_state(engine, finished=True)
