# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Readout and objective against sums written out in numpy, at the ends of the time axis, and their gradients."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from bundle.survival import (
    CenTime,
    SurvivalMapLoss,
    death_by,
    fit_severity,
    log_pmf,
    mean_months,
    quantile_months,
    survival_curve,
)
from bundle.survival.loss import neighbour_difference, occlusion_inconsistency, weight_entropy
from bundle.survival.objectives import centime_log_likelihood
from bundle.survival.severity import Severity, minkowski_functionals, severity_from

TMAX = 30


def normal_pmf(location: float, variance: float, tmax: int) -> np.ndarray:
    """Discretised normal straight from its definition, index 0 is month 1."""
    p = np.array([math.exp(-((t - location) ** 2) / (2 * variance)) for t in range(1, tmax + 1)])
    return p / p.sum()


def random_pmf(rows: int, tmax: int = TMAX) -> np.ndarray:
    p = np.random.default_rng(0).gamma(0.5, size=(rows, tmax)) + 1e-9
    return p / p.sum(1, keepdims=True)


def random_map(batch: int = 2, grid: tuple[int, int, int] = (2, 3, 2), dtype: torch.dtype = torch.float64) -> Tensor:
    """A survival map of which some patches lie outside the lung."""
    location = 5 + 20 * torch.rand(batch, *grid, dtype=dtype)
    inside = torch.rand(batch, *grid) > 0.3
    inside[:, 0] = True
    weight = torch.rand(batch, *grid, dtype=dtype) * inside
    weight = weight / weight.sum((1, 2, 3), keepdim=True)
    return torch.stack([location * inside, weight], 1)


def map_at(*locations: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Survival maps (B, 2, 1, 1, 1) of one patch at each location in months."""
    location = torch.tensor(locations, dtype=dtype)
    return torch.stack([location, torch.ones_like(location)], 1).view(-1, 2, 1, 1, 1)


def pairs(*outcomes: tuple[float, int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(outcomes, dtype=dtype)


# ------------------------------------------------------------------------------------------------------- readout


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pmf_sums_to_one(mixture, dtype):
    pmf = log_pmf(random_map(3, dtype=dtype), TMAX, 36.0, mixture).exp()
    assert pmf.shape == (3, TMAX) and pmf.dtype == dtype
    torch.testing.assert_close(pmf.sum(1), torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("variance", [4.0, 36.0])
def test_pmf_of_the_weighted_mean(variance):
    survival_map = random_map()
    location, weight = survival_map.flatten(2).unbind(1)
    for row, loc in zip(log_pmf(survival_map, TMAX, variance), (location * weight).sum(1).tolist()):
        np.testing.assert_allclose(row.exp().numpy(), normal_pmf(loc, variance, TMAX), rtol=1e-10)


def test_mixture_is_the_weighted_sum_of_the_patches_distributions():
    survival_map = random_map()
    location, weight = survival_map.flatten(2).unbind(1)
    for i, row in enumerate(log_pmf(survival_map, TMAX, 9.0, mixture=True)):
        expected = sum(w * normal_pmf(loc, 9.0, TMAX) for loc, w in zip(location[i].tolist(), weight[i].tolist()))
        np.testing.assert_allclose(row.exp().numpy(), expected, rtol=1e-9)


def test_pmf_has_the_variance_it_is_given():
    t = torch.arange(1, 201, dtype=torch.float64)
    for variance in (9.0, 36.0):
        pmf = log_pmf(map_at(100.0, dtype=torch.float64), 200, variance).exp()[0]
        mean = (pmf * t).sum()
        assert float(mean) == pytest.approx(100)
        assert float((pmf * (t - mean) ** 2).sum()) == pytest.approx(variance, rel=1e-6)


def test_a_tensor_of_variances_gives_each_patient_its_own():
    locations, variances = [8.0, 20.0], torch.tensor([4.0, 25.0], dtype=torch.float64)
    rows = log_pmf(map_at(*locations, dtype=torch.float64), TMAX, variances).exp().numpy()
    for row, loc, variance in zip(rows, locations, variances.tolist()):
        np.testing.assert_allclose(row, normal_pmf(loc, variance, TMAX), rtol=1e-10)


def test_survival_curve_mean_and_death_by():
    p = random_pmf(4)
    pmf = torch.tensor(p)
    for t in range(1, TMAX + 1):
        np.testing.assert_allclose(survival_curve(pmf)[:, t - 1].numpy(), p[:, t:].sum(1), atol=1e-12)
        for horizon in (t, t + 0.9):
            np.testing.assert_allclose(death_by(pmf, horizon).numpy(), p[:, :t].sum(1), atol=1e-12)
    np.testing.assert_allclose(mean_months(pmf).numpy(), [sum(t * row[t - 1] for t in range(1, 31)) for row in p])
    assert bool((death_by(pmf, 0.5) == 0).all())
    torch.testing.assert_close(death_by(pmf, TMAX + 50), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("probability", [0.025, 0.25, 0.5, 0.9, 0.975])
def test_quantiles(probability):
    """The distribution function is piecewise linear through (t + 0.5, P(T <= t))."""
    p = random_pmf(5)
    for row, quantile in zip(p, quantile_months(torch.tensor(p), probability).tolist()):
        expected = np.interp(probability, np.concatenate([[0], row.cumsum()]), np.arange(TMAX + 1) + 0.5)
        assert quantile == pytest.approx(expected, abs=1e-9)


def test_the_median_of_a_distribution_on_one_bin_is_that_bin():
    for t in (1, 7, TMAX):
        pmf = torch.zeros(1, TMAX)
        pmf[0, t - 1] = 1
        assert float(quantile_months(pmf, 0.5)) == t


def test_quantiles_of_a_patient_who_outlives_tmax_stay_within_the_bins():
    pmf = log_pmf(map_at(1e4), TMAX, 36.0).exp()
    for probability in (0.025, 0.5, 0.975):
        assert TMAX - 0.5 <= float(quantile_months(pmf, probability)) <= TMAX + 0.5


# ------------------------------------------------------------------------------------------------------- CenTime


def brute_force(p: np.ndarray, time: float, event: int) -> float:
    """Log-likelihood by listing every (death, censoring) pair of the model.

    Death comes at t with p(t). Someone who is censored is so at c = 1, ..., t - 1 with equal chances.
    """
    chance = {}
    for t in range(1, len(p) + 1):
        if event:
            chance[t] = chance.get(t, 0.0) + p[t - 1]
        else:
            for c in range(1, t):
                chance[c] = chance.get(c, 0.0) + p[t - 1] / (t - 1)
    return math.log(chance[int(time)])


@pytest.mark.parametrize("event", [0, 1])
def test_likelihood_equals_enumeration(event):
    p = random_pmf(1)
    times = range(1, TMAX + event)
    log_p = torch.tensor(p).log().expand(len(times), -1)
    events = torch.full((len(times),), float(event), dtype=torch.float64)
    likelihood = centime_log_likelihood(log_p, torch.tensor(list(times), dtype=torch.float64), events)
    np.testing.assert_allclose(likelihood.numpy(), [brute_force(p[0], t, event) for t in times], rtol=1e-10)


def test_times_are_rounded_to_whole_months_from_one():
    log_p = torch.tensor(random_pmf(1)).log()
    for event in (0.0, 1.0):
        e = torch.tensor([event])
        for time, month in [(0.4, 1), (0.01, 1), (1.4, 1), (1.6, 2), (28.7, 29), (29.4, 29)]:
            torch.testing.assert_close(
                centime_log_likelihood(log_p, torch.tensor([time]), e),
                centime_log_likelihood(log_p, torch.tensor([float(month)]), e),
            )


EXTREMES = [(1, 1), (1, 0), (TMAX, 1), (TMAX - 1, 1), (TMAX - 1, 0)]


@pytest.mark.parametrize("mixture", [False, True])
@pytest.mark.parametrize("location", [-1e4, 0.0, 15.0, 1e4])
@pytest.mark.parametrize("outcome", EXTREMES)
def test_loss_and_gradient_are_finite_at_the_ends(mixture, location, outcome):
    survival_map = map_at(location).requires_grad_()
    loss = CenTime(TMAX, mixture=mixture)(survival_map, pairs(outcome))
    loss.backward()
    assert math.isfinite(loss.detach()) and bool(survival_map.grad.isfinite().all())
    # A prediction far too late or far too early still feels where to go.
    if location == -1e4 and outcome != (1, 1):
        assert survival_map.grad[0, 0] < 0
    if location == 1e4 and outcome[1] == 1 and outcome[0] < TMAX:
        assert survival_map.grad[0, 0] > 0


def test_a_death_in_the_last_month_beside_censored_patients_has_a_finite_gradient():
    survival_map = map_at(10.0, 20.0, 15.0).requires_grad_()
    CenTime(TMAX)(survival_map, pairs((TMAX, 1), (TMAX - 1, 0), (1, 0))).backward()
    assert bool(survival_map.grad.isfinite().all()) and bool((survival_map.grad[:, 0] != 0).all())


@pytest.mark.parametrize("mixture", [False, True])
def test_gradcheck(mixture):
    objective = CenTime(TMAX, variance=9.0, alpha_censored=0.5, mixture=mixture)
    survival_map = random_map(4, (1, 2, 2))
    survival_map[:, 1] = survival_map[:, 1].clamp_min(0.01)  # a weight of 0 stands at the clamp's kink
    outcome = pairs((1, 1), (TMAX, 1), (1, 0), (TMAX - 1, 0), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: objective(x, outcome), survival_map.requires_grad_())


def test_alpha_weighs_the_censored():
    survival_map = map_at(8.0, 12.0, 20.0, dtype=torch.float64)
    outcome = pairs((9, 1), (10, 0), (3, 0), dtype=torch.float64)
    each = [brute_force(normal_pmf(loc, 36.0, TMAX), *o) for loc, o in zip((8, 12, 20), ((9, 1), (10, 0), (3, 0)))]
    for alpha in (0.0, 0.3, 1.0, 2.0):
        expected = -(each[0] + alpha * (each[1] + each[2])) / 3
        assert float(CenTime(TMAX, alpha_censored=alpha)(survival_map, outcome)) == pytest.approx(expected, rel=1e-6)


def test_the_best_location_of_a_death_is_its_time():
    loss = [float(CenTime(TMAX)(map_at(float(loc)), pairs((12, 1)))) for loc in range(1, TMAX + 1)]
    # The normal is cut at tmax and month 1, which moves its best location a little.
    assert abs(np.argmin(loss) + 1 - 12) <= 1


@pytest.mark.parametrize("outcome", [(TMAX, 0), (TMAX + 1, 1), (TMAX + 1, 0)])
def test_times_at_or_above_tmax_have_no_likelihood(outcome):
    with pytest.raises(ValueError, match=f"tmax = {TMAX}"):
        CenTime(TMAX)(map_at(5.0, 5.0), pairs((3, 1), outcome))


@pytest.mark.parametrize("kwargs", [{"tmax": 1}, {"variance": 0.0}, {"alpha_censored": -1.0}])
def test_constructor_errors(kwargs):
    with pytest.raises(ValueError):
        CenTime(**kwargs)


# -------------------------------------------------------------------------------------------------- regularisers


def test_entropy_of_equal_weights_is_the_log_of_their_number():
    weight = torch.zeros(3, 2, 2, 2)
    weight[0, 0, 0, 0] = 1
    weight[1, 0] = 1 / 4
    weight[2] = 1 / 8
    torch.testing.assert_close(weight_entropy(weight), torch.tensor([0.0, math.log(4), math.log(8)]))


def test_entropy_has_a_finite_gradient_at_weight_zero():
    weight = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).requires_grad_()
    weight_entropy(weight).sum().backward()
    assert bool(weight.grad.isfinite().all())


def test_neighbour_difference_of_a_ramp():
    """Steps of 10, 20 and 30 months along the axes: 1 + 4 + 9."""
    z, y, x = torch.meshgrid(torch.arange(3.0), torch.arange(4.0), torch.arange(5.0), indexing="ij")
    ramp = (10 * z + 20 * y + 30 * x)[None]
    torch.testing.assert_close(neighbour_difference(ramp, torch.ones_like(ramp)), torch.tensor(14.0))


def test_neighbour_difference_counts_pairs_in_the_lung_only():
    location, weight = torch.rand(2, 3, 4, 3) * 50, (torch.rand(2, 3, 4, 3) > 0.4).float()
    expected = 0.0
    for axis, step in enumerate([(1, 0, 0), (0, 1, 0), (0, 0, 1)]):
        squares = []
        for b, i, j, k in weight.nonzero().tolist():
            there = (b, i + step[0], j + step[1], k + step[2])
            if there[axis + 1] < weight.shape[axis + 1] and weight[there] > 0:
                squares.append(float(location[b, i, j, k] - location[there]) ** 2 / 100)
        expected += sum(squares) / len(squares)
    assert float(neighbour_difference(location, weight)) == pytest.approx(expected, rel=1e-5)
    alone = torch.zeros(1, 3, 3, 3)
    alone[0, 1, 1, 1] = 1
    assert float(neighbour_difference(torch.rand(1, 3, 3, 3), alone)) == 0


def test_occlusion_finds_danger_left_and_a_prediction_that_rests_on_the_rest():
    """20 patches of lung and 4 outside; the heaviest 4 of them are at 10 months, the others where each case says."""
    location, weight = torch.full((3, 24), 120.0), torch.zeros(3, 24)
    weight[:, 4:8], weight[:, 8:] = 0.25 - 0.01, 0.04 / 16
    location[:, 4:8] = 10.0
    location[1, 8:] = 60.0
    location[:, :4] = -1000.0  # outside
    weight[2] = 0.0
    weight[2, :2], location[2, :2] = 0.5, 30.0  # a lung of two patches: one of them is among the heaviest
    found = occlusion_inconsistency(location.view(3, 2, 3, 4), weight.view(3, 2, 3, 4), 100)
    expected = [0.04 * 110 / 10, (40 + 0.04 * 50) / 10, 70 / 10]
    torch.testing.assert_close(found, torch.tensor(expected))
    alone = torch.zeros(1, 2, 2, 2)
    alone[0, 0, 0, 0] = 1
    assert float(occlusion_inconsistency(40 * alone, alone, 100)) == 0  # nothing is left to say anything


def test_occlusion_has_a_finite_gradient_at_tiny_weights():
    location = torch.tensor([10.0, 90.0, 95.0, 120.0]).view(1, 1, 2, 2).requires_grad_()
    weight = torch.tensor([1.0, 1e-38, 1e-38, 0.0]).view(1, 1, 2, 2).requires_grad_()
    occlusion_inconsistency(location, weight, 100).sum().backward()
    assert bool(location.grad.isfinite().all()) and bool(weight.grad.isfinite().all())


def test_loss_is_the_objective_and_its_regularisers():
    survival_map, outcome = random_map(2), pairs((9, 1), (4, 0), dtype=torch.float64)
    objective = CenTime(TMAX)
    loss = SurvivalMapLoss(objective, entropy=0.7, smoothness=0.2, occlusion=0.3)
    location, weight = survival_map.unbind(1)
    entropy, smoothness = weight_entropy(weight).mean(), neighbour_difference(location, weight)
    occlusion = occlusion_inconsistency(location, weight, TMAX)[0]  # of the one who died
    for strength in (1.0, 0.25, 0.0):
        loss.set_strength(strength)
        expected = objective(survival_map, outcome) + strength * (0.2 * smoothness - 0.7 * entropy + 0.3 * occlusion)
        torch.testing.assert_close(loss(survival_map, outcome), expected)


# ------------------------------------------------------------------------------------------------------- severity

RANGE = (-5.0, 120.0)


def severity_data(num: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numbers of patients all of whom die at a linear function of them, (num, 8), outcomes, and that function."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(num, 8, generator=generator)
    numbers[:, 0] = 30 + 5 * numbers[:, 0]
    slope = torch.tensor([0.0, -6.0, 3.0, 0.0, 4.0, 0.0, 0.0, 0.0])
    time = 45 + numbers[:, 1:] @ slope[1:] + noise * torch.randn(num, generator=generator)
    return numbers, torch.stack([time.round(), torch.ones(num)], 1), slope


def test_severity_fit_is_least_squares_where_many_die_well_within_the_range():
    numbers, outcome, slope = severity_data(300, noise=2.0)
    severity, variance = fit_severity(numbers, outcome, CenTime(), RANGE, months=1e4)
    design = np.column_stack([numbers.numpy(), np.ones(300)])
    target = outcome[:, 0].numpy()
    expected = design @ np.linalg.lstsq(design, target, rcond=None)[0]
    found = (numbers[:, 0] + severity(numbers)).numpy()
    np.testing.assert_allclose(found, expected, atol=0.5)  # it has no slope for what tells nothing, least squares has
    assert variance == pytest.approx(((target - expected) ** 2).mean(), rel=0.02)
    # The first takes back the location, which tells nothing; of the others one may seem to tell something.
    assert float(torch.tensor(severity.slope)[slope == 0][1:].abs().median()) < 0.01


def test_severity_goes_through_json():
    numbers, outcome, _ = severity_data(80, noise=1.0)
    severity, _ = fit_severity(numbers, outcome, CenTime(), RANGE)
    again = severity_from(json.loads(json.dumps(dataclasses.asdict(severity))))
    assert again == severity and torch.equal(again(numbers), severity(numbers))
    assert severity_from(None) is None


def test_severity_fit_to_few_deaths_foretells_others_better_than_least_squares():
    """Eight numbers are many for 25 deaths."""
    found, plain = [], []
    for seed in range(5):
        numbers, outcome, slope = severity_data(25, noise=4.0, seed=seed)
        severity, _ = fit_severity(numbers, outcome, CenTime(), RANGE)
        design = np.column_stack([numbers.numpy(), np.ones(25)])
        line = np.linalg.lstsq(design, outcome[:, 0].numpy(), rcond=None)[0]
        others, _, _ = severity_data(200, noise=0.0, seed=100 + seed)
        truth = 45 + others[:, 1:] @ slope[1:]
        found.append(float((others[:, 0] + severity(others) - truth).square().mean()))
        plain.append(float(np.square(np.column_stack([others.numpy(), np.ones(200)]) @ line - truth.numpy()).mean()))
    assert np.mean(found) < 0.85 * np.mean(plain), (found, plain)


def test_severity_fit_learns_from_the_dead_and_leaves_survivors_where_they_are():
    numbers, outcome, _ = severity_data(80, noise=0.5)
    survivors = numbers.clone()
    survivors[:, 0] = 118
    both = torch.cat([numbers, survivors]), torch.cat([outcome, torch.tensor([[99.0, 0.0]]).expand(80, 2)])
    severity, variance = fit_severity(*both, CenTime(), RANGE)
    assert torch.equal(severity(survivors), torch.zeros(80))
    assert float((numbers[:, 0] + severity(numbers) - outcome[:, 0]).abs().mean()) < 0.7
    assert 1 <= variance < 2


def test_severity_fit_isnt_led_astray_by_deaths_that_a_line_puts_before_the_earliest():
    """As in phantoms, whose times are cut off at 2 months: the line is that of the others, and nobody dies before."""
    numbers, outcome, slope = severity_data(300, noise=0.5)
    numbers[:60, 1] += 12  # the line says -27 months and less
    outcome[:60, 0] = 2
    severity, _ = fit_severity(numbers, outcome, CenTime(), RANGE, months=1e4)
    found = numbers[:, 0] + severity(numbers)
    assert severity.earliest == 2 and float(found.min()) == pytest.approx(2)
    assert bool((found[:60] < 2.1).all())
    torch.testing.assert_close(found[60:], 45 + numbers[60:, 1:] @ slope[1:], atol=0.5, rtol=0)


def test_severity_fit_takes_the_patients_extra_numbers_as_given():
    """Half of the patients are said to be 9 times as uncertain: what is fitted is the variance of the other half."""
    numbers, outcome, _ = severity_data(400, noise=4.0)
    sure = torch.arange(400) % 2 == 0
    numbers[:, 1:] = numbers[:, 1:] * 0.01  # nothing to explain the times by
    outcome[:, 0] = (50 + torch.randn(400) * torch.where(sure, 3.0, 9.0)).round()
    numbers[:, 0] = 50 + torch.randn(400) * 1e-3
    extra = torch.where(sure, 0.0, math.log(9.0)).unsqueeze(1)
    _, variance = fit_severity(numbers, outcome, CenTime(predict_variance=True), RANGE, extra=extra)
    assert variance == pytest.approx(9, rel=0.2)


def test_severity_makes_nothing_of_maps_that_differ_by_rounding_only():
    """A network that learnt nothing gives everybody one map; another rounding of it must not move a patient by years."""
    generator = torch.Generator().manual_seed(0)
    one = torch.tensor([24.5, 1.0, 6.0, 3.0, 1.0, 0.001, 0.12, 1.13])
    numbers = one + 1e-5 * torch.randn(60, 8, generator=generator)
    time = (20 + 1e5 * (numbers[:, 0] - one[0]) + 10 * torch.rand(60, generator=generator)).clamp(1, 90).round()
    severity, _ = fit_severity(numbers, torch.stack([time, torch.ones(60)], 1), CenTime(), RANGE)
    moved = severity(one + 1e-5 * torch.randn(50, 8, generator=generator))
    assert float(moved.max() - moved.min()) < 1.0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_severity_is_the_same_of_numbers_on_a_gpu():
    numbers, outcome, _ = severity_data(80, noise=0.5)
    severity, _ = fit_severity(numbers, outcome, CenTime(), RANGE)
    torch.testing.assert_close(severity(numbers.cuda()).cpu(), severity(numbers))


def test_severity_moves_nobody_located_at_the_end_of_the_range():
    severity = Severity(-5.0, 120.0, 2.0, [0.0] * 8, [1.0] * 8, [0.0] * 8, offset=5.0)
    assert severity(torch.tensor([[115.0], [20.0]]).expand(2, 8)).tolist() == [0.0, 5.0]


def test_severity_fit_without_deaths_moves_nobody():
    numbers, outcome = torch.full((9, 8), 118.0), torch.tensor([[99.0, 0.0]]).expand(9, 2)
    assert fit_severity(numbers, outcome, CenTime(variance=25.0), RANGE) == (None, 25.0)


def body(*boxes: tuple[slice, slice, slice], size: int = 16) -> Tensor:
    x = torch.zeros(1, size, size, size)
    for box in boxes:
        x[(0, *box)] = 1
    return x


def test_minkowski_functionals_of_bodies_that_are_known():
    box = (slice(2, 5), slice(0, 4), slice(3, 8))  # 3 x 4 x 5, touching the border
    expected = torch.tensor([[60.0, 94.0, 12.0, 1.0]])
    torch.testing.assert_close(minkowski_functionals(body(box)), expected)
    apart = (slice(8, 11), slice(8, 12), slice(10, 15))
    torch.testing.assert_close(minkowski_functionals(body(box, apart)), 2 * expected)
    torch.testing.assert_close(minkowski_functionals(body(box, apart) / 2), expected)  # the mean over thresholds
    ring = body((slice(2, 7), slice(2, 7), slice(2, 4))) - body((slice(4, 5), slice(4, 5), slice(2, 4)))
    shell = body((slice(2, 7), slice(2, 7), slice(2, 7))) - body((slice(4, 5), slice(4, 5), slice(4, 5)))
    assert minkowski_functionals(torch.cat([ring, shell]))[:, 3].tolist() == [0.0, 2.0]
