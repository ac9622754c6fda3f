# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Would it be found: what is asked, what a run measures, the ceiling, the verdict, and going on where it was stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import lifelines
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from lifelines.utils import concordance_index

from bundle.errors import InputError
from scripts import implant_test, make_implants
from scripts.implant_ceiling import descriptors, mask_ceiling
from scripts.implant_test import followed_to_the_end, like, main
from scripts.implant_test_report import answer, doubts, reached, verdict
from scripts.make_phantoms import main as make_phantoms

TINY = ["--max_epochs", "1", "--network_def#dim", "8", "--network_def#depth", "1", "--shifts", "1", "--refine", "false"]


@pytest.fixture(scope="module")
def backgrounds(tmp_path_factory):
    """Three chests with lung masks, as a table of backgrounds."""
    out = tmp_path_factory.mktemp("chests")
    make_phantoms(["--complexity", "9", "--num", "3", "--size", "54", "--feature_fraction", "0", "--out", str(out)])
    return out / "cohort.csv"


def command(backgrounds, out, *more):
    fixed = ["--backgrounds", backgrounds, "--spacing", 9, "--test_scans", 3, "--out", out]
    return [*map(str, fixed), *more]


# What is asked


def test_a_cohort_lends_its_censoring_and_follow_up(tmp_path):
    rng = np.random.default_rng(0)
    time, event = rng.uniform(1, 90, 200).round(1), (rng.random(200) < 0.3).astype(int)
    pd.DataFrame({"age": 60, "event": event, "time": time}).to_csv(tmp_path / "c.csv", index=False)
    share, window, count = like(tmp_path / "c.csv")
    assert np.isclose(share, 1 - event.mean()) and count == 200
    curve = lifelines.KaplanMeierFitter().fit(time, 1 - event)
    assert np.allclose(window, [curve.percentile(0.95), curve.percentile(0.05)])
    for text, says in {
        "time\n5\n": "column event: missing",
        "time,event\n-1,1\n5,2\n": "row 2, column time: '-1'.*\n.*row 3, column event: '2'",
        "time,event\n5,0\n": "nobody died",
    }.items():
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(InputError, match=says):
            like(tmp_path / "bad.csv")


@pytest.mark.parametrize(
    "more, says",
    [
        (["--seed", "3"], "--seed can't be given here"),
        (["--num", "3"], "--num can't be given here"),
        (["--patients", "1"], "--patients at least 4"),
        (["--noise", "-1"], "noise is -1"),
        (["--censored", "2"], "censoring is 2"),
        (["--diseased", "0"], "leave no diseased scan"),
        (["--test_anatomies", "none"], "leave no diseased scan"),
        (["--diseased", "0.1", "--patients", "4", "--test_scans", "10"], "leave no diseased scan"),
        (["--test_anatomies", "nobody"], "test_anatomies has nobody"),
        (["--like", "nowhere.csv"], "nowhere.csv"),
        (["--", "--cohort", "c.csv"], "--cohort can't be overridden here"),
        (["--", "--max_epoch", "3"], "--max_epoch is a key neither"),
    ],
)
def test_what_cannot_be_is_one_sentence_before_anything_runs(backgrounds, tmp_path, more, says, monkeypatch):
    monkeypatch.setattr(implant_test, "run_module", None)
    with pytest.raises(SystemExit, match=says):
        main(command(backgrounds, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


# What a run does, with stubs for what is slow


class Stub:
    """Stands for the processes: implants are real, the map is the truth, and the risk is the true share."""

    def __init__(self) -> None:
        self.calls: list[dict] = []
        self.stop = False

    def __call__(self, module, *words, log, threads, lock):
        if module == "scripts.make_implants":
            make_implants.main([*words])
            return
        options = dict(zip((word[2:] for word in words[1::2]), words[2::2], strict=True))
        self.calls.append(options)
        if self.stop and len(self.calls) == 5:  # the second run is trained and not measured
            raise KeyboardInterrupt
        scans = pd.read_csv(options["cohort"])
        if "train" in options["config_file"]:
            assert set(scans.split) == {"train", "val", "test"}
            Path(options["ckpt_dir"]).mkdir(exist_ok=True)
            (Path(options["ckpt_dir"]) / "settings.json").write_text('{"learnt": {"verdict": "yes"}}')
        elif "evaluate" in options["config_file"]:
            assert set(scans.split) == {"test"} and Path(options["ckpt"]).parent.name == "train"
            scans["average_precision"] = np.where(scans.share > 0, 1 - scans.share, np.nan)
            measured = Path(options["output_dir"])
            measured.mkdir(parents=True)
            scans.to_csv(measured / "metrics_per_scan.csv", index=False)
            value = {"c_index": 0.75, "average_precision": scans.average_precision.mean(), "pointing_game": 1.0}
            value = {name: {"value": v} for name, v in value.items()}
            (measured / "metrics.json").write_text(json.dumps({"survival": value, "localisation": value}))
        else:
            (scan,) = scans.itertuples()
            maps = Path(options["output_dir"]) / "maps"
            maps.mkdir(parents=True)
            gt = nib.load(Path(options["cohort"]).parent / scan.gt_mask)
            nib.save(nib.Nifti1Image(gt.get_fdata(), gt.affine), maps / f"{scan.patient_id}_heat.nii.gz")


def test_a_stopped_test_goes_on_and_more_may_be_asked_for(backgrounds, tmp_path, monkeypatch, capsys):
    stub, out = Stub(), tmp_path / "out"
    monkeypatch.setattr(implant_test, "run_module", stub)
    monkeypatch.setattr(implant_test, "threads_of", lambda jobs: 1)
    args = command(backgrounds, out, "--censored", "0.6", "--patients", "6", "8", "--seeds", "0")
    stub.stop = True
    with pytest.raises(KeyboardInterrupt):
        main(args)
    assert "1 of 2 runs are done" in (out / "implant_test.html").read_text()
    stub.stop = False
    main(args)
    trained = [Path(call["ckpt_dir"]).parent.name for call in stub.calls if "ckpt_dir" in call]
    assert trained == ["6_seed0", "8_seed0", "8_seed0"]
    main([*args, "1"])
    assert [Path(call["ckpt_dir"]).parent.name for call in stub.calls if "ckpt_dir" in call][3:] == ["6_seed1", "8_seed1"]
    said = capsys.readouterr().out
    assert "Yes: with 6 patients the map finds it" in said and "found on 2 of 2 seeds" in said
    page = (out / "implant_test.html").read_text()
    assert page.count("data:image/png") == 2 and "runs are done" not in page and not list(out.rglob("cache"))

    rows = pd.read_csv(out / "implant_test.csv")
    assert list(zip(rows.patients, rows.seed)) == [(6, 0), (6, 1), (8, 0), (8, 1)]
    for row in rows.itertuples():
        cohort = pd.read_csv(out / "runs" / f"{row.patients}_seed{row.seed}" / "implants" / "cohort.csv")
        test, learnt = cohort[cohort.split == "test"], cohort[cohort.split != "test"]
        assert len(test) == 3 and len(learnt) == row.patients and learnt.event.sum() == row.deaths
        assert learnt.anatomy.value_counts().max() == row.most_a_chest
        assert not set(test.anatomy) & set(learnt.anatomy) and set(test.anatomy) == set(row.test_anatomies.split(", "))
        assert abs(1 - cohort.event.mean() - 0.6) < 0.1
        # nobody in the test is lost from sight, and the oracle is that of the true share
        full = followed_to_the_end(cohort, 99.0)
        assert ((full.time == full.true_time) == (full.event == 1)).all() and (full.time[full.event == 0] == 99).all()
        assert np.isclose(row.c_index_oracle, concordance_index(full.time, -full.share, full.event))
        assert np.isclose(row.base_rate, test.share[test.share > 0].mean())

    for changed in (["--noise", "0.5"], ["--", "--max_epochs", "3"]):
        with pytest.raises(SystemExit, match="holds another implant test: .*(noise: 0.35 -> 0.5|max_epochs)"):
            main([*args, *changed])


@pytest.mark.slow
def test_the_whole_on_tiny_scans(backgrounds, tmp_path):
    """Real implants, training, evaluation and inference, in processes of their own."""
    args = command(backgrounds, tmp_path / "out", "--patients", "10", "--seeds", "0", "--diseased", "0.9", "--", *TINY)
    done = subprocess.run([sys.executable, "-m", "scripts.implant_test", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + (tmp_path / "out" / "runs" / "10_seed0" / "log.txt").read_text()
    (row,) = pd.read_csv(tmp_path / "out" / "implant_test.csv").to_dict("records")
    assert 0 <= row["c_index"] <= 1 and 0 < row["average_precision"] < 1 and row["base_rate"] < row["ceiling"] <= 1
    assert "With 10 patients" in done.stdout and "One seed only" in done.stdout
    assert "data:image/png" in (tmp_path / "out" / "implant_test.html").read_text()


# The ceiling


def test_descriptors_are_local_means_within_the_lung():
    rng = np.random.default_rng(0)
    lung = np.zeros((14, 14, 14), bool)
    lung[2:12, 3:12, 2:13] = True
    hu = rng.integers(-950, -500, lung.shape)
    found = descriptors(hu, lung, 3.0)
    value = (np.clip(hu, -1000, 200) + 1000) / 1200
    voxels = np.argwhere(lung)
    mean = np.zeros(len(voxels))
    for i, voxel in enumerate(voxels):
        cube = tuple(slice(max(0, v - 1), v + 2) for v in voxel)
        mean[i] = value[cube][lung[cube]].mean()
    assert found.shape == (lung.sum(), 9) and np.allclose(found[:, 1], mean - np.median(mean), atol=1e-4)
    # what lies around the lung is not seen, nor how dense the scan is as a whole
    assert np.allclose(descriptors(np.where(lung, hu, 500), lung, 3.0), found, atol=1e-4)
    assert np.allclose(descriptors(hu + 60, lung, 3.0), found, atol=1e-3)


@pytest.mark.parametrize("seen", [True, False])
def test_the_ceiling_is_high_where_masks_can_be_seen_and_the_base_rate_where_not(tmp_path, seen):
    rng, rows = np.random.default_rng(0), []
    lung = np.zeros((18, 18, 18), np.uint8)
    lung[1:17, 1:17, 1:17] = 1
    for i in range(10):
        gt = np.zeros_like(lung)
        gt[tuple(slice(c, c + 5) for c in rng.integers(2, 11, 3))] = 1
        if not seen:
            gt = lung * (rng.random(lung.shape) < 0.03)
        hu = rng.normal(-850, 30, lung.shape) + 200 * gt * seen
        names = {"image": f"{i}.nii.gz", "lung_mask": f"{i}_lung.nii.gz", "gt_mask": f"{i}_gt.nii.gz"}
        for name, volume in zip(names.values(), (hu.astype(np.int16), lung, gt)):
            nib.save(nib.Nifti1Image(volume, np.diag([3.0, 3, 3, 1])), tmp_path / name)
        rows.append({**names, "split": "test" if i > 6 else "train", "share": gt.sum() / lung.sum()})
    pd.DataFrame(rows).to_csv(tmp_path / "cohort.csv", index=False)
    found = mask_ceiling(tmp_path / "cohort.csv")
    assert found > 0.8 if seen else found < 0.06


# The verdict


def runs(patients, precision, ceiling=0.6, oracle=0.8):
    table = {"patients": patients, "seed": range(len(precision)), "average_precision": precision, "ceiling": ceiling}
    table |= {"base_rate": 0.02, "deaths": 30, "c_index": 0.7, "c_index_oracle": oracle, "test_anatomies": "a, b"}
    table |= {"most_a_chest": 2}
    return pd.DataFrame(table)


def test_the_verdict_of_a_number_of_patients():
    assert np.allclose(reached(runs(60, [0.02, 0.31, 0.6])), [0, 0.5, 1])
    for precision, ceiling, word in (
        ([0.32, 0.5, 0.6], 0.6, "yes"),
        ([0.05, 0.3, 0.02], 0.6, "no"),
        ([0.05, 0.5, 0.02], 0.6, "unsure"),
        ([0.05, 0.05, 0.02], 0.05, "hidden"),
    ):
        found, sentence = verdict(runs(60, precision, ceiling))
        assert found == word and sentence.startswith("With 60 patients (30 deaths)")
    assert "on 1 of 3 seeds" in verdict(runs(60, [0.05, 0.5, 0.02]))[1]


@pytest.mark.parametrize(
    "verdicts, says",
    [
        ({60: "no", 120: "yes", 300: "yes"}, "Yes: with 120 patients"),
        ({60: "yes", 120: "no", 300: "yes"}, "Yes: with 300 patients"),
        ({60: "yes", 120: "no"}, "Not surely"),
        ({60: "no", 120: "unsure"}, "Not surely"),
        ({60: "no", 120: "no"}, "No: with up to 120"),
        ({60: "hidden", 120: "hidden"}, "can't be told"),
    ],
)
def test_the_answer_is_the_number_from_which_on_it_is_found(verdicts, says):
    assert says in answer(verdicts, 3) and "One seed only" in answer(verdicts, 1)


def test_doubts_are_told():
    said = " ".join(doubts(runs(60, [0.1, 0.2], oracle=0.53), 3))
    assert "2 of 3 runs" in said and "C-index of 0.53" in said and "Measured on a, b only" in said
    assert not doubts(runs(60, [0.1]).assign(test_anatomies="a, b, c"), 1)
    shared = doubts(runs(60, [0.1]).assign(test_anatomies="a, b, c", most_a_chest=[12]), 1)
    assert len(shared) == 1 and "Up to 12 patients were made of one chest" in shared[0]
