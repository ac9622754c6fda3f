# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Survival Map: survival times and where in the lung they come from, learnt from CT and censored times alone."""

import importlib
from types import ModuleType

from bundle import fast_gzip  # noqa: F401  NiBabel reads and writes .gz with it


def __getattr__(name: str) -> ModuleType:
    """Import a package at its first use: MONAI hides why an import failed, such as a package that is missing."""
    try:
        return importlib.import_module(f"bundle.{name}")
    except ModuleNotFoundError as e:
        if e.name != f"bundle.{name}":
            raise
        raise AttributeError(f"module 'bundle' has no attribute '{name}'") from None
