# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What the pages on honesty and on real scans count: outcomes drawn or shuffled, intervals, strange scans, vessels."""

from __future__ import annotations

from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from bundle.phantoms.implants import ImplantParams
from bundle.survival.readout import normal_log_pmf
from scripts import make_implants
from scripts.make_phantoms import main as make_phantoms
from scripts.research import honesty, real_scans


@pytest.fixture(scope="module")
def implants(tmp_path_factory):
    """16 implants in three chests, one of them to test on; two scans of the others validate."""
    out = tmp_path_factory.mktemp("implants")
    chests = ["--complexity", "9", "--num", "3", "--size", "54", "--feature_fraction", "0", "--out", str(out / "chests")]
    make_phantoms(chests)
    words = ["--backgrounds", out / "chests" / "cohort.csv", "--num", 16, "--test_share", 0.25, "--spacing", 6]
    make_implants.main([str(word) for word in (*words, "--out", out / "implants")])
    return out / "implants" / "cohort.csv"


def test_shuffled_outcomes_are_the_drawn_ones_dealt_to_others():
    table = pd.DataFrame({"share": np.linspace(0, 0.2, 60)})
    drawn, shuffled = (honesty.cohort_of(table, ImplantParams(), kind, 3) for kind in ("drawn", "shuffled"))
    pairs = [sorted(zip(one["time"], one["event"])) for one in (drawn, shuffled)]
    assert pairs[0] == pairs[1] and not drawn["time"].equals(shuffled["time"])
    assert np.corrcoef(drawn["share"], drawn["true_time"])[0, 1] < -0.5
    assert abs(np.corrcoef(shuffled["share"], shuffled["time"])[0, 1]) < 0.4


def test_intervals_are_counted_on_true_times_those_of_the_censored_too():
    """Everybody is predicted 50 months, with a deviation of 5: an interval from 40.2 to 59.8 months."""
    pmf = normal_log_pmf(torch.full((4,), 50.0), 25.0, 100).exp()
    stage = SimpleNamespace(objective=SimpleNamespace(pmf=lambda maps: pmf), predict=lambda scans: torch.zeros(4))
    trials = SimpleNamespace(stage=stage, test=None)
    rows = pd.DataFrame({"true_time": [39.0, 50, 58, 70], "time": [39.0, 20, 58, 70], "event": [1, 0, 1, 1]})
    rows["share"] = [0.4, 0.3, 0.2, 0.1]
    found = honesty.Trials.intervals(trials, rows, {"last_death": 80.0})
    assert (found["covered"], found["below"], found["above"], found["open"]) == (0.5, 0.25, 0.25, 0.0)
    assert found["oracle"] == 1
    found = honesty.Trials.intervals(trials, rows, {"last_death": 55.0})
    assert (found["covered"], found["above"], found["open"]) == (0.75, 0.0, 1.0)


def test_auroc_is_that_of_sklearn():
    strange, usual = [3.0, 1.0, 2.0, 2.0], [1.0, 2.0, 0.5]
    assert honesty.auroc(strange, usual) == pytest.approx(roc_auc_score([1] * 4 + [0] * 3, strange + usual))


def test_the_page_counts_what_was_trained(implants, tmp_path, capsys):
    words = ["--cohort", str(implants), "--phantoms", str(implants.parents[1] / "chests" / "cohort.csv")]
    words += ["--drawn", "2", "--shuffled", "1", "--out", str(tmp_path / "work"), "--page", str(tmp_path / "page.md")]
    honesty.main(words)
    text = (tmp_path / "page.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| fibrosis | ")]
    drawn, shuffled, intervals = ([word.strip() for word in line] for line in lines)
    for kind, line in {"drawn": drawn, "shuffled": shuffled}.items():
        assert line[1] == kind and int(line[2]) == sum(map(int, line[3:6])) == (2 if kind == "drawn" else 1)
    assert intervals[6].endswith("of 2")
    assert "phantoms instead of patients" in text
    assert "`--disease fibrosis --num 16 --spacing 6.0`: 10 scans to train on, 4 to test." in text
    with pytest.raises(SystemExit, match="second cohort of fibrosis"):
        honesty.main([*words[:1], str(implants), *words[1:]])


def chest() -> tuple[np.ndarray, np.ndarray]:
    """HU and lung of a ball of air, 60 mm wide and of voxels of 3 mm, with a vessel at its centre and one at its surface."""
    grid = np.indices((30, 30, 30)) - 14.5
    lung = np.linalg.norm(grid, axis=0) < 10.5
    hu = np.where(lung, -850.0, 40.0)
    hu[12:17, 14:16, 14:16] = 60
    hu[23:25, 14:16, 14:16] = 60
    return hu, lung


def test_central_vessels_are_the_dense_voxels_deep_in_the_lung():
    vessels = real_scans.central_vessels(*chest())
    assert vessels[14, 14, 14] and not vessels[24, 14, 14]
    assert 8 <= vessels.sum() <= 60


@pytest.mark.parametrize("where, vessels, edge", [("everywhere", 1, 1), ("vessel", None, 0)])
def test_heat_in_vessels_and_along_the_edge_is_over_their_share(tmp_path, where, vessels, edge):
    hu, lung = chest()
    centre = real_scans.central_vessels(hu, lung)
    heat = lung.astype(np.float32) if where == "everywhere" else centre.astype(np.float32)
    for name, volume in {"a_heat": heat, "a_lung": lung, "a": hu}.items():
        nib.save(nib.Nifti1Image(volume.astype(np.float32), np.diag([3.0, 3, 3, 1])), tmp_path / f"{name}.nii.gz")
    said = pd.Series({"status": "ok", "message": "metal; thick slices; it learnt; something", "familiarity": 0.5})
    said = pd.concat([said, pd.Series({"median_months": 20.0, "lower_months": 3.0, "upper_months": 90.0})])
    row = real_scans.row_of("a", tmp_path / "a.nii.gz", said, tmp_path, "it learnt; something")
    assert float(row["vessels"]) == pytest.approx(lung.sum() / centre.sum() if vessels is None else vessels, rel=0.01)
    assert float(row["edge"]) == edge and row["95 %"] == "3–90" and row["message"] == "metal; thick slices"


def test_a_refused_scan_has_its_reason_alone(tmp_path):
    row = real_scans.row_of("a", tmp_path, pd.Series({"status": "failed", "message": "no lung"}), tmp_path, "")
    assert row["message"] == "no lung" and row["months"] == ""
