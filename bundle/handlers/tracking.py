# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""How a run is watched: a progress bar, a table of its epochs, Weights & Biases, and MLflow."""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

import ignite.distributed as idist
import pandas as pd
import wandb
from ignite.engine import Engine, Events
from monai.handlers import MLFlowHandler
from monai.utils import path_to_sqlite_uri
from tqdm import tqdm

from bundle.files import write_atomically


def loss_of(output: dict) -> float:
    """The loss in a trainer's output, for handlers that log it.

    MONAI's `from_engine("loss")` makes a tuple of it, which MONAI's handlers leave out with a warning.

    >>> import torch
    >>> loss_of({"loss": torch.tensor(2.5)})
    2.5
    """
    return output["loss"].item()


class Progress:
    """One progress bar over all epochs of an engine's run, with the loss where there is one.

    ignite's `ProgressBar` starts again in every epoch, and doesn't know the length of a stream.

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
        engine.add_event_handler(Events.COMPLETED, lambda engine: self.bar.close())

    def start(self, engine: Engine) -> None:
        total = self.total
        if total is None and engine.state.epoch_length:
            total = engine.state.max_epochs * engine.state.epoch_length
        hidden = idist.get_rank() > 0
        self.bar = tqdm(desc=self.desc, total=total, mininterval=1.0, dynamic_ncols=True, disable=hidden)

    def step(self, engine: Engine) -> None:
        output = engine.state.output
        if isinstance(output, dict) and "loss" in output:
            self.bar.set_postfix(epoch=engine.state.epoch, loss=f"{loss_of(output):.3f}", refresh=False)
        self.bar.n = engine.state.iteration  # a resumed run goes on in the middle
        self.bar.update(0)


class HistoryWriter:
    """Write `history.csv`: the mean training loss of each epoch, and the metrics of its validation if it had one.

    The regularisers are part of the loss, so a step of their schedule is a step of the curve. The file is written after
    every epoch, before `RunCheckpoint` saves it, and rows of this epoch and of later ones are dropped. So a resumed run
    goes on in the file of before.

    Args:
        path: of the file.
        validator: the evaluator that `ValidationHandler` runs, earlier in the list of handlers.
    """

    def __init__(self, path: str, validator: Engine) -> None:
        self.path = Path(path)
        self.validator = validator
        self.losses: list[float] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, lambda engine: self.losses.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.write)

    def add(self, engine: Engine) -> None:
        self.losses.append(loss_of(engine.state.output))

    def write(self, engine: Engine) -> None:
        if idist.get_rank() != 0:
            return
        epoch = engine.state.epoch
        row = {"epoch": epoch, "train_loss": sum(self.losses) / len(self.losses)}
        if self.validator.state.epoch == epoch:
            row |= _numbers(self.validator)
        table = pd.DataFrame([row])
        if epoch > 1 and self.path.is_file():
            before = pd.read_csv(self.path)
            table = pd.concat([before[before["epoch"] < epoch], table])
        write_atomically(self.path, lambda p: table.to_csv(p, index=False, float_format="%.7g"))


def write_verdict(path: Path, learnt: str) -> None:
    """Put a training's verdict into the last row of its `history.csv`, if it has one: codebooks alone have no epochs."""
    if idist.get_rank() == 0 and path.is_file():
        table = pd.read_csv(path)
        table["learnt"] = [""] * (len(table) - 1) + [learnt]
        write_atomically(path, lambda p: table.to_csv(p, index=False, float_format="%.7g"))


class WandbHandler:
    """Log a run to Weights & Biases: the loss of every iteration of a trainer, the metrics of every validation.

    Trainer and validator log into one run, which a resumed training continues; of several processes the first logs. The
    default mode needs neither an account nor a network; `wandb sync` uploads such a run later. ignite's `WandBLogger`
    would need a handler of this size around it: it starts a run where it is built, and MONAI can't attach it.

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
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.STARTED, self.start)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.log_loss)
            engine.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: wandb.log(_numbers(engine)))

    def start(self, engine: Engine) -> None:
        if wandb.run is None:
            os.makedirs(self.output_dir, exist_ok=True)
            wandb.init(
                project=self.project, dir=self.output_dir, mode=self.mode, id=_identity(self.output_dir), resume="allow"
            )

    def log_loss(self, engine: Engine) -> None:
        if "loss" in engine.state.output:
            wandb.log({"train_loss": loss_of(engine.state.output), "epoch": engine.state.epoch})


class MlflowHandler(MLFlowHandler):
    """Log a run to MLflow: its settings, a row of `history.csv` an epoch, and its verdict.

    A run that goes on, with the same settings in the same folder, goes on there too. Nothing that could name a patient is
    logged, not even hashes of ids, and MLflow's own usage statistics are switched off. It comes after `HistoryWriter` and
    `RunCheckpoint` in the list of handlers. MONAI's handler, which it extends, logs neither settings nor verdict.

    Args:
        ckpt_dir: folder of `history.csv` and `settings.json`.
        settings: from :func:`bundle.run.training_settings`.
        output_dir: identifies the run, and has its database, `mlruns.db`, unless there is a `tracking_uri`.
        tracking_uri: of a database or a server; the variable MLFLOW_TRACKING_URI goes before it.
        experiment_name: what the runs of a study share.
        run_name: by default the name of `output_dir`, and a few digits that no other folder has.
    """

    def __init__(
        self,
        ckpt_dir: str,
        settings: dict,
        output_dir: str,
        tracking_uri: str | None = None,
        experiment_name: str = "survival-map",
        run_name: str | None = None,
    ) -> None:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # it would tell MLflow's makers of every call
        super().__init__(
            tracking_uri=tracking_uri or path_to_sqlite_uri(os.path.abspath(os.path.join(output_dir, "mlruns.db"))),
            iteration_log=False,
            experiment_name=experiment_name,
            run_name=run_name or f"{os.path.basename(os.path.abspath(output_dir))}-{_identity(output_dir)[:8]}",
            close_on_complete=True,
        )
        self.folder = Path(ckpt_dir)
        self.params = dict(_params({k: v for k, v in settings.items() if k not in ("cohort_sha256", "trained_on")}))

    def start(self, engine: Engine) -> None:
        self._set_experiment()
        runs = [r for r in self.client.search_runs([self.experiment.experiment_id]) if r.info.run_name == self.run_name]
        same = [r for r in runs if self.params.items() <= r.data.params.items()]  # newest first
        if same:
            self.client.update_run(same[0].info.run_id, status="RUNNING")
        self.cur_run = same[0] if same else self.client.create_run(self.experiment.experiment_id, run_name=self.run_name)
        super().start(engine)
        items = [] if same else list(self.params.items())
        for first in range(0, len(items), 100):  # as many as MLflow takes at once
            self._log_params(dict(items[first : first + 100]))

    def epoch_completed(self, engine: Engine) -> None:
        row = pd.read_csv(self.folder / "history.csv").iloc[-1]
        numbers = {name: float(row[name]) for name in row.index if name not in ("epoch", "learnt")}
        self._log_metrics({n: value for n, value in numbers.items() if not math.isnan(value)}, step=engine.state.epoch)

    def complete(self) -> None:
        path = self.folder / "settings.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        tags = {"weights_sha256": found.get("weights_sha256"), "network": found.get("network", {}).get("name")}
        for name, value in {**tags, **(found.get("learnt") or {})}.items():
            if isinstance(value, str):
                self.client.set_tag(self.cur_run.info.run_id, name, value)
            elif value is not None:
                self._log_metrics({f"learnt_{name}": float(value)})


def _params(settings: dict, key: str = "") -> Iterator[tuple[str, str]]:
    """Every setting with a name and a text that MLflow takes."""
    for name, value in settings.items():
        whole = re.sub(r"[^\w\-/: ]", ".", f"{key}{name}")
        if isinstance(value, dict) and value:
            yield from _params(value, f"{whole}.")
        else:
            yield whole, str(value)[:500]


def _identity(folder: str) -> str:
    """16 digits that another folder doesn't have."""
    return hashlib.sha256(os.path.abspath(folder).encode()).hexdigest()[:16]


def _numbers(engine: Engine) -> dict[str, float]:
    """The metrics of an engine that are numbers."""
    return {name: value for name, value in engine.state.metrics.items() if isinstance(value, (int, float))}
