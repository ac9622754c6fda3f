# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The bundle's commands as tests run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import monai.bundle

from bundle.errors import input_error_of

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


def command_line(*args: str) -> subprocess.CompletedProcess:
    """The same as a user types it, in a process of its own."""
    command = [sys.executable, "-m", "monai.bundle", "run", *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"})
