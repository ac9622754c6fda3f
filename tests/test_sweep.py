# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The sweep runs nothing twice, loses nothing when killed, and its table says what its CSV says."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from lifelines import CoxPHFitter
from monai.bundle import ConfigParser, update_kwargs

from bundle.files import file_sha256, save_checked
from bundle.networks import SurvivalMapNet
from bundle.survival import CenTime
from scripts.jobs import literal
from scripts.research import objectives, plots, sweep


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- table -->\nold\n<!-- end of table -->\nafter\n")
    return path


def command(tmp_path, *args):
    where = ["--work", str(tmp_path), "--results", str(tmp_path / "results.csv"), "--page", str(tmp_path / "page.md")]
    return ["sweep", *where, *args]


def test_a_killed_sweep_goes_on_and_runs_nothing_twice(tmp_path, page, monkeypatch):
    ran = []

    def row_of(runner, complexity, size, variant, train_scans, seed, test):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append((complexity, seed))
        row = dict(zip(sweep.KEY, (complexity, size, variant, train_scans, seed, test))) | {"overrides": "{}"}
        row |= {"test_scans": 8, "train_seconds": 60 + seed, "pointing_game": 0.9 + seed / 10, "inverted": seed}
        return row | {"average_precision": 0.5, "mae_events": 1.0}

    monkeypatch.setattr(sweep.Runner, "row", row_of)
    what = ["--complexities", "10", "2", "--seeds", "0", "1", "--test_scans"]
    monkeypatch.setattr("sys.argv", command(tmp_path, *what, "8"))
    with pytest.raises(KeyboardInterrupt):
        sweep.main()
    first, ran[:] = list(ran), []
    sweep.main()
    assert sorted(first + ran) == [(2, 0), (2, 1), (10, 0), (10, 1)]
    ran.clear()
    sweep.main()
    assert ran == []
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(r["complexity"], r["seed"]) for r in rows] == [("2", "0"), ("2", "1"), ("10", "0"), ("10", "1")]
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    line = next(line for line in text.splitlines() if line.startswith("| 2 | default | 0–1 |"))
    assert "0.950 (0.900–1.000)" in line  # pointing: mean over seeds, minimum, maximum
    assert "| 1 (0–1) |" in line  # inverted maps are summed
    assert "| 60 (60–61) |" in line or "| 61 (60–61) |" in line
    monkeypatch.setattr("sys.argv", command(tmp_path, *what, "16"))  # other scans to measure on: rows take the place of those
    with pytest.raises(KeyboardInterrupt):
        sweep.main()
    assert len(ran) == 2 and len(list(csv.DictReader((tmp_path / "results.csv").open()))) == 4


def test_rows_that_another_sweep_wrote_meanwhile_stay(tmp_path, page, monkeypatch):
    other = dict(zip(sweep.KEY, (6, 64, "default", 100, 0, "same"))) | {"average_precision": 0.25, "mae_events": 2.0}

    def row_of(runner, *key):
        same = dict(zip(sweep.KEY, key)) | {"average_precision": 0.1}
        sweep.write_rows(tmp_path / "results.csv", [other, same])
        return dict(zip(sweep.KEY, key)) | {"pointing_game": 1.0, "average_precision": 0.5, "mae_events": 1.0}

    monkeypatch.setattr(sweep.Runner, "row", row_of)
    monkeypatch.setattr("sys.argv", command(tmp_path, "--complexities", "2", "--seeds", "0"))
    sweep.main()
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(r["complexity"], r["average_precision"]) for r in rows] == [("2", "0.5"), ("6", "0.25")]
    assert "| 6 | default | 0 | – | 0.250 |" in page.read_text()


def test_seconds_on_a_gpu_are_not_averaged_with_those_on_cpus(tmp_path):
    key = dict(zip(sweep.KEY, (2, 48, "default", 100, 0, "same")))
    rows = [key | {"train_seconds": 50, "device": "cuda"}, key | {"seed": 1, "train_seconds": 200}]
    sweep.write_rows(tmp_path / "results.csv", rows)
    read = sweep.read_rows(tmp_path / "results.csv")
    assert [row["device"] for row in read] == ["cuda", "cpu"]
    assert sweep.numbers(read).train_seconds.dropna().tolist() == [200]


def test_targets_are_met_or_missed_by_what_the_seeds_reach():
    good = {"variant": "default", "test": "same", "train_scans": 100, "size": 64, "inverted": 0, "survivor_heat": 0.02}
    good |= {"pointing_game": 1.0, "average_precision": 0.9, "mass_accuracy": 0.95, "mae_events": 1.5, "correlation": 0.96}
    good |= {"mean_time_censored": 90.0}
    rows = [good | {"complexity": c, "seed": seed} for c in (2, 3, 7) for seed in (0, 1)]
    rows[0] |= {"train_seconds": 400}
    rows[1] |= {"pointing_game": 0.9, "inverted": 2}
    rows[2] |= {"confounder_mass": 0.01, "correlation": None}
    rows[3] |= {"confounder_mass": 0.04}
    rows.append(good | {"complexity": 7, "seed": 2, "variant": "no_entropy", "average_precision": 0.1})
    text = sweep.targets(sweep.numbers(rows))
    assert text.startswith("Phantoms (seeds) by voxels a side: 64³: 2 (2), 3 (2), 7 (2).\n")
    found = {cells[1].strip(): (cells[3].strip(), cells[4].strip()) for cells in (line.split("|") for line in text.splitlines()[4:])}
    assert found["pointing game, mean"] == ("64³: 3, 7", "64³: 2 (0.95)")
    assert found["pointing game, worst seed"] == ("64³: 3, 7", "64³: 2 (0.9)")
    assert found["average precision"] == ("64³: 3", "64³: 2 (0.9), 7 (0.9)")  # 3 has a bound of its own
    assert found["heat in confounder"] == ("–", "64³: 3 (0.025)")
    assert found["survivors / dead"] == ("64³: 2, 3, 7", "–")
    assert found["inverted maps, all seeds"] == ("64³: 3, 7", "64³: 2 (2)")
    assert found["MAE events, months"] == ("64³: 7", "64³: 2 (1.5), 3 (1.5)")
    assert found["correlation"] == ("64³: 2, 7", "64³: 3 (nan)")  # a run without a measure doesn't meet it
    assert found["training, s"] == ("–", "64³: 2 (400)")  # of those whose time on CPUs is known


@pytest.mark.parametrize("variant", sweep.VARIANTS)
def test_a_variant_changes_what_it_names(variant):
    """Of a key that isn't there, or a None, `monai.bundle run` would say nothing, and the default be measured once more."""
    overrides = {k: v for k, v in sweep.VARIANTS[variant].items() if k not in ("phantoms", "shuffle")}
    parser = ConfigParser()
    parser.read_config(["configs/train.json", "configs/cohort/phantom.json", *overrides.pop("config", [])])
    for key, value in overrides.items():
        given = update_kwargs({}, **{key: literal(str(value))})
        assert given and list(given.values())[0] != parser.get(key, None)
        if key not in ("train#dataloader#shuffle", "train#random_transforms#0#prob"):  # arguments that have their defaults
            assert key in parser


def test_reserved_seeds_are_told_from_those_of_development():
    row = dict.fromkeys(sweep.MAP + sweep.SURVIVAL, 1.0) | dict(zip(sweep.KEY, (2, 64, "default", 100, 0, "same")))
    rows = [row, row | {"seed": 1}, row | {"seed": sweep.RESERVED, "average_precision": 0.5}]
    text = sweep.markdown(rows)
    reserved, development = text.split("**Seeds of development.**")
    assert reserved.startswith("**Reserved seeds.** Phantoms (seeds) by voxels a side: 64³: 2 (1).") and "64³: 2 (0.5)" in reserved
    assert development.startswith(" Phantoms (seeds) by voxels a side: 64³: 2 (2).") and "2 (0.5)" not in development
    assert "| 2 | default | 0–1 |" in development and f"| 2 | default | {sweep.RESERVED} |" in development


def test_every_row_is_in_one_section_and_the_shipped_configuration_beside_what_differs():
    row = dict.fromkeys(sweep.MAP + sweep.SURVIVAL, 1.0) | dict(zip(sweep.KEY, (2, 48, "default", 100, 0, "same")))
    rows = [row, row | {"seed": 1}, row | {"seed": 3}, row | {"seed": sweep.RESERVED}, row | {"complexity": 6}]
    rows += [row | {"variant": "softmin"}, row | {"variant": "no_entropy"}, row | {"variant": "radius_4"}, row | {"train_scans": 25}]
    rows += [row | {"test": "flip"}, row | {"complexity": 10, "train_scans": 50}, row | {"complexity": 10, "train_scans": 200}]
    found, title = {}, ""
    for line in sweep.markdown(rows).splitlines():
        if line.startswith("**"):
            title = line.strip("*")
            found[title] = []
        elif line.startswith("| ") and not line.startswith("| phantom") and title in sweep.SECTIONS:
            found[title].append([cell.strip() for cell in line.split("|")[1:5]])
    usual = ["2, 48³", "default"]
    assert [cells[:3] for cells in found["1 to 9, as shipped"]] == [[*usual, "0–1, 3"], [*usual, "1010"], ["6, 48³", "default", "0"]]
    assert [cells[:3] for cells in found["Heads"]] == [[*usual, "0–1, 3"], ["2, 48³", "softmin", "0"]]
    assert [cells[:3] for cells in found["Single settings"]] == [[*usual, "0–1, 3"], ["2, 48³", "no_entropy", "0"]]
    assert found["Other cohorts"] == [[*usual, "25", "0"], [*usual, "100", "0–1, 3"], ["2, 48³", "radius_4", "100", "0"]]
    assert found["Other phantoms than trained on"] == [[*usual, "flip", "0"], [*usual, "same", "0–1, 3"]]
    assert found["10 to 13"] == [["10, 48³", "default", "50", "0"], ["10, 48³", "default", "200", "0"]]


def test_a_run_that_fails_does_not_take_the_others_with_it(tmp_path, page, monkeypatch, capsys):
    def row_of(runner, complexity, size, variant, train_scans, seed, test):
        if complexity == 2:
            raise RuntimeError("no such luck")
        return dict(zip(sweep.KEY, (complexity, size, variant, train_scans, seed, test))) | dict.fromkeys(
            ("pointing_game", "average_precision", "mae_events", "inverted"), 1
        )

    monkeypatch.setattr(sweep.Runner, "row", row_of)
    monkeypatch.setattr("sys.argv", command(tmp_path, "--complexities", "2", "3", "--seeds", "0"))
    with pytest.raises(SystemExit, match="1 of 2 runs failed"):
        sweep.main()
    assert "no such luck" in capsys.readouterr().out
    assert [r["complexity"] for r in csv.DictReader((tmp_path / "results.csv").open())] == ["3"]


def test_every_variant_changes_a_part_that_the_configuration_has():
    from monai.bundle import ConfigParser

    config = ConfigParser()
    config.read_config("configs/train.json")
    for overrides in sweep.VARIANTS.values():
        for key in overrides.keys() - {"phantoms", "shuffle", "config"}:
            assert key.rpartition("#")[0] in config
        assert all(Path(file).is_file() for file in overrides.get("config", []))
    with_options = [test.get("options", {}) for test in sweep.TESTS.values()]
    config = json.load(open("configs/evaluate.json"))
    assert all(key in config for options in with_options for key in options)


def test_weights_without_severity_say_the_months_of_the_softmin(tmp_path):
    net = SurvivalMapNet(dim=16).eval()
    image = torch.rand(1, 1, 16, 16, 16)
    before = net(image)
    net.severity.slope.fill_(1.0)
    net.severity.offset.fill_(3.0)
    net.severity.earliest.fill_(70.0)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    settings = {"objective": CenTime(variance=1.5).arguments, "network": net.arguments}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    save_checked({"best_objective": CenTime(variance=9.0).arguments}, tmp_path / "last.pt")
    assert (net(image)[0, 0] - before[0, 0]).abs().min() > 1
    model = sweep.without_severity(tmp_path, tmp_path / "test")
    net.load_state_dict(torch.load(model, weights_only=True))
    torch.testing.assert_close(net(image), before)
    found = json.loads((tmp_path / "test" / "settings.json").read_text())
    assert found["objective"]["variance"] == 9.0 and found["weights_sha256"] == file_sha256(model)


def test_another_size_is_another_run_and_rows_without_a_size_stay_valid(tmp_path, page, monkeypatch):
    (tmp_path / "results.csv").write_text("complexity,variant,train_scans,seed,test,mae_events\n2,default,100,0,same,1\n")
    trained = []

    def row_of(runner, *key):
        trained.append(key)
        return dict(zip(sweep.KEY, key)) | {"pointing_game": 1.0, "average_precision": 0.5, "mae_events": 2.0}

    monkeypatch.setattr(sweep.Runner, "row", row_of)
    monkeypatch.setattr("sys.argv", command(tmp_path, "--complexities", "2", "9", "--seeds", "0"))
    sweep.main()
    assert trained == [(9, 107, "default", 100, 0, "same")]
    monkeypatch.setattr("sys.argv", command(tmp_path, "--complexities", "2", "--seeds", "0", "--size", "48"))
    sweep.main()
    sweep.main()
    assert trained[1:] == [(2, 48, "default", 100, 0, "same")]
    rows = {(r["complexity"], r["size"]): r["mae_events"] for r in csv.DictReader((tmp_path / "results.csv").open())}
    assert rows == {("2", "48"): "2", ("2", "64"): "1", ("9", "107"): "2"}
    assert "| 2, 48³ | default |" in page.read_text() and "| 2 | default |" in page.read_text()


def test_training_and_test_phantoms_have_the_size_of_the_run(tmp_path, monkeypatch):
    runner, made = sweep.Runner(tmp_path, 8, 1), []

    def python(self, *args, log):
        if args[0] == "scripts.make_phantoms":
            made.append(args[args.index("--size") + 1] if "--size" in args else "64")

    monkeypatch.setattr(sweep.Runner, "python", python)
    usual, small = (runner.phantoms(2, size, 8, 0, {}) for size in (64, 48))
    assert made == ["64", "48"] and usual != small
    assert runner.phantoms(2, 64, 8, 0, {"size": 48}) == small  # the test size_48 of a run of the usual size
    assert sweep.name_of_run(2, 64, "cox", 100, 0) == "2_cox_100_0" != sweep.name_of_run(2, 48, "cox", 100, 0)
    assert sweep.name_of_run(9, 107, "cox", 100, 0) == "9_cox_100_0"


def test_seconds_of_a_training_that_was_stopped_are_not_those_of_its_end(tmp_path, monkeypatch):
    runner, folder = sweep.Runner(tmp_path, 8, 1), tmp_path / "phantoms"
    folder.mkdir()
    pd.DataFrame({"time": [10.0, 20.0], "event": [1, 0]}).to_csv(folder / "cohort.csv", index=False)
    clock = iter(range(0, 1000, 60))

    def python(self, *args, log):
        (log.parent / "cache").mkdir(parents=True, exist_ok=True)
        killed = log.parent.name == "2_default_2_1" and not (log.parent / "last.pt").is_file()
        (log.parent / "last.pt").touch()
        if killed:
            raise RuntimeError("killed")

    monkeypatch.setattr(sweep.Runner, "python", python)
    monkeypatch.setattr(sweep.Runner, "phantoms", lambda *args: folder)
    monkeypatch.setattr(sweep.time, "time", lambda: next(clock))
    with pytest.raises(RuntimeError, match="killed"):
        runner.train(2, 64, "default", 2, 1)
    for _ in range(2):  # trained, and read
        assert runner.train(2, 64, "default", 2, 0)[1]["train_seconds"] == 60
        assert runner.train(2, 64, "default", 2, 1)[1]["train_seconds"] is None
    monkeypatch.setitem(sweep.VARIANTS, "default", {"max_epochs": 3})
    with pytest.raises(RuntimeError, match="2_default_2_0 was trained with other settings"):
        runner.train(2, 64, "default", 2, 0)


def test_the_page_of_objectives_names_the_best_and_those_not_told_apart(tmp_path, page, monkeypatch):
    precision = {"centime": 0.9, "classical": 0.9, "cox": 0.5}
    rows = [
        dict(zip(sweep.KEY, (complexity, 48, "default" if name == "centime" else name, 100, seed, "same")))
        | {"train_seconds": 60, "average_precision": value + 0.1 * seed + (0.02 * seed - 0.01) * (name == "classical")}
        | {"c_index": 1 - value, "mae_events": 1.5}
        for complexity in (1, 2)
        for seed in (0, 1)
        for name, value in precision.items()
    ]
    rows.append({**rows[0], "complexity": 6, "average_precision": 0.0})  # the others were not trained on it
    sweep.write_rows(tmp_path / "results.csv", rows)
    monkeypatch.setattr("sys.argv", command(tmp_path, "--table"))
    objectives.main()
    text = page.read_text()
    assert "Best map (average precision)**: centime 0.950; not told apart from it: classical 0.950; worse: cox 0.550." in text
    assert "Best order of patients (C-index)**: cox 0.500; worse: centime 0.100, classical 0.100." in text
    assert "Best probabilities (integrated Brier)**: not measured yet." in text
    assert "Means over the 4 pairs of phantom and seed" in text
    lines = [line for line in text.splitlines() if line.startswith("| 1, 48³ |")]
    assert [line.split(" | ")[1] for line in lines] == ["centime", "classical", "cox"]
    assert "0.950 (0.900–1.000)" in lines[0] and "| – |" in lines[0]


def test_heat_ratio_compares_heat_per_voxel(tmp_path):
    """Lesions of 64 voxels, 16 of them severe, in scans of 512."""
    lesion, severe = np.zeros((2, 8, 8, 8), np.uint8)
    lesion[:4, :4, :4], severe[:4, :4, :1] = 1, 1
    for name, mask in (("lesion", lesion), ("severe", severe)):
        nib.save(nib.Nifti1Image(mask, np.eye(4)), tmp_path / f"{name}.nii.gz")
    names = ["a", "b", "c", "d"]
    cohort = pd.DataFrame({"patient_id": names, "gt_mask": "lesion.nii.gz", "gt_severe_mask": "severe.nii.gz"})
    # a: three times as hot; b: five times; c has no severe lesion; d, a survivor, no lesion
    scans = pd.DataFrame({"patient_id": names, "mass_accuracy": [0.6, 1.0, 1.0, np.nan], "confounder_mass": [0.3, 5 / 8, np.nan, np.nan]})
    assert sweep.heat_ratio(scans, cohort, tmp_path, "gt_severe_mask", "lesions") == pytest.approx(4)  # the median of 3 and 5
    even = 512 / 16
    assert sweep.heat_ratio(scans, cohort, tmp_path, "gt_severe_mask", "scan") == pytest.approx((0.3 + 5 / 8) / 2 * even)
    assert sweep.heat_ratio(scans[2:], cohort, tmp_path, "gt_severe_mask", "lesions") is None


def test_heat_ratio_of_true_volumes_is_that_of_lifelines(tmp_path):
    generator = np.random.default_rng(0)
    rows = []
    for i in range(60):
        lesions, severe = np.zeros((2, 12, 12, 12), np.uint8)
        lesions[: generator.integers(0, 7), :8, :8], lesions[7 : generator.integers(7, 12), :8, :8] = 1, 1
        severe[7:] = lesions[7:]
        for name, mask in (("gt", lesions), ("severe", severe)):
            nib.save(nib.Nifti1Image(mask, np.eye(4)), tmp_path / f"{i}_{name}.nii.gz")
        risk = 10 * (lesions.mean() + 2 * severe.mean())
        row = {"time": 80 * np.exp(-risk) * generator.weibull(1.5), "event": int(generator.random() < 0.7)}
        rows.append({**row, "gt_mask": f"{i}_gt.nii.gz", "gt_severe_mask": f"{i}_severe.nii.gz", "mild": (lesions - severe).mean(), "severe": severe.mean()})
    cohort = pd.DataFrame(rows)
    cohort.to_csv(tmp_path / "cohort.csv", index=False)
    slopes = CoxPHFitter().fit(cohort[["time", "event", "mild", "severe"]], "time", "event").params_
    assert sweep.heat_ratio_of_true_volumes(tmp_path) == pytest.approx(slopes.severe / slopes.mild, rel=1e-3)


def test_curves_are_drawn_of_what_was_varied(tmp_path):
    def row(complexity, variant, train_scans):
        row = dict(zip(sweep.KEY, (complexity, 48, variant, train_scans, 0, "same")))
        return row | {"average_precision": 0.9, "mass_accuracy": 0.8, "mae_events": 1.0}

    rows = [row(2, "default", 25), row(2, "default", 100), row(2, "events_30", 100), row(2, "one_origin", 100)]
    rows += [row(6, "default", 100), row(6, "radius_4", 100), row(6, "events_90_alpha_5", 100)]
    rows.append(row(2, "default", 12) | {"seed": sweep.RESERVED})
    found = {title: sorted(zip(part.complexity, part.x)) for title, part in plots.cohorts(rows).items()}
    assert list(found.values()) == [[(2, 25), (2, 100)], [(2, 0.3), (2, 0.5)], [(6, 4.5), (6, 15.0)]]
    plots.draw_cohorts(rows, tmp_path / "cohorts.png")
    assert (tmp_path / "cohorts.png").read_bytes().startswith(b"\x89PNG")
    plots.draw_cohorts([], tmp_path / "none.png")


def test_settings_are_drawn_beside_the_shipped_ones(tmp_path):
    row = {"average_precision": 0.9, "mass_accuracy": 0.8, "mae_events": 1.0}
    names = ["default", "no_entropy", "alpha_5", "alpha_10", "global", "patch_8"]
    rows = [row | dict(zip(sweep.KEY, (6, 48, name, 100, 0, "same"))) for name in [*names, "hazard", "events_10"]]
    rows += [row | dict(zip(sweep.KEY, (2, 48, name, 100, 0, "same"))) for name in ("default", "no_texture")]
    ((key, part),) = plots.settings(rows).items()
    assert key == (6, 48) and part.variant.tolist() == names
    plots.draw_settings(rows, tmp_path / "settings.png")
    assert (tmp_path / "settings.png").read_bytes().startswith(b"\x89PNG")
    plots.draw_settings([], tmp_path / "none.png")


def test_true_masks_leave_no_months_where_time_is_linear_in_volume_until_it_ends(tmp_path):
    generator = np.random.default_rng(0)
    for name in ("train", "test"):
        folder, rows = tmp_path / name, []
        folder.mkdir()
        for i in range(30):
            mask = np.zeros((12, 12, 12), np.uint8)
            size = generator.integers(1, 8, 3)
            mask[1 : 1 + size[0], 1 : 1 + size[1], 1 : 1 + size[2]] = 1
            nib.save(nib.Nifti1Image(mask, np.eye(4)), folder / f"{i}.nii.gz")
            rows.append({"gt_mask": f"{i}.nii.gz", "time": np.clip(62 - 600 * mask.mean(), 2, 60), "event": 1})
        assert 1 < sum(row["time"] == 2 for row in rows) < 20
        pd.DataFrame(rows).to_csv(folder / "cohort.csv", index=False)
    assert sweep.mae_of_true_masks(tmp_path / "train", tmp_path / "test") == pytest.approx(0, abs=1e-2)
