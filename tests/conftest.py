# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The bundle's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real scans and tables beside the checkout; a test that needs it is skipped where it is absent."""
    folder = Path(os.environ.get("SURVIVAL_MAP_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the real scans are not here ({folder.name} beside the checkout, or SURVIVAL_MAP_SHARED_DATA)")
    return folder


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
