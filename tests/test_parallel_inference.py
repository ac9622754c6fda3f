# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Inference of several scans at a time leaves the files of the local run, whatever happens to a worker."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from monai.bundle import ConfigParser

from bundle.errors import InputError
from bundle.run.parallel import run_parallel
from scripts import make_phantoms

from .commands import run

CONFIG = "configs/inference.json"


class Dies:
    """A transform whose process is killed at one patient, so many times; it logs the patients it was called with."""

    def __init__(self, transform, patient: str, log: Path, times: int) -> None:
        self.transform, self.patient, self.log, self.times = transform, patient, log, times

    def __call__(self, record: dict) -> dict:
        with open(self.log, "a") as log:
            log.write(record["patient_id"] + "\n")
        if record["patient_id"] == self.patient and self.log.read_text().split().count(self.patient) <= self.times:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.transform(record)


@pytest.fixture(scope="module")
def chests(root, tmp_path_factory):
    """A cohort of five chests, the third of which is torn, and what the local run leaves of it in `local`."""
    folder = tmp_path_factory.mktemp("chests")
    make_phantoms.main(["--complexity", "9", "--num", "5", "--size", "48", "--out", str(folder / "chests")])
    table = pd.read_csv(folder / "chests" / "cohort.csv")[["image", "lung_mask"]]
    table = table.map(lambda name: str(folder / "chests" / name))
    table.insert(0, "patient_id", [f"p{i}" for i in range(5)])
    (folder / "torn.nii.gz").write_bytes(Path(table["image"][2]).read_bytes()[:300])
    table.loc[2, "image"] = str(folder / "torn.nii.gz")
    table.to_csv(folder / "c.csv", index=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as workers have; sums of more threads are rounded otherwise
    with contextlib.chdir(root), pytest.raises(InputError, match="1 of 5 scans failed"):
        run(CONFIG, output_dir=str(folder / "local"), cohort=str(folder / "c.csv"), shifts=1)
    torch.set_num_threads(threads)
    return folder


def parts_of(folder: Path, root: Path, output: str, dies: str, times: int) -> dict:
    """The parts of the inference config, for another folder of output, and with a scan that kills its process."""
    parser = ConfigParser()
    parser.read_config(CONFIG)
    cohort = {"cohort": str(folder / "c.csv"), "shifts": 1}
    parser.update({**cohort, "output_dir": str(folder / output), "bundle_root": str(root)})
    keys = {"stream": "dataset", "network": "network_def", **{key: key for key in ("inferer", "postprocessing", "writer")}}
    parts = {name: parser.get_parsed_content(key) for name, key in keys.items()}
    assert parts["writer"].stream is parts["stream"]
    parts["stream"].transform = Dies(parts["stream"].transform, dies, folder / f"{output}.log", times)
    return parts


def same_files(folder: Path, output: str) -> None:
    for name in ("predictions.csv", "survival_curves.csv"):
        assert (folder / output / name).read_text() == (folder / "local" / name).read_text()
    files = [sorted(p.name for p in (folder / engine / "maps").iterdir()) for engine in ("local", output)]
    assert files[0] == files[1] and len(files[0]) == 12  # heat, picture and lung mask of four
    for name in files[0]:
        assert (folder / output / "maps" / name).read_bytes() == (folder / "local" / "maps" / name).read_bytes()


def test_processes_leave_the_files_of_a_local_run_and_one_that_dies_is_replaced(chests, root):
    parts = parts_of(chests, root, "processes", dies="p3", times=1)
    run_parallel("processes", **parts, jobs=2)
    assert (chests / "processes.log").read_text().split().count("p3") == 2
    assert [patient for patient, _ in parts["stream"].faults] == ["p2"]
    same_files(chests, "processes")


def test_a_scan_that_kills_its_process_twice_is_a_bad_one(chests, root):
    parts = parts_of(chests, root, "twice", dies="p1", times=2)
    run_parallel("processes", **parts, jobs=2)
    faults = dict(parts["stream"].faults)
    assert set(faults) == {"p1", "p2"} and faults["p1"].startswith("patient p1: the process died while reading")
    table = pd.read_csv(chests / "twice" / "predictions.csv").set_index("patient_id")
    assert table.status.to_dict() == {"p0": "ok", "p1": "failed", "p2": "failed", "p3": "ok", "p4": "ok"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere they end when their scan is done")
def test_processes_end_with_a_run_that_is_killed(chests, root):
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", CONFIG, "--engine", "processes", "--jobs", "2"]
    command += ["--cohort", str(chests / "c.csv"), "--output_dir", str(chests / "killed")]
    started = subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
    while started.poll() is None and len(children.read_text().split()) < 2:
        time.sleep(0.05)
    processes = [Path("/proc", pid) for pid in children.read_text().split()]
    started.kill()
    started.wait()
    assert len(processes) == 2
    until = time.monotonic() + 10
    while any(p.exists() for p in processes):
        assert time.monotonic() < until, "a process outlives its run"
        time.sleep(0.05)


@pytest.mark.slow
def test_ray_leaves_the_files_of_a_local_run_and_replaces_a_killed_worker(chests, root):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    parts = parts_of(chests, root, "ray", dies="p3", times=1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(root)}})
    try:
        run_parallel("ray", **parts, jobs=2)
    finally:
        ray.shutdown()
    tried = (chests / "ray.log").read_text().split()
    assert tried.count("p3") >= 2 and set(tried) == {f"p{i}" for i in range(5)}
    assert [patient for patient, _ in parts["stream"].faults] == ["p2"]
    same_files(chests, "ray")


def test_an_unknown_engine_is_one_sentence():
    with pytest.raises(InputError, match="expected local, processes or ray"):
        run_parallel("spark", None, None, None, None, None, 1)
