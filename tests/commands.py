# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The bundle's commands as tests run them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import monai.bundle
import pytest

from bundle.errors import input_error_of
from bundle.run import RunCheckpoint

TRAIN = ["configs/train.json", "configs/cohort/phantom.json"]
SMALL = {"recipe": "network", "network_def#dim": 16, "batch_size": 4, "max_epochs": 4, "val_interval": 1}


def run(config, **override) -> None:
    """`monai.bundle run` in this process; an :class:`InputError` comes out unwrapped."""
    hook = sys.excepthook
    try:
        monai.bundle.run(config_file=config, **override)
    except Exception as e:
        raise (input_error_of(e) or e) from e.__cause__
    finally:
        sys.excepthook = hook


def train(cohort, folder, config=TRAIN, **override) -> Path:
    run(config, cohort=str(cohort), ckpt_dir=str(folder), output_dir=str(folder), **{**SMALL, **override})
    return Path(folder) / "model.pt"


@contextlib.contextmanager
def stopped_after(epoch: int) -> Iterator[None]:
    """The training within is stopped as by Ctrl-C when this epoch has been saved; it must be."""
    save = RunCheckpoint.save

    def save_then_die(self, engine):
        save(self, engine)
        if engine.state.epoch == epoch:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunCheckpoint, "save", save_then_die)
        yield


def command_line(*args: str) -> subprocess.CompletedProcess:
    """The same as a user types it, in a process of its own."""
    command = [sys.executable, "-m", "monai.bundle", "run", *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
