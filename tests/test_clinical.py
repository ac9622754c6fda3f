# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Clinical covariates: imputation against closed forms and scikit-learn, encoding, how they enter, whole runs."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from lifelines import CoxPHFitter
from lifelines.utils import concordance_index
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer
from sklearn.linear_model import BayesianRidge

from bundle.data import clinical_names, encode_clinical, fit_clinical, read_cohort
from bundle.data.clinical import clinical_kinds, em_step, fill_in, fit_gaussian
from bundle.errors import InputError
from bundle.metrics.verdict import in_words
from bundle.networks import ClinicalNet, SurvivalMapNet, network_from
from bundle.networks.heads import HEADS
from bundle.run.scans import training_cohort
from bundle.survival import CenTime, patient_numbers

from .commands import run
from .conftest import absolute_table

COLUMNS = {"age": "numeric", "sex": "categorical", "fvc": "numeric", "smoking": "categorical"}


def patients(num: int = 60, seed: int = 0) -> list[dict]:
    """Records in which FVC falls with age; FVC and smoking are missing in some."""
    rng = np.random.default_rng(seed)
    records = []
    for i in range(num):
        age = rng.normal(65, 8)
        covariates = {
            "age": age,
            "sex": str(rng.choice(["f", "m"])),
            "fvc": None if i % 7 == 3 else 80 - (age - 65) + rng.normal(0, 3),
            "smoking": None if i % 11 == 5 else str(rng.choice(["current", "former", "never"])),
        }
        records.append({"patient_id": f"p{i}", "covariates": covariates})
    return records


def with_gaps(share: float = 0.25, num: int = 400, dim: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Standardised correlated normal rows, whole and with values missing at random."""
    rng = np.random.default_rng(1)
    whole = rng.normal(size=(num, dim)) @ rng.normal(size=(dim, dim))
    whole = (whole - whole.mean(0)) / whole.std(0)
    return whole, np.where(rng.random(whole.shape) < share, np.nan, whole)


# ---------------------------------------------------------------------------------------------------- imputation


def test_em_of_two_columns_is_andersons_closed_form():
    # With x always there and y missing in some, the likelihood factors: Anderson, JASA 52 (1957) 200.
    rng = np.random.default_rng(0)
    x = rng.normal(size=200)
    y = 0.8 * x + rng.normal(0, 0.6, 200)
    seen = rng.random(200) < 1 / (1 + np.exp(-2 * x))  # by x, so that the mean of what is seen is off
    table = np.stack([x, np.where(seen, y, np.nan)], 1)
    mean, covariance = fit_gaussian(table, ridge=0.0, tolerance=1e-12)
    slope = np.cov(x[seen], y[seen], ddof=0)[0, 1] / x[seen].var()
    residual = (y[seen] - y[seen].mean() - slope * (x[seen] - x[seen].mean())).var()
    assert abs(y[seen].mean() - y.mean()) > 0.1
    np.testing.assert_allclose(mean, [x.mean(), y[seen].mean() + slope * (x.mean() - x[seen].mean())], atol=1e-9)
    off = slope * x.var()
    np.testing.assert_allclose(covariance, [[x.var(), off], [off, residual + slope * off]], atol=1e-9)


def log_likelihood(x: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """Of what is there, row by row."""
    total = 0.0
    for row in x:
        seen = ~np.isnan(row)
        difference, part = row[seen] - mean[seen], covariance[np.ix_(seen, seen)]
        total -= 0.5 * (seen.sum() * np.log(2 * np.pi) + np.linalg.slogdet(part)[1])
        total -= 0.5 * difference @ np.linalg.solve(part, difference)
    return total


@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_the_likelihood_of_what_is_there_never_falls(ridge):
    _, x = with_gaps()
    mean, covariance = np.array([1.0, -1.0, 0.5, 2.0]), np.eye(4)
    last = -np.inf
    for _ in range(60):
        mean, covariance = em_step(x, mean, covariance, ridge)
        value = log_likelihood(x, mean, covariance) - 0.5 * len(x) * ridge * np.trace(np.linalg.inv(covariance))
        assert value >= last - 1e-8
        last = value


def test_without_gaps_em_is_the_sample_mean_and_covariance():
    whole, _ = with_gaps()
    mean, covariance = fit_gaussian(whole, ridge=0.0)
    np.testing.assert_allclose(mean, whole.mean(0), atol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(whole.T, ddof=0), atol=1e-12)


def test_imputation_is_that_of_scikit_learns_iterative_imputer():
    def rms(x: np.ndarray) -> float:
        return float(np.sqrt(np.square(x[gaps]).mean()))

    whole, x = with_gaps(share=0.1, num=2000)
    one = whole.copy()
    one[:, 2] = x[:, 2]
    # With gaps in one column both are a linear regression. With gaps in many scikit-learn takes what it filled in for
    # certain, EM does not.
    for table, close in ((one, 0.004), (x, 0.05)):
        gaps = np.isnan(table)
        ours = fill_in(table, *fit_gaussian(table))[0]
        theirs = IterativeImputer(BayesianRidge(), sample_posterior=False, max_iter=100).fit_transform(table)
        assert np.array_equal(ours[~gaps], table[~gaps])
        assert rms(ours - theirs) < close
        assert rms(ours - whole) < 1.01 * rms(theirs - whole) < 0.5 * rms(whole)


def test_a_row_without_any_value_gets_the_mean():
    mean, covariance = np.array([1.0, 2.0]), np.array([[2.0, 1.0], [1.0, 3.0]])
    filled, left = fill_in(np.full((3, 2), np.nan), mean, covariance)
    np.testing.assert_allclose(filled, np.tile(mean, (3, 1)))
    np.testing.assert_allclose(left, 3 * covariance)


# ------------------------------------------------------------------------------------------------------ encoding


def test_numbers_are_standardised_and_categories_one_hot():
    records = patients()
    encoding = fit_clinical(records, COLUMNS)
    assert clinical_names(encoding) == ["age", "sex=m", "fvc", "smoking=former", "smoking=never"]
    x = np.array([record["clinical"] for record in encode_clinical(records, encoding)])
    table = pd.DataFrame([record["covariates"] for record in records])
    np.testing.assert_allclose(x[:, 0], (table.age - table.age.mean()) / table.age.std(ddof=0))
    assert np.array_equal(x[:, 1], table.sex == "m")
    seen = table.smoking.notna()
    assert np.array_equal(x[seen, 3:], np.stack([table.smoking[seen] == c for c in ("former", "never")], 1))
    fvc = table.fvc.notna()
    np.testing.assert_allclose(x[fvc, 2], ((table.fvc - table.fvc.mean()) / table.fvc.std(ddof=0))[fvc])
    # FVC falls with age, and so does what is imputed; a plain mean would not.
    assert np.corrcoef(x[~fvc, 2], x[~fvc, 0])[0, 1] < -0.95


def test_encodings_from_settings_json_are_the_same_to_the_last_bit():
    records = patients()
    encoding = fit_clinical(records, COLUMNS, missing_mask=True)
    assert encode_clinical(records, json.loads(json.dumps(encoding))) == encode_clinical(records, encoding)


def test_only_training_rows_are_fitted(tmp_path):
    rng = np.random.default_rng(0)
    rows = [["patient_id", "image", "time", "event", "split", "age", "sex"]]
    for i in range(20):
        (tmp_path / f"p{i}.nii.gz").touch()
        age, sex = rng.normal(60, 9), rng.choice(["f", "m"])
        rows.append([f"p{i}", f"p{i}.nii.gz", 10 + i, 1, ("train", "train", "val", "test")[i % 4], age, sex])

    def encodings(rows) -> tuple[dict, list]:
        (tmp_path / "c.csv").write_text("\n".join(",".join(map(str, row)) for row in rows))
        kinds = {"age": "numeric", "sex": "categorical"}
        parts = training_cohort(str(tmp_path / "c.csv"), fold=None, seed=0, clinical=kinds, tmax=100, on_fault="fail")
        encoding = fit_clinical(parts["train"], kinds)
        return encoding, [encode_clinical(parts[part], encoding) for part in ("train", "val")]

    before, (train, val) = encodings(rows)
    changed = copy.deepcopy(rows)
    for row in changed[1:]:
        if row[4] != "train":
            row[5:] = [1000.0, "x"]
    after, (same, other) = encodings(changed)
    assert before == after and train == same
    assert all(record["clinical"][0] > 50 for record in other) and val != other
    changed[1][5] = 61.0
    assert encodings(changed)[0] != before


def test_what_training_had_not_seen_is_missing_and_is_said_once(caplog):
    records = patients()
    encoding = fit_clinical(records, COLUMNS, missing_mask=True)
    asked = [copy.deepcopy(records[i]) for i in (0, 1, 2)]
    asked[0]["covariates"]["smoking"] = "vape"
    asked[1]["covariates"]["smoking"] = None
    asked[2]["covariates"]["smoking"] = "vape"
    with caplog.at_level(logging.WARNING):
        new, gap, again = encode_clinical(asked, encoding)
    assert len(caplog.messages) == 1
    assert "column smoking: vape was not seen in training (current, former, never)" in caplog.messages[0]
    assert "2 scan(s)" in caplog.messages[0]
    assert new["imputed"] == again["imputed"] == "taken as missing: smoking (vape was not seen in training)"
    assert gap["imputed"] == "taken as missing: smoking"
    asked[0]["covariates"]["smoking"] = None
    assert encode_clinical(asked[:1], encoding)[0]["clinical"] == new["clinical"]
    assert clinical_names(encoding)[-2:] == ["fvc missing", "smoking missing"] and new["clinical"][-2:] == [0.0, 1.0]


def test_a_column_that_the_table_lacks_is_missing_in_all(caplog, tmp_path):
    records = patients()
    encoding = fit_clinical(records, COLUMNS)
    for name in ("a.nii.gz", "b.nii.gz"):
        (tmp_path / name).touch()
    (tmp_path / "c.csv").write_text("patient_id,image,age,sex,smoking\nA,a.nii.gz,70,m,never\nB,b.nii.gz,50,f,\n")
    found = read_cohort(tmp_path / "c.csv", need_outcome=False, clinical=clinical_kinds(encoding), need_clinical=False)
    with caplog.at_level(logging.WARNING):
        old, young = encode_clinical(found, encoding)
    assert caplog.messages == ["column fvc: no scan has a value; each gets the one expected of its other covariates."]
    assert old["clinical"][2] < -0.3 < 0.3 < young["clinical"][2]  # by their ages
    assert old["imputed"] == "taken as missing: fvc" and young["imputed"] == "taken as missing: fvc, smoking"
    # Nothing known at all: the expectation of everything.
    (alone,) = encode_clinical([{"patient_id": "C"}], encoding)
    np.testing.assert_allclose(alone["clinical"], encoding["imputation"]["mean"])


def test_no_columns_leave_the_records_as_they_are():
    records = patients(3)
    assert fit_clinical(records, {}) == {} and clinical_names({}) == []
    assert encode_clinical(records, {}) == records


def test_the_mask_tells_a_gap_from_the_expected_value():
    records = patients()
    plain, masked = fit_clinical(records, COLUMNS), fit_clinical(records, COLUMNS, missing_mask=True)
    assert masked["missing_mask"] == ["fvc", "smoking"] and plain["missing_mask"] == []
    for record, short, long in zip(records, encode_clinical(records, plain), encode_clinical(records, masked)):
        gaps = [float(record["covariates"][name] is None) for name in ("fvc", "smoking")]
        assert long["clinical"] == short["clinical"] + gaps


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(fvc=80.0), "column fvc: 80.0 in each of the 60 training scans"),
        (lambda c: c.update(sex="f"), "column sex: f in each of the 60 training scans"),
        (lambda c: c.update(fvc=None), "column fvc: empty"),
        (lambda c: c.update(fvc=2 * c["age"] + 1), "column fvc: in the 60 training scans a linear combination of age "),
        (lambda c: c.update(fvc=float(c["sex"] == "m") - c["age"]), "a linear combination of age, sex "),
    ],
)
def test_columns_that_say_nothing_are_refused(change, says):
    records = patients()
    for record in records:
        change(record["covariates"])
    with pytest.raises(InputError) as caught:
        fit_clinical(records, COLUMNS)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_linear_combination_shows_through_gaps():
    records = patients(100)
    for i, record in enumerate(records):
        covariates = record["covariates"]
        covariates["fvc"] = 3 * covariates["age"] if i % 5 else None
    with pytest.raises(InputError, match="column fvc: .* linear combination of age"):
        fit_clinical(records, COLUMNS)


def test_imputed_covariates_of_a_lung_cancer_table_give_its_cox_model(shared_data):
    table = pd.read_csv(shared_data / "survival" / "ncctg_lung_228.csv")
    columns = {name: "numeric" for name in ("age", "ph.karno", "pat.karno", "meal.cal", "wt.loss")}
    columns |= {"sex": "categorical", "ph.ecog": "numeric"}
    assert table[list(columns)].isna().any(axis=1).sum() > 50
    records = []
    for _, row in table.iterrows():
        covariates = {name: None if pd.isna(row[name]) else row[name] for name in columns}
        records.append({"covariates": covariates | {"sex": f"{row.sex:g}"}})
    encoding = fit_clinical(records, columns)
    outcome = {"time": table.time, "event": table.status}

    def cox(x: np.ndarray) -> CoxPHFitter:
        frame = pd.DataFrame(x, columns=clinical_names(encoding)).assign(**outcome)
        return CoxPHFitter().fit(frame, "time", "event")

    ours = cox(np.array([record["clinical"] for record in encode_clinical(records, encoding)]))
    scaled = table[list(columns)].assign(sex=table.sex - 1)
    numeric = [name for name in columns if name != "sex"]
    scaled[numeric] = (scaled[numeric] - scaled[numeric].mean()) / scaled[numeric].std(ddof=0)
    theirs = cox(IterativeImputer(BayesianRidge(), max_iter=50).fit_transform(scaled))
    assert ((ours.params_ - theirs.params_).abs() < 0.1 * ours.standard_errors_).all()
    assert abs(ours.concordance_index_ - theirs.concordance_index_) < 0.005 and ours.concordance_index_ > 0.62
    # Women (2) live longer, a worse performance status means a shorter life: Loprinzi et al., JCO 12 (1994) 601.
    assert ours.params_["sex=2"] < -0.4 and ours.summary.p["sex=2"] < 0.01 and ours.params_["ph.ecog"] > 0.2


# ------------------------------------------------------------------------------------------------------ networks


def small(**arguments) -> SurvivalMapNet:
    torch.manual_seed(0)
    return SurvivalMapNet(dim=16, **arguments)


def test_covariates_move_the_time_and_not_the_map():
    image, clinical, net = torch.rand(2, 1, 16, 16, 16), torch.randn(2, 3), small(clinical_dim=3)
    assert set(net.state_dict()) - set(small().state_dict()) == {
        "clinical_months.weight",
        *(f"blocks.{i}.film.{name}" for i in range(2) for name in ("weight", "bias")),
    }
    before = net(image, None, clinical)
    torch.testing.assert_close(before, net(image, None, 0 * clinical), rtol=0, atol=0)  # they start by saying nothing
    torch.nn.init.normal_(net.clinical_months.weight)
    after = net(image, None, clinical)
    assert torch.equal(after[:, 1], before[:, 1])
    moved = 30 * (0.1 * clinical) @ net.clinical_months.weight[0]
    expected = moved.view(-1, 1, 1, 1).expand(2, 4, 4, 4)
    torch.testing.assert_close(after[:, 0] - before[:, 0], expected, rtol=1e-4, atol=1e-3)
    assert moved.abs().min() > 0.1
    torch.testing.assert_close(torch.jit.script(net)(image, None, clinical), after)


@pytest.mark.parametrize("head", HEADS)
def test_all_that_covariates_do_is_learnt_from_the_patients_time(head):
    net = small(clinical_dim=3, head=head)
    location, weight = net(torch.rand(2, 1, 16, 16, 16), None, torch.randn(2, 3)).unbind(1)
    (location * weight).sum((1, 2, 3)).square().sum().backward()
    for block in net.blocks:
        assert block.film.weight.grad.abs().max() > 0
    assert net.clinical_months.weight.grad.abs().max() > 0


def test_clinical_net_is_a_survival_map_of_one_time_and_of_the_lung():
    net = ClinicalNet(3)
    torch.nn.init.normal_(net.to_location.weight)
    image, lung, clinical = torch.rand(2, 1, 18, 16, 13), torch.zeros(2, 1, 18, 16, 13), torch.randn(2, 3)
    lung[0, :, 2:9, 4:8, :5] = 1
    lung[1, :, :, :8] = 1
    location, weight = net(image, lung, clinical).unbind(1)
    assert location.shape == (2, 5, 4, 4)
    torch.testing.assert_close(weight.sum((1, 2, 3)), torch.ones(2))
    share = torch.nn.functional.avg_pool3d(torch.nn.functional.pad(lung, [0, 3, 0, 0, 0, 2]), 4)[:, 0]
    torch.testing.assert_close(weight, (share > 0) / (share > 0).sum((1, 2, 3), keepdim=True))
    months = 60 + 30 * clinical @ net.to_location.weight[0]
    torch.testing.assert_close(location, months.view(-1, 1, 1, 1) * (share > 0))
    torch.testing.assert_close((location * weight).sum((1, 2, 3)), months)
    torch.testing.assert_close(torch.jit.script(net)(image, lung, clinical), net(image, lung, clinical))
    with pytest.raises(ValueError, match="no lung"):
        net(image, torch.zeros_like(lung), clinical)
    for wrong in (None, torch.zeros(2, 4)):
        with pytest.raises(ValueError, match="length 3"):
            net(image, lung, wrong)
    with pytest.raises(InputError, match="key clinical"):
        ClinicalNet(0)


def test_what_covariates_leave_open_is_learnt_in_a_training():
    """Everybody dies at 20 months; the network begins at 40. Optimizer and steps as shipped."""
    net, objective = ClinicalNet(2, loc_bias=40.0), CenTime(tmax=100)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.002, weight_decay=0.05)
    image, clinical = torch.zeros(32, 1, 4, 4, 4), torch.randn(32, 2)
    outcome = torch.stack([torch.full((32,), 20.0), torch.ones(32)], 1)
    for _ in range(700):
        optimizer.zero_grad()
        objective(net(image, clinical=clinical), outcome).backward()
        optimizer.step()
    assert (patient_numbers(net(image, clinical=clinical))[0] - 20).abs().max() < 3


def test_clinical_net_gives_the_extra_numbers_that_an_objective_asks_for():
    net, image, clinical = ClinicalNet(3, extra=2), torch.rand(2, 1, 8, 8, 8), torch.randn(2, 3)
    plain = net(image, None, clinical)
    assert plain.shape == (2, 4, 2, 2, 2) and bool((plain[:, 1:3] == 0).all())
    torch.nn.init.normal_(net.to_extra.weight)
    said = net(image, None, clinical)
    expected = 3 * torch.tanh(clinical @ net.to_extra.weight.T)
    torch.testing.assert_close(said[:, 1:3], expected.view(2, 2, 1, 1, 1).expand(2, 2, 2, 2, 2))
    assert torch.equal(said[:, [0, 3]], plain[:, [0, 3]])


def test_settings_name_one_of_the_networks_there_are():
    net = network_from({"name": "ClinicalNet", "clinical_dim": 2, "extra": 5})
    assert isinstance(net, ClinicalNet) and net.to_extra.out_features == 5
    assert isinstance(network_from({"dim": 16}), SurvivalMapNet)
    with pytest.raises(InputError, match="os.system .*ClinicalNet, CodebookNet, MaskedAutoencoder, SurvivalMapNet"):
        network_from({"name": "os.system"})
    with pytest.raises(InputError, match="another version: SurvivalMapNet has no min_lung, severity"):
        network_from({"dim": 16, "severity": True, "min_lung": 0.25})


# ---------------------------------------------------------------------------------------------------- whole runs

TRAIN = ["configs/train.json", "configs/cohort/phantom.json", "configs/clinical/fibrosis.json"]
CLINICAL_ONLY = [*TRAIN, "configs/network/clinical_only.json"]
SHORT = {"recipe": "network", "batch_size": 4, "max_epochs": 3, "val_interval": 1}
TINY = {"network_def#dim": 16, **SHORT}


def fit(cohort, folder, config=TRAIN, **override) -> Path:
    run(config, cohort=str(cohort), ckpt_dir=str(folder), output_dir=str(folder), **override)
    return Path(folder) / "model.pt"


@pytest.fixture(scope="module")
def cohort(tiny_cohort, tmp_path_factory) -> Path:
    """The tiny cohort with the columns of a fibrosis study: FVC knows the outcome, DLCO is missing in some."""
    rng = np.random.default_rng(0)
    table = absolute_table(tiny_cohort)
    n = len(table)
    table["age"] = rng.normal(65, 8, n).round(1)
    table["fvc_percent"] = (60 + 30 * (1 - table.event) + table.time / 3 + rng.normal(0, 2, n)).round(1)
    table["dlco_percent"] = rng.normal(50, 12, n).round(1)
    table.loc[::5, "dlco_percent"] = np.nan
    for column, values in {"sex": "fm", "smoking": ["never", "former"], "antifibrotic": ["no", "yes"]}.items():
        table[column] = rng.permutation([values[i // 2 % 2] for i in range(n)])
    table["split"] = [("val" if i < 6 else "test") if i in (4, 5, 12, 13, 14, 15) else "train" for i in range(n)]
    path = tmp_path_factory.mktemp("clinical") / "cohort.csv"
    table.to_csv(path, index=False)
    return path


@pytest.mark.slow
def test_train_and_predict_with_covariates(cohort, tmp_path, capsys):
    model = fit(cohort, tmp_path / "run", **TINY)
    settings = json.loads((model.parent / "settings.json").read_text())
    assert settings["network"]["clinical_dim"] == len(clinical_names(settings["clinical"])) == 7
    state = torch.load(model, weights_only=True)
    assert all(state[name].abs().max() > 0 for name in ("blocks.0.film.weight", "clinical_months.weight"))
    table = pd.read_csv(cohort)[["patient_id", "image", "age", "sex", "fvc_percent", "antifibrotic", "smoking"]]
    table.loc[1, "smoking"] = "vape"
    table.loc[2, "fvc_percent"] = np.nan
    table.head(3).to_csv(tmp_path / "new.csv", index=False)
    capsys.readouterr()
    run("configs/inference.json", cohort=str(tmp_path / "new.csv"), ckpt=str(model), output_dir=str(tmp_path / "out"))
    said = capsys.readouterr().out
    assert said.count("column dlco_percent: no scan has a value") == 1
    assert said.count("column smoking: vape was not seen in training (former, never)") == 1
    predictions = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert (predictions.status == "ok").all() and predictions.mean_months.notna().all()
    doubt = f"{in_words(settings['learnt'])}; taken as missing: "  # of five deaths at least could a verdict be sure
    assert doubt.startswith("it is not sure") and predictions.message.tolist() == [
        f"{doubt}dlco_percent",
        f"{doubt}dlco_percent, smoking (vape was not seen in training)",
        f"{doubt}fvc_percent, dlco_percent",
    ]
    assert "vape was not seen" in (tmp_path / "out" / "cohort.html").read_text()
    run("configs/inference.json", image=table.image[0], ckpt=str(model), output_dir=str(tmp_path / "one"))
    assert "age, sex, fvc_percent" in pd.read_csv(tmp_path / "one" / "predictions.csv").message[0]
    run("configs/evaluate.json", cohort=str(cohort), ckpt=str(model), output_dir=str(tmp_path / "evaluate"))
    assert len(pd.read_csv(tmp_path / "evaluate" / "metrics_per_scan.csv")) == 4


def test_a_run_with_other_covariates_is_another_run(cohort, tmp_path):
    fit(cohort, tmp_path / "run", **TINY | {"max_epochs": 1})
    table = pd.read_csv(cohort)
    table.loc[table.split == "val", "age"] += 1
    table.to_csv(tmp_path / "older.csv", index=False)
    with pytest.raises(InputError, match="cohort_sha256"):
        fit(tmp_path / "older.csv", tmp_path / "run", **TINY | {"max_epochs": 1})


@pytest.mark.slow
def test_clinical_only_and_image_only_run_with_the_same_configs(cohort, tmp_path):
    model = fit(cohort, tmp_path / "clinical", CLINICAL_ONLY, **SHORT | {"max_epochs": 60, "val_interval": 20})
    assert json.loads((model.parent / "settings.json").read_text())["network"]["name"] == "ClinicalNet"
    override = {"cohort": str(cohort), "ckpt": str(model)}
    run("configs/inference.json", output_dir=str(tmp_path / "out"), refine=False, **override)
    predictions, truth = pd.read_csv(tmp_path / "out" / "predictions.csv"), pd.read_csv(cohort)
    assert concordance_index(truth.time, predictions.mean_months, truth.event) > 0.85
    heat = nib.load(tmp_path / "out" / "maps" / "p0_heat.nii.gz").get_fdata()
    inside = heat[4:-4, 4:-4, 4:-4]  # fewer patches reach the border
    assert inside.std() < 0.001 * inside.mean()
    model = fit(cohort, tmp_path / "image", clinical={}, **TINY | {"max_epochs": 1})
    settings = json.loads((model.parent / "settings.json").read_text())
    assert settings["clinical"] == {} and settings["network"]["clinical_dim"] == 0


def test_bad_columns_stop_before_training(cohort, tmp_path):
    table = pd.read_csv(cohort)
    table.loc[table.split == "train", "sex"] = "f"
    table.to_csv(tmp_path / "c.csv", index=False)
    with pytest.raises(InputError, match="column sex: f in each of the 10 training scans"):
        fit(tmp_path / "c.csv", tmp_path / "run", **TINY)
    assert not (tmp_path / "run" / "last.pt").exists()
    with pytest.raises(InputError, match="key clinical"):
        fit(cohort, tmp_path / "none", CLINICAL_ONLY, clinical={}, **SHORT)
