# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The bundle as its users run it: `monai.bundle run` with the shipped configs, resuming, and what goes wrong."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import monai.bundle
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow

from bundle.data.cohort import patient_digest
from bundle.data.fingerprint import describe
from bundle.data.sampler import EventSampler
from bundle.errors import InputError
from bundle.files import file_sha256
from bundle.maps import GridShiftInferer
from bundle.networks import network_from
from bundle.networks.heads import LogMeanExp
from bundle.run import BestModel, CollapseGuard, RunCheckpoint, share_of_window, training_cohort
from bundle.survival import OBJECTIVES
from bundle.survival.priors import location_range, softmin_beta

from .commands import TRAIN, command_line, run, stopped_after, train
from .conftest import absolute_table, write_scan


def test_train_leaves_weights_settings_and_what_resuming_needs(tiny_cohort, trained):
    folder = trained.parent
    state = torch.load(trained, weights_only=True)
    settings = json.loads((folder / "settings.json").read_text())
    network = network_from(settings["network"])
    network.load_state_dict(state)
    assert settings["weights_sha256"] == file_sha256(trained)
    assert settings["network"]["dim"] == 16 and settings["preprocessing"]["lung_mask"] == "none"
    assert settings["objective"]["tmax"] == 100
    assert torch.load(folder / "last.pt", weights_only=True)["epoch"] == 4
    history = pd.read_csv(folder / "history.csv")
    assert list(history.columns) == ["epoch", "train_loss", "val_log_likelihood", "val_c_index", "learnt"]
    learnt = history.pop("learnt")
    assert history.epoch.tolist() == [1, 2, 3, 4] and history.notna().all(axis=None)
    assert learnt[:3].isna().all() and learnt[3] == settings["learnt"]["verdict"]  # of what is kept, not of an epoch
    assert sorted(p.name for p in (folder / "figures").iterdir()) == ["training_curves.png", "training_curves.svg"]
    assert {p.name for p in folder.iterdir() if p.name.startswith(".")} <= {".lock"}  # nothing half written
    parts = training_cohort(str(tiny_cohort), fold=None, seed=0, clinical={}, tmax=100, on_fault="fail")
    seen = [record["patient_id"] for part in ("train", "val") for record in parts[part]]
    assert settings["trained_on"] == sorted(map(patient_digest, seen)) and len(seen) == 14
    words = set(re.findall(r"\w+", (folder / "settings.json").read_text()))
    assert not words & {*seen, tiny_cohort.parent.name, folder.name}  # no id, no path


def test_a_stopped_run_goes_on_to_the_very_same_weights(tiny_cohort, tmp_path, trained):
    with stopped_after(2):
        train(tiny_cohort, tmp_path)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 2
    train(tiny_cohort, tmp_path)
    once, twice = (torch.load(folder / "last.pt", weights_only=True) for folder in (trained.parent, tmp_path))
    for name, value in once["network"].items():
        assert torch.equal(value, twice["network"][name]), name
    assert describe(once["best"]) == describe(twice["best"])
    assert (tmp_path / "history.csv").read_bytes() == (trained.parent / "history.csv").read_bytes()


@pytest.mark.parametrize(
    "name, override", [("cox_memory", {"objective#memory": 8}), ("logistic_hazard", {"objective#learn_variance": True})]
)
def test_a_stopped_run_of_another_objective_goes_on_to_the_very_same_bits(name, override, tiny_cohort, tmp_path):
    config = [*TRAIN, f"configs/objective/{name}.json"]
    train(tiny_cohort, tmp_path / "once", config, **override)
    with stopped_after(2):
        train(tiny_cohort, tmp_path / "twice", config, **override)
    train(tiny_cohort, tmp_path / "twice", config, **override)
    once, twice = (torch.load(tmp_path / folder / "last.pt", weights_only=True) for folder in ("once", "twice"))
    assert once["objective"]["log_factor"] != 0
    for part in ("network", "objective"):
        assert all(torch.equal(value, twice[part][key]) for key, value in once[part].items())
    settings = [json.loads((tmp_path / folder / "settings.json").read_text()) for folder in ("once", "twice")]
    assert settings[0]["objective"] == settings[1]["objective"] and settings[0]["objective"]["name"] == name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_infers_and_evaluates(name, tiny_cohort, tmp_path):
    model = train(tiny_cohort, tmp_path / "run", [*TRAIN, f"configs/objective/{name}.json"], max_epochs=2)
    one = pd.read_csv(tiny_cohort)[:2].assign(image=[str(tiny_cohort.parent / f"p{i}.nii.gz") for i in (0, 1)])
    one[["patient_id", "image"]].to_csv(tmp_path / "two.csv", index=False)
    run("configs/inference.json", cohort=str(tmp_path / "two.csv"), ckpt=str(model), output_dir=str(tmp_path), shifts=1)
    table, curves = (pd.read_csv(tmp_path / file) for file in ("predictions.csv", "survival_curves.csv"))
    assert (table.status == "ok").all()
    assert np.allclose(1 - curves["survival_60m"], table["death_60m"], atol=1e-4)
    run("configs/evaluate.json", cohort=str(tiny_cohort), ckpt=str(model), output_dir=str(tmp_path / "eval"), shifts=1)
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text())["survival"]["c_index"]["value"] is not None


def test_training_scans_without_deaths_teach_cox_nothing(tiny_cohort, tmp_path):
    table = absolute_table(tiny_cohort)
    table["split"] = ["val" if event else "train" for event in table.event]
    table.to_csv(tmp_path / "c.csv", index=False)
    with pytest.raises(InputError, match="none of the 8 training scans has event 1"):
        train(tmp_path / "c.csv", tmp_path / "run", [*TRAIN, "configs/objective/cox.json"])
    with pytest.raises(InputError, match="0 training scans died by then and 8"):
        train(tmp_path / "c.csv", tmp_path / "run", [*TRAIN, "configs/objective/logistic.json"], ipcw=True)
    assert not (tmp_path / "run").exists()


def test_a_run_stopped_while_finishing_finishes_to_the_very_same_weights(tiny_cohort, tmp_path, trained, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(RunCheckpoint, "end", lambda self, engine: None)
        train(tiny_cohort, tmp_path)
    assert "severity" not in json.loads((tmp_path / "settings.json").read_text())  # that is fitted last
    (tmp_path / "settings.json").unlink()  # a kill between the two files leaves none that fits
    train(tiny_cohort, tmp_path)
    once, twice = (torch.load(folder / "model.pt", weights_only=True) for folder in (trained.parent, tmp_path))
    assert all(torch.equal(value, twice[name]) for name, value in once.items())
    first, second = (json.loads((folder / "settings.json").read_text()) for folder in (trained.parent, tmp_path))
    assert first["severity"]["slope"] and second["weights_sha256"] == file_sha256(tmp_path / "model.pt")
    assert second["severity"] == first["severity"] and second["objective"] == first["objective"]


def test_weights_from_before_the_schedules_have_settled_are_not_the_best(tiny_cohort, tmp_path, trained, monkeypatch):
    update = BestModel.update

    def update_with_best_epoch_first(self, engine):
        self.validator.state.metrics[self.metric] = -float(engine.state.epoch)
        update(self, engine)

    monkeypatch.setattr(BestModel, "update", update_with_best_epoch_first)
    train(tiny_cohort, tmp_path, max_epochs=5)
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["best"]["epoch"] == 4 and state["best"]["value"] == -4.0  # the first of the last fifth


def test_an_epoch_that_undoes_what_was_learnt_is_taken_back(tiny_cohort, tmp_path, monkeypatch):
    check, save = CollapseGuard.check, RunCheckpoint.save
    losses, weights = [], []

    def ruin_the_third_epoch(self, engine):
        network = self.parts["network"]
        if not weights:
            weights.append(self.before["network"])
        if engine.state.epoch == 3:
            self.history.losses[:] = [1e4]
            for p in network.parameters():
                p.data.zero_()
        losses.append(np.mean(self.history.losses))
        check(self, engine)
        weights.append({name: value.clone() for name, value in network.state_dict().items()})

    def save_then_stop(self, engine):
        save(self, engine)
        if stop and engine.state.epoch == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(CollapseGuard, "check", ruin_the_third_epoch)
    monkeypatch.setattr(RunCheckpoint, "save", save_then_stop)
    stop = False
    train(tiny_cohort, tmp_path / "once", max_epochs=5)
    began = weights[int(np.argmin(losses[:2]))]
    assert all(torch.equal(value, weights[3][name]) for name, value in began.items())
    assert not any(torch.equal(value, began[name]) for name, value in weights[5].items() if "mlp" in name)  # it learns on
    stop = True
    with pytest.raises(KeyboardInterrupt):
        train(tiny_cohort, tmp_path / "twice", max_epochs=5)
    train(tiny_cohort, tmp_path / "twice", max_epochs=5)
    once, twice = (torch.load(tmp_path / folder / "last.pt", weights_only=True) for folder in ("once", "twice"))
    assert describe(once["network"]) == describe(twice["network"])
    assert describe(once["collapse_guard"]) == describe(twice["collapse_guard"])
    assert once["collapse_guard"]["least_loss"] < once["collapse_guard"]["first_loss"] + 5


def test_every_batch_has_the_cohorts_share_of_events():
    for deaths, num in ((5, 20), (10, 20), (3, 8)):
        dataset = SimpleNamespace(data=[{"event": int(i < deaths)} for i in range(num)])
        orders = [list(EventSampler(dataset, 0.25)) for _ in range(20)]
        for order in orders:
            assert sorted(order) == list(range(num))
            share = [sum(i < deaths for i in order[k : k + 4]) for k in range(0, num, 4)]
            assert max(share) - min(share) <= 1
        assert len({tuple(order) for order in orders}) > 15


def test_where_few_died_they_come_several_times_an_epoch_and_the_others_take_turns():
    dataset = SimpleNamespace(data=[{"event": int(i < 3)} for i in range(40)])
    orders = [list(EventSampler(dataset, min_event_share=0.25)) for _ in range(20)]
    for order in orders:
        counts = np.bincount(order, minlength=40)
        assert len(order) == 40 and counts[:3].sum() == 10
        assert counts[:3].min() >= 3 and counts[:3].max() <= 4 and counts[3:].max() == 1
        assert {sum(i < 3 for i in order[k : k + 4]) for k in range(0, 40, 4)} == {1}
    assert set(range(40)) == {i for order in orders[:5] for i in order}
    assert sorted(EventSampler(dataset, min_event_share=0.0)) == list(range(40))
    nobody = SimpleNamespace(data=[{"event": 0}] * 5)
    assert sorted(EventSampler(nobody, 0.25)) == list(range(5))
    with pytest.raises(InputError, match="min_event_share"):
        EventSampler(dataset, min_event_share=1.0)


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(tiny_cohort, trained):
    digest = file_sha256(trained)
    train(tiny_cohort, trained.parent)
    assert file_sha256(trained) == digest
    with pytest.raises(InputError, match=r"learning_rate: 0.002 -> 0.001.*--resume false"):
        train(tiny_cohort, trained.parent, learning_rate=0.001)


@pytest.mark.parametrize(
    "key, value",
    [
        ("optimizer#weight_decay", 0.1),
        ("lr_scheduler#warmup_steps", 5),
        ("lr_scheduler#warmup_multiplier", 0.1),
        ("train#gradient_clip#max_norm", 2.0),
        ("train#random_transforms#0#max_pad", 1),
        ("train#regularisers#vc_kwargs#gamma", 0.5),
        ("train#sampler#min_event_share", 0.0),
        ("train#collapse_guard#collapsed", 9.0),
        ("load_transforms#4#lung_litres", [0.3, 10]),
        (
            "validate#key_metric",
            {"val_log_likelihood": {"_target_": "bundle.metrics.ConcordanceIndex", "objective": "@objective"}},
        ),
    ],
)
def test_whatever_shapes_the_weights_is_a_setting_of_the_run(key, value, tiny_cohort, trained):
    with pytest.raises(InputError, match=rf"other settings .*{key.split('#')[-1]}.*--resume false"):
        train(tiny_cohort, trained.parent, **{key: value})


def test_where_and_how_fast_a_run_goes_on_may_change(tiny_cohort, tmp_path, trained):
    folder = shutil.copytree(trained.parent, tmp_path / "elsewhere")
    moved = {"num_workers": 1, "patience": 50, "cache_dir": str(tmp_path / "cache"), "train#progress#desc": "once more"}
    assert train(tiny_cohort, folder, **moved).read_bytes() == trained.read_bytes()


def test_resume_false_starts_from_the_beginning(tiny_cohort, tmp_path, trained):
    folder = tmp_path / "copy"
    shutil.copytree(trained.parent, folder)
    train(tiny_cohort, folder, learning_rate=0.001, resume="false", max_epochs=1)
    assert torch.load(folder / "last.pt", weights_only=True)["epoch"] == 1


def test_patience_stops_early_and_stays_stopped(tiny_cohort, tmp_path):
    """And a finished run is left alone."""
    model = train(tiny_cohort, tmp_path, patience=1, learning_rate=1e-12, max_epochs=20)
    assert model.is_file()
    epoch = torch.load(tmp_path / "last.pt", weights_only=True)["epoch"]
    assert epoch < 20 and epoch % 2 == 0
    train(tiny_cohort, tmp_path, patience=1, learning_rate=1e-12, max_epochs=20)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == epoch


def test_folds_leave_their_own_scans_out(tiny_cohort, tmp_path):
    table = absolute_table(tiny_cohort)
    table["fold"] = [i // 2 % 4 for i in range(len(table))]
    table.to_csv(tmp_path / "folds.csv", index=False)
    model = train(tmp_path / "folds.csv", tmp_path / "run", fold=1, max_epochs=1)
    assert len(json.loads((model.parent / "settings.json").read_text())["trained_on"]) == 16
    with pytest.raises(InputError, match="0, 1, 2, 3"):
        train(tmp_path / "folds.csv", tmp_path / "run7", fold=7)


def test_inference_writes_all_files_on_the_scans_own_grid(tiny_cohort, tmp_path, trained):
    run("configs/inference.json", cohort=str(tiny_cohort), ckpt=str(trained), output_dir=str(tmp_path))
    table = pd.read_csv(tmp_path / "predictions.csv")
    assert len(table) == 16 and (table.status == "ok").all()
    expected = "patient_id status message median_months mean_months lower_months upper_months risk"
    assert list(table) == expected.split() + [f"death_{t}m" for t in (12, 24, 36, 60)] + ["familiarity"]
    assert (table.lower_months < table.median_months).all() and (table.median_months < table.upper_months).all()
    curves = pd.read_csv(tmp_path / "survival_curves.csv").set_index("patient_id")
    assert (np.diff(curves.to_numpy(), axis=1) <= 1e-6).all()
    for _, row in table.iterrows():
        heat = nib.load(tmp_path / "maps" / f"{row.patient_id}_heat.nii.gz")
        image = nib.load(tiny_cohort.parent / f"{row.patient_id}.nii.gz")
        assert heat.shape == image.shape and np.allclose(heat.affine, image.affine)
        assert np.isclose(heat.get_fdata().sum(), row.death_60m, rtol=1e-3, atol=1e-6)
        assert np.isclose(1 - curves.loc[row.patient_id, "survival_24m"], row.death_24m, atol=1e-4)
    assert "url=reports/p0.html" in (tmp_path / "report.html").read_text()
    assert sorted(f.stem for f in (tmp_path / "reports").iterdir()) == sorted(table.patient_id)
    assert (tmp_path / "cohort.html").read_text().count('href="reports/') == 16


def test_one_bad_scan_fails_its_row_alone(tiny_cohort, tmp_path, trained):
    for name in ("p0", "p1"):
        shutil.copy(tiny_cohort.parent / f"{name}.nii.gz", tmp_path)
    (tmp_path / "torn.nii.gz").write_bytes((tiny_cohort.parent / "p2.nii.gz").read_bytes()[:500])
    (tmp_path / "c.csv").write_text("patient_id,image\na,p0.nii.gz\nb,torn.nii.gz\nc,gone.nii.gz\nd,p1.nii.gz\n")
    args = ("--config_file", "configs/inference.json", "--cohort", str(tmp_path / "c.csv"))
    done = command_line(*args, "--ckpt", str(trained), "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "2 of 4 scans failed" in done.stderr and "Traceback" not in done.stderr
    table = pd.read_csv(tmp_path / "out" / "predictions.csv").set_index("patient_id")
    assert list(table.index) == ["a", "b", "c", "d"]
    assert list(table.status) == ["ok", "failed", "failed", "ok"]
    assert "torn.nii.gz" in table.message["b"] and "gone.nii.gz" in table.message["c"]
    maps = sorted(p.name for p in (tmp_path / "out" / "maps").iterdir())
    assert maps == ["a_heat.nii.gz", "a_heat.png", "d_heat.nii.gz", "d_heat.png"]
    assert sorted(p.name for p in (tmp_path / "out" / "reports").iterdir()) == ["a.html", "d.html"]
    for name in ("predictions.csv", "cohort.html", "reports/a.html"):  # which are shared
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()


def test_a_scan_that_cannot_be_predicted_fails_alone_and_leaves_no_map_of_before(
    tiny_cohort, tmp_path, trained, monkeypatch
):
    files = [tiny_cohort.parent / f"p{i}.nii.gz" for i in range(3)]
    (tmp_path / "c.csv").write_text("patient_id,image\n" + "".join(f"{f.name[:2]},{f}\n" for f in files))
    args = {"cohort": str(tmp_path / "c.csv"), "ckpt": str(trained), "output_dir": str(tmp_path / "out")}
    run("configs/inference.json", **args)
    predict, seen = GridShiftInferer.__call__, []

    def fails_once(*inputs, **kwargs):
        seen.append(1)
        if len(seen) == 2:
            raise MemoryError("no room for 9 GiB")
        return predict(*inputs, **kwargs)

    monkeypatch.setattr(GridShiftInferer, "__call__", fails_once)
    with pytest.raises(InputError, match="1 of 3 scans failed, .* patient p1: MemoryError while predicting: no room"):
        run("configs/inference.json", **args, shifts=1)
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert list(table.status) == ["ok", "failed", "ok"] and len(seen) == 3
    assert {p.name[:2] for folder in ("maps", "done") for p in (tmp_path / "out" / folder).iterdir()} == {"p0", "p2"}
    run("configs/inference.json", **args, shifts=1)
    assert len(seen) == 4 and (pd.read_csv(tmp_path / "out" / "predictions.csv").status == "ok").all()


def test_an_ensemble_goes_on_where_a_scan_cannot_be_predicted(tiny_cohort, tmp_path, trained, monkeypatch):
    files = [tiny_cohort.parent / f"p{i}.nii.gz" for i in range(3)]
    (tmp_path / "c.csv").write_text("patient_id,image\n" + "".join(f"{f.name[:2]},{f}\n" for f in files))
    predict, seen = GridShiftInferer.__call__, []

    def fails_at_the_second_scan(*inputs, **kwargs):
        seen.append(1)
        if len(seen) == 3:  # the first of its two members
            raise MemoryError("no room for 9 GiB")
        return predict(*inputs, **kwargs)

    monkeypatch.setattr(GridShiftInferer, "__call__", fails_at_the_second_scan)
    stack = ["configs/inference.json", "configs/ensemble.json"]
    args = {"cohort": str(tmp_path / "c.csv"), "ckpt": [str(trained)] * 2, "output_dir": str(tmp_path), "shifts": 1}
    with pytest.raises(InputError, match="1 of 3 scans failed, .* patient p1: MemoryError while predicting: no room"):
        run(stack, **args)
    assert list(pd.read_csv(tmp_path / "predictions.csv").status) == ["ok", "failed", "ok"]


@pytest.mark.parametrize(
    "rotation, zooms",
    [
        ([[1, 0, 0], [0, 1, 0], [0, 0, 1]], (1.5, 1.5, 4.0)),
        ([[-1, 0, 0], [0, -1, 0], [0, 0, 1]], (1.5, 1.5, 5.0)),
        ([[0, 0, -1], [0.8, -0.6, 0], [-0.6, -0.8, 0]], (4.0, 1.5, 1.5)),
    ],
)
def test_heat_comes_back_to_where_the_lesion_is_in_the_world(tmp_path, localising, rotation, zooms):
    affine = np.eye(4)
    affine[:3, :3] = np.array(rotation) * zooms
    affine[:3, 3] = [-30, 20, 400]
    shape = tuple(round(60 / mm) for mm in zooms)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    lesion = np.array([0.3, 0.6, 0.4]) * shape  # well off the centre
    distance = np.linalg.norm((index - lesion) * zooms, axis=-1)
    noise = np.random.default_rng(0).normal(0, 8, shape)
    write_scan(tmp_path / "scan.nii.gz", np.where(distance < 12, 0, -800 + noise), affine)
    run("configs/inference.json", image=str(tmp_path / "scan.nii.gz"), ckpt=str(localising), output_dir=str(tmp_path))
    heat = nib.load(tmp_path / "maps" / "scan_heat.nii.gz")
    assert heat.shape == shape and np.allclose(heat.affine, affine, atol=1e-4)
    hottest = np.array(np.unravel_index(heat.get_fdata().argmax(), shape))
    assert np.linalg.norm((hottest - lesion) * zooms) < 12


def test_a_full_disk_in_inference_is_one_sentence_and_leaves_no_torn_map(tiny_cohort, tmp_path, trained, monkeypatch):
    def full(self, name):
        Path(name).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib.Nifti1Image, "to_filename", full)
    with pytest.raises(InputError, match="No space left on device"):
        run("configs/inference.json", cohort=str(tiny_cohort), ckpt=str(trained), output_dir=str(tmp_path))
    assert not list((tmp_path / "maps").iterdir())


def test_one_image_by_path(tiny_cohort, tmp_path, trained):
    image = tiny_cohort.parent / "p4.nii.gz"
    run("configs/inference.json", image=str(image), ckpt=str(trained), output_dir=str(tmp_path))
    assert pd.read_csv(tmp_path / "predictions.csv").patient_id.tolist() == ["p4"]


def test_evaluation_scores_unseen_scans_and_the_maps_of_other_tools(tiny_cohort, tmp_path, trained):
    run("configs/evaluate.json", cohort=str(tiny_cohort), ckpt=str(trained), output_dir=str(tmp_path / "own"))
    metrics = json.loads((tmp_path / "own" / "metrics.json").read_text())
    rows = pd.read_csv(tmp_path / "own" / "metrics_per_scan.csv")
    trained_on = json.loads((trained.parent / "settings.json").read_text())["trained_on"]
    assert len(rows) == 16 - len(trained_on) > 0
    assert {"c_index", "integrated_brier", "mae_events"} <= metrics["survival"].keys()
    assert {"value", "lower", "upper", "num_scans"} <= metrics["localisation"]["average_precision"].keys()
    assert len(list((tmp_path / "own" / "figures").glob("*.png"))) == 5
    assert (tmp_path / "own" / "report.html").read_text().count("<img") == 5
    # Maps that are the masks themselves score 1; every scan counts, because nobody trained on them.
    maps = tmp_path / "maps"
    maps.mkdir()
    for i in range(16):
        shutil.copy(tiny_cohort.parent / f"p{i}_gt.nii.gz", maps / f"p{i}_heat.nii.gz")
    run("configs/evaluate.json", cohort=str(tiny_cohort), maps_dir=str(maps), output_dir=str(tmp_path / "other"))
    found = json.loads((tmp_path / "other" / "metrics.json").read_text())["localisation"]
    assert found["pointing_game"]["value"] == found["average_precision"]["value"] == 1
    assert found["mass_accuracy"]["num_scans"] == 8 and found["num_empty_mask"] == 8
    files = sorted(p.name for p in (tmp_path / "other").iterdir())
    assert files == ["metrics.json", "metrics_per_scan.csv", "report.html"]
    # A survivor without a mask counts, as it does where the maps are our own.
    table = absolute_table(tiny_cohort)
    table.loc[table.event == 0, "gt_mask"] = None
    table.to_csv(tmp_path / "sparse.csv", index=False)
    run(
        "configs/evaluate.json",
        cohort=str(tmp_path / "sparse.csv"),
        maps_dir=str(maps),
        output_dir=str(tmp_path / "sparse"),
    )
    sparse = json.loads((tmp_path / "sparse" / "metrics.json").read_text())["localisation"]
    assert sparse["survivor_heat"] == found["survivor_heat"] and sparse["mass_accuracy"] == found["mass_accuracy"]
    (maps / "p5_heat.nii.gz").unlink()
    with pytest.raises(InputError, match="p5"):
        run("configs/evaluate.json", cohort=str(tiny_cohort), maps_dir=str(maps), output_dir=str(tmp_path / "gone"))


def test_evaluation_without_figures_writes_the_metrics_alone(tiny_cohort, tmp_path, trained):
    run("configs/evaluate.json", cohort=str(tiny_cohort), ckpt=str(trained), output_dir=str(tmp_path), figures=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.json", "metrics_per_scan.csv", "survival_curves.csv"]


def test_overrides_that_contradict_training_are_errors(tiny_cohort, tmp_path, trained):
    image = str(tiny_cohort.parent / "p4.nii.gz")
    for key, value in {"spacing": [1.0, 1.0, 1.0], "hu_window": [-1024.0, 150.0], "lung_mask": "threshold"}.items():
        with pytest.raises(InputError, match=f"--{key} .* contradicts"):
            run("configs/inference.json", image=image, ckpt=str(trained), output_dir=str(tmp_path), **{key: value})


def test_weights_of_another_network_or_run_are_refused(tiny_cohort, tmp_path, trained):
    image = str(tiny_cohort.parent / "p4.nii.gz")
    for name in ("model.pt", "settings.json"):
        shutil.copy(trained.parent / name, tmp_path)
    with open(tmp_path / "model.pt", "ab") as f:
        f.write(b"x")
    with pytest.raises(InputError, match="SHA-256"):
        run("configs/inference.json", image=image, ckpt=str(tmp_path / "model.pt"), output_dir=str(tmp_path / "o"))
    settings = json.loads((tmp_path / "settings.json").read_text())
    shutil.copy(trained, tmp_path)
    settings["network"]["dim"] = 32
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="another architecture"):
        run("configs/inference.json", image=image, ckpt=str(tmp_path / "model.pt"), output_dir=str(tmp_path / "o"))
    assert not (tmp_path / "o" / "predictions.csv").exists()


@pytest.mark.slow
def test_missing_options_unwritable_folders_and_full_disks_are_one_sentence(tiny_cohort, tmp_path, monkeypatch):
    for args, message in {
        ("--config_file", "configs/train.json"): "--cohort is missing",
        ("--config_file", "configs/inference.json"): "--image or --cohort is missing",
    }.items():
        done = command_line(*args)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="can't write to the folder"):
        train(tiny_cohort, tmp_path / "file" / "run")
    real = torch.save

    def full(obj, f, *args, **kwargs):
        if "settings" in obj:
            raise OSError(28, "No space left on device")
        return real(obj, f, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(InputError, match="No space left on device"):
        train(tiny_cohort, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*last.pt*"))


def test_a_bad_scan_stops_training_unless_skipped(tiny_cohort, tmp_path):
    table = absolute_table(tiny_cohort)
    write_scan(tmp_path / "picture.nii.gz", np.random.default_rng(0).integers(0, 255, (16, 16, 16)))
    table.loc[3, "image"] = str(tmp_path / "picture.nii.gz")
    table["split"] = ["val" if i % 4 == 0 else "train" for i in range(16)]
    table.to_csv(tmp_path / "c.csv", index=False)
    with pytest.raises(InputError, match=r"1 of 16 scans can't be used:\n  patient p3, .*\n.*with --on_fault skip"):
        train(tmp_path / "c.csv", tmp_path / "run", max_epochs=1)
    assert not (tmp_path / "run" / "last.pt").exists()
    train(tmp_path / "c.csv", tmp_path / "run", max_epochs=1, on_fault="skip")
    assert (tmp_path / "run" / "model.pt").exists()


def test_tmax_follows_the_cohort_and_an_evaluation_censors_there(tiny_cohort, trained, tmp_path, capsys):
    table = absolute_table(tiny_cohort)
    table["patient_id"] = [f"q{i}" for i in range(16)]
    table.loc[0, "time"], table.loc[1, "time"] = 146.2, 120
    table.to_csv(tmp_path / "c.csv", index=False)
    train(tmp_path / "c.csv", tmp_path / "run", max_epochs=1)
    assert json.loads((tmp_path / "run" / "settings.json").read_text())["objective"]["tmax"] == 150
    assert "tmax, the last month of the model, is 150: the longest follow-up is 146.2 months" in capsys.readouterr().out
    with pytest.raises(InputError, match="row 3, column time: 120.0 .*less than tmax, which is 110; --tmax sets another"):
        train(tmp_path / "c.csv", tmp_path / "other", max_epochs=1, tmax=110)

    options = {"ckpt": str(trained), "output_dir": str(tmp_path / "out"), "shifts": 1, "figures": False}
    run("configs/evaluate.json", cohort=str(tmp_path / "c.csv"), **options)
    rows = pd.read_csv(tmp_path / "out" / "metrics_per_scan.csv", index_col="patient_id")
    assert rows.time[["q0", "q1", "q3"]].tolist() == [100, 100, 99] and rows.event[["q0", "q2"]].tolist() == [0, 1]
    assert rows.message["q0"] == "followed up to month 146.2, counted as censored at 100, the model's last"
    assert rows.message.notna().sum() == 2
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["survival"]["num_events"] == 7


@pytest.mark.parametrize("config, kind", [("train", "train"), ("inference", "infer"), ("evaluate", "infer")])
def test_bundle_properties(config, kind):
    workflow = ConfigWorkflow(config_file=f"configs/{config}.json", workflow_type=kind)
    workflow.initialize()
    assert workflow.check_properties() == []


def test_network_takes_and_gives_what_the_metadata_say():
    monai.bundle.verify_net_in_out(
        net_id="network_def", config_file="configs/train.json", meta_file="configs/metadata.json", n=3
    )


def test_metadata_follow_the_model_zoo_schema(tmp_path):
    shutil.copy(Path("tests") / "metadata_schema.json", tmp_path / "schema.json")
    monai.bundle.verify_metadata(meta_file="configs/metadata.json", filepath=str(tmp_path / "schema.json"))


def test_torchscript_export_equals_the_network(tmp_path, trained):
    monai.bundle.ckpt_export(
        net_id="network_def",
        filepath=str(tmp_path / "model.ts"),
        ckpt_file=str(trained),
        config_file="configs/inference.json",
        ckpt=str(trained),
    )
    exported = torch.jit.load(tmp_path / "model.ts")
    eager = network_from(json.loads((trained.parent / "settings.json").read_text())["network"])
    eager.load_state_dict(torch.load(trained, weights_only=True))
    image, lung = torch.rand(2, 1, 18, 16, 20), torch.zeros(2, 1, 18, 16, 20)
    lung[:, :, 3:14, 2:9] = 1
    eager.eval()
    for mask in (None, lung):
        torch.testing.assert_close(exported(image, mask), eager(image, mask))


def test_wandb_offline_by_one_override(tiny_cohort, tmp_path):
    train(tiny_cohort, tmp_path, max_epochs=1, tracking="configs/tracking/wandb.json")
    assert list((tmp_path / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("recipe", ["network", "codebook"])
def test_mlflow_by_one_override_has_settings_epochs_and_verdict(recipe, tiny_cohort, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (requirements-mlflow.txt)")
    pytest.importorskip("sqlalchemy", reason="its database needs sqlalchemy (requirements-mlflow.txt)")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    options = {"tracking": "configs/tracking/mlflow.json", "max_epochs": 2, "recipe": recipe}
    train(tiny_cohort, tmp_path / "first", **options)
    train(tiny_cohort, tmp_path / "first", **options)  # finished: no second run of it
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/first/mlruns.db")
    (found,) = client.search_runs([client.get_experiment_by_name("survival-map").experiment_id])
    settings = json.loads((tmp_path / "first" / "settings.json").read_text())
    assert found.info.status == "FINISHED" and found.info.run_name.startswith("first-")
    assert found.data.params["network.dim"] == "16" and found.data.params["training.seed"] == "0"
    assert found.data.tags["verdict"] == settings["learnt"]["verdict"]
    assert found.data.tags["weights_sha256"] == settings["weights_sha256"]
    assert found.data.metrics["learnt_p_value"] == settings["learnt"]["p_value"]
    rows = pd.read_csv(tmp_path / "first" / "history.csv") if recipe == "network" else pd.DataFrame({"train_loss": []})
    logged = client.get_metric_history(found.info.run_id, "train_loss")
    assert [(m.step, pytest.approx(m.value)) for m in logged] == list(enumerate(rows.train_loss, 1))
    text = json.dumps([found.data.params, found.data.tags])
    assert not any(digest in text for digest in settings["trained_on"]) and str(tiny_cohort.parent) not in text


@pytest.fixture
def mlflow_server(tmp_path):
    """Address of an MLflow server of its own."""
    for module in ("mlflow", "sqlalchemy", "flask", "flask_cors", "uvicorn"):
        pytest.importorskip(module, reason=f"an MLflow server needs {module} (requirements-dev.txt)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", *words]
    with open(tmp_path / "server.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=tmp_path, start_new_session=True)
    address, until = f"http://127.0.0.1:{port}", time.monotonic() + 180
    try:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                break
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "server.log").read_text()
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


@pytest.mark.slow
def test_mlflow_to_a_server(mlflow_server, tiny_cohort, tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    train(tiny_cohort, tmp_path / "run", tracking="configs/tracking/mlflow.json", max_epochs=1, recipe="network")
    client = mlflow.MlflowClient(mlflow_server)
    (found,) = client.search_runs([client.get_experiment_by_name("survival-map").experiment_id])
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert found.info.status == "FINISHED" and found.data.tags["weights_sha256"] == settings["weights_sha256"]
    assert not (tmp_path / "run" / "mlruns.db").exists()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_freed_memory_is_kept_for_the_next_array(root):
    code = """
import resource, statistics, sys, torch
from bundle.run import begin
if sys.argv[1] == "begin":
    begin()
faults = []
for _ in range(8):
    torch.ones(2**25).add_(1)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(statistics.median(after - before for before, after in zip(faults[2:], faults[3:])))  # one may meet a full heap
"""

    def faults(how: str) -> float:
        done = subprocess.run([sys.executable, "-c", code, how], cwd=root, check=True, capture_output=True, text=True)
        return float(done.stdout)

    assert faults("plain") > 10_000 and faults("begin") < 100  # of 32768 pages an array


def test_the_range_of_locations_follows_the_deaths():
    died = [{"time": 26.0 + i, "event": 1} for i in range(11)]  # tenth percentile 27, median 31
    lived = [{"time": 1.0, "event": 0}] * 5
    assert location_range(died + lived, 100) == [3 * 27 - 2 * 31, 120]
    assert location_range([{"time": 2.0, "event": 1}, *died[1:]], 100) == [
        19,
        120,
    ]  # one early death says nothing of the others
    apart = [{"time": time, "event": 1} for time in (1.0, 2.0, 8.0, 30.0, 40.0, 50.0, 60.0, 60.0, 60.0, 60.0, 60.0)]
    assert location_range(apart, 100) == [-60, 120] and location_range(apart, 40) == [-24, 48]
    assert location_range([{"time": 80.0, "event": 1}], 100) == [30, 120]
    assert location_range(lived, 100) == [0, 120]


def test_the_steepness_of_the_softmin_follows_the_deaths():
    died = [{"time": 16.0 + 3 * i, "event": 1} for i in range(11)]  # tenth percentile 19, median 31
    assert softmin_beta([*died, {"time": 1.0, "event": 0}], 100) == pytest.approx(1 / 12)
    assert softmin_beta(died[:2], 100) == pytest.approx(1 / 8) and softmin_beta([], 50) == pytest.approx(1 / 4)
    assert softmin_beta([{"time": 90.0 * (i > 3), "event": 1} for i in range(11)], 100) == pytest.approx(1 / 30)


@pytest.mark.parametrize("share, quantile", [(math.exp(-3), 0.5), (math.exp(-2), 0.1)])
def test_lesions_at_the_bound_kill_when_half_and_when_a_tenth_are_dead(share, quantile):
    died = [{"time": 16.0 + 3 * i, "event": 1} for i in range(11)]
    low, beta = location_range(died, 100)[0], softmin_beta(died, 100)
    location = torch.where(torch.arange(1000) < 1000 * share, low, 1e4).unsqueeze(0)
    found = LogMeanExp(16, 1, (-5.0, 120.0), beta, False).log_mean_exp(location, torch.ones(1, 1000))
    assert float(found) == pytest.approx(np.quantile([r["time"] for r in died], quantile), abs=0.2)


def test_the_narrow_window_is_given_in_hu():
    assert share_of_window([-900, -700], [-1000, 200]) == pytest.approx([1 / 12, 3 / 12])
    assert share_of_window(None, [-1000, 200]) is None


def test_locations_begin_where_tmax_says():
    config = ConfigParser()
    config.read_config("configs/train.json")
    config["tmax"] = 40
    assert config.get_parsed_content("network_def").head.bias == 24  # months; 60 lay outside the range
