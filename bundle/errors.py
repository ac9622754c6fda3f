# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""One kind of error for everything a user can mend, and a way to show it as one sentence."""

from __future__ import annotations

import os
import sys

__all__ = ["InputError", "input_error_of", "plain_errors"]


class InputError(ValueError):
    """Something the user gave is wrong. The message says what, where (row, file, key) and what was expected."""


def input_error_of(error: BaseException | None) -> InputError | None:
    """The :class:`InputError` behind an exception, or ``None``.

    MONAI and ignite wrap errors raised in configs, transforms and engines, so the cause chain is followed.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, InputError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def plain_errors() -> None:
    """Let the process end with ``error: <sentence>`` and exit code 1 for an :class:`InputError`, without a traceback.

    Any other exception, and every one when the environment has ``SURVIVAL_MAP_TRACEBACK=1``, is shown in full.
    The configs call this first, because `monai.bundle run` itself has no such handling.
    """
    default = sys.__excepthook__

    def hook(kind, error, trace):
        fault = input_error_of(error)
        if fault is None or os.environ.get("SURVIVAL_MAP_TRACEBACK") == "1":
            default(kind, error, trace)
        else:
            print(f"error: {fault}", file=sys.stderr)

    sys.excepthook = hook
