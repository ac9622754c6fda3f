# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from .commands import train

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(config, items) -> None:
    """The kill test runs only where it is asked for by name, whatever else `-m` says."""
    if "kill" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("kill")])
        items[:] = [item for item in items if not item.get_closest_marker("kill")]


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


def write_scan(path: Path, hu: np.ndarray, affine: np.ndarray | None = None) -> None:
    """Write an int16 NIfTI, by default with 3 mm voxels."""
    nib.save(nib.Nifti1Image(hu.astype(np.int16), np.diag([3.0, 3, 3, 1]) if affine is None else affine), path)


def absolute_table(cohort: Path) -> pd.DataFrame:
    """The table of a cohort for a CSV elsewhere: with absolute paths."""
    table = pd.read_csv(cohort)
    for column in ("image", "gt_mask", "confounder_mask"):
        table[column] = [str(cohort.parent / name) for name in table[column]]
    return table


@pytest.fixture(scope="session")
def tiny_cohort(tmp_path_factory) -> Path:
    """Cohort CSV of 16 scans of 16^3: in those who die a bright block, and a larger one means a shorter life."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    rows = ["patient_id,image,time,event,gt_mask,confounder_mask,age"]
    for i in range(16):
        v = rng.normal(0, 0.2, (16, 16, 16))
        mask = np.zeros(v.shape)
        time, event = 99, 0
        if i % 2 == 0:
            size = 4 + 2 * (i % 3)
            start = rng.integers(0, 16 - size, 3)
            mask[tuple(slice(s, s + size) for s in start)] = 1
            time, event = 40 - 4 * size, 1
        write_scan(folder / f"p{i}.nii.gz", -800 + 40 * np.where(mask > 0, 20, v))
        write_scan(folder / f"p{i}_gt.nii.gz", mask)
        write_scan(folder / f"p{i}_confounder.nii.gz", np.zeros(v.shape))
        rows.append(f"p{i},p{i}.nii.gz,{time},{event},p{i}_gt.nii.gz,p{i}_confounder.nii.gz,{50 + i}")
    (folder / "cohort.csv").write_text("\n".join(rows) + "\n")
    return folder / "cohort.csv"


@pytest.fixture(autouse=True)
def _in_root(root, monkeypatch):
    monkeypatch.chdir(root)


@pytest.fixture(scope="session")
def trained(tiny_cohort, tmp_path_factory, root) -> Path:
    """Weights of a short training run on the tiny cohort."""
    with contextlib.chdir(root):
        return train(tiny_cohort, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def localising(tiny_cohort, tmp_path_factory, root) -> Path:
    """Weights of a run that is long enough to find the bright block."""
    with contextlib.chdir(root):
        return train(tiny_cohort, tmp_path_factory.mktemp("localising"), max_epochs=60)
