# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.metrics import compute_froc_curve_data, compute_froc_score
from skimage.filters import threshold_otsu
from sklearn.metrics import average_precision_score, roc_auc_score

from bundle.errors import InputError
from bundle.metrics import LocalisationMetric
from bundle.metrics.bootstrap import bootstrap, with_interval
from bundle.metrics.localisation import (
    auroc,
    average_precision,
    confounder_mass,
    froc,
    hit_rate,
    iou_otsu,
    mass_accuracy,
    peak_scores,
    pointing_game,
    rank_accuracy,
    survivor_heat,
)

SCAN_SCORES = [pointing_game, average_precision, auroc, mass_accuracy, rank_accuracy, hit_rate, iou_otsu]


def random_scan(seed: int, size: int = 12, levels: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Noisy heat, zero in half of the grid, with few distinct values if `levels`; mask of two boxes and some voxels."""
    rng = np.random.default_rng(seed)
    mask = rng.random((size,) * 3) > 0.99
    mask[2:5, 2:5, 2:6] = mask[8:10, 8:11, 7:10] = True
    heat = rng.random(mask.shape) + 0.4 * mask
    if levels:
        heat = np.round(heat * levels)
    heat[:, :, ::2] = 0
    return heat.astype(np.float32), mask


def assert_equal_to_sklearn(heat: np.ndarray, mask: np.ndarray) -> None:
    truth, score = mask.ravel(), heat.ravel()
    assert average_precision(heat, mask) == pytest.approx(average_precision_score(truth, score), abs=1e-12)
    assert auroc(heat, mask) == pytest.approx(roc_auc_score(truth, score), abs=1e-12)


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("shift", [0.0, -0.5])
def test_rank_scores_equal_sklearn_with_ties_zeros_and_negative_heat(levels, shift):
    for seed in range(3):
        heat, mask = random_scan(seed, levels=levels)
        heat = heat + np.float32(shift)
        assert_equal_to_sklearn(heat, mask)


def test_a_large_map_is_exact_and_takes_seconds():
    rng = np.random.default_rng(0)
    heat = np.zeros((128, 128, 128), np.float32)
    heat[20:100, 20:100, 20:100] = rng.random((80, 80, 80), np.float32).round(4)
    mask = np.zeros(heat.shape, bool)
    mask[30:50, 30:50, 30:50] = True
    assert_equal_to_sklearn(heat, mask)


def draws_of_hottest(heat: np.ndarray, num: int):
    """Every way to take the `num` hottest voxels with positive heat, as flat indices."""
    flat = heat.ravel()
    warm = [int(v) for v in np.argsort(-flat) if flat[v] > 0]
    if len(warm) <= num:
        return [warm]
    cut = flat[warm[num - 1]]
    sure, tied = [v for v in warm if flat[v] > cut], [v for v in warm if flat[v] == cut]
    return [sure + list(rest) for rest in combinations(tied, num - len(sure))]


@pytest.mark.parametrize("seed", range(8))
def test_rank_accuracy_and_hit_rate_are_means_over_all_ways_to_break_ties(seed):
    rng = np.random.default_rng(seed)
    heat = rng.integers(-1, 4, (3, 3, 2)).astype(np.float32)
    mask = np.zeros(heat.shape, bool)
    mask[0, 0, 0] = mask[2, 0, 1] = mask[2, 1, 1] = mask[2, 2, 1] = True
    lesions = [{0}, set(np.flatnonzero(mask)) - {0}]
    draws = draws_of_hottest(heat, 4)
    share = np.mean([len(set(draw) & set(np.flatnonzero(mask))) / 4 for draw in draws])
    hit = np.mean([np.mean([bool(lesion & set(draw)) for lesion in lesions]) for draw in draws])
    assert rank_accuracy(heat, mask) == pytest.approx(share)
    assert hit_rate(heat, mask) == pytest.approx(hit)


def test_mass_pointing_and_otsu_by_definition():
    heat, mask = random_scan(0)
    heat -= 0.2
    positive = [(v, m) for v, m in zip(heat.ravel().tolist(), mask.ravel()) if v > 0]
    assert mass_accuracy(heat, mask) == pytest.approx(sum(v for v, m in positive if m) / sum(v for v, _ in positive))
    assert confounder_mass(heat, ~mask) == pytest.approx(1 - mass_accuracy(heat, mask))
    hot = heat / heat.max() > threshold_otsu(heat / heat.max())
    assert iou_otsu(heat, mask) == pytest.approx((hot & mask).sum() / (hot | mask).sum())
    heat[np.unravel_index(heat.argmax(), heat.shape)] = 0
    heat[2, 2, 2] = heat[0, 0, 0] = heat[0, 5, 0] = heat[3, 3, 3] = 7
    assert mask[2, 2, 2] and mask[3, 3, 3] and not mask[0, 0, 0] and not mask[0, 5, 0]
    assert pointing_game(heat, mask) == 0.5


def test_the_mask_itself_is_the_best_map_and_its_inverse_the_worst():
    _, mask = random_scan(0)
    assert [score(mask, mask) for score in SCAN_SCORES] == [1.0] * len(SCAN_SCORES)
    graded = np.where(mask, 0, 1 + np.arange(mask.size).reshape(mask.shape))
    assert average_precision(~mask, mask) == pytest.approx(mask.mean())
    shuffled = np.where(mask, np.random.default_rng(0).random(mask.shape) - 2, graded)
    assert average_precision(shuffled, mask) < mask.mean()
    assert auroc(~mask, mask) == 0
    assert pointing_game(~mask, mask) == mass_accuracy(~mask, mask) == iou_otsu(~mask, mask) == 0


def test_flips_transposes_and_the_scale_of_heat_change_nothing():
    for levels in (None, 3):
        heat, mask = random_scan(1, levels=levels)
        expected = [score(heat, mask) for score in SCAN_SCORES]
        for axis in range(3):
            assert [score(np.flip(heat, axis), np.flip(mask, axis)) for score in SCAN_SCORES] == pytest.approx(expected)
        turned = heat.transpose(2, 0, 1), mask.transpose(2, 0, 1)
        assert [score(*turned) for score in SCAN_SCORES] == pytest.approx(expected)
        for scale in (1e-7, 3.7, 1e5):
            assert [score(heat * np.float32(scale), mask) for score in SCAN_SCORES] == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_map_without_positive_heat_scores_nothing(value):
    _, mask = random_scan(0)
    heat = np.full(mask.shape, value, np.float32)
    for score in (pointing_game, mass_accuracy, rank_accuracy, hit_rate, iou_otsu):
        assert score(heat, mask) == 0
    assert average_precision(heat, mask) == pytest.approx(mask.mean())
    assert auroc(heat, mask) == 0.5
    assert [len(scores) for scores in peak_scores(heat, mask)[:2]] == [0, 0]


def test_a_lesion_without_heat_is_not_hit():
    mask = np.zeros((20, 20, 20), bool)
    mask[1:8, 1:8, 1:8] = mask[12:19, 12:19, 12:19] = True
    heat = np.zeros(mask.shape, np.float32)
    heat[3, 3, 3] = 1
    assert hit_rate(heat, mask) == 0.5


@pytest.mark.parametrize("score", [*SCAN_SCORES, confounder_mass])
def test_bad_maps_are_refused_with_what_is_wrong(score):
    heat, mask = random_scan(0)
    with pytest.raises(InputError, match="mask is empty"):
        score(heat, mask & False)
    with pytest.raises(InputError, match=r"\(12, 12, 12\) and \(11, 12, 12\)"):
        score(heat, mask[1:])
    for bad in (np.nan, np.inf):
        heat[0, 0, 0] = bad
        with pytest.raises(InputError, match="heat map has 1 voxels that are NaN or infinite"):
            score(heat, mask)


def test_a_mask_that_fills_the_grid_has_no_auroc():
    heat, mask = random_scan(0)
    assert auroc(heat, mask | True) is None
    assert average_precision(heat, mask | True) == 1


def test_peaks_find_lesions_plateaus_count_once_and_a_missed_lesion_is_counted():
    mask = np.zeros((16, 16, 16), bool)
    mask[2:5, 2:5, 2:5] = mask[8:12, 8:12, 8:12] = mask[14, 14, 14] = True
    heat = np.zeros(mask.shape, np.float32)
    heat[3, 3, 3] = 5  # finds lesion 1
    heat[8:10, 8, 8] = 4  # a plateau, finds lesion 2
    heat[11, 11, 11] = 3  # the same lesion again: neither found nor false
    heat[14, 2:4, 2] = 2  # false
    heat[14, 14, 13:15] = 1.5  # half of it in lesion 3, which it finds
    heat[5:8, 12:14, 2] = 1  # a plateau with no voxel in a lesion: false
    false, found, lesions = peak_scores(heat, mask)
    assert false.tolist() == [2, 1] and found.tolist() == [5, 4, 1.5] and lesions == 3
    heat[14, 14, 12] = 1.5  # now only a third of it
    assert peak_scores(heat, mask)[0].tolist() == [2, 1.5, 1]
    false, found, lesions = peak_scores(heat, mask & False)
    assert false.tolist() == [5, 4, 3, 2, 1.5, 1] and len(found) == lesions == 0
    assert peak_scores(heat, mask & False, num=2)[0].tolist() == [5, 4]


def padded(rows: list[list[float]]) -> np.ndarray:
    return np.array([row + [np.nan] * (6 - len(row)) for row in rows])


def test_froc_equals_monai_and_a_loop_over_thresholds():
    rng = np.random.default_rng(0)
    for _ in range(10):
        false = [rng.random(rng.integers(0, 7)).round(1).tolist() for _ in range(9)]
        lesions = rng.integers(0, 4, 9)
        lesions[0] = 2
        found = [(rng.random(rng.integers(0, n + 1)) + 0.05).round(1).tolist() for n in lesions]
        missed = [0.0] * (int(lesions.sum()) - sum(map(len, found)) + 1)  # MONAI skips the lowest threshold
        curve = compute_froc_curve_data(
            np.array(sum(false, [])), np.array(sum(found, missed)), num_targets=int(lesions.sum()), num_images=9
        )
        assert froc(padded(false), padded(found), lesions) == pytest.approx(compute_froc_score(*curve))


def test_froc_closed_forms():
    one = np.array([1, 1, 0])
    assert froc(padded([[], [], []]), padded([[0.9], [0.8], []]), one) == 1
    assert froc(padded([[], [], []]), padded([[0.9], [], []]), one) == 0.5
    assert froc(padded([[0.9], [], []]), padded([[], [], []]), one) == 0
    assert froc(padded([[0.9], [], []]), padded([[], [], []]), one * 0) is None
    # 3 false peaks above the only lesion, on 3 scans: sensitivity 0, and 1 from one false positive a scan on. As hot as
    # the lesion, they are met with it: the curve is the line from (0, 0) to (1, 1).
    first = np.array([1, 0, 0])
    assert froc(padded([[0.9] * 3, [], []]), padded([[0.5], [], []]), first) == pytest.approx(4 / 6)
    assert froc(padded([[0.9] * 3, [], []]), padded([[0.9], [], []]), first) == pytest.approx((0.25 + 0.5 + 4) / 6)


def test_survivor_heat():
    heat, event = np.array([1.0, 2.0, 0.3, 0.0]), np.array([1, 1, 0, 0])
    assert survivor_heat(heat, event) == pytest.approx(0.1)
    assert survivor_heat(heat, event * 0) is None and survivor_heat(heat, event * 0 + 1) is None
    assert survivor_heat(heat * event * 0, event) is None


def cohort(num: int = 6) -> dict:
    scans = [random_scan(seed) for seed in range(num)]
    heat = torch.stack([torch.tensor(heat)[None] for heat, _ in scans])
    mask = torch.stack([torch.tensor(mask)[None] for _, mask in scans])
    mask[1] = False
    event = torch.tensor([1.0, 0.0] * (num // 2))
    return {
        "y_pred": heat,
        "y": mask,
        "confounder": ~mask & (torch.arange(num) < 2)[:, None, None, None, None],
        "ceiling": [mask[0].float(), *[None] * (num - 1)],
        "event": event,
        "time": 10 * event + 5,
        "patient_id": [f"p{i}" for i in range(num)],
    }


def test_metric_averages_the_functions_and_counts_what_it_leaves_out():
    given = cohort()
    metric = LocalisationMetric(num_resamples=50)
    metric(**given)
    result = metric.aggregate()
    assert list(result) == [
        *("pointing_game", "average_precision", "average_precision_ceiling", "auroc", "mass_accuracy", "rank_accuracy"),
        *("hit_rate", "iou_otsu", "froc", "confounder_mass", "survivor_heat", "num_scans", "num_empty_mask"),
    ]
    assert result["num_scans"] == 6 and result["num_empty_mask"] == 1
    heat, mask = given["y_pred"][:, 0].numpy(), given["y"][:, 0].numpy()
    scored = [0, 2, 3, 4, 5]
    for score in SCAN_SCORES:
        entry = result[score.__name__]
        values = [score(heat[i], mask[i]) for i in scored]
        assert entry["value"] == pytest.approx(np.mean(values)) and entry["num_scans"] == 5
        assert min(values) <= entry["lower"] <= entry["value"] <= entry["upper"] <= max(values)
    assert result["average_precision_ceiling"]["value"] == 1 and result["average_precision_ceiling"]["num_scans"] == 1
    peaks = [peak_scores(heat[i], mask[i], 64) for i in range(6)]
    false, found = (np.array([np.pad(p[k], (0, 64 - len(p[k])), constant_values=np.nan) for p in peaks]) for k in (0, 1))
    expected = froc(false, found, np.array([p[2] for p in peaks]))
    assert result["froc"]["value"] == pytest.approx(expected) and result["froc"]["num_scans"] == 6
    # Scan 1 has a confounder but no lesion, so it isn't scored.
    assert result["confounder_mass"]["value"] == pytest.approx(mass_accuracy(heat[0], ~mask[0]))
    assert result["confounder_mass"]["num_scans"] == 1
    totals = np.maximum(heat, 0).sum((1, 2, 3), dtype=np.float64)
    assert result["survivor_heat"]["value"] == pytest.approx(totals[1::2].mean() / totals[::2].mean())
    table = metric.table()
    assert table.patient_id.tolist() == given["patient_id"]
    assert np.isnan(table.auroc[1]) and table.num_lesions[1] == 0 and table.num_lesions[0] > 0
    assert np.isnan(table.confounder_mass[2]) and np.isnan(table.average_precision_ceiling[2])


def test_order_batches_lists_and_repeated_scans_change_nothing():
    given = cohort()
    one, many = LocalisationMetric(num_resamples=20), LocalisationMetric(num_resamples=20)
    one(**given)
    for i in (3, 5, 0, 1, 3, 4, 2):
        many(**{key: [MetaTensor(v[i]) if key == "y_pred" else v[i]] for key, v in given.items()})
    assert one.aggregate() == many.aggregate()
    assert one.table().equals(many.table())


def test_scans_without_masks_and_empty_cohorts_have_no_values_rather_than_nan():
    metric = LocalisationMetric(num_resamples=10)
    for num_scans in (0, 2):
        result = metric.aggregate()
        assert result.pop("num_scans") == num_scans and result.pop("num_empty_mask") == 0
        assert all(v == {"value": None, "lower": None, "upper": None, "num_scans": 0} for v in result.values())
        assert len(metric.table()) == num_scans
        metric(cohort()["y_pred"][:2])
    metric.reset()
    assert metric.table().empty


def test_a_bad_scan_is_named():
    given = cohort()
    given["y_pred"][4, 0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="Patient p4: the heat map has 1 voxels"):
        LocalisationMetric()(**given)
    with pytest.raises(InputError, match="Patient number 5 of the batch: the heat map"):
        LocalisationMetric()(given["y_pred"])
    with pytest.raises(InputError, match=r"Patient p0: .* got \(2, 4, 4, 4\)"):
        LocalisationMetric()([torch.ones(2, 4, 4, 4)], patient_id=["p0"])
    with pytest.raises(InputError, match="1 patient ids were given for 6 scans"):
        LocalisationMetric()(cohort()["y_pred"], patient_id=["p0"])


def test_scans_are_known_by_any_name_or_by_none():
    names = ["b", "Müller-7", "a" * 300]
    metric = LocalisationMetric(num_resamples=0)
    heat = cohort()["y_pred"]
    for i in (2, 0, 2, 1):
        metric(heat[i : i + 1], patient_id=[names[i]])
    assert metric.table().patient_id.tolist() == sorted(names)
    metric(heat[:2])
    assert metric.table().patient_id.tolist() == ["a" * 300, "b", "Müller-7", None, None]


def test_bootstrap_interval_covers_the_true_mean_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        sample = rng.normal(3, 1, 40)
        lower, upper = bootstrap(40, lambda i, s=sample: s[i].mean(), num=200, seed=seed)
        covered += lower <= 3 <= upper
    assert 0.88 <= covered / 200 <= 0.99


def test_bootstrap_leaves_out_resamples_without_a_value():
    sample = np.array([np.nan, 1.0, 2.0, 3.0])
    statistic = lambda i: None if np.isnan(sample[i]).any() else float(sample[i].mean())  # noqa: E731
    assert bootstrap(4, statistic) == (None, None)  # 1 - (3/4)^4 = 68 % have none
    assert bootstrap(4, lambda i: None if np.isnan(sample[i]).all() else float(np.nanmean(sample[i])))[0] >= 1
    assert bootstrap(0, statistic) == (None, None) and bootstrap(3, lambda i: 1.0, num=0) == (None, None)
    assert bootstrap(1, lambda i: 2.0) == (2, 2)
    assert with_interval(4, lambda i: None, 4) == {"value": None, "lower": None, "upper": None, "num_scans": 0}


def test_otsu_takes_a_map_that_is_even_to_the_last_digit():
    heat = np.full((4, 4, 4), 1e-4, np.float32)
    heat[0] = np.nextafter(heat[0], np.float32(1))
    mask = np.zeros(heat.shape, bool)
    mask[0] = True
    assert iou_otsu(heat, mask) == 1.0
    assert iou_otsu(np.full((4, 4, 4), 1e-4, np.float32), mask) == 0.0
