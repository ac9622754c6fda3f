# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The figures: what is drawn equals lifelines and the data, and cohorts that can't tell get a figure that says so."""

from __future__ import annotations

import json
import re
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from ignite.engine import Engine, Events
from lifelines import KaplanMeierFitter
from lifelines.statistics import logrank_test
from monai.data import MetaTensor

from bundle.handlers import HistoryWriter, draw_training, report_evaluation, save_figure
from bundle.handlers.evaluation import mask_cells
from bundle.metrics import MapDistribution, SurvivalMetric
from bundle.report.figures import (
    calibration,
    kaplan_meier_by_risk,
    map_distribution,
    predicted_against_real,
    risk_groups,
    training_curves,
)
from bundle.report.pictures import svg
from bundle.survival.kaplan_meier import kaplan_meier, kaplan_meier_censoring, restricted_mean

FIGURES = ("calibration", "kaplan_meier_by_risk", "map_distribution", "predicted_against_real")


def cohort(seed: int = 0, num: int = 120, whole: bool = True) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    death, censoring = rng.exponential(40, num), rng.uniform(5, 110, num)
    time = np.minimum(death, censoring)
    predicted = death * rng.lognormal(0, 0.4, num)
    table = {"time": np.ceil(time) if whole else time, "event": (death <= censoring) * 1, "predicted": predicted}
    table |= {f"death_{h}m": 1 / (1 + np.exp((predicted - h) / 10)) for h in (12, 24, 60)}
    return pd.DataFrame(table)


def steps(ax) -> dict[str, np.ndarray]:
    """The step curves of an axes by the first word of their label, (2, N)."""
    return {line.get_label().split()[0]: line.get_xydata().T for line in ax.lines if "steps" in line.get_drawstyle()}


@pytest.mark.parametrize("whole", [True, False])
def test_kaplan_meier_curves_bands_and_p_equal_lifelines(whole):
    for seed in range(3):
        table = cohort(seed, 60, whole)
        risk = -table.predicted + np.random.default_rng(seed).normal(0, 40, 60)
        figure = kaplan_meier_by_risk(risk, table.time, table.event)
        ax = figure.axes[0]
        high = (risk > risk.median()).to_numpy()
        assert len(steps(ax)) == len(ax.collections) == 2
        for (name, (x, y)), band, mask in zip(steps(ax).items(), ax.collections, (~high, high)):
            fitted = KaplanMeierFitter().fit(table.time[mask], table.event[mask])
            assert name == ("high" if mask is high else "low")
            assert y == pytest.approx(fitted.survival_function_at_times(x).to_numpy(), abs=1e-6)
            assert set(x[1:]) == set(table.time[mask])
            known = fitted.survival_function_.iloc[:, 0].between(0, 1, inclusive="neither")
            limits = fitted.confidence_interval_[known].to_numpy()
            drawn = np.unique(band.get_paths()[0].vertices[:, 1])
            assert np.isin(limits.round(6), drawn.round(6)).all()
        p = logrank_test(table.time[high], table.time[~high], table.event[high], table.event[~high]).p_value
        assert ax.get_title() == ("log-rank p < 0.001" if p < 0.001 else f"log-rank p = {p:.3f}")


def test_numbers_at_risk_and_censored_ticks_are_those_of_the_cohort():
    table = cohort(1)
    figure = kaplan_meier_by_risk(-table.predicted, table.time, table.event)
    ax, below = figure.axes
    high = (table.predicted < table.predicted.median()).to_numpy()
    assert [label.get_text() for label in below.get_yticklabels()] == ["low risk", "high risk"]
    drawn = {(round(t.get_position()[0], 6), t.get_position()[1]): int(t.get_text()) for t in below.texts}
    assert len(drawn) >= 10
    for (tick, row), number in drawn.items():
        assert number == (table.time[high == bool(row)] >= tick).sum()
    ticks = [set(line.get_xdata()) for line in ax.lines if line.get_marker() == "|"]
    assert ticks == [set(table.time[mask & (table.event == 0)]) for mask in (~high, high)]


def test_kaplan_meier_estimates_equal_lifelines():
    for whole in (True, False):
        table = cohort(2, 80, whole)
        at = np.linspace(0, table.time.max(), 57)
        expected = KaplanMeierFitter().fit(table.time, table.event).survival_function_at_times(at)
        assert kaplan_meier(table.time, table.event).evaluate(at) == pytest.approx(expected.to_numpy(), abs=1e-9)
        # Of a tie the death comes first, so that patient isn't at risk of being censored.
        expected = KaplanMeierFitter().fit(table.time - 1e-6 * table.event, 1 - table.event)
        censoring = kaplan_meier_censoring(table.time, table.event).evaluate(at)
        assert censoring == pytest.approx(expected.survival_function_at_times(at).to_numpy(), abs=1e-9)
    assert restricted_mean([10, 20, 30], [1, 1, 1], 25) == pytest.approx(10 + 10 * 2 / 3 + 5 / 3)
    assert restricted_mean([10, 20, 30], [1, 1, 1], 50) == pytest.approx(20)  # all died: nothing is left to know
    assert restricted_mean([10, 20, 30], [1, 1, 0], 31) is None and restricted_mean([], [], 12) is None


def test_predicted_against_real_draws_every_patient_and_arrows_for_the_censored():
    table = cohort(3, 30)
    figure = predicted_against_real(table.predicted, table.time, table.event)
    ax = figure.axes[0]
    lines = {line.get_label(): line.get_xydata() for line in ax.lines}
    died = table.event == 1
    assert (lines["predicted = real"][:, 0] == lines["predicted = real"][:, 1]).all()
    assert (lines[f"died (n = {died.sum()})"] == table.loc[died, ["time", "predicted"]].to_numpy()).all()
    (arrows,) = ax.containers
    assert (arrows.lines[0].get_xydata() == table.loc[~died, ["time", "predicted"]].to_numpy()).all()
    tips = arrows.lines[1][0].get_xdata()
    assert (tips > table.time[~died]).all()  # death comes later
    low, high = ax.get_xlim()
    assert low == 0 and high > table[["time", "predicted"]].to_numpy().max() and ax.get_ylim() == (low, high)


def test_calibration_equals_lifelines_in_groups_of_predicted_risk():
    table = cohort(4, 200)
    figure = calibration({h: table[f"death_{h}m"] for h in (12, 24, 60)}, table.time, table.event)
    for ax, horizon in zip(figure.axes, (12, 24, 60)):
        assert ax.get_title() == f"death by {horizon} months"
        x, y = ax.containers[0].lines[0].get_xydata().T
        risk = table[f"death_{horizon}m"]
        expected = []
        for _, part in table.groupby(pd.qcut(risk, 5)):
            fitted = KaplanMeierFitter().fit(part.time, part.event)
            at = fitted.survival_function_at_times(horizon).item()
            limits = fitted.confidence_interval_.asof(horizon).to_numpy()
            expected.append((part[risk.name].mean(), 1 - at, *(1 - limits[::-1] if 0 < at < 1 else [1 - at] * 2)))
        expected = np.array(expected)
        assert np.stack([x, y], 1) == pytest.approx(expected[:, :2], abs=1e-6)
        bars = np.array([segment[:, 1] for segment in ax.containers[0].lines[2][0].get_segments()])
        assert bars == pytest.approx(expected[:, 2:], abs=1e-6)


def test_risk_groups_keep_ties_together():
    assert risk_groups([3, 1, 2, 4], 2).tolist() == [1, 0, 0, 1]
    assert risk_groups([1, 1, 1, 2], 2).tolist() == [0, 0, 0, 1]
    assert risk_groups([1, 2, 2, 2], 2).tolist() == [0, 1, 1, 1]  # the median is the largest
    assert risk_groups([2, 2, 2], 2).tolist() == [0, 0, 0]
    assert risk_groups([5], 2).tolist() == [0] and risk_groups([], 2).tolist() == []
    assert np.bincount(risk_groups(np.arange(100), 5)).tolist() == [20] * 5
    assert risk_groups([1, 2, 3], 5).tolist() == [0, 1, 2]


CASES = {
    "no patients": lambda t: t[:0],
    "one patient": lambda t: t[:1],
    "fewer patients than groups": lambda t: t[:3],
    "no deaths": lambda t: t.assign(event=0),
    "no one censored": lambda t: t.assign(event=1),
    "one prediction for all": lambda t: t.assign(predicted=30.0, death_12m=0.1, death_24m=0.3, death_60m=0.7),
    "all at one time": lambda t: t.assign(time=20.0),
    "followed for a year": lambda t: t.assign(time=t.time.clip(upper=11), event=t.event * (t.time < 11)),
}


@pytest.mark.parametrize("case", CASES)
def test_cohorts_that_cannot_tell_have_figures_that_say_so(tmp_path, case):
    table = CASES[case](cohort(5, 40))
    outcome = table.time, table.event
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        by_risk = kaplan_meier_by_risk(-table.predicted, *outcome)
        agreement = calibration({h: table[f"death_{h}m"] for h in (12, 24, 60)}, *outcome)
        for i, figure in enumerate((predicted_against_real(table.predicted, *outcome), by_risk, agreement)):
            save_figure(figure, tmp_path, str(i))
    assert len(list(tmp_path.iterdir())) == 6
    title, notes = by_risk.axes[0].get_title(), [text.get_text() for text in by_risk.axes[0].texts]
    if case == "no patients":
        assert notes == ["no patients"] and [t.get_text() for t in agreement.axes[2].texts] == ["no patients"]
    elif case in ("no deaths", "one patient"):
        assert title == "no deaths: nothing to compare"
    elif case == "one prediction for all":
        assert title == "all have the same risk: nothing to compare"
    elif case == "followed for a year":
        assert " of 5 groups not followed so far" in agreement.axes[1].get_title()
    else:
        assert title.startswith("log-rank p")
    assert not any("nan" in text.get_text() for ax in by_risk.axes for text in ax.texts) and "nan" not in title


def test_logrank_without_a_death_while_both_groups_are_at_risk():
    figure = kaplan_meier_by_risk([2, 2, 1, 1], [5, 6, 20, 30], [0, 0, 1, 1])
    assert figure.axes[0].get_title() == "log-rank: no death while both groups are at risk"


def test_svg_is_small_undated_the_same_every_time_and_its_text_is_text():
    def draw(num):
        table = cohort(6, num)
        figures = (predicted_against_real(table.predicted, table.time, table.event),)
        return [svg(figure) for figure in (*figures, kaplan_meier_by_risk(-table.predicted, table.time, table.event))]

    once, again = draw(100), draw(100)
    assert once == again
    assert not any(re.search(rb"dc:date", content) for content in once)
    assert b">real time, months<" in once[0] and b">log-rank p" in once[1]
    assert all(len(content) < 100_000 for content in once)
    assert all(len(content) < 250_000 for content in draw(3000))  # many points are pixels


def test_training_curves_draw_the_history_and_leave_out_epochs_without_a_validation():
    history = pd.DataFrame({"epoch": range(1, 7), "train_loss": np.arange(6) / 2, "val_c_index": [np.nan, 0.5] * 3})
    figure = training_curves(history)
    loss, score = (ax.lines[0].get_xydata().tolist() for ax in figure.axes)
    assert loss == history[["epoch", "train_loss"]].to_numpy().tolist()
    assert score == [[2, 0.5], [4, 0.5], [6, 0.5]]
    assert [ax.get_ylabel() for ax in figure.axes] == ["train loss", "val c index"]
    none = training_curves(history[:1])
    assert [text.get_text() for text in none.axes[1].texts] == ["no values"]


def history_of(tmp_path, epochs: range, losses: dict[int, list[float]]) -> pd.DataFrame:
    """Run a trainer from one epoch to another, with a validation every second epoch, and read what was written."""
    validator = Engine(lambda engine, batch: None)
    trainer = Engine(lambda engine, i: {"loss": torch.tensor(losses[engine.state.epoch][i])})

    @trainer.on(Events.STARTED)
    def resume(engine):
        engine.state.epoch, engine.state.iteration = epochs.start - 1, 2 * (epochs.start - 1)

    @trainer.on(Events.EPOCH_COMPLETED(every=2))
    def validate(engine):
        validator.state.epoch = engine.state.epoch
        validator.state.metrics = {"val_c_index": engine.state.epoch / 10, "val_curve": [1, 2]}

    HistoryWriter(tmp_path / "history.csv", validator).attach(trainer)
    trainer.run([0, 1], max_epochs=epochs.stop - 1)
    return pd.read_csv(tmp_path / "history.csv")


def test_history_goes_on_in_a_resumed_run_and_begins_anew_in_another(tmp_path):
    losses = {epoch: [epoch, epoch + 1.0] for epoch in range(1, 8)}
    history_of(tmp_path, range(1, 6), losses)
    losses[5] = [0.0, 0.0]  # epoch 5 was written but not saved by the checkpoint: it comes again
    table = history_of(tmp_path, range(5, 7), losses)
    assert list(table.columns) == ["epoch", "train_loss", "val_c_index"]
    assert table.epoch.tolist() == [1, 2, 3, 4, 5, 6]
    assert table.train_loss.tolist() == [1.5, 2.5, 3.5, 4.5, 0, 6.5]
    assert table.val_c_index.fillna(0).tolist() == [0, 0.2, 0, 0.4, 0, 0.6]
    assert history_of(tmp_path, range(1, 3), losses).epoch.tolist() == [1, 2]
    draw_training(str(tmp_path))
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == ["training_curves.png", "training_curves.svg"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures", "history.csv"]
    draw_training(str(tmp_path / "figures"))  # nothing to draw


def test_map_distribution_holds_each_scans_quantiles_by_group():
    rng = np.random.default_rng(0)
    maps, lesions = [], []
    for i in range(3):
        weight = rng.random((4, 5, 6))
        weight[0] = 0  # outside the lung
        maps.append(torch.tensor(np.stack([np.where(weight > 0, rng.normal(50, 20, weight.shape), 0), weight])))
        lesions.append(torch.tensor(rng.random(weight.shape) * (weight > 0)) if i < 2 else None)
    distribution = MapDistribution()
    for i in (1, 0, 2, 1):  # one comes twice
        distribution([maps[i]], [lesions[i]], [f"p{i}"])
    groups = distribution.aggregate()
    at = np.linspace(0, 1, 201)
    inside, outside, rest = groups.values()
    for found, pick in ((inside, lambda lesion: lesion >= 0.5), (outside, lambda lesion: lesion < 0.5)):
        for channel, scale in ((0, 1), (1, 90)):  # 90 of the cells are lung
            parts = [m[channel][(m[1] > 0) & pick(c)] for m, c in zip(maps, lesions[:2])]
            expected = [np.quantile(part, at) * scale for part in parts]
            assert found[channel] == pytest.approx(np.concatenate(expected))
    assert rest[0] == pytest.approx(np.quantile(maps[2][0][maps[2][1] > 0], at))
    figure = map_distribution(groups)
    for ax, channel in zip(figure.axes, (0, 1)):
        values = [g[channel] if channel == 0 else np.log10(g[channel].clip(1e-3)) for g in groups.values()]
        for value, stairs in zip(values, [patch for patch in ax.patches if not patch.get_fill()]):
            count, edges, _ = stairs.get_data()
            expected = np.histogram(value, edges)[0]
            assert count == pytest.approx(expected / expected.max())


def test_cells_of_a_mask_are_those_of_the_map_even_beyond_the_image():
    image = MetaTensor(torch.zeros(1, 5, 6, 7))
    mask, lung = MetaTensor(torch.zeros(1, 5, 6, 7)), torch.ones(1, 5, 6, 7)
    mask[0, 1:5, 2:4, 3:7] = 1
    lung[0, 4] = 0
    cells = mask_cells(mask, image, lung, 2, (4, 4, 4))
    seen = np.zeros((8, 8, 8))
    seen[1:4, 2:4, 3:7] = 1
    assert cells.shape == (1, 4, 4, 4)
    assert cells[0].numpy() == pytest.approx(seen.reshape(4, 2, 4, 2, 4, 2).mean((1, 3, 5)))


def test_map_distribution_of_few_or_equal_cells_is_drawn(tmp_path):
    distribution = MapDistribution()
    assert all(len(locations) == 0 for locations, _ in distribution.aggregate().values())
    save_figure(map_distribution(distribution.aggregate()), tmp_path, "none")
    distribution([torch.full((2, 2, 2, 2), 0.125)], [None])
    groups = distribution.aggregate()
    assert groups["inside a lesion"][0].size == 0 and (groups["scans without a marked lesion"][1] == 1).all()
    save_figure(map_distribution(groups), tmp_path, "equal")


def test_report_of_an_evaluation_without_predictions_has_no_figures(tmp_path):
    entry = {"value": None, "lower": None, "upper": None, "num_scans": 0}
    (tmp_path / "metrics.json").write_text(json.dumps({"localisation": {"auroc": entry, "num_scans": 3}}))
    report_evaluation(str(tmp_path), SurvivalMetric(), MapDistribution())
    page = (tmp_path / "report.html").read_text()
    assert "<img" not in page and "<td>auroc</td><td>–</td>" in page and "3 scans" in page
    assert not (tmp_path / "figures").exists()


def test_report_of_an_evaluation_holds_figures_and_metrics(tmp_path):
    survival, distribution = SurvivalMetric(num_resamples=2), MapDistribution()
    table = cohort(7, 12)
    outcome = torch.tensor(table[["time", "event"]].to_numpy())
    names = [f"patient {i}" for i in range(12)]
    survival(torch.softmax(torch.randn(12, 120), 1), outcome, patient_id=names)
    distribution([torch.rand(2, 3, 3, 3) for _ in names], [None] * 12, names)
    entry = {"value": 0.7, "lower": 0.61, "upper": 0.8, "num_scans": 12}
    (tmp_path / "metrics.json").write_text(json.dumps({"survival": {"c_index": entry, "num_events": 5}}))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "history.csv").write_text("epoch,train_loss,val_c_index\n1,2.5,\n2,2.1,0.7\n")
    report_evaluation(str(tmp_path), survival, distribution, str(tmp_path / "run" / "model.pt"))
    files = sorted(p.name for p in (tmp_path / "figures").iterdir())
    assert files == sorted(f"{name}.{kind}" for name in (*FIGURES, "training_curves") for kind in ("png", "svg"))
    page = (tmp_path / "report.html").read_text()
    assert page.count('<img alt="') == 5 and "Research use only" in page
    assert "<td>c_index</td><td>0.700</td><td>0.610</td><td>0.800</td><td>12</td>" in page and "5 events" in page
    assert all(link.startswith("data:") for link in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert not any(name in page for name in names)
