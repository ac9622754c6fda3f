# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""One kind of error for everything a user can put right, and one sentence for every other."""

import math
import os
import sys
from collections.abc import Callable
from typing import Any


class InputError(ValueError):
    """Something the user gave is wrong. The message says what, where (row, file, key) and what was expected."""


def checked_numbers(
    key: str, value: Any, count: int, expected: str, valid: Callable[..., bool] = lambda *numbers: True
) -> list[float]:
    """`count` finite numbers, as a config or a command line gave them: one number, or a sequence.

    Args:
        key: what the user calls the value.
        expected: for the message.
        valid: of the numbers, whether they may be used.

    Raises:
        InputError: the value is something else.

    Example::

        >>> checked_numbers("hu_window", (-1000, 200), 2, "two ascending HU", lambda low, high: low < high)
        [-1000.0, 200.0]
    """
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    real = all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    if len(values) != count or not real or not valid(*values):
        raise InputError(f"{key} is {value!r} (expected {expected})")
    return [float(v) for v in values]


def input_error_of(error: BaseException | None) -> InputError | None:
    """The :class:`InputError` behind an exception, or ``None``: MONAI and ignite wrap what is raised in their callbacks."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, InputError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def unforeseen(patient: str, error: BaseException, doing: str) -> str:
    """One sentence about an error that no check expected, by the cause at the bottom of its chain."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"patient {patient}: {type(error).__name__} while {doing}: {' '.join(str(error).split())}"


def scan_fault(patient: str, error: Exception) -> str:
    """One sentence about a scan that could not be read or preprocessed."""
    return str(input_error_of(error) or unforeseen(patient, error, "reading or preprocessing"))


def plain_errors() -> None:
    """Let the process end with ``error: <sentence>`` and exit code 1 for an :class:`InputError`, without a traceback.

    Any other exception, and every one when the environment has ``SURVIVAL_MAP_TRACEBACK=1``, is shown in full.
    """
    default = sys.__excepthook__

    def hook(kind, error, trace):
        fault = input_error_of(error)
        if fault is None or os.environ.get("SURVIVAL_MAP_TRACEBACK") == "1":
            default(kind, error, trace)
        else:
            print(f"error: {fault}", file=sys.stderr)

    sys.excepthook = hook
