# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The sweep runs nothing twice, loses nothing when killed, and its table says what its CSV says."""

from __future__ import annotations

import platform

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from lifelines import CoxPHFitter
from monai.bundle import ConfigParser, update_kwargs

from bundle.run.config import check_config
from scripts.jobs import literal
from scripts.research import plots, sweep, tables, variants

DONE = {"pointing_game": 1.0, "average_precision": 0.5, "mae_events": 1.0}
SHIPPED = ("spheres", 48, "default", 100, 0, "same")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run a sweep in which `row_of(*key)` gives the measures of a run; returns its rows and its page."""

    def run(row_of, *args):
        def row(runner, *key):
            return dict(zip(tables.KEY, key, strict=True)) | row_of(*key)

        monkeypatch.setattr(sweep.Runner, "row", row)
        sweep.main(["--work", str(tmp_path), "--results", str(tmp_path / "results.csv"), *args])
        return pd.read_csv(tmp_path / "results.csv"), (tmp_path / "results.md").read_text()

    return run


def table_of(*rows):
    """Rows that differ from the shipped configuration on the spheres by what is given, all measures 1 unless given."""
    key = dict(zip(tables.KEY, SHIPPED, strict=True))
    measures = dict.fromkeys(set(tables.MEASURES) - {"heat_ratio", "heat_ratio_oracle", "train_seconds"}, 1.0)
    return pd.DataFrame([key | measures | row for row in rows])


def test_a_killed_sweep_goes_on_and_runs_nothing_twice(run, tmp_path):
    ran = []

    def row_of(phantom, size, variant, train_scans, seed, test):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append((phantom, seed))
        row = {"test_scans": 8, "train_seconds": 60 + seed, "pointing_game": 0.9 + seed / 10, "inverted": seed}
        return row | {"average_precision": 0.5, "mae_events": 1.0}

    what = ["--phantoms", "harmless-honeycomb", "2", "--seeds", "0", "1", "--test_scans"]
    with pytest.raises(KeyboardInterrupt):
        run(row_of, *what, "8")
    first, ran[:] = list(ran), []
    (tmp_path / f".tmp-{platform.node()}-4194305-1-results.csv").touch()  # of a process that was killed
    rows, text = run(row_of, *what, "8")
    assert not list(tmp_path.glob(".tmp-*"))
    every = [("spheres", 0), ("spheres", 1), ("harmless-honeycomb", 0), ("harmless-honeycomb", 1)]
    assert sorted(first + ran) == sorted(every)
    ran.clear()
    rows, text = run(row_of, *what, "8")
    assert ran == [] and list(zip(rows.phantom, rows.seed, strict=True)) == every
    line = next(line for line in text.splitlines() if line.startswith("| spheres | default | 0–1 |"))
    assert "0.950 (0.900–1.000)" in line  # pointing: mean over seeds, minimum, maximum
    assert "| 1 (0–1) |" in line  # inverted maps are summed
    assert "| 60 (60–61) |" in line or "| 61 (60–61) |" in line
    with pytest.raises(KeyboardInterrupt):  # other scans to measure on: rows take the place of those
        run(row_of, *what, "16")
    assert len(ran) == 2 and len(rows) == 4


def test_rows_that_another_sweep_wrote_meanwhile_stay(run, tmp_path):
    def row_of(*key):
        other = ("spheres-honeycomb-corner", 64, "default", 100, 0, "same")
        rows = [dict(zip(tables.KEY, k, strict=True)) | {"average_precision": ap} for k, ap in ((other, 0.25), (key, 0.1))]
        tables.write_rows(tmp_path / "results.csv", pd.DataFrame(rows))
        return DONE

    rows, text = run(row_of, "--phantoms", "2", "--seeds", "0")
    assert list(zip(rows.phantom, rows.average_precision, strict=True)) == [
        ("spheres", 0.5),
        ("spheres-honeycomb-corner", 0.25),
    ]
    assert "| spheres-honeycomb-corner | default | 0 | – | 0.250 |" in text


def test_a_run_that_fails_does_not_take_the_others_with_it(run, tmp_path, capsys):
    def row_of(phantom, *key):
        if phantom == "spheres":
            raise RuntimeError("no such luck")
        return DONE

    with pytest.raises(SystemExit, match="1 of 2 runs failed"):
        run(row_of, "--phantoms", "2", "3", "--seeds", "0")
    assert "no such luck" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "results.csv").phantom.tolist() == ["honeycomb"]


def test_another_size_is_another_run_and_rows_without_a_size_stay_valid(run, tmp_path):
    (tmp_path / "results.csv").write_text("complexity,variant,train_scans,seed,test,mae_events\n2,default,100,0,same,1\n")
    trained = []

    def row_of(*key):
        trained.append(key)
        return DONE | {"mae_events": 2.0}

    run(row_of, "--phantoms", "2", "9", "--seeds", "0")
    assert trained == [("chest", 107, "default", 100, 0, "same")]
    for _ in range(2):
        rows, text = run(row_of, "--phantoms", "2", "chest", "--seeds", "0", "--size", "48")
    assert trained[1:] == [SHIPPED]
    found = rows.set_index(["phantom", "size"]).mae_events.to_dict()
    assert found == {("spheres", 48): 2, ("spheres", 64): 1, ("chest", 107): 2}
    assert "| spheres, 48³ | default |" in text and "| spheres | default |" in text


@pytest.mark.parametrize(
    "args, message",
    [
        (["--phantoms", "chess"], "no phantom chess"),
        (["--variants", "softmax"], "no variant softmax"),
        (["--tests", "flop"], "no test flop"),
        (["--size", "8"], "size is 8"),
        (["--jobs", "0"], "--jobs, --test_scans and --train_scans must be at least 1"),
    ],
)
def test_bad_arguments_are_one_sentence(tmp_path, args, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        sweep.main(["--results", str(tmp_path / "results.csv"), *args])
    assert not list(tmp_path.iterdir())


def test_a_group_stands_for_its_variants_and_the_shipped_configuration():
    assert sweep.variants_of(["heads"]) == ["default", "softmin", "attention", "hazard", "mean"]
    assert sweep.variants_of(["cox", "objectives", "cox"])[:3] == ["cox", "default", "classical"]


def test_seconds_on_a_gpu_are_not_averaged_with_those_on_cpus(tmp_path):
    rows = table_of({"train_seconds": 50, "device": "cuda"}, {"seed": 1, "train_seconds": 200})
    tables.write_rows(tmp_path / "results.csv", rows)
    read = tables.read_rows(tmp_path / "results.csv")
    assert read.device.tolist() == ["cuda", "cpu"]
    assert tables.numbers(read).train_seconds.dropna().tolist() == [200]


def test_targets_are_met_or_missed_by_what_the_seeds_reach():
    good = {"size": 64, "inverted": 0, "survivor_heat": 0.02, "average_precision": 0.9, "mass_accuracy": 0.95}
    good |= {"mae_events": 1.5, "correlation": 0.96, "mean_time_censored": 90.0, "confounder_mass": np.nan}
    names = ("spheres", "honeycomb", "counted-spheres")
    rows = [good | {"phantom": name, "seed": seed} for name in names for seed in (0, 1)]
    rows[0] |= {"train_seconds": 400}
    rows[1] |= {"pointing_game": 0.9, "inverted": 2}
    rows[2] |= {"confounder_mass": 0.01, "correlation": np.nan}
    rows[3] |= {"confounder_mass": 0.04}
    rows.append(good | {"phantom": "counted-spheres", "seed": 2, "variant": "no_entropy", "average_precision": 0.1})
    text = tables.targets(tables.numbers(table_of(*rows)))
    assert text.startswith("Phantoms (seeds): spheres (2); honeycomb (2); counted-spheres (2).\n")
    cells = [line.split(" | ") for line in text.splitlines()[4:]]
    found = {line[0].strip("| "): (line[2], line[3].strip("| ")) for line in cells}
    assert found["pointing game, mean"] == ("2 of 3", "spheres (0.95)")
    assert found["pointing game, worst seed"] == ("2 of 3", "spheres (0.9)")
    assert found["average precision"] == (
        "1 of 3",
        "spheres (0.9); counted-spheres (0.9)",
    )  # honeycomb has a bound of its own
    assert found["heat in confounder"] == ("0 of 1", "honeycomb (0.025)")
    assert found["survivors / dead"] == ("3 of 3", "–")
    assert found["inverted maps, all seeds"] == ("2 of 3", "spheres (2)")
    assert found["MAE events, months"] == ("1 of 3", "spheres (1.5); honeycomb (1.5)")
    assert found["correlation"] == ("2 of 3", "honeycomb (nan)")  # a run without a measure doesn't meet it
    assert found["training, s"] == ("0 of 1", "spheres (400)")  # of those whose time on CPUs is known


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_a_variant_changes_what_it_names_in_the_shipped_configuration(variant):
    """Of a None `monai.bundle run` would say nothing, and the default be measured once more."""
    options = {k: v for k, v in variants.VARIANTS[variant].items() if k not in ("phantoms", "shuffle")}
    files = ["configs/train.json", "configs/cohort/phantom.json", *options.pop("config", [])]
    parser = ConfigParser()
    parser.read_config(files)
    for key, value in options.items():
        given = update_kwargs({}, **{key: literal(str(value))})
        assert given and list(given.values())[0] != parser.get(key, None)
        if key not in ("train#dataloader#shuffle", "train#random_transforms#0#prob"):  # arguments that have their defaults
            assert key in parser
    parser.update({key: literal(str(value)) for key, value in options.items()})
    check_config(parser, files[0])


@pytest.mark.parametrize("test", variants.TESTS)
def test_what_is_measured_on_is_an_option_of_the_evaluation(test):
    parser = ConfigParser()
    parser.read_config("configs/evaluate.json")
    options = variants.TESTS[test].get("options", {})
    assert all(key in parser for key in options)
    parser.update(options)
    check_config(parser, "configs/evaluate.json")


def test_reserved_seeds_are_told_from_those_of_development():
    text = tables.page(table_of({}, {"seed": 1}, {"seed": tables.RESERVED, "average_precision": 0.5}))
    reserved, development = text.split("## Seeds of development")
    assert "## Reserved seeds\n\nPhantoms (seeds): spheres, 48³ (1)." in reserved and "spheres, 48³ (0.5)" in reserved
    assert development.startswith("\n\nPhantoms (seeds): spheres, 48³ (2).") and "spheres, 48³ (0.5)" not in development
    assert "| spheres, 48³ | default | 0–1 |" in development
    assert f"| spheres, 48³ | default | {tables.RESERVED} |" in development


def test_every_row_is_in_one_section_and_the_shipped_configuration_beside_what_differs():
    six, ten = {"phantom": "spheres-honeycomb-corner"}, {"phantom": "harmless-honeycomb"}
    rows = [{}, {"seed": 1}, {"seed": 3}, {"seed": tables.RESERVED}, six, {"variant": "softmin"}, {"variant": "no_entropy"}]
    rows += [{"variant": "cox"}, {"variant": "radius_4"}, {"train_scans": 25}, {"test": "flip"}]
    rows += [ten | {"train_scans": 50}, ten | {"train_scans": 200}]
    found, title = {}, ""
    for line in tables.page(table_of(*rows)).splitlines():
        if line.startswith("## "):
            title = line[3:]
            found[title] = []
        elif line.startswith("| ") and not line.startswith("| phantom") and title in tables.SECTIONS:
            found[title].append([cell.strip() for cell in line.split("|")[1:5]])
    usual = ["spheres, 48³", "default"]
    shipped = [[*usual, "0–1, 3"], [*usual, "1010"], ["spheres-honeycomb-corner, 48³", "default", "0"]]
    assert [cells[:3] for cells in found["As shipped"]] == shipped
    for name, variant in (("Heads", "softmin"), ("Objectives", "cox"), ("Single settings", "no_entropy")):
        assert [cells[:3] for cells in found[name]] == [[*usual, "0–1, 3"], ["spheres, 48³", variant, "0"]]
    other = [[*usual, "25", "0"], [*usual, "100", "0–1, 3"], ["spheres, 48³", "radius_4", "100", "0"]]
    assert found["Other cohorts"] == other
    assert found["Other phantoms than trained on"] == [[*usual, "flip", "0"], [*usual, "same", "0–1, 3"]]
    drawn = [["harmless-honeycomb, 48³", "default", scans, "0"] for scans in ("50", "200")]
    assert found["Drawn outcomes"] == drawn


def test_the_best_objective_is_named_with_those_not_told_apart():
    rows = [
        {"phantom": phantom, "seed": seed, "variant": variant, "train_seconds": 60, "c_index": 1 - value}
        | {"average_precision": value + 0.1 * seed + (0.02 * seed - 0.01) * (variant == "classical")}
        | {"mae_events": 1.5, "integrated_brier": np.nan}
        for phantom in ("central-sphere", "spheres")
        for seed in (0, 1)
        for variant, value in {"default": 0.9, "classical": 0.9, "cox": 0.5}.items()
    ]
    rows.append({**rows[0], "phantom": "texture", "average_precision": 0.0})  # the others were not trained on it
    text = tables.page(table_of(*rows)).partition("## Objectives")[2].partition("## ")[0]
    assert (
        "Best map (average precision)**: centime 0.950; not significantly different: classical 0.950; worse: cox 0.550."
        in text
    )
    assert "Best order of patients (C-index)**: cox 0.500; worse: centime 0.100, classical 0.100." in text
    assert "Best probabilities (integrated Brier)**: not measured yet." in text
    assert "Means over the 4 pairs of phantom and seed" in text
    lines = [line for line in text.splitlines() if line.startswith("| central-sphere, 48³ |")]
    assert [line.split(" | ")[1] for line in lines] == ["default", "classical", "cox"]
    assert "0.950 (0.900–1.000)" in lines[0] and "integrated Brier |" not in text


def test_training_and_test_phantoms_have_the_size_of_the_run(tmp_path, monkeypatch):
    runner, made = sweep.Runner(tmp_path, 8, 1), []

    def python(self, *args, log, lock=None):
        if args[0] == "scripts.make_phantoms":
            made.append(args[args.index("--size") + 1] if "--size" in args else "64")

    monkeypatch.setattr(sweep.Runner, "python", python)
    usual, small = (runner.phantoms("spheres", size, 8, 0, {}) for size in (64, 48))
    assert made == ["64", "48"] and usual != small
    assert runner.phantoms("spheres", 64, 8, 0, {"size": 48}) == small  # another size to measure on
    usual, small = (sweep.name_of_run("spheres", size, "cox", 100, 0) for size in (64, 48))
    assert usual == "spheres_cox_100_0" != small and sweep.name_of_run("chest", 107, "cox", 100, 0) == "chest_cox_100_0"


def test_seconds_of_a_training_that_was_stopped_are_not_those_of_its_end(tmp_path, monkeypatch):
    runner, folder = sweep.Runner(tmp_path, 8, 1), tmp_path / "phantoms"
    folder.mkdir()
    pd.DataFrame({"time": [10.0, 20.0], "event": [1, 0]}).to_csv(folder / "cohort.csv", index=False)
    clock = iter(range(0, 1000, 60))

    def python(self, *args, log, lock=None):
        (log.parent / "cache").mkdir(parents=True, exist_ok=True)
        killed = log.parent.name == "spheres_default_2_1" and not (log.parent / "last.pt").is_file()
        (log.parent / "last.pt").touch()
        if killed:
            raise RuntimeError("killed")

    monkeypatch.setattr(sweep.Runner, "python", python)
    monkeypatch.setattr(sweep.Runner, "phantoms", lambda *args: folder)
    monkeypatch.setattr(sweep.time, "time", lambda: next(clock))
    with pytest.raises(RuntimeError, match="killed"):
        runner.train("spheres", 64, "default", 2, 1)
    for _ in range(2):  # trained, and read
        assert runner.train("spheres", 64, "default", 2, 0)[1]["train_seconds"] == 60
        assert runner.train("spheres", 64, "default", 2, 1)[1]["train_seconds"] is None
    monkeypatch.setitem(variants.VARIANTS, "default", {"max_epochs": 3})
    with pytest.raises(RuntimeError, match="spheres_default_2_0 was trained with other settings"):
        runner.train("spheres", 64, "default", 2, 0)


def test_heat_ratio_compares_heat_per_voxel(tmp_path):
    """Lesions of 64 voxels, 16 of them severe, in scans of 512."""
    lesion, severe = np.zeros((2, 8, 8, 8), np.uint8)
    lesion[:4, :4, :4], severe[:4, :4, :1] = 1, 1
    for name, mask in (("lesion", lesion), ("severe", severe)):
        nib.save(nib.Nifti1Image(mask, np.eye(4)), tmp_path / f"{name}.nii.gz")
    names = ["a", "b", "c", "d"]
    cohort = pd.DataFrame({"patient_id": names, "gt_mask": "lesion.nii.gz", "gt_severe_mask": "severe.nii.gz"})
    # a: three times as hot; b: five times; c has no severe lesion; d, a survivor, no lesion
    scans = pd.DataFrame(
        {"patient_id": names, "mass_accuracy": [0.6, 1.0, 1.0, np.nan], "confounder_mass": [0.3, 5 / 8, np.nan, np.nan]}
    )
    assert sweep.heat_ratio(scans, cohort, tmp_path, "gt_severe_mask", "lesions") == pytest.approx(
        4
    )  # the median of 3 and 5
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
        rows.append(
            {
                **row,
                "gt_mask": f"{i}_gt.nii.gz",
                "gt_severe_mask": f"{i}_severe.nii.gz",
                "mild": (lesions - severe).mean(),
                "severe": severe.mean(),
            }
        )
    cohort = pd.DataFrame(rows)
    cohort.to_csv(tmp_path / "cohort.csv", index=False)
    slopes = CoxPHFitter().fit(cohort[["time", "event", "mild", "severe"]], "time", "event").params_
    assert sweep.heat_ratio_of_true_volumes(tmp_path) == pytest.approx(slopes.severe / slopes.mild, rel=1e-3)


def test_curves_are_drawn_of_what_was_varied(tmp_path):
    six = {"phantom": "spheres-honeycomb-corner"}
    rows = [{"train_scans": 25}, {}, {"variant": "events_30"}, {"variant": "one_origin"}, six]
    rows += [
        six | {"variant": "radius_4"},
        six | {"variant": "events_90_alpha_5"},
        {"train_scans": 12, "seed": tables.RESERVED},
    ]
    table = table_of(*rows)
    found = [sorted(zip(part.phantom, part.x, strict=True)) for part in plots.cohorts(table).values()]
    radii = [(six["phantom"], 4.5), (six["phantom"], 15.0)]
    assert found == [[("spheres", 25), ("spheres", 100)], [("spheres", 0.3), ("spheres", 0.5)], radii]
    plots.draw_cohorts(table, tmp_path / "cohorts.png")
    assert (tmp_path / "cohorts.png").read_bytes().startswith(b"\x89PNG")
    plots.draw_cohorts(table[:0], tmp_path / "none.png")


def test_settings_are_drawn_beside_the_shipped_ones(tmp_path):
    names = ["default", "no_entropy", "alpha_5", "alpha_10", "global", "patch_8"]
    rows = [{"phantom": "spheres-honeycomb-corner", "variant": name} for name in [*names, "hazard", "events_10"]]
    table = table_of(*rows, {}, {"variant": "no_texture"})
    ((key, part),) = plots.settings(table).items()
    assert key == ("spheres-honeycomb-corner", 48) and part.variant.tolist() == names
    plots.draw_settings(table, tmp_path / "settings.png")
    assert (tmp_path / "settings.png").read_bytes().startswith(b"\x89PNG")
    plots.draw_settings(table[:0], tmp_path / "none.png")
