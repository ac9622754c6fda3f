# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The README's four stories, run as written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bundle.phantoms import PhantomParams, make_phantom

from .conftest import write_scan

STORIES = ("Train on my cohort", "Run on a scan", "Share with a colleague", "Measure a map")


def lines_of(readme: str, story: str) -> str:
    """The shell commands of a story: the fenced bash blocks below its heading."""
    section = re.search(rf"^## {story}\n(.*?)(?=^## |\Z)", readme, re.M | re.S)
    return "".join(re.findall(r"^```bash\n(.*?)^```", section[1], re.M | re.S))


def write_cohort(folder: Path, table: str, names: list[str], seed: int) -> None:
    """Small chests (192 mm a side, so that they are quick), every second one with fibrosis, of which the patient dies."""
    (folder / "scans").mkdir(exist_ok=True)
    affine, rows = np.diag([4.0, 4, 4, 1]), ["patient_id,image,time,event,gt_mask"]
    for i, name in enumerate(names):
        chest = make_phantom("chest", np.random.default_rng(seed + i), i % 2 == 0, PhantomParams(size=48))
        write_scan(folder / "scans" / f"{name}.nii.gz", chest.image, affine)
        write_scan(folder / "scans" / f"{name}_gt.nii.gz", chest.gt_mask, affine)
        rows.append(f"{name},scans/{name}.nii.gz,{chest.time},{chest.event},scans/{name}_gt.nii.gz")
    (folder / table).write_text("\n".join(rows) + "\n")


def test_the_readme_is_short_and_each_story_has_commands(root):
    readme = (root / "README.md").read_text()
    assert len(readme.split()) <= 900
    assert all("python -m " in lines_of(readme, story) for story in STORIES)


@pytest.mark.slow
def test_the_stories_run_as_they_are_written(root, tmp_path):
    tree = tmp_path / "tree"
    left_out = shutil.ignore_patterns("__pycache__", ".*", "runs", "tests", "docs", "demo", "models")
    shutil.copytree(root, tree, ignore=left_out)
    train = json.loads((tree / "configs" / "train.json").read_text())
    (tree / "configs" / "train.json").write_text(json.dumps(train | {"max_epochs": 1}))  # the only thing that is cut short
    write_cohort(tree, "my_cohort.csv", [f"A{i}" for i in range(8)], seed=0)
    write_cohort(tree, "marked.csv", ["B0", "B1"], seed=100)
    shutil.copy(tree / "scans" / "B0.nii.gz", tree / "scan.nii.gz")
    readme = (root / "README.md").read_text()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": "", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    said = {}
    for story in STORIES:
        command = ["bash", "-euo", "pipefail", "-c", lines_of(readme, story)]
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{story}:\n{done.stderr[-2000:]}"
        said[story] = done.stdout
    runs = tree / "runs"
    assert json.loads((runs / "mine" / "settings.json").read_text())["learnt"]["verdict"] in ("yes", "unsure", "no")
    assert pd.read_csv(runs / "out" / "predictions.csv").status.tolist() == ["ok"]
    assert nib.load(runs / "out" / "maps" / "scan_heat.nii.gz").shape == (48, 48, 48)
    assert "received: the same as where it was packed, bit for bit." in said["Share with a colleague"]
    metrics = json.loads((runs / "measured" / "metrics.json").read_text())
    assert metrics["localisation"]["pointing_game"]["num_scans"] == 1 and metrics["failed"]["scans"] == []
