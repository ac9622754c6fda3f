# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""How every job starts: its config is checked, its errors are plain, its arithmetic is fast and repeatable."""

import ctypes
import logging
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from monai.utils import set_determinism

from bundle.errors import InputError, plain_errors
from bundle.run.config import check_config, running_config

logger = logging.getLogger(__name__)

_MALLOPT = {-4: 0, -1: 2**31 - 1}  # malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD in bytes


def begin(seed: int = 0) -> None:
    """First step of every config: a check of the config, plain error messages, fast memory and arithmetic, a seed.

    Raises:
        InputError: the config has a key or a value that nothing can use; see :func:`~bundle.run.config.check_config`.
    """
    plain_errors()
    exit_on_sigterm()
    parser, file = running_config()
    if parser is not None:
        check_config(parser, file)
    keep_memory()
    torch.set_flush_denormal(True)  # the tails of a softmin are denormal, and denormals are slow
    set_determinism(seed)


def keep_memory() -> None:
    """Let glibc keep the memory of freed arrays: clearing the pages of new ones is a sixth of the time of inference."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        for option, value in _MALLOPT.items():
            mallopt(option, value)


def exit_on_sigterm() -> None:
    """Let SIGTERM, by which a cluster takes the machine away, end the process with code 143: all is on disk by then."""

    def end(number: int, frame: Any) -> None:
        logger.warning("stopped by SIGTERM; the same command goes on.")
        sys.exit(128 + number)

    if threading.current_thread() is threading.main_thread():  # only there can handlers be set
        signal.signal(signal.SIGTERM, end)


def require(value: Any, option: str, what: str) -> None:
    """Raise an :class:`InputError` if an option that has no default was not given."""
    if value is None:
        raise InputError(f"{option} is missing: give {what}.")


def folder_of(path: str | None) -> str | None:
    """The folder that a file lies in; None for no file."""
    return None if path is None else os.path.dirname(path)


def make_folder(path: str) -> str:
    """Create an output folder now, so that a fault in it shows before any work is done; returns the path."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as e:
        raise InputError(f"can't write to the folder {path}: {e.strerror}.") from e
    return path
