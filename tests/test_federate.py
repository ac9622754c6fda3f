# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Sites that train together: what they sum up, what leaves them, and that one that drops out does no harm."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import logging
import os
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from bundle.data import fit_clinical
from bundle.errors import InputError
from bundle.federated.codebooks import SharedCodebooks
from bundle.federated.site import Site, bundle_digest, checked_job, kept_at_site
from bundle.federated.sums import (
    MINIMUM,
    clinical_encoding,
    death_priors,
    look_sums,
    moments,
    shared_familiarity,
    site_sums,
)
from bundle.maps.familiarity import fit_familiarity
from bundle.run import TrainedModel
from bundle.run.codebooks import as_maps, fit_months
from bundle.survival import location_range, softmin_beta
from bundle.survival.cox import minimise, partial_log_likelihood
from bundle.survival.objectives import classical_log_likelihood
from bundle.survival.priors import location_bounds
from scripts import federate
from scripts.research import federated as three_sites

from .conftest import write_scan

needs_flare = pytest.mark.skipif(
    importlib.util.find_spec("nvflare") is None,
    reason="NVIDIA FLARE is not installed (pip install -r requirements-federated.txt)",
)
CLINICAL = {"age": "numeric", "sex": ["f", "m"]}


def patients(num: int, seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    return [
        {
            "patient_id": f"s{seed}p{i}",
            "time": float(rng.uniform(2, 80)),
            "event": int(i % 3 > 0),
            "covariates": {"age": float(rng.normal(60 + seed, 9)), "sex": str(rng.choice(["f", "m"]))},
        }
        for i in range(num)
    ]


def mean(answers: list[tuple[dict, int]]) -> dict:
    """What FLARE's aggregator makes of answers: the mean weighted by scans."""
    total = sum(weight for _, weight in answers)
    return {key: sum(message[key] * weight for message, weight in answers) / total for key in answers[0][0]}


def job(**settings) -> dict:
    whole = {"sites": ["north", "south", "west", "east"], "recipe": "network", "rounds": 3, "local_epochs": 1}
    whole |= {"tmax": 100, "clinical": {"age": "numeric"}, "bundle": bundle_digest()}
    return checked_job({**whole, "spacing": "native", "lung_mask": "none", "margin": 0.0, **settings})


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory) -> dict[str, Path]:
    """Three sites of 14, 12 and 10 tiny scans, whose times no other number is likely to be."""
    found = {}
    for number, (name, num) in enumerate({"north": 14, "south": 12, "west": 10}.items()):
        folder, rng, rows = tmp_path_factory.mktemp(name), np.random.default_rng(number), []
        for i in range(num):
            volume = rng.normal(-800, 10, (16, 16, 16))
            size = 4 + 2 * (i % 3)
            if i % 2 == 0:
                volume[2 : 2 + size, 3 : 3 + size, 4 : 4 + size] = 0
            write_scan(folder / f"{i}.nii.gz", volume)
            time = 41.37 - 4 * size + rng.uniform() if i % 2 == 0 else 90.73 + rng.uniform()
            split = "val" if i in (2, 3) else "train"
            rows.append([f"{name}_Ahab{i}", f"{i}.nii.gz", time, 1 - i % 2, 50 + 30 * rng.random(), split])
        table = pd.DataFrame(rows, columns=["patient_id", "image", "time", "event", "age", "split"])
        table.to_csv(folder / f"{name}.csv", index=False)
        found[name] = folder / f"{name}.csv"
    return found


def sites(cohorts: dict[str, Path], folder: Path, **settings) -> dict[str, Site]:
    own = {name: {"cohort": str(path), "ckpt_dir": str(folder / name)} for name, path in cohorts.items()}
    return {name: Site(name, job(**settings), own[name]) for name in cohorts}


def test_sums_of_sites_are_those_of_all_patients():
    cohorts = [patients(30, 0), patients(23, 1), patients(19, 2)]
    everybody = [record for cohort in cohorts for record in cohort]
    found = mean([({"sums": site_sums(cohort, CLINICAL)}, len(cohort)) for cohort in cohorts])["sums"]
    deaths = [record["time"] for record in everybody if record["event"]]
    ages = [record["covariates"]["age"] for record in everybody]
    of, spread = moments(found)
    np.testing.assert_allclose(of[:2], [np.mean(deaths), np.mean(ages)])
    np.testing.assert_allclose(spread[:2], [np.std(deaths), np.std(ages)])
    expected = fit_clinical(everybody, {"age": "numeric", "sex": "categorical"})
    encoding = clinical_encoding(found, CLINICAL)
    assert encoding["columns"]["sex"] == expected["columns"]["sex"]
    assert encoding["columns"]["age"] == pytest.approx(expected["columns"]["age"])
    np.testing.assert_allclose(encoding["imputation"]["mean"], expected["imputation"]["mean"], atol=1e-6)


def test_priors_of_normal_deaths_are_those_of_the_records():
    times = np.random.default_rng(0).normal(45, 8, 20_000)
    records = [{"time": time, "event": 1, "covariates": {}} for time in times]
    found = death_priors(site_sums(records, {}), 100)
    assert found["loc_range"] == pytest.approx(location_range(records, 100), abs=0.5)
    assert found["beta"] == pytest.approx(softmin_beta(records, 100), rel=0.02)
    assert found["loc_range"][0] > location_bounds(20.0, 45.0, 100)[0]  # the test could fail


def test_of_few_patients_nothing_is_told():
    with pytest.raises(InputError, match="trains on 4 scans"):
        site_sums(patients(MINIMUM - 1, 0), CLINICAL)
    cohort = patients(12, 0)
    for i, record in enumerate(cohort):
        record["event"] = int(i < MINIMUM - 1)
        record["covariates"] = {"age": 60.0 + i if i < MINIMUM else None, "sex": "m" if i < 2 else "f"}
    sums = site_sums(cohort, CLINICAL)
    assert not sums[:, 0].any()  # four deaths
    assert sums[0, 1] > 0  # five ages
    assert not sums[:, 2].any()  # two men among twelve
    with pytest.raises(InputError, match="column sex: no site has"):
        clinical_encoding(sums, CLINICAL)
    with pytest.raises(InputError, match="no site has 5 deaths"):
        death_priors(sums, 100)


def test_familiar_is_what_looks_like_the_scans_of_any_site():
    """The same as of all scans in one place; how far is usual is told by the site's own scans, left out."""
    g = torch.Generator().manual_seed(0)
    looks = [torch.randn(n, 108, generator=g) + shift for n, shift in ((14, 0), (9, 6), (6, 0))]
    sums = mean([({"looks": look_sums(own, k, 3)}, len(own)) for k, own in enumerate(looks)])["looks"]
    found = shared_familiarity(sums, looks[0], 0)
    whole = fit_familiarity(torch.cat(looks), [k for k, own in enumerate(looks) for _ in own])
    np.testing.assert_allclose(found.mean, whole.mean, atol=1e-4)
    np.testing.assert_allclose(found.spread, whole.spread, rtol=0.03)  # over 29 scans, not 28
    assert len(found.distances) == 14
    assert np.abs(np.subtract.outer(found.distances, whole.distances)).min(1).max() < 0.05
    assert found.strangeness(looks[1][0]) < 0.2
    assert fit_familiarity(looks[0], list(range(14))).strangeness(looks[1][0]) == 1  # by its own scans it would be strange


@pytest.mark.parametrize(
    "wrong",
    [
        {"spacing": "$__import__('os').system('id')"},
        {"clinical": {"@cohort": "numeric"}},
        {"clinical": {"sex": ["f", "%configs/train.json::cohort"]}},
        {"cohort": "theirs.csv"},
        {"network_def": {"_target_": "os.system"}},
        {"learning_rate": float("nan")},
        {"bundle": "another"},
    ],
)
def test_a_job_brings_numbers_and_names_only(wrong):
    with pytest.raises(InputError, match="the job"):
        job(**wrong)


def test_what_leaves_a_site(cohorts, tmp_path):
    """Weights, counts and sums of a job from start to end: no id, no time, no age; every site ends with the same network."""
    federation, message, left = sites(cohorts, tmp_path), {}, []
    for number in range(5):
        answers = [site.answer(message, number) for site in federation.values()]
        left += answers
        message = mean(answers)
    network = torch.load(tmp_path / "north/model.pt", weights_only=True)
    shapes = {"net." + key: tuple(value.shape) for key, value in network.items()}
    records = [record for site in federation.values() for record in site.records]
    secrets = np.array([value for record in records for value in (record["time"], record["covariates"]["age"])])
    for number, (answer, weight) in enumerate(left):
        assert weight == (12, 10, 8)[number % 3]
        assert answer.keys() == {"sums"} | ({"looks", *shapes} if number >= 3 else set())
        for key, value in answer.items():
            assert value.shape == {"sums": (3, 2), "looks": (5, 3, 108), **shapes}[key]
            for scale in (1.0, weight):  # as it is, and as a sum
                near = np.abs(scale * value.ravel().astype(float)[:, None] / secrets - 1) < 1e-6
                assert not near.any(), (key, value.ravel()[near.any(1)], secrets[near.any(0)], scale)
    for site in ("south", "west"):
        other = torch.load(tmp_path / site / "model.pt", weights_only=True)
        assert all(torch.equal(network[key], other[key]) for key in network)
    settings = json.loads((tmp_path / "south/settings.json").read_text())
    ages = [record["covariates"]["age"] for record in records]
    assert settings["clinical"]["columns"]["age"]["mean"] == pytest.approx(np.mean(ages))
    first = left[3][0]
    moved = [np.abs(network[key.removeprefix("net.")].numpy() - first[key]).max() for key in shapes]
    assert max(moved) > 1e-3


def test_all_start_alike_and_a_missed_round_is_no_harm(cohorts, tmp_path):
    pair = sites({name: cohorts[name] for name in ("north", "south")}, tmp_path, rounds=4)
    north, south = pair["north"], pair["south"]
    message = mean([site.answer({}, 0) for site in (north, south)])
    for site in (north, south):
        torch.rand(int(site.job["tmax"] + len(site.name)))  # whatever has been drawn before
        site.build(message["sums"])
    first = [site.first_weights() for site in (north, south)]
    assert all(torch.equal(first[0][key], first[1][key]) for key in first[0])
    messages = {}
    for number in (1, 2):  # south is away
        messages[number] = message
        message = mean([north.answer(message, number)])
    (answer, _), (again, _) = south.answer(message, 3), north.answer(message, 3)
    for site in (north, south):
        scheduler, steps = site.part("lr_scheduler"), len(site.part("train#dataloader"))
        assert site.algo.trainer.state.epoch == 3
        assert scheduler.last_epoch == 3 * steps
        assert scheduler.get_last_lr()[0] == pytest.approx(scheduler.base_lrs[0] * scheduler.lr_lambda(3 * steps))
    assert answer.keys() == again.keys()
    with pytest.raises(InputError, match="without a network"):
        south.answer({"sums": message["sums"], "looks": message["looks"]}, 4)


def test_logs_stay_at_the_site(tmp_path, caplog):
    def others() -> None:
        logging.getLogger("flare").warning("of FLARE")

    with kept_at_site(tmp_path / "site" / "site.log"):
        logging.getLogger("bundle.data").warning("patient Ahab")
        thread = threading.Thread(target=others)
        thread.start()
        thread.join()
    logging.getLogger("bundle.data").warning("after")
    assert caplog.messages == ["of FLARE", "after"]
    assert "patient Ahab" in (tmp_path / "site" / "site.log").read_text()
    assert "FLARE" not in (tmp_path / "site" / "site.log").read_text()


def test_names_and_settings_of_sites(cohorts):
    with pytest.raises(InputError, match="expected two or more"):
        federate.checked_names(["a"])
    with pytest.raises(InputError, match="of different names"):
        federate.checked_names(["a", "a"])
    with pytest.raises(InputError, match="expected letters"):
        federate.checked_names(["a", "b c"])
    with pytest.raises(InputError, match="expected cohort, ckpt_dir"):
        Site("north", job(), {"cohort": str(cohorts["north"]), "ckpt_dir": "x", "network": "theirs"})
    assert [federate.checked_minimum(least, "abcd") for least in (None, 2, 4)] == [3, 2, 4]
    for least in (1, 5):
        with pytest.raises(InputError, match="expected 2 to 4"):
            federate.checked_minimum(least, "abcd")


def parts_of(x: list[torch.Tensor], outcome: list[torch.Tensor]) -> list[SharedCodebooks]:
    """Sites that know the features of their patients (n, D) and their outcomes, and nothing else."""
    found = []
    for index, (features, own) in enumerate(zip(x, outcome, strict=True)):
        part = SharedCodebooks.__new__(SharedCodebooks)
        part.index, part.sites, part.outcome, part.scans = index, len(x), own, [None] * len(own)
        part.features = lambda state, features=features: features
        found.append(part)
    return found


def test_hazards_are_those_of_stratified_ridge_cox(monkeypatch):
    """Against L-BFGS and Efron's likelihood, each site a stratum; a site that misses rounds is heard again later."""
    monkeypatch.setattr("bundle.federated.codebooks.PHASES", ["hazards"] * 60)
    g = torch.Generator().manual_seed(0)
    x = [torch.randn(n, 70, generator=g, dtype=torch.float64) * 0.3 for n in (31, 24, 12)]
    outcome = []
    for number, features in enumerate(x):  # the base risk differs by site
        time = torch.rand(len(features), generator=g) * 9 + 40 * number + 5 - 3 * features[:, 0]
        outcome.append(torch.stack([time.float(), (torch.rand(len(features), generator=g) > 0.3).float()], 1))
    parts = parts_of(x, outcome)
    zero = np.zeros((4, 70))
    message = {f"state.{name}": zero for name in ("c", "c_before", "g_before")}
    message |= {"own.g": zero, "own.present": np.array([1.0, 1, 1]) / 67}
    for number in range(2, 61):
        present = parts[:2] if number in (9, 10) else parts
        message = mean([(part.answer(message, number), len(part.scans)) for part in present])
    found = parts[0].next(message, 61)["state.c"]
    for fit in range(4):
        strata = [k for k in range(3) if k != fit - 1]

        def loss(c, strata=strata):
            own = [partial_log_likelihood(x[k] @ c, *outcome[k].double().unbind(1)) for k in strata]
            return 0.5 * (c @ c) - sum(own)

        np.testing.assert_allclose(found[fit], minimise(loss, torch.zeros(70, dtype=torch.float64)), atol=2e-4)
    one_set = minimise(
        lambda c: 0.5 * (c @ c) - partial_log_likelihood(torch.cat(x) @ c, *torch.cat(outcome).double().unbind(1)),
        torch.zeros(70, dtype=torch.float64),
    )
    assert np.abs(found[0] - one_set.numpy()).max() > 0.01  # one risk set of all would be another fit


def test_a_site_of_few_deaths_tells_no_gradient():
    x = torch.randn(8, 5, dtype=torch.float64)
    outcome = torch.stack([torch.arange(8.0) + 1, (torch.arange(8) < MINIMUM - 1).float()], 1)
    state = {"state.c": np.zeros((3, 5))}
    assert not parts_of([x, x], [outcome, outcome])[0].tell_hazards(state)["g"].any()
    outcome[MINIMUM - 1, 1] = 1
    told = parts_of([x, x], [outcome, outcome])[0].tell_hazards(state)["g"]
    assert [bool(row.any()) for row in told] == [True, False, True]


@pytest.mark.slow
def test_codebooks_of_sites(cohorts, tmp_path, monkeypatch):
    """From start to end in this process: all sites get one network, whose months are as likely as a fit to all scans."""
    phases = ["tokens", *["words"] * 3, "shares", *["hazards"] * 20, "risk", *["months"] * 16, "student"]
    for module in ("site", "codebooks"):
        monkeypatch.setattr(f"bundle.federated.{module}.PHASES", phases)
    there = dict(cohorts)
    federation = sites(there, tmp_path, recipe="codebook", sites=list(there), clinical={})
    message, left = {}, []
    for number in range(len(phases) + 2):
        answers = [site.answer(message, number) for site in federation.values()]
        left += answers
        message = mean(answers)
    networks = [torch.load(tmp_path / name / "model.pt", weights_only=True) for name in there]
    for other in networks[1:]:
        assert all(torch.allclose(networks[0][key], other[key], rtol=1e-5) for key in networks[0])
    parts = [site.shared for site in federation.values()]
    state = parts[0].next({key: value for key, value in message.items() if key != "sums"}, len(phases) + 1)
    risk = torch.cat([part.unseen_risk(state) for part in parts])
    outcome = torch.cat([part.outcome for part in parts])
    pooled = copy.deepcopy(parts[0].network)
    variance = fit_months(pooled, risk, outcome, parts[0].stage.objective, torch.zeros(len(risk), 0))
    model = TrainedModel(tmp_path / "south" / "model.pt", torch.device("cpu"))

    def likelihood(network, variance):
        objective = copy.copy(parts[0].stage.objective)
        objective.variance = variance
        pmf = objective.log_pmf(as_maps(network.months(risk).detach()))
        return float(classical_log_likelihood(pmf, *outcome.unbind(1)).mean())

    assert likelihood(model.network, model.objective.variance) > likelihood(pooled, variance) - 0.05
    assert float(state["state.top"][0]) == pytest.approx(float(risk.mean() + 2 * risk.std(correction=0)), rel=1e-4)
    lowest = model.network.months(risk) == model.network.low
    assert lowest.float().mean() < 0.1  # the riskiest are told apart
    secrets = np.array([record["time"] for site in federation.values() for record in site.records])
    sizes = {2, 3, 4, 6, 29, 36, 108, 250, 9000}  # sites, words, books, descriptors: no axis is of patients
    for message, weight in left:
        for key, value in message.items():
            assert set(value.shape) - {1, 3} <= sizes, key
            for scale in (1.0, weight):
                assert not (np.abs(scale * value.ravel()[:, None] / secrets - 1) < 1e-9).any(), key


@needs_flare
def test_an_executor_says_that_it_failed_and_not_why(cohorts, tmp_path, monkeypatch, caplog):
    from nvflare.apis.dxo import DXO, DataKind, from_shareable
    from nvflare.apis.fl_constant import ReservedKey, ReturnCode
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.signal import Signal
    from nvflare.app_common.decomposers import common_decomposers
    from nvflare.fuel.utils import fobs

    from bundle.federated.executor import SiteExecutor

    common_decomposers.register()
    own = {"north": {"cohort": str(cohorts["north"]), "ckpt_dir": str(tmp_path / "north")}}
    table = pd.read_csv(cohorts["south"])
    table["image"] = [str(cohorts["south"].parent / name) for name in table["image"]]
    table.loc[1, "image"] = "south_Ahab1_gone.nii.gz"
    table.to_csv(tmp_path / "south.csv", index=False)
    own["south"] = {"cohort": str(tmp_path / "south.csv"), "ckpt_dir": str(tmp_path / "south")}
    (tmp_path / "sites.json").write_text(json.dumps(own))
    monkeypatch.setenv("SURVIVAL_MAP_SITES", str(tmp_path / "sites.json"))
    replies = {}
    for name in ("north", "south", "east"):
        context = FLContext()
        context.set_prop(ReservedKey.IDENTITY_NAME, name, private=False, sticky=False)
        task = DXO(DataKind.WEIGHTS, data={}).to_shareable()
        task.set_header("current_round", 0)
        replies[name] = SiteExecutor(job()).execute("train", task, context, Signal())
    assert replies["north"].get_return_code() == ReturnCode.OK
    assert from_shareable(replies["north"]).data["sums"].shape == (3, 2)
    assert b"Ahab" not in fobs.dumps(replies["north"])
    for name in ("south", "east"):
        assert replies[name].get_return_code() == ReturnCode.EXECUTION_EXCEPTION
        assert b"Ahab" not in fobs.dumps(replies[name])
    assert "Ahab" not in caplog.text
    assert "see site.log" in caplog.text
    assert "south_Ahab1_gone" in (tmp_path / "south" / "site.log").read_text()


@needs_flare
def test_a_job_names_classes_and_brings_no_code(tmp_path, capsys):
    federate.main(["export", "--names", "london", "paris", "--out", str(tmp_path), "--rounds", "7", "--spacing", "native"])
    folder = tmp_path / "survival_map"
    assert not [path for path in folder.rglob("*") if path.is_dir() and path.name == "custom" or path.suffix == ".py"]
    server = json.loads(next(folder.rglob("config_fed_server.json")).read_text())
    client = json.loads(next(folder.rglob("config_fed_client.json")).read_text())
    paths = [part["path"] for part in server["workflows"] + server["components"]]
    assert all(path.startswith("nvflare.app_common.") for path in paths)
    executor = client["executors"][0]["executor"]
    assert executor["path"] == json.loads(capsys.readouterr().out.splitlines()[-1])["allow at each site"]
    assert checked_job(executor["args"]["settings"])["rounds"] == 7
    assert str(Path.home()) not in json.dumps([server, client])


@needs_flare
@pytest.mark.slow
def test_simulator_goes_on_without_sites_that_fail_or_hang(cohorts, tmp_path, monkeypatch):
    """Of four sites one fails and one hangs after round 0; the others end where a loop of the two in this process does."""
    monkeypatch.setenv("SURVIVAL_MAP_SITES", "")
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    table = pd.read_csv(cohorts["west"])
    table["image"] = [str(cohorts["west"].parent / name) for name in table["image"]]
    (tmp_path / "torn.nii.gz").write_bytes(b"no scan")
    os.mkfifo(tmp_path / "never.nii.gz")  # to open it is to wait
    there = dict(cohorts)
    for name, image in (("west", "torn.nii.gz"), ("east", "never.nii.gz")):
        table.loc[5, "image"] = str(tmp_path / image)
        table.to_csv(tmp_path / f"{name}.csv", index=False)
        there[name] = tmp_path / f"{name}.csv"
    out = tmp_path / "out"
    done = federate.simulate(list(there.values()), out, job(sites=list(there)), min_sites=2, wait=5)
    assert [folder.name for folder in done] == ["north", "south"]
    alone = sites(there, tmp_path / "loop")
    message = mean([site.answer({}, 0) for site in alone.values()])
    pair = [alone["north"], alone["south"]]
    for number in range(1, 5):
        message = mean([site.answer(message, number) for site in pair])
    found = torch.load(out / "north" / "model.pt", weights_only=True)
    for key, value in found.items():
        np.testing.assert_allclose(value.numpy(), message["net." + key], rtol=1e-4, atol=1e-5)
    words = b"".join(path.read_bytes() for path in (out / "flare").rglob("*") if path.is_file())
    assert b"Ahab" not in words
    assert b"torn" not in words
    assert b"torn.nii.gz" in (out / "west" / "site.log").read_bytes()


def test_page_says_which_aim_is_missed():
    scores = {
        "codebook": {"federated": (0.88, 0.80), "c": (0.7, 0.7)},
        "network": {"federated": (0.88, 0.60), "c": (0.7, 0.7)},
    }
    args = argparse.Namespace(recipes=["codebook", "network"], seeds=[0, 1], phantom="spheres", epochs=4, rounds=3)
    rows = [
        {"recipe": recipe, "way": way, "seed": seed, "c_index": c + 0.04 * seed, "ap": ap + 0.04 * seed}
        for recipe in args.recipes
        for way in three_sites.RECIPES[recipe]
        for c, ap in [scores[recipe].get(way, (0.9, 0.8))]
        for seed in args.seeds
    ]
    text = three_sites.page(pd.DataFrame(rows), args, "python -m it")
    assert "on average: codebook, met; network, missed in the AP." in text
    assert "| codebook | federated | 0.90 (0.88 to 0.92) | 0.82 (0.80 to 0.84) | -0.02, +0.00 |" in text
