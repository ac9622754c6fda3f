# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Cross-validation: folds, resuming, the paired test, ensembles, and what is refused before anything runs."""

from __future__ import annotations

import fcntl
import json
import platform
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.data import MetaTensor

from bundle.data import cross_validation_parts, encode_clinical, patient_of, read_cohort, stratified_folds
from bundle.errors import InputError
from bundle.files import file_sha256
from bundle.maps import EnsembleToHeatd, MapToHeatd
from bundle.metrics.bootstrap import draw_patients, paired_difference
from bundle.networks import SurvivalMapNet
from bundle.run import Ensemble, read_settings, run_parallel
from bundle.run.trained import joint_settings, member_files
from bundle.survival import CenTime, Cox
from scripts import cross_validate, jobs

from .commands import run
from .conftest import absolute_table

SMALL = "--recipe codebook --network_def#dim 8 --codebook_def#books 6 --max_epochs 1 --shifts 1 --refine false"


MODELS = {"centime": "centime", "clinical_only": "clinical_only_centime"}  # and their folders


def people(num: int, seed: int = 0, scans: int = 1) -> list[dict]:
    """Records of patients, of whom each third has several scans."""
    rng = np.random.default_rng(seed)
    records = []
    for i in range(num):
        time, event = rng.uniform(1, 90), int(rng.random() < 0.5)
        for k in range(scans if i % 3 == 0 else 1):
            name = f"p{i:03}" + (f"_{k + 1}" if k else "")
            records.append({"patient_id": name, "patient": f"p{i:03}", "time": time - 0.1 * k, "event": event})
    return records


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_folds_are_alike_and_no_patient_is_in_two(seed):
    records = people(100, seed, scans=3)
    folds = np.array(stratified_folds(records, 5, seed))
    owner = np.array([patient_of(r) for r in records])
    assert all(len(set(folds[owner == name])) == 1 for name in set(owner))
    size = np.bincount(folds)
    events = np.array([r["event"] for r in records])
    late = np.array([r["time"] > np.median([r["time"] for r in records]) for r in records])
    assert size.max() - size.min() <= 6
    for what in (events, late):
        share = np.bincount(folds, what) / size
        assert np.abs(share - what.mean()).max() < 0.12
    order = np.random.default_rng(seed).permutation(len(records))
    again = stratified_folds([records[i] for i in order], 5, seed)
    assert again == folds[order].tolist()
    assert stratified_folds(records, 5, seed + 1) != folds.tolist()


def test_single_scans_fill_strata_to_within_one_scan():
    """Without groups each stratum is spread evenly: as many deaths of each quarter of times in each fold."""
    records = [{"patient_id": f"p{i:03}", "time": float(i + 1), "event": i % 2} for i in range(80)]
    folds = np.array(stratified_folds(records, 5))
    for event in (0, 1):
        rows = [i for i in range(80) if i % 2 == event]
        for quarter in np.array_split(rows, 4):
            assert np.bincount(folds[quarter], minlength=5).tolist() == [2] * 5


def test_parts_hold_every_scan_out_once_and_choose_weights_on_others():
    records = people(40, 3, scans=2)
    parts = cross_validation_parts(records, 4)
    held = [r["patient_id"] for p in parts.values() for r in p["test"]]
    assert sorted(held) == sorted(r["patient_id"] for r in records)
    for p in parts.values():
        owners = [{patient_of(r) for r in p[split]} for split in ("train", "val", "test")]
        assert sum(map(len, owners)) == len(set.union(*owners)) == 40
        assert all(any(r["event"] for r in part) for part in p.values())
        assert len(p["val"]) < len(p["train"]) / 4


def test_the_column_fold_is_obeyed_unless_folds_are_drawn():
    records = [{**r, "fold": i % 3 + 7} for i, r in enumerate(people(30))]
    parts = cross_validation_parts(records)
    assert list(parts) == [7, 8, 9] and parts[8]["test"] == [r for r in records if r["fold"] == 8]
    assert list(cross_validation_parts(records, 4)) == [0, 1, 2, 3]
    assert len(cross_validation_parts(people(30))) == 5


def test_too_few_patients_or_deaths_for_the_folds():
    alive = [{"patient_id": f"a{i}", "time": 9.0, "event": 0} for i in range(9)]
    dead = [{"patient_id": f"d{i}", "time": 5.0, "event": 1} for i in range(4)]
    one = [{"patient_id": f"d{i}", "patient": "d", "time": 5.0, "event": 1} for i in range(9)]
    by_event = [{**r, "fold": int(r["event"])} for r in alive + dead]
    uneven = [{**r, "fold": int(i == 0 or i > 9)} for i, r in enumerate(alive + dead)]
    for records, folds, says in (
        (alive + dead, 5, "13 patients, 4 of whom died: too few for 5 folds"),
        (alive + one, 2, "10 patients, 1 of whom died: too few for 2 folds"),
        (alive + dead, 1, "expected at least 2"),
        (by_event, None, "fold 0 has no event"),
        (uneven, None, "without fold 1, 1 of the patients left died"),
        ([{**r, "fold": 3} for r in dead], None, "at least two folds"),
    ):
        with pytest.raises(InputError, match=says):
            cross_validation_parts(records, folds)


# Several scans of one patient


def test_scans_of_a_patient_have_names_of_their_own(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.nii.gz").touch()
    path = tmp_path / "c.csv"

    def read(*rows, header="patient_id,image,time,event", **options):
        path.write_text("\n".join([header, *rows]) + "\n")
        return read_cohort(path, **options)

    records = read("A,a.nii.gz,5,1", "B,b.nii.gz,6,0", "A,c.nii.gz,4,1", "A,d.nii.gz,3,1")
    assert [r["patient_id"] for r in records] == ["A", "B", "A_2", "A_3"]
    assert [patient_of(r) for r in records] == ["A", "B", "A", "A"] and "patient" not in records[1]
    for rows, header, says in (
        (("A,a.nii.gz,5,1", "A,a.nii.gz,5,1"), "", "row 3, column patient_id: 'A' is in row 2 too, with the same image"),
        (("A,a.nii.gz,5,1", "A,b.nii.gz,5,1", "A_2,c.nii.gz,5,1"), "", "is to be named 'A_2', which is another patient"),
        (("A,a.nii.gz,5,1,train", "A,b.nii.gz,5,1,val"), ",split", "row 3, column split: val, but train for the same"),
        (("A,a.nii.gz,5,1,0", "A,b.nii.gz,5,1,1"), ",fold", "row 3, column fold: 1, but 0 for the same patient in row 2"),
    ):
        with pytest.raises(InputError, match=says):
            read(*rows, header="patient_id,image,time,event" + header)


# The paired test


def test_resamples_draw_whole_patients_within_folds():
    folds = [["a", "b", "a"], ["c"], ["d", "e"]]
    for draw in draw_patients(folds, 50):
        assert (draw[0] == 0).sum() == (draw[0] == 2).sum()  # both scans of a, or none
        assert len(set(draw[0].tolist()) & {0, 2}) in (0, 2) and len(draw[1]) == 1 and len(draw[2]) == 2


def test_the_bootstrap_of_a_mean_has_its_closed_form_spread():
    rng = np.random.default_rng(1)
    values = rng.normal(0.5, 2, 60)
    fold = [f"p{i}" for i in range(60)]
    means = np.array([values[draw[0]].mean() for draw in draw_patients([fold], 4000)])
    assert np.isclose(means.std(), values.std() / np.sqrt(60), rtol=0.05)
    found = paired_difference(np.zeros(4000), means)
    half = 1.96 * values.std() / np.sqrt(60)
    assert np.allclose([found["lower"], found["upper"]], [values.mean() - half, values.mean() + half], atol=0.1 * half)
    z = abs(values.mean()) / (values.std() / np.sqrt(60))
    assert np.isclose(found["p"], 2 * torch.distributions.Normal(0, 1).cdf(torch.tensor(-z)).item(), atol=0.02)


def test_the_p_value_at_its_ends():
    same = np.random.default_rng(0).normal(size=99)
    assert paired_difference(same, same)["p"] == 1
    assert paired_difference(same, same + 1)["p"] == 2 / 100
    assert paired_difference(same, same - 1)["p"] == 2 / 100
    gaps = np.where(np.arange(99) < 60, np.nan, same)
    assert paired_difference(gaps, same + 1) == {"lower": None, "upper": None, "p": None}


# Ensembles


def write_member(folder, clinical=None, objective=None, **settings):
    """Random weights with their settings."""
    folder.mkdir(parents=True)
    dim = 0 if clinical is None else 1
    network = SurvivalMapNet(dim=8, depth=1, clinical_dim=dim)
    torch.nn.init.normal_(network.head.to_location[-1].weight, std=1.0)
    if dim:
        torch.nn.init.normal_(network.clinical_months.weight, std=3.0)
    torch.save(network.state_dict(), folder / "model.pt")
    objective = objective or CenTime()
    preprocessing = {"spacing": [3.0] * 3, "hu_window": [-1000.0, 200.0], "lung_mask": "none", "margin": 0.0}
    preprocessing["lungmask_sha256"] = []
    content = {
        "format": 1,
        "network": network.arguments,
        "objective": {"name": objective.name, **objective.arguments},
        "preprocessing": preprocessing,
        "horizon": 60,
        "clinical": clinical or {},
        "trained_on": [],
        "weights_sha256": file_sha256(folder / "model.pt"),
    }
    (folder / "settings.json").write_text(json.dumps(content | settings))
    return str(folder / "model.pt")


def encoding(mean: float, std: float) -> dict:
    """Of one column, age, without gaps in training."""
    fitted = {"age": {"mean": mean, "std": std}}
    return {"columns": fitted, "imputation": {"mean": [0.0], "covariance": [[1.0]]}, "missing_mask": []}


INFER, EVALUATE = ([f"configs/{job}.json", "configs/ensemble.json"] for job in ("inference", "evaluate"))


def test_an_ensemble_is_the_mean_of_its_members_distributions_and_heat(tiny_cohort, tmp_path):
    """Members of several objectives and covariates, each fitted on its own scans, against each of them alone."""
    table = pd.read_csv(tiny_cohort)[["patient_id", "image", "time", "event", "gt_mask", "age"]][:2]
    for column in ("image", "gt_mask"):
        table[column] = [str(tiny_cohort.parent / name) for name in table[column]]
    table.to_csv(tmp_path / "c.csv", index=False)
    cox = Cox()
    cox.fit_baseline(torch.linspace(20, 90, 8), torch.tensor([[10.0 * (i + 1), i % 2] for i in range(8)]))
    files = [
        write_member(tmp_path / "cv" / "fold_0", encoding(50, 2)),
        write_member(tmp_path / "cv" / "fold_1"),
        write_member(tmp_path / "cv" / "fold_10", encoding(60, 10), cox),
    ]
    options = dict(cohort=str(tmp_path / "c.csv"), shifts=1)
    curves, heats = [], []
    for i, file in enumerate(files):
        run("configs/inference.json", ckpt=file, output_dir=str(tmp_path / str(i)), **options)
        curves.append(pd.read_csv(tmp_path / str(i) / "survival_curves.csv").set_index("patient_id"))
        heats.append([nib.load(tmp_path / str(i) / "maps" / f"p{k}_heat.nii.gz").get_fdata() for k in range(2)])
    assert np.abs(curves[0] - curves[1]).to_numpy().max() > 0.01
    run(INFER, ckpt=str(tmp_path / "cv"), output_dir=str(tmp_path / "all"), **options)
    joint = pd.read_csv(tmp_path / "all" / "survival_curves.csv").set_index("patient_id")
    np.testing.assert_allclose(joint, sum(curves) / 3, atol=1e-4)
    predictions = pd.read_csv(tmp_path / "all" / "predictions.csv")
    for k in range(2):
        heat = nib.load(tmp_path / "all" / "maps" / f"p{k}_heat.nii.gz").get_fdata()
        np.testing.assert_allclose(heat, sum(h[k] for h in heats) / 3, rtol=1e-4, atol=1e-9)
        assert np.isclose(heat.sum(), predictions.death_60m[k], atol=1e-4)
    with pytest.raises(InputError, match="--engine ray predicts by one model"):
        run_parallel("ray", None, [torch.nn.Identity()], None, None, None, 1)
    with pytest.raises(InputError, match="--engine processes predicts by one model"):
        run(INFER, ckpt=files, output_dir=str(tmp_path / "parallel"), engine="processes", **options)
    run(EVALUATE, ckpt=files, output_dir=str(tmp_path / "measured"), **options)
    measured = pd.read_csv(tmp_path / "measured" / "metrics_per_scan.csv")
    np.testing.assert_allclose(measured.median_months, predictions.median_months, rtol=1e-4)
    assert 0 < measured.average_precision[0] < 1
    # One member is that member, to the last digit.
    run(INFER, ckpt=[files[1]], output_dir=str(tmp_path / "one"), **options)
    for name in ("predictions.csv", "survival_curves.csv", "maps/p0_heat.nii.gz"):
        one, alone = tmp_path / "one" / name, tmp_path / "1" / name
        if name.endswith("csv"):
            assert one.read_text() == alone.read_text()
        else:
            assert (nib.load(one).get_fdata() == nib.load(alone).get_fdata()).all()


def test_the_mean_distribution_in_closed_form():
    """Two survival maps of known location: half of each one's discretised normal, and heat by each one's own risk."""
    maps = torch.zeros(2, 2, 2, 1, 1)
    maps[0, 0], maps[1, 0] = 20.0, 70.0
    maps[0, 1] = torch.tensor([1.0, 0.0])[:, None, None]
    maps[1, 1] = torch.tensor([0.25, 0.75])[:, None, None]
    scan = {"image": MetaTensor(torch.zeros(1, 4, 2, 2), affine=torch.eye(4)), "lung": torch.ones(1, 4, 2, 2)}
    scan |= {"pred_0": maps[0], "pred_1": maps[1]}
    out = EnsembleToHeatd([CenTime(), CenTime()], 60, 2)(scan)
    t = np.arange(1, 101)
    pmfs = [np.exp(-((t - m) ** 2) / 72) / np.exp(-((t - m) ** 2) / 72).sum() for m in (20, 70)]
    np.testing.assert_allclose(out["pmf"], sum(pmfs) / 2, atol=1e-6)
    risk = [p[:60].sum() for p in pmfs]
    halves = out["heat"][0].sum((1, 2)).view(2, 2).sum(1)
    np.testing.assert_allclose(halves, [(risk[0] + 0.25 * risk[1]) / 2, 0.75 * risk[1] / 2], rtol=1e-5)
    assert MapToHeatd(CenTime(), 60, 2, map_key="pred_0")(scan)["heat"].sum() > out["heat"].sum()


def test_members_that_contradict_each_other_are_one_error(tmp_path):
    first = write_member(tmp_path / "a")
    others = {
        "spacing": dict(preprocessing={**read_settings(first)["preprocessing"], "spacing": [1.0] * 3}),
        "tmax: 100 -> 120": dict(objective=CenTime(tmax=120)),
        "horizon: 60 -> 36": dict(horizon=36),
        "stride: 4 -> 8": dict(network=SurvivalMapNet(dim=8, patch_size=8).arguments),
    }
    for i, (says, settings) in enumerate(others.items()):
        other = write_member(tmp_path / f"b{i}", **settings)
        with pytest.raises(InputError, match=f"a/model.pt and .*b{i}/model.pt can't be one ensemble: .*{says}"):
            joint_settings([first, other], [read_settings(file) for file in (first, other)])
    text = write_member(tmp_path / "text", {**encoding(0, 1), "columns": {"age": {"categories": ["old", "young"]}}})
    number = write_member(tmp_path / "number", encoding(50, 2))
    with pytest.raises(InputError, match="age is numeric for one member of the ensemble, categorical for another"):
        joint_settings([number, text], [read_settings(file) for file in (number, text)])
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="no model.pt"):
        member_files(str(tmp_path / "none"))
    with pytest.raises(InputError, match="stack configs/ensemble.json"):
        read_settings(tmp_path)


def test_members_take_their_own_part_of_the_clinical_vector(tmp_path):
    encodings = (encoding(50, 2), None, encoding(60, 10))
    files = [write_member(tmp_path / str(i), each) for i, each in enumerate(encodings)]
    ensemble = Ensemble(files)
    (record,) = encode_clinical([{"covariates": {"age": 70.0}}], ensemble.settings["clinical"])
    assert record["clinical"] == [10.0, 1.0]
    image = torch.rand(1, 1, 8, 8, 8)
    vector = torch.tensor([record["clinical"]])
    for network, own in zip(ensemble.networks, (vector[:, :1], None, vector[:, 1:]), strict=True):
        with torch.no_grad():
            assert torch.equal(network(image, clinical=vector), network.network(image, clinical=own))
    (gap,) = encode_clinical([{}], ensemble.settings["clinical"])
    assert gap["clinical"] == [0.0, 0.0] and "age" in gap["imputed"]


# The whole


def with_second_scans(tiny_cohort, folder):
    """The tiny cohort, of whose patients two have two scans."""
    table = absolute_table(tiny_cohort)
    table.loc[5, "patient_id"], table.loc[8, "patient_id"] = "p3", "p2"
    table.to_csv(folder / "cohort.csv", index=False)
    return folder / "cohort.csv"


@pytest.fixture
def cohort(tiny_cohort, tmp_path):
    return with_second_scans(tiny_cohort, tmp_path)


def command(cohort, out, *args):
    fixed = ["--cohort", str(cohort), "--out", str(out), "--config", "configs/cohort/phantom.json", "--resamples", "20"]
    return [*fixed, *args, "--", *SMALL.split()]


@pytest.fixture(scope="module")
def finished(tiny_cohort, tmp_path_factory, root):
    """A cross-validation that was killed and went on: its cohort, folder, arguments, and the options of all that ran.

    Its runs are in this process, which is quicker.
    """
    folder, ran = tmp_path_factory.mktemp("cross_validation"), []
    cohort, out = with_second_scans(tiny_cohort, folder), folder / "cv"
    args = command(cohort, out, "--folds", "2", "--clinical", "{'age': 'numeric'}", "--baselines", "clinical_only")

    def run_module(*words, log, threads, lock=None):
        assert words[:2] == ("monai.bundle", "run")
        if len(ran) == 3 and not killed:  # the first fold is done, and one of the second's two steps
            killed.append(True)
            raise KeyboardInterrupt
        options = {key[2:]: cross_validate.literal(value) for key, value in zip(words[2::2], words[3::2], strict=True)}
        ran.append(options)
        run(options.pop("config_file"), **options)

    killed: list[bool] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(cross_validate, "run_module", run_module)
        with pytest.raises(KeyboardInterrupt):
            cross_validate.main(args)
        assert not (out / "cross_validation.md").exists()
        cross_validate.main(args)
        yield cohort, out, args, ran


@pytest.mark.slow
def test_a_killed_cross_validation_goes_on_and_done_is_done(finished, tmp_path):
    cohort, out, args, ran = finished
    trained = [options["ckpt_dir"] for options in ran if "ckpt_dir" in options]
    measured = [options["output_dir"] for options in ran if "ckpt" in options]
    assert len(measured) == len(set(measured)) == 4 and len(trained) == 5 and len(set(trained)) == 4
    assert not (out / "cache").exists() and not list(out.rglob(".tmp-*"))
    # Every scan was measured once by a model that had seen no scan of its patient.
    scans = pd.read_csv(out / "out_of_fold.csv")
    names = [f"p{i}" for i in range(16) if i not in (5, 8)] + ["p2_2", "p3_2"]
    for _, group in scans.groupby("model"):
        assert sorted(group.patient_id) == sorted(names)
        for name in ("p2", "p3"):
            assert group[group.patient_id.isin([name, f"{name}_2"])].fold.nunique() == 1
    settings = [json.loads((out / name / "fold_0" / "settings.json").read_text()) for name in MODELS.values()]
    assert [found["network"]["name"] for found in settings] == ["CodebookNet", "ClinicalNet"]  # it sees no image
    assert settings[0]["network"]["books"] == 6 and settings[0]["training"]["network_def#dim"] == 8
    count = len(ran)
    cross_validate.main(args)
    assert len(ran) == count
    with pytest.raises(SystemExit, match="holds another cross-validation: .*seed: 0 -> 1"):
        cross_validate.main([*args[:2], "--seed", "1", *args[2:]])
    # Its folds are an ensemble, which has nobody left to be evaluated on in its own cohort.
    with pytest.raises(InputError, match="ids of all 16 scans"):
        run(EVALUATE, cohort=str(cohort), ckpt=str(out / "centime"), output_dir=str(tmp_path / "own"))


def test_the_table_is_the_mean_and_spread_of_what_evaluation_wrote(finished):
    cohort, out, _, _ = finished
    table = pd.read_csv(out / "cross_validation.csv").set_index(["model", "metric"])
    for model in MODELS:
        files = [out / MODELS[model] / f"fold_{k}" / "test" / "metrics.json" for k in (0, 1)]
        for metric in ("c_index", "mae_events", "integrated_brier"):
            values = [json.loads(file.read_text())["survival"][metric]["value"] for file in files]
            assert np.isclose(table.loc[(model, metric), "mean"], np.mean(values), rtol=1e-5)
            assert np.isclose(table.loc[(model, metric), "std"], np.std(values, ddof=1), rtol=1e-4, atol=1e-6)
    page = (out / "cross_validation.md").read_text()
    assert "16 scans of 14 patients, 8 of them with a death" in page and "Difference from centime" in page
    assert f"| clinical_only | {table.loc[('clinical_only', 'c_index'), 'mean']:.3f} ±" in page
    # So is what resamples are scored by, on all scans as they are.
    options = jobs.options_of(SMALL.split()) | {"clinical": "{'age': 'numeric'}"}
    configs = ["configs/cohort/phantom.json"]
    cv = cross_validate.CrossValidation(out, str(cohort), ["centime"], folds=2, configs=configs, options=options)
    scores = cv.scores(cv.models[0])
    every = [np.arange(len(patients)) for patients in scores.patients]
    for metric in ("c_index", "c_index_ipcw", "integrated_brier", "mae_events", "mae_censored", "average_precision"):
        found = scores.resampled(metric, [every])[0]
        np.testing.assert_allclose(found, table.loc[("centime", metric), "mean"], rtol=1e-4)


def test_scans_left_out_and_what_else_a_table_says_are_part_of_a_cross_validation(cohort, tmp_path):
    table = pd.read_csv(cohort)
    table["image"] = [str(Path(cohort).parent / name) for name in table["image"]]
    table = table[["patient_id", "image", "time", "event", "age"]]
    patient = table.patient_id[0]
    table = pd.concat([table.iloc[:1].assign(image="gone.nii.gz"), table], ignore_index=True)
    table.to_csv(tmp_path / "c.csv", index=False)
    options = {"on_fault": "skip", "clinical": "{'age': 'numeric'}"}

    def cross_validation() -> cross_validate.CrossValidation:
        return cross_validate.CrossValidation(
            tmp_path / "cv", str(tmp_path / "c.csv"), ["centime"], folds=2, options=options
        )

    cv = cross_validation()
    for fold in cv.parts:
        names = {name for name, owner in cv.owners(fold).items() if owner == patient}
        assert names == {patient}  # not the second of two scans: the first isn't there
    folder = cv.folder(cv.models[0], 0)
    folder.mkdir(parents=True)
    (folder / "model.pt").write_text("weights")
    (folder / "done.json").write_text(json.dumps(cv.made(cv.models[0], 0)))
    assert cross_validation().done(cv.models[0], 0)
    (folder / "model.pt").write_text("others")
    assert not cross_validation().done(cv.models[0], 0)
    table.assign(age=table.age + 1).to_csv(tmp_path / "c.csv", index=False)
    with pytest.raises(InputError, match="holds another cross-validation: cohort"):
        cross_validation()


def test_a_failed_fold_does_not_end_the_others(cohort, tmp_path, monkeypatch, capsys):
    measured = []

    def run_module(*args, log, threads, lock=None):
        if "cox" in str(log) and "fold_0" in str(log):
            raise RuntimeError("the disk is full")
        measured.append(args)
        (log.parent / "model.pt").touch()

    monkeypatch.setattr(cross_validate, "run_module", run_module)
    monkeypatch.setattr(cross_validate, "report", lambda *args: None)
    with pytest.raises(SystemExit, match="1 of 4 runs failed"):
        cross_validate.main(command(cohort, tmp_path / "cv", "--folds", "2", "--objectives", "cox,centime"))
    assert len(measured) == 6 and "the disk is full" in capsys.readouterr().err
    assert not (tmp_path / "cv" / "cox" / "fold_0" / "done.json").exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--objectives", "centime,coxx"], "objective coxx: unknown or named twice"),
        (["--objectives", "cox,cox"], "objective cox: unknown or named twice"),
        (["--baselines", "image_only"], "name columns with --clinical"),
        (["--folds", "9"], "14 patients, 7 of whom died: too few for 9 folds"),
        (["--config", "configs/none.json"], "config configs/none.json: .*expected a JSON file"),
        (["--clinical", "{'smoker': 'numeric'}"], "column smoker: named as clinical but missing"),
        (["--", "--max_epoch", "3"], "--max_epoch is a key neither"),
        (["--", "--network_def#dimm", "3"], "has no argument dimm .did you mean dim"),
        (["--", "--shifts", "0"], "--shifts is 0"),
        (["--", "--cohort", "3"], "--cohort can't be overridden"),
        (["--", "max_epochs", "3"], "max_epochs is no override"),
        (["--", "--max_epochs"], "--max_epochs is no override"),
        (["--", "--tmax", "50"], "column time: 99 .expected months, less than tmax, which is 50"),
    ],
)
def test_bad_input_stops_before_anything_runs(cohort, tmp_path, monkeypatch, args, says):
    monkeypatch.setattr(cross_validate, "run_module", lambda *a, **k: pytest.fail("something ran"))
    with pytest.raises(SystemExit, match=says):
        cross_validate.main(["--cohort", str(cohort), "--out", str(tmp_path / "cv"), *args])


def test_a_covariate_that_is_constant_in_one_fold_is_named_with_the_fold(cohort, tmp_path):
    table = pd.read_csv(cohort).assign(rare=0)
    table.loc[[9, 10, 12], "rare"] = 1
    table["fold"] = [i // 8 for i in range(16)]
    table.loc[table.patient_id == "p2", "fold"] = 0
    table.to_csv(cohort, index=False)
    with pytest.raises(SystemExit, match="fold 1: clinical column rare: 0.0 in each of the"):
        cross_validate.main(["--cohort", str(cohort), "--out", str(tmp_path / "cv"), "--clinical", "{'rare': 'numeric'}"])


# Processes


def test_a_module_that_fails_says_what_its_error_was(tmp_path):
    jobs.run_module("platform", log=tmp_path / "log.txt", threads=1)
    assert platform.machine() in (tmp_path / "log.txt").read_text()
    with pytest.raises(RuntimeError, match="no_such_module failed"):
        jobs.run_module("no_such_module", log=tmp_path / "log.txt", threads=1)


def test_a_lock_is_held_as_long_as_a_process_that_took_it_lives(tmp_path):
    with jobs.locked(tmp_path / "lock") as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,))
    with open(tmp_path / "lock") as again:
        with pytest.raises(BlockingIOError):
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child.communicate(b"\n")
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_leaving_the_results_ends_what_runs_and_starts_nothing_more(tmp_path):
    started = []

    def work(name):
        started.append(name)
        if name:
            jobs.run_module("http.server", "0", log=tmp_path / "log.txt", threads=1)

    results = jobs.run_jobs(work, [(0,), (1,), (2,)], 1)
    assert next(results) is None
    results.close()
    assert started in ([0], [0, 1])
