# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Two processes that torchrun starts give what one gives."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import ignite.distributed as idist
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.transforms import Compose

from bundle.data.sampler import EventSampler
from bundle.run.distributed import RankBatches

from .conftest import absolute_table

SMALL = ("--network_def#dim", "16", "--max_epochs", "3", "--val_interval", "1")


def launch(root: Path, processes: int, configs: list[str], *args: str, wait: bool = True):
    """A config with the override for several processes, as a user starts it; one process without either.

    Returns a `CompletedProcess`, or, if not to `wait`, the `Popen`.
    """
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
        configs = [*configs, f"configs/multi_gpu_{Path(configs[0]).name}"]
    command += ["monai.bundle", "run", "--config_file", str(configs), *args]
    if not wait:
        return subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL)
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_scans_that_come_several_times_in_a_batch_all_count(monkeypatch):
    """Those who died, where few did. A process without a scan gets one that doesn't count."""
    events = [{"event": int(i < 2)} for i in range(33)]
    drawn, counted = [], []
    for rank in range(2):
        monkeypatch.setattr(idist, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(idist, "get_world_size", lambda: 2)
        torch.manual_seed(0)
        shares = RankBatches(EventSampler(SimpleNamespace(data=events), 0.25), 16, Compose([]))
        for rows in shares:
            count = shares.rows.popleft()
            drawn += rows[:count]
            counted.append((len(rows), count))
    assert counted == [(8, 8), (8, 8), (1, 1), (8, 8), (8, 8), (1, 0)]
    assert len(drawn) == 33 and sum(i < 2 for i in drawn) == 9


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(root, tiny_cohort, tmp_path):
    # 13 scans to train on: the last of the batches of 4 has one scan, and one process none. One scan is smaller.
    table = absolute_table(tiny_cohort)
    smaller = nib.load(table["image"][1])
    nib.save(smaller.slicer[:14, :13, :11], tmp_path / "smaller.nii.gz")
    table.loc[1, ["image", "gt_mask", "confounder_mask"]] = [str(tmp_path / "smaller.nii.gz"), None, None]
    table["split"] = ["val" if i in (3, 6, 8) else "train" for i in range(16)]
    table.to_csv(tmp_path / "c.csv", index=False)
    table.assign(patient_id=[f"q{i}" for i in range(16)])[:5].to_csv(tmp_path / "unseen.csv", index=False)
    configs = ["configs/train.json", "configs/cohort/phantom.json", "configs/objective/cox.json"]
    args = ("--cohort", str(tmp_path / "c.csv"), "--batch_size", "4", *SMALL)

    def train(processes: int, folder: Path, *more: str) -> None:
        done = launch(root, processes, configs, *args, "--ckpt_dir", str(folder), *more)
        assert done.returncode == 0, done.stderr[-3000:]

    one, two = tmp_path / "one", tmp_path / "two"
    train(1, one)
    train(2, two)
    states = [torch.load(folder / "last.pt", weights_only=True) for folder in (one, two)]
    assert states[0]["finished"] and states[1]["finished"]
    for part in ("network", "objective"):
        for name, value in states[0][part].items():
            torch.testing.assert_close(states[1][part][name], value, rtol=1e-3, atol=1e-4)
    history = [pd.read_csv(folder / "history.csv") for folder in (one, two)]
    pd.testing.assert_frame_equal(history[1], history[0], rtol=1e-4)
    assert len(list((two / "tensorboard").iterdir())) == len(list((one / "tensorboard").iterdir()))
    settings = [json.loads((folder / "settings.json").read_text()) for folder in (one, two)]
    np.testing.assert_allclose(settings[1]["objective"]["baseline"], settings[0]["objective"]["baseline"], rtol=1e-3)

    stopped = tmp_path / "stopped"
    with launch(root, 2, configs, *args, "--ckpt_dir", str(stopped), wait=False) as running:
        while running.poll() is None and not (stopped / "last.pt").exists():
            time.sleep(0.01)
        running.terminate()
    train(2, stopped)
    again = torch.load(stopped / "last.pt", weights_only=True)
    assert all(torch.equal(value, again["network"][name]) for name, value in states[1]["network"].items())

    for processes in (1, 2):
        done = launch(
            root, processes, ["configs/evaluate.json"], "--cohort", str(tmp_path / "unseen.csv"), "--shifts", "1",
            "--ckpt", str(one / "model.pt"), "--output_dir", str(tmp_path / f"eval{processes}"), "--figures", "false",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    for name in ("metrics.json", "metrics_per_scan.csv"):
        assert (tmp_path / "eval1" / name).read_text() == (tmp_path / "eval2" / name).read_text()
    assert json.loads((tmp_path / "eval2" / "metrics.json").read_text())["survival"]["num_scans"] == 5
