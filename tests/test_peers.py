# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Peers: all fit and answer in one way, are measured by one code, and a command that was stopped goes on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from lifelines import CoxPHFitter
from scipy import ndimage

from bundle.networks import CodebookNet
from bundle.run.codebooks import fit_books
from bundle.survival.cox import partial_log_likelihood
from scripts.research.peers import (
    __main__ as command,
)
from scripts.research.peers import (
    attention,
    ceiling,
    codebooks,
    density,
    descriptors,
    masked,
    measure,
    ours,
    page,
    resnet,
    ridge,
)
from scripts.research.peers.cohort import Cohort, outcome

SHAPE = (21, 24, 22)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """24 scans of four anatomies, the last of them to test on: dense balls kill, each ball sooner; air is harmless."""
    folder, rng, rows = tmp_path_factory.mktemp("peers"), np.random.default_rng(0), []
    grid = np.stack(np.indices(SHAPE))
    lung = (np.abs(grid - np.array(SHAPE)[:, None, None, None] / 2) < 8).all(0)
    for i in range(24):
        ball = [((grid - rng.integers(7, 14, (3, 1, 1, 1))) ** 2).sum(0) <= r**2 for r in (3.5, 2.5)]
        lesion, like = ball[0] & lung & (i % 3 > 0), ball[1] & lung & ~ball[0]
        image = np.where(lung, -850 + 10 * (i % 4), 40) + 20 * rng.normal(size=SHAPE)
        image = np.where(lesion, -400, np.where(like, -990, image))
        row = {
            "patient_id": f"p{i:02d}",
            "anatomy": f"a{i % 4}",
            "site": f"a{i % 4}",
            "split": "test" if i % 4 == 3 else "train",
        }
        volumes = {"image": image, "lung_mask": lung, "gt_mask": lesion, "confounder_mask": like}
        for name, volume in volumes.items():
            row[name] = f"{row['patient_id']}_{name}.nii.gz"
            nib.save(nib.Nifti1Image(volume.astype(np.int16), np.diag([3.0, 3, 3, 1])), folder / row[name])
        share = lesion.sum() / lung.sum()
        time = 60 - 300 * share + rng.random()
        rows.append({**row, "share": share, "time": time, "true_time": time, "event": int(i % 5 != 4)})
    pd.DataFrame(rows).to_csv(folder / "cohort.csv", index=False)
    found = Cohort(folder / "cohort.csv")
    found.describe(jobs=1)
    return found


def test_blur_and_descriptors_are_scipys():
    rng = np.random.default_rng(1)
    x, lung = rng.random(SHAPE).astype("f4"), np.zeros(SHAPE, bool)
    lung[3:18, 4:20, 2:19] = True
    for sigma, order in ((1.0, (0, 0, 0)), (1.8, (1, 0, 1)), (1.0, (0, 2, 0))):
        found = descriptors.blur(torch.from_numpy(x), sigma, 2, order)
        wanted = ndimage.gaussian_filter(x, sigma, order, mode="constant", radius=int(3 * sigma + 0.5))[::2, ::2, ::2]
        if max(order) < 2:  # of a second derivative scipy subtracts what the cut-off leaves of the mean
            assert np.allclose(found, wanted, atol=2e-3)
    tokens, place = descriptors.describe(torch.from_numpy(x), torch.from_numpy(lung))
    assert tokens.shape == (int(lung[::2, ::2, ::2].sum()), len(descriptors.NAMES)) and torch.isfinite(tokens).all()
    at = tuple(place.T.numpy())
    blurred = [ndimage.gaussian_filter(v * lung, 3.0, mode="constant", truncate=3.0) for v in (x, np.ones_like(x))]
    wanted = (blurred[0] / np.maximum(blurred[1], 0.02))[at]
    assert np.allclose(tokens[:, descriptors.NAMES.index("mean_3.0")], wanted, atol=1e-4)
    assert lung[at].all() and np.array_equal(tokens[:, 0].numpy(), x[at])


def test_centring_takes_offset_and_contrast_of_a_scan_out():
    tokens = torch.rand(500, len(descriptors.NAMES))
    seen, moved = descriptors.SEEN, tokens.clone()
    moved[:, :seen] = 3 * moved[:, :seen] + 7
    assert torch.allclose(descriptors.centre(tokens)[:, :seen], descriptors.centre(moved)[:, :seen], atol=0.02)
    assert torch.equal(descriptors.centre(tokens)[:, seen:], tokens[:, seen:])


@pytest.mark.parametrize("shape", [(9, 10, 11), (8, 8, 13)])
def test_voxels_between_tokens_are_interpolated_within_the_lung(shape):
    lung = torch.ones(shape, dtype=torch.bool)
    lung[0] = False
    place = descriptors.STEP * lung[::2, ::2, ::2].nonzero()
    value = place.float() @ torch.tensor([1.0, 10.0, 100.0])
    found = descriptors.to_voxels(value, place, lung)
    i, j, k = np.indices(shape)
    inner = (slice(2, 7), slice(0, 7), slice(0, 7))
    assert found.shape == shape and np.allclose(found[inner], (i + 10 * j + 100 * k)[inner], atol=1e-3)
    assert not found[0].any()
    assert np.allclose(descriptors.to_voxels(torch.ones(len(place)), place, lung, smooth=1.8)[2:], 1, atol=1e-4)


def test_folds_share_no_anatomy_and_test_scans_are_apart(cohort):
    anatomy = np.array([scan.row.anatomy for scan in cohort.train])
    assert {scan.row.anatomy for scan in cohort.test}.isdisjoint(anatomy)
    folds = cohort.folds()
    assert sorted(i for _, own in folds for i in own.tolist()) == list(range(len(anatomy)))
    assert all(set(anatomy[rest]).isdisjoint(anatomy[own]) for rest, own in folds)


def test_residuals_and_ridge_are_those_of_other_code():
    g = torch.Generator().manual_seed(0)
    x, time = torch.randn(40, 3, generator=g).double(), torch.rand(40, generator=g).double()
    event = (torch.rand(40, generator=g) < 0.6).double()
    hazard = [sum(event[j] / (time >= time[j]).sum() for j in range(40) if time[j] <= t) for t in time]
    residual = codebooks.martingale_residuals(time, event)
    assert torch.allclose(residual, event - torch.stack(hazard)) and abs(residual.sum()) < 1e-9
    table = pd.DataFrame({"a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "time": time, "event": event})
    lifelines = CoxPHFitter(penalizer=0.2).fit(table, "time", "event")
    one = SimpleNamespace(log_likelihood=lambda risk, scans: partial_log_likelihood(risk, time[scans], event[scans]))
    own = ridge.ridge_cox((x - x.mean(0)) / 1.0, one, 0.2, torch.arange(40))
    assert np.corrcoef(own, lifelines.params_)[0, 1] > 0.99 and np.abs(own - lifelines.params_.to_numpy()).max() < 0.05


def test_patients_are_compared_within_their_anatomy(cohort):
    risk, scans = torch.randn(len(cohort.train)).double(), torch.arange(0, len(cohort.train), 2)
    moved = risk + torch.tensor([0.0, 10.0, 30.0])[cohort.stratum]
    for which in (torch.arange(len(cohort.train)), scans):
        assert torch.allclose(cohort.log_likelihood(risk[which], which), cohort.log_likelihood(moved[which], which))
    batches = resnet.drawn_within(cohort.stratum)
    assert sorted(torch.cat(batches).tolist()) == list(range(len(cohort.train)))
    assert all(len(cohort.stratum[batch].unique()) == 1 for batch in batches)


@pytest.mark.parametrize("method", [attention, ceiling, codebooks, density, resnet, ridge])
def test_every_method_answers_in_one_way(cohort, monkeypatch, method):
    for module, name, value in (
        (attention, "STEPS", 20),
        (resnet, "EPOCHS", 1),
        (codebooks, "BOOKS", 8),
        (ceiling, "TOKENS", 300),
    ):
        monkeypatch.setattr(module, name, value)
    predict = method.fit(cohort, 0)
    for scan in cohort.test:
        risk, heat = predict(scan)
        assert isinstance(risk, float) and np.isfinite(risk) and heat.shape == SHAPE and np.isfinite(heat).all()
        assert heat.min() >= 0 and not heat[~scan.mask("lung_mask").numpy()].any()
    found, planes = measure.measure(cohort, predict)
    assert planes["heat"].shape == SHAPE[:2]
    if method in (ceiling, codebooks, density):
        assert found["average_precision"] > 5 * found["base_rate"] and found["pointing_game"] > 0.6


def test_the_network_told_where_finds_it_by_its_own_books(cohort, monkeypatch):
    network = CodebookNet(books=6, words=20)
    fit_books(network, [masked.tokens_of(scan)[0] for scan in cohort.train], 0)
    centres = network.centres.clone()
    monkeypatch.setattr(masked.ours, "train", lambda cohort, seed: Path("model.pt"))
    monkeypatch.setattr(masked, "TrainedModel", lambda ckpt: SimpleNamespace(network=network))
    found, _ = measure.measure(cohort, masked.fit(cohort, 0))
    assert found["average_precision"] > 5 * found["base_rate"] and found["pointing_game"] > 0.6
    assert torch.equal(network.centres, centres)


def test_of_the_healthy_as_many_die_as_the_table_says(cohort):
    table = pd.read_csv(cohort.folder / "cohort.csv")
    dies = (table.true_time <= 50).groupby(table.share > 0).mean()
    assert measure.healthy_deaths(cohort, 50) == pytest.approx(dies[False] / dies[True])


def test_measures_of_the_truth_and_of_its_opposite(cohort):
    def truth(scan):
        return float(scan.row["share"]), scan.mask("gt_mask").float().numpy()

    def lookalikes(scan):
        return -float(scan.row["share"]), scan.mask("confounder_mask").float().numpy()

    found, planes = measure.measure(cohort, truth)
    assert (found["average_precision"], found["pointing_game"], found["c_index_less_oracle"]) == (1, 1, 0)
    assert (found["lookalike_heat"], found["healthy_heat"], found["test_scans"]) == (0, 0, 6)
    assert planes["lesion"].any() and np.array_equal(planes["heat"] > 0, planes["lesion"])
    found, _ = measure.measure(cohort, lookalikes)
    assert found["pointing_game"] == 0 and found["lookalike_heat"] > 5 and found["c_index"] < 0.5 < found["c_index_oracle"]


def test_survival_map_is_called_by_its_commands_and_sees_no_mask(cohort, monkeypatch):
    called = []

    def run_module(*words, **_):
        options = dict(zip(words[2::2], words[3::2]))
        called.append(options)
        if "train" in options["--config_file"]:
            (Path(options["--ckpt_dir"]) / "settings.json").write_text('{"learnt": {"verdict": "unsure"}}')
        else:
            table = pd.read_csv(options["--cohort"])
            assert list(table) == ["patient_id", "image", "lung_mask"]
            (maps := Path(options["--output_dir"]) / "maps").mkdir(parents=True, exist_ok=True)
            table.assign(risk=2.5)[["patient_id", "risk"]].to_csv(maps.parent / "predictions.csv", index=False)
            for name in table.patient_id:
                nib.save(nib.Nifti1Image(np.ones(SHAPE, "f4"), np.eye(4)), maps / f"{name}_heat.nii.gz")

    monkeypatch.setattr(ours, "run_module", run_module)
    risk, heat = ours.fit(cohort, 3)(cohort.test[0])
    assert (risk, heat.shape, ours.verdict_of(cohort)) == (2.5, SHAPE, "unsure")
    assert called[0]["--seed"] == "3" and called[1]["--ckpt"].endswith("model.pt")
    learnt = pd.read_csv(called[0]["--cohort"])
    assert list(learnt.patient_id) == [scan.row.patient_id for scan in cohort.train] and learnt.site.nunique() == 3


def test_the_command_goes_on_where_it_stopped_and_writes_page_and_picture(cohort, tmp_path, monkeypatch, capsys):
    asked, broken = [], {"codebooks"}

    def fit_of(method):
        def fit(cohort, seed):
            asked.append(method)
            if method in broken:
                raise RuntimeError("no luck")
            return lambda scan: (0.5, scan.mask("gt_mask").float().numpy())

        return fit

    for module in (density, codebooks):
        monkeypatch.setattr(module, "fit", fit_of(module.__name__.split(".")[-1]))
    monkeypatch.setattr(command, "cohort_of", lambda args, backgrounds, *which: cohort)
    table = tmp_path / "backgrounds.csv"
    columns = ["patient_id", "image", "lung_mask"]
    pd.read_csv(cohort.folder / "cohort.csv")[columns].assign(
        image=lambda t: [str(cohort.folder / i) for i in t.image]
    ).assign(lung_mask=lambda t: [str(cohort.folder / i) for i in t.lung_mask]).to_csv(table, index=False)
    words = ["--diseases", "nodules", "--seeds", "0", "--num", "18", "--methods", "density", "codebooks"]
    words += ["--backgrounds", str(table), "--out", str(tmp_path / "out"), "--page", str(tmp_path / "peers.md")]
    with pytest.raises(SystemExit, match="1 of 2 results are missing"):
        command.main(words)
    broken.clear()
    command.main(words)
    command.main(words)
    assert asked == ["density", "codebooks", "codebooks"]
    row = json.loads((tmp_path / "out" / "results" / "nodules_0_18_density.json").read_text())
    assert row["c_index"] == 0.5 and row["average_precision"] == 1
    text = (tmp_path / "peers.md").read_text()
    assert density.TITLE in text and codebooks.TITLE in text and "no luck" in capsys.readouterr().err
    assert (tmp_path / "peers.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="results of other test_anatomies"):
        command.main([*words, "--test_anatomies", "p01"])
    with pytest.raises(SystemExit, match="results of other num"):
        command.main([*words, "--num", "18", "30"])


def test_a_smaller_cohort_is_the_first_scans_of_the_larger(cohort):
    smaller = Cohort(cohort.folder / "cohort.csv", 7)
    assert [s.row.patient_id for s in smaller.train] == [s.row.patient_id for s in cohort.train[:7]]
    assert len(smaller.test) == len(cohort.test) and len(smaller.time) == 7


def test_targets_are_judged_cohort_by_cohort():
    numbers = {"c_index_less_oracle": -0.05, "lookalike_heat": 1.0, "healthy_heat": 0.2, "pointing_game": 0.9}
    rows = pd.DataFrame(
        [
            {"disease": "nodules", "num": 120, "seed": seed, "method": method, "average_precision": ap, **numbers}
            for seed, aps in ((2, (0.9, 0.8, 0.5, 1.0)), (3, (0.6, 0.7, 0.9, 1.0)))
            for method, ap in zip(("ours", "ridge", "density", "ceiling", "masked"), (*aps, 0.8))
        ]
    )
    found = page.targets(rows).set_index("measure")["120 scans"]
    assert found["AP less the best peer's"] == "1 of 2; -0.10 (-0.30 to 0.10)"
    assert found["AP less that of the peer best on average"] == "1 of 2; 0.00 (-0.10 to 0.10)"
    assert found["AP over the ceiling's"] == "1 of 2; 0.75 (0.60 to 0.90)"
    assert found["AP over the same network's, told the masks"] == "1 of 2; 0.94 (0.75 to 1.12)"
    assert found["pointing"].startswith("2 of 2")
    rows["learnt"] = rows.seed.map({2: "yes", 3: "no"})
    assert page.verdicts(rows) == "Verdict of the training in these 2 cohorts: yes in 1 (AP 0.90), no in 1 (AP 0.60).\n"


def test_a_cell_is_the_mean_with_least_and_greatest():
    assert page.cell(pd.Series([0.5, 0.7, None]), 2) == "0.60 (0.50 to 0.70)"
    assert (page.cell(pd.Series([3.0]), 0), page.cell(pd.Series([None], dtype=float), 2)) == ("3", "–")


def test_outcomes_are_months_and_events(cohort):
    time, event = outcome(cohort.test)
    assert time.dtype == torch.float64 and set(event.tolist()) <= {0.0, 1.0}
