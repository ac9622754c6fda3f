# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Inference over Ray's workers leaves the files of the local run, whatever happens to a worker."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import monai.bundle
import pandas as pd
import pytest
from monai.bundle import ConfigParser

from bundle.errors import InputError, input_error_of
from bundle.ray_inference import is_ray, run_on_ray
from scripts import make_phantoms

CONFIG = "configs/inference.json"


class DieOnce:
    """A transform whose process is killed at one patient, the first time."""

    def __init__(self, transform, patient: str, flag: Path) -> None:
        self.transform, self.patient, self.flag = transform, patient, flag

    def __call__(self, record: dict) -> dict:
        with open(self.flag.with_suffix(".log"), "a") as log:
            log.write(record["patient_id"] + "\n")
        if record["patient_id"] == self.patient and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.transform(record)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_files_are_those_of_a_local_run(root, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    monkeypatch.chdir(root)
    make_phantoms.main(["--complexity", "9", "--num", "5", "--size", "48", "--out", str(tmp_path / "chests")])
    table = pd.read_csv(tmp_path / "chests" / "cohort.csv")[["image", "lung_mask"]]
    table = table.map(lambda name: str(tmp_path / "chests" / name))
    table.insert(0, "patient_id", [f"p{i}" for i in range(5)])
    (tmp_path / "torn.nii.gz").write_bytes(Path(table["image"][2]).read_bytes()[:300])
    table.loc[2, "image"] = str(tmp_path / "torn.nii.gz")
    table.to_csv(tmp_path / "c.csv", index=False)
    override = {"cohort": str(tmp_path / "c.csv"), "shifts": 1}
    with pytest.raises(Exception) as error:
        monai.bundle.run(config_file=CONFIG, output_dir=str(tmp_path / "local"), **override)
    assert "1 of 5 scans failed" in str(input_error_of(error.value))

    parser = ConfigParser()
    parser.read_config(CONFIG)
    parser.update({**override, "output_dir": str(tmp_path / "ray"), "bundle_root": str(root)})
    stream = parser.get_parsed_content("dataset")
    stream.transform = DieOnce(stream.transform, "p3", tmp_path / "died")
    parts = [parser.get_parsed_content(name) for name in ("network", "inferer", "postprocessing", "writer")]
    assert parts[3].stream is stream
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(root)}})
    try:
        run_on_ray(stream, *parts)
    finally:
        ray.shutdown()
    assert (tmp_path / "died").exists()
    tried = (tmp_path / "died.log").read_text().split()
    assert tried.count("p3") >= 2 and set(tried) == set(table["patient_id"])
    assert [patient for patient, _ in stream.faults] == ["p2"]
    for name in ("predictions.csv", "survival_curves.csv"):
        assert (tmp_path / "ray" / name).read_text() == (tmp_path / "local" / name).read_text()
    files = [sorted(p.name for p in (tmp_path / engine / "maps").iterdir()) for engine in ("local", "ray")]
    assert files[0] == files[1] and len(files[0]) == 12  # heat, picture and lung mask of four
    for name in files[0]:
        assert (tmp_path / "ray" / "maps" / name).read_bytes() == (tmp_path / "local" / "maps" / name).read_bytes()


def test_an_unknown_engine_is_one_sentence():
    assert not is_ray("local")
    with pytest.raises(InputError, match="expected local or ray"):
        is_ray("spark")
