# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What a training keeps: its best weights, and all that it takes to go on where it was stopped.

Four handlers, in this order: :class:`BestModel`, :class:`CollapseGuard`, :class:`Patience`, :class:`RunCheckpoint`.
"""

import copy
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from filelock import FileLock, Timeout
from ignite.engine import Engine, Events

from bundle import files
from bundle.errors import InputError
from bundle.handlers import HistoryWriter
from bundle.run.settings import differences, read_settings, settings_file

logger = logging.getLogger(__name__)


@dataclass(eq=False, repr=False)
class BestModel:
    """Keep the best weights, in memory and as `model.pt`, a plain state dict, with its `settings.json`.

    Both files are whole at any moment; MONAI's `CheckpointSaver` writes in place.

    Args:
        ckpt_dir: folder of the run.
        settings: from :func:`bundle.run.training_settings`.
        network: whose weights are kept.
        objective: its arguments, as learnt by then, go into `settings.json`.
        validator: the evaluator that `ValidationHandler` runs, earlier in the list of handlers.
        metric: its metric that is largest for the best weights.
        val_interval: epochs between two validations.
        settled: first epoch whose weights may be the best for good; the likelihood of a few validation scans is often
            best while the map is still forming.
    """

    ckpt_dir: str
    settings: dict
    network: torch.nn.Module
    objective: torch.nn.Module
    validator: Engine
    metric: str
    val_interval: int
    settled: int = 1

    def __post_init__(self) -> None:
        self.path = Path(self.ckpt_dir) / "model.pt"
        self.value: float | None = None
        self.epoch = 0
        self.learnt: dict = self.settings["objective"]  # the settings of the objective that belong to the weights
        self.weights: dict[str, torch.Tensor] | None = None

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("value", "epoch", "learnt", "weights")}

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update(state)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.update)

    def update(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        if epoch == self.settled:
            self.value = None
        if epoch % self.val_interval != 0:
            return
        value = float(self.validator.state.metrics[self.metric])
        if value > (-math.inf if self.value is None else self.value):
            self.value, self.epoch = value, epoch
            self.learnt = {**self.settings["objective"], **self.objective.arguments}
            self.keep({"objective": self.learnt})

    def finish(self, fit: Callable[[dict], tuple[torch.nn.Module, dict]] | None) -> None:
        """Put the best weights into the network, fit what belongs to finished weights, and write what is to be kept."""
        if self.weights is not None:
            self.network.load_state_dict(self.weights)
        network, found = (self.network, {"objective": self.learnt}) if fit is None else fit(self.learnt)
        self.write(network.state_dict(), found)

    def keep(self, found: dict) -> None:
        """Take the network's weights; the first process writes them, and the settings with what was found."""
        self.weights = {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}
        self.write(self.weights, found)

    def write(self, weights: Mapping[str, torch.Tensor], found: dict) -> None:
        if idist.get_rank() != 0:
            return

        def save(path: Path) -> None:
            with open(path, "wb") as f:  # by its name, torch would put that into the file
                torch.save({name: value.detach().cpu().clone() for name, value in weights.items()}, f)

        files.write_atomically(self.path, save)
        sha256 = files.file_sha256(self.path)
        files.write_json(settings_file(self.path), {**self.settings, **found, "weights_sha256": sha256})

    def is_whole(self) -> bool:
        """Whether `model.pt` and `settings.json` are there and belong together."""
        try:
            read_settings(self.path)
        except InputError as e:
            logger.warning(f"{e} They are written again.")
            return False
        return True


@dataclass(eq=False, repr=False)
class CollapseGuard:
    """Take back an epoch that undid what was learnt: one whose mean loss is far above the first one's.

    A softmin has sharp edges: beyond one, all patches come out alike, and no gradient leads back. Training goes on with
    the state that the best epoch so far began with.

    Args:
        parts: network, objective and optimizer, by name: what is taken back.
        history: what keeps the losses of an epoch, earlier in the list of handlers.
        collapsed: how far above the first epoch's mean loss is too far; of a loss that is a log-likelihood, in nats.
            The regularisers' schedule adds 3 to 4.5.
    """

    parts: Mapping[str, Any]
    history: HistoryWriter
    collapsed: float = 5.0

    def __post_init__(self) -> None:
        self.first_loss, self.least_loss = math.inf, math.inf
        self.before: dict = {}  # what this epoch began with
        self.sound: dict = {}  # what the epoch of the least loss began with

    def state_dict(self) -> dict:
        return {name: getattr(self, name) for name in ("first_loss", "least_loss", "sound")}

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update(state)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.remember)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.check)

    def remember(self, engine: Engine) -> None:
        self.before = {name: copy.deepcopy(part.state_dict()) for name, part in self.parts.items()}

    def check(self, engine: Engine) -> None:
        epoch, losses = engine.state.epoch, self.history.losses
        loss = float(idist.all_reduce(sum(losses)) / idist.all_reduce(len(losses)))
        if epoch == 1:
            self.first_loss = loss
        if loss > self.first_loss + self.collapsed:
            logger.warning(
                f"epoch {epoch} undid what was learnt (mean loss {loss:.3g}, {self.least_loss:.3g} at its best); "
                "going on from where it was best."
            )
            for name, state in self.sound.items():
                self.parts[name].load_state_dict(copy.deepcopy(state))
        elif loss < self.least_loss:
            self.least_loss, self.sound = loss, self.before


@dataclass(eq=False, repr=False)
class Patience:
    """Stop at the first validation so many epochs or more after the best one.

    MONAI's `EarlyStopHandler` counts validations, and has no state to go on with.

    Args:
        best: knows which epoch was the best.
        epochs: to wait; None to go through all epochs.
    """

    best: BestModel
    epochs: int | None = None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        if self.epochs is None or self.best.value is None or epoch % self.best.val_interval != 0:
            return
        if epoch - self.best.epoch >= self.epochs and epoch < engine.state.max_epochs:
            logger.info(f"no better validation since epoch {self.best.epoch}: stopping early.")
            engine.terminate()


@dataclass(eq=False, repr=False)
class RunCheckpoint:
    """Save all that it takes to go on after every epoch, and go on with a run that was stopped.

    `last.pt` has a checksum (ignite's `Checkpoint` has none); if it is damaged, `previous.pt` is used. A second run in
    the same folder waits until the first has ended: one that outlived its killed parent, for instance.

    Args:
        ckpt_dir: folder of the run.
        settings: from :func:`bundle.run.training_settings`.
        parts: all that has a state, by name.
        best: the best weights, which are finished at the end.
        finish: what comes before the first epoch and after the last, see :class:`bundle.run.Finish`.
        resume: go on with an unfinished run of the same settings; if false, start from the beginning.
    """

    ckpt_dir: str
    settings: dict
    parts: Mapping[str, Any]
    best: BestModel
    finish: Any = None
    resume: bool = True

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.load)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def load(self, engine: Engine) -> None:
        folder = Path(self.ckpt_dir)
        if idist.get_rank() == 0:
            lock(folder)
            files.remove_leftovers(folder)
            if not self.resume:
                for path in states(folder):
                    path.unlink()
            newest_state(folder)  # damaged ones go before the other processes look
        idist.barrier()
        state = newest_state(folder)
        idist.barrier()  # every process has read it
        if state is None:
            return self.prepare(engine)
        changed = differences(state["settings"], self.settings)
        if changed:
            raise InputError(
                f"{folder} holds a run with other settings ({'; '.join(changed)}); "
                "repeat them, choose another --ckpt_dir, or start from the beginning with --resume false."
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        engine.state.epoch, engine.state.iteration = state["epoch"], state["iteration"]
        if state["finished"] and self.best.is_whole():
            logger.info(f"{folder} is a finished run of {state['epoch']} epochs: nothing to do.")
            engine.terminate()
        elif state["ended"]:
            self.end(engine)
            engine.terminate()
        else:
            logger.info(f"going on after epoch {state['epoch']} of {engine.state.max_epochs} in {folder}.")
            self.prepare(engine)

    def prepare(self, engine: Engine) -> None:
        """What comes before the first epoch; it ends the run where there are no epochs."""
        if self.finish is not None and not self.finish.prepare():
            self.end(engine)
            engine.terminate()

    def save(self, engine: Engine) -> None:
        ended = engine.should_terminate or engine.state.epoch >= engine.state.max_epochs
        self.save_state(engine, ended)
        if ended:
            self.end(engine)

    def end(self, engine: Engine) -> None:
        self.best.finish(self.finish)
        self.save_state(engine, ended=True, finished=True)

    def save_state(self, engine: Engine, ended: bool, finished: bool = False) -> None:
        if idist.get_rank() != 0:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"settings": self.settings, "epoch": engine.state.epoch, "iteration": engine.state.iteration}
        last = Path(self.ckpt_dir) / "last.pt"
        if last.is_file():
            os.replace(last, last.with_name("previous.pt"))
        files.save_checked({**state, "ended": ended, "finished": finished}, last)


def states(folder: Path) -> list[Path]:
    """The states of a run that are there, newest first."""
    return [path for path in (folder / "last.pt", folder / "previous.pt") if path.is_file()]


def newest_state(folder: Path) -> dict | None:
    """The newest state of a run that is whole; None if there is none."""
    damaged: list[Path] = []
    for path in states(folder):
        try:
            state = files.load_checked(path)
        except files.DamagedFile as e:
            logger.warning(f"{e}; going back to the epoch before.")
            damaged.append(path)
        else:
            for newer in damaged:
                newer.unlink()  # it would become the previous one
            return state
    if damaged:
        fault = f"{' and '.join(map(str, damaged))}: damaged (the checksum is wrong or missing)"
        raise InputError(f"{fault}; --resume false starts from the beginning.")
    return None


@lru_cache
def folder_lock(folder: Path) -> FileLock:
    """The lock of a run's folder in this process, which holds it until it ends, however that comes about."""
    return FileLock(folder / ".lock", thread_local=False)


def lock(folder: Path) -> None:
    """Hold the folder of a run; wait while another process trains there."""
    held = folder_lock(folder.resolve())
    try:
        held.acquire(timeout=0)
    except Timeout:
        logger.warning(f"another process is training in {folder}; waiting until it has ended.")
        held.acquire()
    except NotImplementedError:
        logger.warning(f"the file system of {folder} has no locks: nothing else may train there.")
