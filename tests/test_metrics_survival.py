# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable

import ignite.distributed as idist
import numpy as np
import pandas as pd
import pytest
import torch
from ignite.engine import Engine
from lifelines import KaplanMeierFitter
from lifelines.utils import concordance_index, restricted_mean_survival_time
from monai.handlers import IgniteMetricHandler, from_engine
from scipy.stats import chisquare
from sksurv import metrics as sksurv
from sksurv.util import Surv

from bundle.errors import InputError
from bundle.metrics import ConcordanceIndex, MeanLogLikelihood, PartialLogLikelihood, SurvivalMetric
from bundle.metrics.survival import (
    c_index,
    c_index_ipcw,
    correlation,
    cumulative_auc,
    d_calibration,
    integrated_brier,
    mae_censored,
    mae_events,
    mae_pseudo_observation,
    mean_time_censored,
    rae_events,
    rmst_bias,
)
from bundle.run.distributed import on_all_scans
from bundle.survival import CenTime, Cox, mean_months, restricted_mean_months

TMAX = 120
DAY = 1 / 30.4375  # months
TABLES = {
    # file: time, its unit in months, event, its value for a death, what to predict from
    "gbsg2_686.csv": ("time", DAY, "cens", 1, "age"),
    "ncctg_lung_228.csv": ("time", DAY, "status", 1, "age"),
    "nsclc_radiogenomics_143.csv": ("Survival.time", DAY, "deadstatus.event", 1, "Age at Histological Diagnosis"),
    "rossi_432.csv": ("week", 1.0, "arrest", 1, "age"),
    "veteran_lung_137.csv": ("Survival_in_days", DAY, "Status", "dead", "Age_in_years"),
    "whas500_500.csv": ("lenfol", DAY, "fstat", 1, "age"),
}


def cohort(seed: int, num: int = 80, whole: bool = True) -> tuple[torch.Tensor, ...]:
    """risk (rounded, so that it ties), time (whole months tie too), event and pmf of `num` patients."""
    rng = np.random.default_rng(seed)
    death, censoring = rng.exponential(35, num).clip(0.1, 110), rng.uniform(5, 100, num)
    time = np.minimum(death, censoring)
    time = np.ceil(time) if whole else time
    location = np.round(death + rng.normal(0, 20, num), -1)
    return predictions(location, time, death <= censoring)


def predictions(location: np.ndarray, time: np.ndarray, event: np.ndarray) -> tuple[torch.Tensor, ...]:
    """Risk and pmf of a normal distribution around each location, with time and event."""
    month = np.arange(1, TMAX + 1)
    pmf = np.exp(-((month - location[:, None]) ** 2) / 400)
    pmf /= pmf.sum(1, keepdims=True)
    return tuple(torch.tensor(np.asarray(values, float)) for values in (-location, time, event, pmf))


def real_cohort(path) -> tuple[torch.Tensor, ...]:
    """risk, time in months, event and pmf of a real table, predicted from the age alone, with its ties."""
    time, unit, event, died, age = TABLES[path.name]
    table = pd.read_csv(path)
    time, event, age = table[time].to_numpy() * unit, table[event].to_numpy() == died, table[age].to_numpy(float)
    return predictions(110 - age, time, event)


def structured(time: torch.Tensor, event: torch.Tensor) -> np.ndarray:
    """As scikit-survival takes them, with deaths a moment earlier: then its P(C > T) is P(C >= T), also at the last time."""
    return Surv.from_arrays(event.numpy() == 1, time.numpy() - 1e-7 * event.numpy())


def assert_equal_to_scikit_survival(risk, time, event, pmf):
    here = structured(time, event)
    expected = sksurv.concordance_index_censored(event.numpy() == 1, time.numpy(), risk.numpy())[0]
    assert c_index(risk, time, event) == pytest.approx(expected, abs=1e-6)
    expected = sksurv.concordance_index_ipcw(here, here, risk.numpy())[0]
    assert c_index_ipcw(risk, time, event) == pytest.approx(expected, abs=1e-6)
    months = np.arange(np.ceil(time.min().item()), np.ceil(time.max().item()))
    survival = 1 - pmf.cumsum(1).numpy()[:, months.astype(int) - 1]
    expected = sksurv.integrated_brier_score(here, here, survival, months)
    assert integrated_brier(pmf, time, event) == pytest.approx(expected, abs=1e-6)
    for horizon in (12, 24, 36, 60):
        dead = bool(((time <= horizon) & (event == 1)).any())
        if not dead or horizon >= time.max():
            assert cumulative_auc(risk, time, event, horizon) is None
            continue
        expected = sksurv.cumulative_dynamic_auc(here, here, risk.numpy(), [horizon])[0][0]
        assert cumulative_auc(risk, time, event, horizon) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("num", [12, 80, 400])
def test_equal_to_scikit_survival_with_ties(num, whole):
    for seed in range(3):
        assert_equal_to_scikit_survival(*cohort(seed, num, whole))


@pytest.mark.parametrize("table", TABLES)
def test_equal_to_the_oracles_on_real_tables(shared_data, table):
    risk, time, event, pmf = real_cohort(shared_data / "survival" / table)
    assert 5 < event.sum() and len(time) > 100
    assert_equal_to_scikit_survival(risk, time, event, pmf)
    assert c_index(risk, time, event) == pytest.approx(concordance_index(time, -risk, event), abs=1e-6)
    assert d_calibration(pmf, time, event) == pytest.approx(d_calibration_by_a_loop(pmf, time, event), rel=1e-6)
    expected = mae_pseudo_observation_by_a_loop(-risk, time, event)
    assert mae_pseudo_observation(-risk, time, event) == pytest.approx(expected, abs=1e-6)
    for horizon in (12, 24):
        assert rmst_bias(pmf, time, event, horizon) == pytest.approx(rmst_bias_by_lifelines(pmf, time, event, horizon))


def test_deaths_tied_with_censorings_weigh_by_the_censoring_before_them():
    """Months 1 2 2 3 3: one of two is censored at 2, and the death at 3 is tied with the last censoring."""
    time, event = torch.tensor([1.0, 2, 2, 3, 3]), torch.tensor([1.0, 1, 0, 1, 0])
    risk = torch.tensor([1.0, 4, 5, 2, 3])
    # P(C >= 1) = P(C >= 2) = 1. Of the three at risk of censoring at 2 one is censored: P(C >= 3) = 2 / 3.
    pairs = {0: ([0, 0, 0, 0], 1), 1: ([0, 1, 1], 1), 3: ([0], 9 / 4)}  # of each death: those who outlive it, weight
    won, all_pairs = (sum(w * f(p) for p, w in pairs.values()) for f in (sum, len))
    assert c_index_ipcw(risk, time, event) == pytest.approx(won / all_pairs)
    # Death at 1 (weight 1) and at 2 (weight 1) against the two who live longer, with risks 2 and 3.
    assert cumulative_auc(risk, time, event, 2.0) == pytest.approx(2 / 4)
    assert cumulative_auc(-risk, time, event, 2.0) == pytest.approx(2 / 4)
    late, dead = torch.tensor([30.0, 30, 20]), torch.tensor([0.0, 1, 1])
    assert c_index_ipcw(-late, late, dead) == pytest.approx(2.5 / 3)  # the death at the last month counts, too


def test_c_index_equals_lifelines_and_a_loop_over_pairs():
    risk, time, event, _ = cohort(3, 60)
    pairs = [
        1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
        for i in range(60)
        for j in range(60)
        if event[i] == 1 and (time[j] > time[i] or (time[j] == time[i] and event[j] == 0))
    ]
    assert c_index(risk, time, event) == pytest.approx(np.mean(pairs), abs=1e-6)
    assert c_index(risk, time, event) == pytest.approx(concordance_index(time, -risk, event), abs=1e-6)
    assert c_index(-time, time, torch.ones(60)) == 1 and c_index(time, time, torch.ones(60)) == 0


def test_what_a_cohort_cannot_tell_is_none():
    risk, time, event, pmf = cohort(0, 30)
    alive = torch.zeros(30)
    for score in (c_index, c_index_ipcw):
        assert score(risk, time, alive) is None
        assert score(risk[:1], time[:1], torch.ones(1)) is None
        assert score(risk, torch.full((30,), 9.0), torch.ones(30)) is None  # all die together
        assert score(risk * 0, time, event) == 0.5
    assert cumulative_auc(risk * 0, time, event, 24) == 0.5
    assert cumulative_auc(risk, time, alive, 24) is None
    assert cumulative_auc(risk, time, event, 200) is None
    assert integrated_brier(pmf, time, alive) is None
    assert integrated_brier(pmf[:1], time[:1], torch.ones(1)) is None
    for score in (mae_events, rae_events, correlation):
        assert score(time, time, alive) is None
    assert mae_censored(time, time, alive + 1) is None and mean_time_censored(time, alive + 1) is None
    assert correlation(time * 0, time, alive + 1) is None
    assert correlation(time[:2] + 1, time[:2], alive[:2] + 1) is None
    assert d_calibration(pmf[:0], time[:0], event[:0]) is None
    assert mae_pseudo_observation(time, time, alive) is None and mae_pseudo_observation(*[time[:0]] * 3) is None
    assert rmst_bias(pmf[:0], time[:0], event[:0], 12) is None
    assert rmst_bias(pmf, time, alive, float(time.max()) + 1) is None  # nobody was followed so far
    assert rmst_bias(pmf, time, alive + 1, 200) is not None  # nobody lived so long


def test_all_ties_have_a_value_or_none():
    """One time, one risk, one distribution for all: nobody can be ranked, but errors have their values."""
    risk, time, pmf = torch.zeros(6), torch.full((6,), 30.0), torch.full((6, TMAX), 1 / TMAX)
    died = torch.tensor([1.0, 1, 1, 0, 0, 0])
    assert c_index(risk, time, died) == 0.5  # deaths against the censored, who live on
    assert c_index_ipcw(risk, time, died) == 0.5  # the censored were followed up to the deaths
    assert cumulative_auc(risk, time, died, 30) is None and integrated_brier(pmf, time, died) is None
    assert d_calibration(pmf, time, died) < 1
    assert mae_events(time + 2, time, died) == mae_censored(time - 2, time, died) == 2
    assert correlation(time, time, died) is None
    # S falls to 1/2 at 30, and on to 0 at 60: a mean of 0.75 * 30 + 0.25 * 30 = 30 months for all six.
    # Without one of the censored: 3 of 5 die, S is 2/5 until it reaches 0 at 50, the mean 0.7 * 30 + 0.2 * 20 = 25.
    surrogate = 6 * 30 - 5 * 25
    expected = (3 * 0 + 3 * 0.5 * (surrogate - 30)) / (3 + 3 * 0.5)
    assert mae_pseudo_observation(time, time, died) == pytest.approx(expected)


def test_errors_by_hand():
    predicted, time = torch.tensor([10.0, 30.0, 20.0, 50.0]), torch.tensor([20.0, 25.0, 30.0, 40.0])
    event = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert mae_events(predicted, time, event) == 7.5
    assert rae_events(predicted, time, event) == pytest.approx((10 / 20 + 5 / 25) / 2)
    assert mae_censored(predicted, time, event) == 5  # 10 months too early, and 10 months later than seen: no error
    assert mean_time_censored(predicted, event) == 35
    assert correlation(predicted, time, event * 0 + 1) == pytest.approx(np.corrcoef(predicted, time)[0, 1])


def d_calibration_by_a_loop(pmf, time, event):
    counts = np.zeros(10)
    edges = np.arange(TMAX + 1) + 0.5
    for t, died, p in zip(time.tolist(), event.tolist(), pmf.numpy()):
        s = 1 - np.interp(t, edges, np.concatenate([[0], p.cumsum()]))
        if died:
            counts[min(int(s * 10), 9)] += 1
        else:
            for k in range(10):
                counts[k] += max(0, min(s, (k + 1) / 10) - k / 10) / s
    assert counts.sum() == pytest.approx(len(time))
    return chisquare(counts).pvalue


def test_d_calibration_bins_by_a_loop_over_patients():
    for seed in range(3):
        _, time, event, pmf = cohort(seed, 50, whole=False)
        assert d_calibration(pmf, time, event) == pytest.approx(d_calibration_by_a_loop(pmf, time, event), rel=1e-6)


def mean_lifetime(time, event):
    """Area under lifelines' Kaplan-Meier curve: linear between deaths, then on the line from (0, 1) through its end."""
    curve = KaplanMeierFitter().fit(time, event).survival_function_.iloc[:, 0]
    knots = [0.0, *np.unique(time[event == 1]), time.max()]
    values = curve.loc[knots].to_numpy()
    return np.trapezoid(values, knots) + values[-1] * (knots[-1] / (1 - values[-1]) - knots[-1]) / 2


def mae_pseudo_observation_by_a_loop(predicted, time, event):
    """Straight from the paper: each censored patient's own two Kaplan-Meier curves."""
    predicted, time, event = (values.numpy() for values in (predicted, time, event))
    curve = KaplanMeierFitter().fit(time, event)
    errors, weights = [], []
    whole = mean_lifetime(time, event)
    for i in range(len(time)):
        target, weight = time[i], 1.0
        if event[i] == 0:
            weight = 1 - curve.predict(time[i])
            others = np.arange(len(time)) != i
            target = len(time) * whole - (len(time) - 1) * mean_lifetime(time[others], event[others])
        errors.append(abs(predicted[i] - target))
        weights.append(weight)
    return np.average(errors, weights=weights)


@pytest.mark.parametrize("whole", [True, False])
def test_mae_pseudo_observation_by_a_loop_over_patients(whole):
    for seed in range(3):
        risk, time, event, _ = cohort(seed, 40, whole)
        expected = mae_pseudo_observation_by_a_loop(-risk, time, event)
        assert mae_pseudo_observation(-risk, time, event) == pytest.approx(expected, abs=1e-6)
        died = torch.ones(40)
        assert mae_pseudo_observation(-risk, time, died) == pytest.approx(mae_events(-risk, time, died))


def test_mae_pseudo_observation_tells_a_good_prediction_for_the_censored_from_a_hinge_that_cannot():
    rng = np.random.default_rng(0)
    death, censoring = torch.tensor(rng.exponential(35, 400)), torch.tensor(rng.uniform(5, 60, 400))
    time, event = torch.minimum(death, censoring), (death <= censoring).double()
    late = torch.where(event == 1, death, 500.0)
    assert mae_censored(late, time, event) == mae_censored(death, time, event) == 0
    assert mae_pseudo_observation(death, time, event) < 0.2 * mae_pseudo_observation(late, time, event)


def rmst_bias_by_lifelines(pmf, time, event, horizon):
    observed = restricted_mean_survival_time(KaplanMeierFitter().fit(time, event), horizon)
    alive = np.concatenate([np.ones((len(pmf), 1)), 1 - pmf.cumsum(1).numpy()], 1)[:, :-1]  # at 0, 1, ... months
    lived = np.clip(horizon - np.arange(TMAX), 0, 1)  # of the month that follows
    return (alive @ lived).mean() - observed


@pytest.mark.parametrize("horizon", [12, 24.5, 36])
def test_restricted_means_equal_lifelines(horizon):
    for seed in range(2):
        _, time, event, pmf = cohort(seed, 80)
        expected = rmst_bias_by_lifelines(pmf, time, event, horizon)
        assert rmst_bias(pmf, time, event, horizon) == pytest.approx(expected, abs=1e-6)
    assert restricted_mean_months(pmf, TMAX).allclose(mean_months(pmf))


def test_d_calibration_accepts_the_true_distribution_and_rejects_a_wrong_one():
    rng = np.random.default_rng(0)
    pmf = torch.softmax(-(((torch.arange(1, TMAX + 1) - 55.0) / 30) ** 2), 0).expand(300, TMAX)
    accepted = 0
    for _ in range(40):
        death = rng.choice(np.arange(1, TMAX + 1), 300, p=pmf[0].double().numpy() / pmf[0].double().sum().item())
        censoring = rng.uniform(1, 150, 300)
        time, event = torch.tensor(np.minimum(death, censoring)), torch.tensor(death <= censoring).float()
        accepted += d_calibration(pmf, time, event) > 0.05
        assert d_calibration(pmf.roll(20, 1), time, event) < 1e-3
    assert accepted >= 33
    assert d_calibration(pmf[:1], torch.tensor([500.0]), torch.zeros(1)) >= 0  # censored beyond tmax: S = 0


def test_metric_has_every_key_with_an_interval_around_the_value():
    _, time, event, pmf = cohort(1)
    metric = SurvivalMetric(num_resamples=30)
    metric(pmf, torch.stack([time, event], 1))
    result = metric.aggregate()
    assert result.pop("num_scans") == 80
    deaths = result.pop("num_events")
    assert deaths == int(event.sum())
    assert list(result) == [
        *("c_index", "c_index_ipcw", "integrated_brier", "auc_12m", "auc_24m", "auc_36m", "auc_60m", "d_calibration_p"),
        *("mae_events", "rae_events", "mae_censored", "mae_pseudo_observation"),
        *("rmst_bias_12m", "rmst_bias_24m", "rmst_bias_36m", "rmst_bias_60m", "correlation", "mean_time_censored"),
    ]
    for name, entry in result.items():
        assert list(entry) == ["value", "lower", "upper", "num_scans"]
        if name != "d_calibration_p":  # repeated patients make a resample look worse calibrated
            assert entry["lower"] < entry["value"] < entry["upper"]
    assert result["mae_events"]["num_scans"] == deaths and result["mae_censored"]["num_scans"] == 80 - deaths
    mean = mean_months(pmf)
    assert result["c_index"]["value"] == pytest.approx(concordance_index(time, mean, event), abs=1e-6)
    table = metric.table()
    median = torch.tensor(table.median_months)
    assert result["mae_events"]["value"] == pytest.approx(mae_events(median, time, event))
    assert table.time.tolist() == time.tolist()
    assert table.mean_months.tolist() == pytest.approx(mean.tolist())
    assert table.death_24m.tolist() == pytest.approx(pmf[:, :24].sum(1).tolist())
    assert table.rmst_60m.tolist() == pytest.approx(restricted_mean_months(pmf, 60).tolist())


def test_order_batches_and_repeated_patients_change_nothing():
    _, time, event, pmf = cohort(1, 20)
    outcome, names = torch.stack([time, event], 1), [f"p{i:02}" for i in range(20)]
    one, many = SurvivalMetric(num_resamples=10), SurvivalMetric(num_resamples=10)
    one(pmf, outcome, patient_id=names)
    for i in (*range(11, 20), 3, *range(11)):
        many([pmf[i]], [outcome[i]], patient_id=[names[i]])
    assert one.aggregate() == many.aggregate() and one.table().equals(many.table())


def test_degenerate_cohorts_have_no_nan():
    for num, died in ((0, 0.0), (1, 1.0), (1, 0.0), (5, 0.0)):
        metric = SurvivalMetric(num_resamples=5)
        if num:
            _, time, _, pmf = cohort(0, num)
            metric(pmf, torch.stack([time, torch.full((num,), died)], 1))
        result = metric.aggregate()
        assert result.pop("num_scans") == num == len(metric.table())
        assert result.pop("num_events") == num * died
        assert result["c_index"] == {"value": None, "lower": None, "upper": None, "num_scans": 0}
        for entry in result.values():
            assert all(entry[k] is None or np.isfinite(entry[k]) for k in entry)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda pmf, outcome: pmf.mul_(2), "sum to 1"),
        (lambda pmf, outcome: pmf[0].fill_(torch.nan), "sum to 1"),
        (lambda pmf, outcome: outcome[0, 0].fill_(0), "above 0 months, got 0.0"),
        (lambda pmf, outcome: outcome[0, 0].fill_(torch.nan), "above 0 months, got nan"),
        (lambda pmf, outcome: outcome[0, 1].fill_(2), "event must be 1 .* got 2.0"),
        (lambda pmf, outcome: outcome.resize_(3, 2), "got .*10, 120.*3, 2"),
    ],
)
def test_bad_predictions_and_outcomes_are_refused(change, message):
    _, time, event, pmf = cohort(0, 10)
    outcome = torch.stack([time, event], 1)
    change(pmf, outcome)
    with pytest.raises(InputError, match=message):
        SurvivalMetric()(pmf, outcome)


def test_monais_ignite_handler_drives_it():
    _, time, event, pmf = cohort(1, 24)
    outcome = torch.stack([time, event], 1)

    def step(engine, index):  # decollated, as MONAI's evaluators leave it
        return [{"pmf": pmf[i], "outcome": outcome[i]} for i in range(index, index + 4)]

    engine = Engine(step)
    metric = SurvivalMetric(num_resamples=0)
    handler = IgniteMetricHandler(metric_fn=metric, output_transform=from_engine(["pmf", "outcome"]))
    handler.attach(engine, "survival")
    for _ in range(2):  # the second epoch starts afresh
        engine.run(range(0, 24, 4), max_epochs=1)
        assert engine.state.metrics["survival"]["num_scans"] == 24
    mean = (pmf * torch.arange(1, TMAX + 1)).sum(1)
    assert engine.state.metrics["survival"]["c_index"]["value"] == c_index(-mean, time, event)


def validation(num: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Survival maps of one patch, and outcomes, of `num` scans that were in different batches of a validation."""
    _, time, event, _ = cohort(2, num)
    location = torch.linspace(5, 90, num)[torch.randperm(num, generator=torch.Generator().manual_seed(0))]
    survival_map = torch.stack([location, torch.ones(num)], 1).view(num, 2, 1, 1, 1)
    return survival_map, torch.stack([time, event], 1).float()


def validated(batches: list[list[int]], on_all: Callable = dict, names: str = "mean partial c_index") -> dict[str, float]:
    """The metrics of a validation, those of train.json and of cox.json, of scans that came in these batches."""
    survival_map, outcome = validation()
    cox, centime = Cox(), CenTime(TMAX)
    engine = Engine(lambda engine, rows: {"pred": survival_map[rows], "label": outcome[rows]})
    metrics = {"mean": MeanLogLikelihood(centime), "c_index": ConcordanceIndex(centime)}
    metrics["partial"] = PartialLogLikelihood(cox)
    for name, metric in on_all({name: metrics[name] for name in names.split()}).items():
        metric.attach(engine, name)
    return engine.run(batches).metrics


def test_a_validation_counts_every_scan_once_whatever_batches_they_came_in():
    survival_map, outcome = validation()
    rows = list(range(9))
    uneven = validated([rows[:4], rows[4:8], rows[8:]])
    with torch.no_grad():
        alone = [-CenTime(TMAX)(survival_map[i : i + 1], outcome[i : i + 1]).item() for i in rows]
        partial = -Cox()(survival_map, outcome).item()
    assert uneven["mean"] == pytest.approx(np.mean(alone), rel=1e-5)
    assert uneven["partial"] == pytest.approx(partial, rel=1e-5)
    risk = -mean_months(CenTime(TMAX).pmf(survival_map))
    assert uneven["c_index"] == pytest.approx(c_index(risk, *outcome.unbind(1)))
    batch_means = np.mean([np.mean(alone[k : k + 4]) for k in (0, 4, 8)])
    assert abs(batch_means - uneven["mean"]) > 0.1  # what the mean over batches would say
    for batches in ([rows], [[i] for i in rows]):
        assert validated(batches) == pytest.approx(uneven, rel=1e-5)


def test_a_validation_of_survivors_has_no_concordance():
    metric = ConcordanceIndex(CenTime(TMAX))
    survival_map, outcome = validation()
    metric.update((survival_map, outcome * torch.tensor([1.0, 0.0])))
    assert np.isnan(metric.compute())


def _validate(rank: int, expected: dict) -> None:
    rows = list(range(9))
    # All scans to every process, as GatherInferer gives them. Then a share to each.
    assert validated([rows[:4], rows[4:8], rows[8:]], on_all_scans) == pytest.approx(expected, rel=1e-5)
    shared = validated([rows[:4], rows[4:8]] if rank == 0 else [rows[8:]], names="mean")
    assert shared["mean"] == pytest.approx(expected["mean"], rel=1e-5)


def test_a_validation_of_two_processes_is_that_of_one():
    expected = validated([list(range(9))])
    with idist.Parallel(backend="gloo", nproc_per_node=2, start_method="spawn") as parallel:
        parallel.run(_validate, expected)
