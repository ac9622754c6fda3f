# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Codebooks of local texture: descriptors, fits, the verdict, familiarity, and the stage through the bundle's commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lifelines
import monai.bundle
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage, optimize
from sklearn.metrics import average_precision_score

from bundle.data import read_cohort
from bundle.errors import InputError
from bundle.maps import Familiarityd
from bundle.maps.familiarity import fit_familiarity, look
from bundle.maps.scan_space import in_cells
from bundle.metrics import verdict as verdicts
from bundle.metrics.verdict import doubtful, in_words, martingale_residuals, prediction_accuracy, verdict
from bundle.networks import CodebookNet
from bundle.networks.descriptors import describe, level_and_spread, tokens_at
from bundle.report import pictures
from bundle.run import TrainedModel
from bundle.run.codebooks import (
    CodebookStage,
    Tokens,
    fit_hazards,
    fit_months,
    risk_of,
    site_folds,
    strata_of,
    teach,
    unseen_months,
    words_of,
)
from bundle.run.results import prediction_row
from bundle.run.trained import worst_of
from bundle.run.training import Finish
from bundle.survival import CenTime, Cox
from bundle.survival.calibration import LEVELS, cohort_pmf, interval_levels, last_death, widened
from bundle.survival.discrete import LogisticHazard
from bundle.survival.readout import dead_at, normal_log_pmf, quantile_months
from bundle.survival.ridge_cox import ridge_cox

from .commands import run, train

BOOKS = {"recipe": "codebook", "codebook_def#books": 3, "codebook_def#words": 20}


def scan(seed: int = 0, shape=(22, 20, 24), margin: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and lung (D, H, W): noise of several scales in an ellipsoid, `margin` voxels from the border."""
    rng = np.random.default_rng(seed)
    noise = sum(ndimage.gaussian_filter(rng.normal(0, 0.05 * (1 + 3 * s), shape), s) for s in (0, 1, 2))
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) * n / (n - 2 * margin) for n in shape], indexing="ij"))
    lung = (grid**2).sum(0) < 1
    return torch.tensor(0.3 + noise).clamp(0, 1).float(), torch.tensor(lung).float()


def network(clinical_dim: int = 0) -> CodebookNet:
    net = CodebookNet(books=4, words=9, few=5, clinical_dim=clinical_dim).requires_grad_(False)
    for book in net.chosen:
        book.copy_(torch.randperm(29)[:5])
    net.centres.normal_()
    net.hazard.normal_(0.2)
    net.offset.fill_(80.0), net.slope.fill_(60.0), net.power.fill_(0.7)
    net.clinical_months.normal_(0, 5)
    return net


def reference(image: np.ndarray, lung: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The descriptors by scipy, one after the other as they are defined."""

    def blur(x, s, order=0):
        return ndimage.gaussian_filter(x, s, order=order, mode="constant", truncate=3.0)

    def at(x):
        return x[tuple(index.T)]

    usual = image[lung > 0].mean()
    image = (image - usual) * lung
    share = {s: np.maximum(blur(lung, s), 0.02) for s in (1.0, 1.7, 2.0, 3.0, 5.0)}
    mean = {s: blur(image, s) / share[s] for s in (1.0, 1.7, 3.0, 5.0)}
    filled = np.where(lung > 0, image, np.where(share[1.7] > 0.021, mean[1.7], mean[5.0]))
    found = [at(image) + usual]
    for s in (1.0, 1.7, 3.0, 5.0):
        variance = blur(image**2, s) / share[s] - mean[s] ** 2
        found += [at(mean[s]) + usual, np.log(np.sqrt(np.maximum(at(variance), 1e-6)) + 0.02)]
    bands = [filled, *(0 for _ in range(3))]
    for k, s in enumerate((0.7, 1.5, 3.0)):
        bands[k + 1] = blur(filled, s)
        found += [np.log(at(blur(abs(bands[k] - bands[k + 1]) * lung, t) / share[t]) + 0.01) for t in (1.7, 3.0)]
    for s in (1.0, 1.8):
        first = [blur(filled, s, np.eye(3, dtype=int)[i]) for i in range(3)]
        hessian = [
            [s**2 * blur(filled, s, np.eye(3, dtype=int)[i] + np.eye(3, dtype=int)[j]) for i in range(3)] for j in range(3)
        ]
        hessian = np.moveaxis(np.array(hessian), (0, 1), (-2, -1))
        found += list(5 * np.linalg.eigvalsh(at(hessian)).T)
        for energy in (np.sqrt((hessian**2).sum((-1, -2))), abs(np.trace(hessian, axis1=-2, axis2=-1))):
            found.append(np.log(at(blur(energy * lung, 2.0) / share[2.0]) + 0.005))
        found.append(np.log(s * at(np.sqrt(sum(f**2 for f in first))) + 0.01))
    return np.stack([*found, at(share[5.0]), at(share[3.0])], 1)


def test_descriptors_are_those_of_scipy():
    image, lung = scan()
    index = lung.nonzero()
    got = describe(image.double(), lung.double(), index).numpy()
    np.testing.assert_allclose(got, reference(image.double().numpy(), lung.double().numpy(), index.numpy()), atol=1e-8)
    np.testing.assert_allclose(describe(image, lung, index), got, atol=5e-3)
    assert (tokens_at(lung) % 2 == 0).all() and len(tokens_at(torch.ones(1, 1, 1))) == 1
    single = torch.zeros(4, 4, 4)
    single[1, 1, 3] = 1
    assert tokens_at(single).tolist() == [[1, 1, 3]]


def test_a_map_is_the_same_for_another_calibration_of_the_scanner():
    net, (image, lung) = network(), scan(shape=(30, 28, 32), margin=9)
    plain, moved, stretched = net(torch.stack([image, image + 0.1, 1.2 * image])[:, None], lung.expand(3, 1, *lung.shape))
    for other, least in ((moved, 0.999), (stretched, 0.95)):
        assert np.corrcoef(plain[1].flatten(), other[1].flatten())[0, 1] > least
    patient = [float((one[0] * one[1]).sum()) for one in (plain, moved)]
    assert patient[1] == pytest.approx(patient[0], abs=0.5)


@pytest.mark.parametrize("clinical_dim", [0, 2])
@pytest.mark.parametrize("taught", [False, True])
def test_a_map_is_a_location_and_a_weight_for_the_lung_alone_in_torchscript_too(clinical_dim, taught):
    net = network(clinical_dim)
    if taught:
        net.student.normal_(), net.student_scale.fill_(0.6)
    image, lung = (torch.stack([x, y])[:, None] for x, y in zip(scan(0), scan(1, margin=4)))
    clinical = torch.randn(2, clinical_dim) if clinical_dim else None
    found, script = net(image, lung, clinical), torch.jit.script(net)
    torch.testing.assert_close(script(image, lung, clinical), found)
    whole = net(image, torch.ones_like(image), clinical)
    torch.testing.assert_close(script(image, None, clinical), whole)
    torch.testing.assert_close(net(image, None, clinical), whole)
    torch.testing.assert_close(net(image[1:], lung[1:], clinical[1:] if clinical_dim else None)[0], found[1])
    torch.testing.assert_close(found[:, 1].sum((1, 2, 3)), torch.ones(2))
    assert (found[:, 1][lung[:, 0] > 0] > 0).all() and (found.movedim(1, -1)[lung[:, 0] == 0] == 0).all()
    if clinical_dim:
        by = (found[:, 0] - net(image, lung, 0 * clinical)[:, 0]) * lung[:, 0]
        torch.testing.assert_close(by, (clinical @ net.clinical_months)[:, None, None, None] * lung[:, 0], atol=1e-4, rtol=0)
        with pytest.raises(ValueError, match="vector of length 2"):
            net(image, lung)
    with pytest.raises(ValueError, match="no lung"):
        net(image, 0 * lung, clinical)


def test_a_patients_location_is_what_the_fit_took_it_for():
    net = network()
    for seed in range(3):
        image, lung = scan(seed, margin=3)
        found = net(image[None, None], lung[None, None])[0]
        tokens = Tokens(describe(image, lung, tokens_at(lung)), tokens_at(lung))  # a cohort's are kept in half precision
        risk = risk_of(net, words_of(net, tokens), tokens.index)
        assert float((found[0] * found[1]).sum()) == pytest.approx(float(net.months(risk)), abs=0.01)


def test_arguments_out_of_range_are_one_sentence():
    for wrong in ({"books": 0}, {"words": 0}, {"few": 30}, {"clinical_dim": -1}):
        with pytest.raises(InputError, match="must be positive"):
            CodebookNet(**wrong)


def drawn(count: int, seed: int, slope: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard normal risks and (time, event) with ties, of which the risks know something if there is a slope."""
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=count)
    time = rng.exponential(40 * np.exp(-slope * risk)).clip(1, 99).round()
    outcome = np.stack([time, rng.random(count) < 0.6], 1)
    return torch.tensor(risk).float(), torch.tensor(outcome).float()


@pytest.mark.parametrize("penalty", [0.1, 1.0])
def test_ridge_cox_is_the_minimum_of_the_penalised_partial_likelihood(penalty):
    _, outcome = drawn(25, 1)
    assert len(outcome[:, 0].unique()) < 25
    x, adjust = torch.randn(25, 4), torch.randn(25, 2)
    time, event = outcome.numpy().T
    both = torch.cat([x, adjust], 1).double().numpy()

    def loss(b):
        eta = both @ b
        partial = sum(eta[i] - np.log(np.exp(eta[time >= time[i]]).sum()) for i in range(25) if event[i])
        return penalty * (4 * b[:4] @ b[:4] + b[4:] @ b[4:]) / 2 - partial

    expected = optimize.minimize(loss, np.zeros(6), tol=1e-10).x[:4]
    np.testing.assert_allclose(ridge_cox(x, outcome, penalty, adjust), expected, atol=2e-4)
    alone = optimize.minimize(lambda b: loss(np.append(b, [0, 0])), np.zeros(4), tol=1e-10).x
    np.testing.assert_allclose(ridge_cox(x, outcome, penalty), alone, atol=2e-4)
    assert (ridge_cox(x, outcome * torch.tensor([1, 0])) == 0).all()

    strata = torch.arange(25) % 3

    def stratified(b):
        eta = x.double().numpy() @ b
        same = strata.numpy()[:, None] == strata.numpy()
        partial = sum(eta[i] - np.log(np.exp(eta[(time >= time[i]) & same[i]]).sum()) for i in range(25) if event[i])
        return penalty * 4 * b @ b / 2 - partial

    expected = optimize.minimize(stratified, np.zeros(4), tol=1e-10).x
    np.testing.assert_allclose(ridge_cox(x, outcome, penalty, strata=strata), expected, atol=2e-4)
    shifted = x + 100 * torch.nn.functional.one_hot(strata, 4)
    np.testing.assert_allclose(ridge_cox(shifted, outcome, penalty, strata=strata), expected, atol=2e-3)


def test_a_site_is_a_stratum_if_it_has_patients_to_compare():
    records = [{"site": "a"}] * 10 + [{"site": "b"}] * 12 + [{"site": "c"}] * 9 + [{}]
    assert strata_of(records).tolist() == [0] * 10 + [1] * 12 + [-1] * 10
    assert strata_of([{}] * 12).unique().tolist() == [0]


def test_tissue_that_does_not_shorten_life_has_no_hazard():
    shares = torch.rand(40, 2, 3)
    shares = shares / shares.sum(2, keepdim=True)
    hazard = fit_hazards(shares, torch.stack([60 - 40 * shares[:, 0, 1], torch.ones(40)], 1))
    assert hazard.min() == 0 and hazard.max() == 1 and hazard[0].argmax() == 1


def test_hazards_stay_numbers_where_nothing_varies():
    outcome = torch.tensor([[5.0, 1], [9.0, 1], [20.0, 0]])
    for shares in (torch.full((3, 2, 4), 0.25), torch.rand(3, 2, 4)):
        assert fit_hazards(shares, outcome).isfinite().all() and fit_hazards(shares[:1], outcome[:1]).isfinite().all()


@pytest.mark.parametrize("objective", [CenTime(), Cox()])
def test_months_tell_patients_apart_where_few_died(objective):
    """The likelihood would put everybody beyond the last month; then all were clamped to the same one."""
    risk, outcome = drawn(40, 3)
    risk, outcome[:, 1], outcome[:, 0] = risk.sigmoid(), 0, outcome[:, 0].clamp_min(30)
    outcome[:4], risk[:4] = torch.tensor([[10.0, 1], [15, 1], [20, 1], [60, 1]]), risk[:4] + 0.5
    net = CodebookNet(2, 5).requires_grad_(False)
    variance = fit_months(net, risk, outcome, objective, torch.zeros(40, 0))
    assert net.low <= float(net.offset) <= net.high and len(net.months(risk).unique()) > 35
    assert (variance is None) == isinstance(objective, Cox) and (variance is None or 1 < variance < 1e5)
    assert net.months(risk)[:4].mean() < net.months(risk)[4:].mean() - 5


def test_covariates_of_noise_do_not_tell_the_outcome(monkeypatch):
    """Months of covariates that had seen the patient's outcome made nearly every verdict of noise a yes or unsure."""
    monkeypatch.setattr(verdicts, "PERMUTATIONS", 990)
    sure = []
    for seed in range(3):
        risk, outcome = drawn(40, seed)
        clinical, net = torch.randn(40, 6), CodebookNet(2, 5, clinical_dim=6).requires_grad_(False)
        folds = torch.arange(40) % 4
        fit_months(net, risk.sigmoid(), outcome, CenTime(), clinical)
        months = net.months(risk.sigmoid()) + unseen_months(net, risk.sigmoid(), outcome, CenTime(), clinical, folds)
        sure.append(verdict(-months, *outcome.T, by="out of fold")["verdict"])
    assert sure.count("no") >= 2 and (unseen_months(net, risk, outcome, CenTime(), clinical[:, :0], folds) == 0).all()


def test_the_verdict_says_no_to_noise_yes_to_a_signal_and_unsure_of_few(monkeypatch):
    monkeypatch.setattr(verdicts, "PERMUTATIONS", 990)
    noise = [drawn(60, seed) for seed in range(20)]
    said = [verdict(risk, *outcome.T, by="validation") for risk, outcome in noise]
    assert [one["verdict"] for one in said].count("no") >= 19
    risk, outcome = drawn(60, 0, slope=1.0)
    found = verdict(risk, *outcome.T, by="out of fold")
    expected = lifelines.utils.concordance_index(outcome[:, 0], -risk, outcome[:, 1])
    assert found["verdict"] == "yes" and found["p_value"] < 0.005 and found["patients"] == 60
    assert found["c_index"] == pytest.approx(expected) and "learnt something (C-index" in in_words(found)
    few = outcome.clone()
    few[few[:, 1].nonzero()[4:, 0], 1] = 0
    assert verdict(risk, *few.T, by="validation")["verdict"] == "unsure"
    alike = verdict(torch.ones(60), *outcome.T, by="validation")
    assert alike["verdict"] == "no" and alike["p_value"] == 1


def test_accuracy_is_against_kaplan_and_meier():
    """Where all died, a Brier score is the plain mean of squares."""
    _, outcome = drawn(50, 3)
    outcome[:, 1] = 1
    time, event = outcome.double().T
    cohort, months = cohort_pmf(outcome, 100), np.arange(np.ceil(time.min()), np.ceil(time.max()))
    pmf = normal_log_pmf(time + torch.linspace(-9, 9, 50), 80.0, 100).exp().double()
    alive = time.numpy()[:, None] > months

    def score(p: np.ndarray) -> float:
        survival = 1 - p.cumsum(-1)[..., months.astype(int) - 1]
        return np.trapezoid(((survival - alive) ** 2).mean(0), months)

    found = prediction_accuracy(pmf, cohort, time, event)
    assert found == pytest.approx(1 - score(pmf.numpy()) / score(np.array(cohort)[None]), abs=1e-6) and 0 < found < 1
    assert prediction_accuracy(torch.tensor(cohort).expand(50, -1), cohort, time, event) == pytest.approx(0, abs=1e-9)
    assert prediction_accuracy(pmf.flip(0), cohort, time, event) < 0
    assert prediction_accuracy(pmf, cohort, time, torch.zeros(50)) is None


def test_a_shuffle_that_ties_counts_as_reached():
    """All but one patient are alike: the score is reached by one shuffle in six at least, however sums are rounded."""
    time, event = torch.tensor([3.3, 7.7, 11.1, 11.1, 11.1, 30.7]), torch.tensor([1.0, 1, 1, 0, 0, 1])
    assert verdict(torch.tensor([0.9, 0.1, 0.1, 0.1, 0.1, 0.1]), time, event, by="validation")["p_value"] > 0.15


def test_residuals_and_the_cohorts_distribution_are_those_of_lifelines():
    _, outcome = drawn(50, 2)
    time, event = outcome.double().T
    hazard = lifelines.NelsonAalenFitter(nelson_aalen_smoothing=False).fit(time, event).cumulative_hazard_.iloc[:, 0]
    expected = event.numpy() - hazard.reindex(time.numpy()).to_numpy()
    np.testing.assert_allclose(martingale_residuals(time, event), expected, atol=1e-6)
    assert abs(float(martingale_residuals(time, event).sum())) < 1e-6
    pmf = np.array(cohort_pmf(outcome, 100))
    curve = lifelines.KaplanMeierFitter().fit(time, event).survival_function_at_times(np.arange(1, 100) + 0.5)
    np.testing.assert_allclose(1 - pmf.cumsum()[:-1], curve, atol=1e-9)
    assert pmf.sum() == pytest.approx(1)
    own = torch.eye(100)[:1]
    assert widened(own, pmf.tolist(), 0.0) is own
    torch.testing.assert_close(widened(own, pmf.tolist(), 0.25), 0.75 * own + 0.25 * torch.tensor(pmf).float())


@pytest.mark.parametrize("stretch", [0.4, 1.0, 2.0])
@pytest.mark.parametrize("censored, follow_up", [(0.0, 100), (0.5, 100), (0.0, 50), (0.5, 50)])
@pytest.mark.parametrize("n, trials", [(30, 400), (120, 100)])
def test_intervals_cover_95_percent_whatever_the_width_of_the_distributions(stretch, censored, follow_up, n, trials):
    """Levels of n patients, counted on 500 others; distributions are too narrow, right, or too wide.

    With a follow-up of 50 months most upper ends are open: their intervals cover as many as the closed ones.
    """
    rng, covered = np.random.default_rng(0), {True: [], False: []}
    for _ in range(trials):
        middle = rng.uniform(30, 60, n + 500)
        time = rng.normal(middle, 8).clip(1, 99)
        end = np.minimum(np.where(rng.random(n + 500) < censored, rng.uniform(10, 80, n + 500), np.inf), follow_up)
        event = time <= end
        pmf = normal_log_pmf(torch.tensor(middle), (8 * stretch) ** 2, 100).exp()
        outcome = torch.tensor(np.stack([np.minimum(time, end), event], 1))
        low, high, low_if_open = interval_levels(pmf[:n], outcome[:n])
        level, last = dead_at(pmf[n:], torch.tensor(time[n:])), last_death(outcome[:n])
        is_open = dead_at(pmf[n:], torch.full((500,), last, dtype=torch.float64)) < high
        inside = torch.where(is_open, low_if_open <= level, (low <= level) & (level <= high))
        for kind in (True, False):
            covered[kind] += inside[is_open == kind].tolist()
    least, most = (0.92, 0.99) if n == 30 else (0.94, 0.975)
    assert least < np.mean(covered[True] + covered[False]) < most
    if follow_up == 50 and n == 120:
        assert 0.935 < np.mean(covered[True]) < 0.965 and 0.9 < np.mean(covered[False]) < 0.98


@pytest.mark.parametrize("n, deaths", [(40, 1), (120, 2), (300, 5)])
def test_few_deaths_have_levels_too(n, deaths):
    rng = np.random.default_rng(n)
    pmf = normal_log_pmf(torch.tensor(rng.uniform(30, 60, n)), 64.0, 100).exp()
    for _ in range(20):
        event = np.isin(np.arange(n), rng.permutation(n)[:deaths])
        low, high, low_if_open = interval_levels(pmf, torch.tensor(np.stack([rng.uniform(1, 90, n), event], 1)))
        assert 0 <= low <= low_if_open <= high <= 1 and high >= LEVELS[1]


def test_an_end_of_an_interval_that_few_patients_reach_is_not_drawn_in():
    pmf = normal_log_pmf(torch.full((12,), 50.0), 100.0, 100).exp()
    outcome = torch.tensor([[50.0, 1.0]] * 12)
    assert interval_levels(pmf, outcome * torch.tensor([1.0, 0.0])) == list(LEVELS)  # nobody died
    assert interval_levels(pmf, outcome) == list(LEVELS)  # all died at the same time
    outcome[0, 0], outcome[1, 0] = 10.0, 95.0
    low, high, _ = interval_levels(pmf, outcome)
    assert low < 1e-3 and high > 1 - 1e-3
    assert quantile_months(pmf[:1], float(dead_at(pmf[:1], torch.tensor([37.3])))).item() == pytest.approx(37.3, abs=1e-3)


def test_a_student_draws_the_map_and_leaves_the_months_alone():
    net, (image, lung) = network(), scan(3)
    plain = net(image[None, None], lung[None, None])[0]
    net.student.normal_(), net.student_bias.fill_(-1.0), net.student_scale.fill_(0.6)
    taught = net(image[None, None], lung[None, None])[0]
    months = [float((m[0] * m[1]).sum()) for m in (plain, taught)]
    assert months[0] == pytest.approx(months[1], abs=1e-3) and not torch.allclose(plain[1], taught[1], rtol=0.1)
    index = tokens_at(lung)
    described = describe(image, lung, index)
    words = net.words_of(net.standardised(described, *level_and_spread(described))).numpy()
    odds = sum(net.student[book, words[:, book].tolist()] for book in range(4)).numpy() - 1
    said = 0.6 / (1 + np.exp(-odds))
    volumes = [np.zeros([(n + 1) // 2 for n in image.shape]) for _ in range(2)]
    for volume, values in zip(volumes, (said, 1.0)):
        volume[tuple((index // 2).T.numpy())] = values
    near, count = (ndimage.gaussian_filter(v, 0.9, mode="constant", radius=int(3 * 0.9 + 0.5)) for v in volumes)
    at = tuple((index // 2).T.numpy())
    weight = float(net.base) + (near[at] / count[at]) ** 2
    assert np.corrcoef(taught[1][tuple(index.T)], weight)[0, 1] > 0.9999


def test_a_student_draws_each_kind_of_disease_though_its_hottest_voxels_are_of_one():
    """Two kinds of disease, of which one is more dangerous and more than what is sure to the student."""
    g, net, scans, words, kinds = torch.Generator().manual_seed(0), network(), [], [], []
    for _ in range(30):
        kind = torch.multinomial(torch.tensor([0.97, 0.015, 0.015]), 800, True, generator=g)
        drawn = torch.randint(2, 9, (800, 4), generator=g)
        keeps = torch.rand(800, 4, generator=g) < 0.75
        for k in (1, 2):
            drawn[keeps & (kind == k)[:, None]] = k - 1
        index = torch.stack(torch.meshgrid(*(2 * torch.arange(n) for n in (8, 10, 10)), indexing="ij"), -1).view(-1, 3)
        words.append(drawn.to(torch.int16)), kinds.append(kind)
        scans.append(Tokens(torch.zeros(800, 29), index.to(torch.int16)))
    net.hazard.copy_(torch.tensor([1.0, 0.7, *[0.1] * 7]).expand(4, 9))
    net.smoothing = 0.2  # lesions here are single voxels
    teach(net, words, scans, torch.full((30,), 0.4), seed=0)
    told = torch.stack([net.drawn(w, net.evidence(w)) for w in words])
    for k in (1, 2):
        others = torch.stack(kinds) != 3 - k
        assert average_precision_score((torch.stack(kinds) == k)[others], told[others]) > 0.8
    assert told.square().mean().sqrt() == pytest.approx(0.4, rel=0.05)
    net.hazard.zero_()
    evidence = net.evidence(words[0])
    teach(net, words, scans, torch.full((30,), 0.4), seed=0)
    assert net.student_scale == 0 and torch.equal(net.drawn(words[0], evidence), evidence)


def test_an_upper_bound_beyond_the_last_death_is_open():
    pmf = torch.zeros(100)
    pmf[[29, 69]] = torch.tensor([0.9, 0.1])
    assert prediction_row("a", pmf, 0.5, last_death=75.0)["upper_months"] == pytest.approx(69.5, abs=1)
    assert prediction_row("a", pmf, 0.5, last_death=65.0)["upper_months"] == 100
    assert prediction_row("a", pmf)["familiarity"] is None
    wide, narrow = prediction_row("a", pmf), prediction_row("a", pmf, interval_levels=(0.5, 0.6, 0.7))
    assert wide["lower_months"] < narrow["lower_months"] < narrow["upper_months"] < wide["upper_months"]


def test_familiarity_of_training_scans_and_of_a_strange_one():
    looks = torch.randn(30, 108)
    model = fit_familiarity(looks, list(range(30)))
    shares = sorted(model.quantile(seen) for seen in looks)
    assert shares[-1] > 0.95 and shares[0] < 0.2 and 0.4 < np.mean(shares) < 0.8
    assert all(model.strangeness(seen) == 0 for seen in looks)
    assert model.quantile(looks[0] + 9) == 0 and model.strangeness(looks[0] + 9) == 1
    sites = looks + 4 * (torch.arange(30) % 2)[:, None]
    apart, mixed = (fit_familiarity(sites, folds) for folds in ([i % 2 for i in range(30)], list(range(30))))
    assert min(apart.distances) > max(mixed.distances)


def test_a_strange_scan_gets_a_note():
    described = [look(describe(*s, tokens_at(s[1]))) for s in map(scan, range(4))]
    model = fit_familiarity(torch.stack(described), range(4))
    image, lung = scan(9)
    for data, strange in ((image, False), (image.round(), True)):
        out = Familiarityd([None, model])({"image": data[None], "lung": lung[None], "notes": "thick slices"})
        assert (out["familiarity"] == 0 and out["strangeness"] > 0) or not strange
        assert out["notes"].startswith("thick slices") and ("unlike the training scans" in out["notes"]) == (
            out["familiarity"] < 0.02
        )
    assert "the cohort's own" in out["notes"] and Familiarityd([None])({"image": 1}) == {"image": 1}


def test_folds_leave_out_a_site_else_patients():
    cohort = [{"patient_id": f"P{i:02}", "time": 10.0 + i, "event": i % 2, "site": "AB"[i > 9]} for i in range(24)]
    assert site_folds(cohort, 0) == [int(i > 9) for i in range(24)]
    many = [{**one, "site": str(i)} for i, one in enumerate(cohort)]
    assert max(site_folds(many, 0)) == 9
    alone = [{k: v for k, v in one.items() if k != "site"} for one in cohort]
    assert sorted(set(site_folds(alone, 0))) == list(range(10))
    assert site_folds(alone[:3], 0) == [0, 1, 2]
    assert len(set(site_folds([{**one, "event": 0} for one in alone], 0))) == 2
    twice = [{**one, "patient": "A"} for one in alone[:2]] + alone[2:4]
    assert site_folds(twice, 0)[0] == site_folds(twice, 0)[1]


class Scans:
    """A dataset of drawn scans, as much of one as the stage asks for."""

    def __init__(self, folder: Path, count: int) -> None:
        self.cache_dir = folder
        self.data = [{"patient_id": f"P{i:02}", "time": 90.0 - 5 * i, "event": i % 3 > 0} for i in range(count)]

    def key(self, record: dict) -> bytes:
        return record["patient_id"].encode()

    def _cachecheck(self, record: dict) -> dict:
        image, lung = scan(int(record["patient_id"][1:]), shape=(12, 12, 12), margin=2)
        return {"image": image[None], "lung": lung[None]}


def stage(folder: Path, recipe: str = "codebook", objective=None, count: int = 12, **changed) -> CodebookStage:
    scans = Scans(folder, count)
    scans.data = [{**record, **changed} for record in scans.data]
    return CodebookStage(recipe, CodebookNet(2, 6), scans, scans, objective or CenTime(), str(folder))


def test_a_fit_is_read_again_unless_damaged_missing_or_of_something_else(tmp_path, monkeypatch):
    fits, fit = [], CodebookStage.fit
    monkeypatch.setattr(CodebookStage, "fit", lambda self: (fits.append(self), fit(self))[1])
    first = stage(tmp_path)
    first.run(), first.run()
    assert len(fits) == 1 and first.objective.variance != 36.0
    again = stage(tmp_path)
    again.run()
    assert len(fits) == 1 and torch.equal(again.location, first.location) and again.familiarity == first.familiarity
    assert again.objective.arguments == first.objective.arguments
    for name, value in first.network.state_dict().items():
        assert torch.equal(again.network.state_dict()[name], value), name
    whole = first.path.read_bytes()
    first.path.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    stage(tmp_path).run()
    first.path.unlink()
    stage(tmp_path).run()
    assert len(fits) == 3 and torch.equal(fits[-1].location, first.location)
    for changed in ({"event": 1}, {"site": "A"}, {"objective": CenTime(variance=49.0)}, {"recipe": "auto"}):
        stage(tmp_path, **changed).run()
    assert len(fits) == 7
    assert len(list(tmp_path.glob("*.tokens.pt"))) == 12


def test_what_a_recipe_needs(tmp_path):
    with pytest.raises(InputError, match="recipe must be one of auto, codebook, network"):
        stage(tmp_path, recipe="forest")
    with pytest.raises(
        InputError, match='the recipe "codebook" needs an objective of months or hazards, not logistic_hazard'
    ):
        stage(tmp_path, objective=LogisticHazard())
    for recipe, objective in (("auto", LogisticHazard()), ("network", None)):
        plain = stage(tmp_path, recipe, objective, count=3)
        plain.run()
        assert not plain.fitted and len(plain.familiarity.distances) == 3
    with pytest.raises(InputError, match="two patients or more"):
        stage(tmp_path, count=1).run()
    few = stage(tmp_path, count=2)
    few.run()
    assert few.location.isfinite().all() and all(value.isfinite().all() for value in few.network.state_dict().values())
    cox = stage(tmp_path, objective=Cox())
    cox.run()
    assert len(cox.objective.baseline) == 100 and cox.location.std() > 0


def test_a_fine_map_joins_those_of_coarser_cells():
    fine = network()(*(x[None, None] for x in scan(shape=(10, 9, 8), margin=1)))[0]
    coarse = in_cells(fine, 4)
    assert coarse.shape == (2, 3, 3, 2) and float(coarse[1].sum()) == pytest.approx(1, abs=1e-5)
    inside = fine[1, :4, :4, :4] > 0
    assert float(coarse[0, 0, 0, 0]) == pytest.approx(float(fine[0, :4, :4, :4][inside].mean()), abs=1e-3)


# Through monai.bundle


@pytest.fixture(scope="module")
def codebook(tiny_cohort, tmp_path_factory, root) -> Path:
    """Weights of codebooks of the tiny cohort."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        return train(tiny_cohort, tmp_path_factory.mktemp("codebook"), **BOOKS)


def settings_of(ckpt: Path) -> dict:
    return json.loads((ckpt.parent / "settings.json").read_text())


def infer(ckpt, cohort, folder, stack=(), **options) -> pd.DataFrame:
    run(["configs/inference.json", *stack], ckpt=ckpt, cohort=str(cohort), output_dir=str(folder), **options)
    return pd.read_csv(folder / "predictions.csv").set_index("patient_id")


def table_of(cohort: Path) -> pd.DataFrame:
    """Scans, outcomes and disease of a cohort, by absolute paths."""
    table = pd.read_csv(cohort)[["patient_id", "image", "time", "event", "gt_mask"]]
    for column in ("image", "gt_mask"):
        table[column] = [str(cohort.parent / name) for name in table[column]]
    return table


@pytest.fixture
def three(tiny_cohort, tmp_path) -> Path:
    """The first three scans of the tiny cohort."""
    table_of(tiny_cohort)[:3].to_csv(tmp_path / "three.csv", index=False)
    return tmp_path / "three.csv"


def test_a_codebook_run_leaves_all_that_a_run_leaves(codebook, tiny_cohort, tmp_path):
    found = settings_of(codebook)
    assert found["network"]["name"] == "CodebookNet" and found["network"]["words"] == 20 and found["severity"] is None
    assert found["learnt"]["by"] == "out of fold" and found["learnt"]["deaths"] > 0
    assert sum(found["outcomes"]["pmf"]) == pytest.approx(1) and found["outcomes"]["last_death"] <= 24
    assert 0 <= found["outcomes"]["interval_levels"][0] <= 0.5 < found["outcomes"]["interval_levels"][1] <= 1
    assert len(found["familiarity"]["distances"]) == found["learnt"]["patients"]
    assert {"model.pt", "codebooks.pt", "last.pt"} <= {path.name for path in codebook.parent.iterdir()}
    before = codebook.read_bytes()
    folder = shutil.copytree(codebook.parent, tmp_path / "again")
    (folder / "model.pt").unlink()
    assert train(tiny_cohort, folder, **BOOKS).read_bytes() == before  # a finished run whose weights are gone
    (folder / "last.pt").unlink()
    (folder / "codebooks.pt").unlink()
    assert train(tiny_cohort, folder, **BOOKS, **{"cache_dir": str(tmp_path / "cache")}).read_bytes() == before


def test_the_verdict_and_familiarity_are_on_the_face_of_what_inference_leaves(codebook, three, tmp_path, monkeypatch):
    folder = shutil.copytree(codebook.parent, tmp_path / "no", ignore=shutil.ignore_patterns("cache", "tensorboard"))
    found = settings_of(codebook)
    found["learnt"] |= {"verdict": "no", "p_value": 0.4}
    found["outcomes"]["last_death"] = 1.0
    (folder / "settings.json").write_text(json.dumps(found))
    drawn_with, draw = [], pictures.heat_figure
    monkeypatch.setattr("bundle.run.results.heat_figure", lambda *a: (drawn_with.append(a[-1]), draw(*a))[1])
    said = "the training learnt nothing that could be shown"
    table = infer(str(folder / "model.pt"), three, tmp_path / "out")
    assert table.message.str.startswith(said).all() and (table.upper_months == 100).all()
    assert table.familiarity.between(0, 1).all() and len(drawn_with) == 3 and all(one.startswith(said) for one in drawn_with)
    for page in ("cohort.html", "reports/p0.html"):
        assert f"The model: {said}" in (tmp_path / "out" / page).read_text()
    heat = nib.load(tmp_path / "out" / "maps" / "p0_heat.nii.gz").get_fdata()
    assert heat.shape == (16, 16, 16) and heat.sum() == pytest.approx(table.death_60m["p0"], abs=1e-3)
    title = draw(np.zeros((4, 4, 4)), np.ones((4, 4, 4)), (3.0, 3.0, 3.0), 60, said).get_suptitle()
    assert title.replace("\n", " ") == f"Don't rely on this map: {said}."
    found["learnt"]["verdict"] = "yes"
    (folder / "settings.json").write_text(json.dumps(found))
    table = infer(str(folder / "model.pt"), three, tmp_path / "yes")
    assert table.message.str.endswith("p = 0.4)").all() and table.message.str.contains("learnt something").all()
    assert drawn_with[3:] == ["", "", ""]


def test_what_learnt_from_simulated_times_says_so(tiny_cohort, tmp_path):
    table = table_of(tiny_cohort)
    table.assign(simulated=1).to_csv(tmp_path / "c.csv", index=False)
    model = train(tmp_path / "c.csv", tmp_path / "run", **BOOKS)
    learnt = settings_of(model)["learnt"] | {"verdict": "yes"}
    real = {name: value for name, value in learnt.items() if name != "simulated"} | {"p_value": 1.0}
    assert doubtful(learnt) and not doubtful(real) and doubtful(real | {"verdict": "unsure"})
    assert in_words(learnt).startswith("survival times were simulated, so nothing is known of patients; the training learnt")
    assert worst_of([learnt, real]) == learnt and worst_of([real]) == real and worst_of([]) is None
    path = model.with_name("settings.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"learnt": learnt}))
    table.drop(columns=["time", "event"])[:1].to_csv(tmp_path / "one.csv", index=False)
    said = infer(str(model), tmp_path / "one.csv", tmp_path / "out").message
    assert said.str.startswith("survival times were simulated").all()
    assert 'class="believe doubt"' in (tmp_path / "out" / "reports" / "p0.html").read_text()
    table.assign(simulated="maybe").to_csv(tmp_path / "c.csv", index=False)
    with pytest.raises(InputError, match="row 2, column simulated: 'maybe' .expected 1 or 0"):
        read_cohort(tmp_path / "c.csv")


@pytest.mark.parametrize("wins, name", [(True, "SurvivalMapNet"), (False, "CodebookNet")])
def test_auto_keeps_what_the_validation_supports_and_both_join_in_an_ensemble(
    wins, name, codebook, tiny_cohort, three, tmp_path, monkeypatch
):
    monkeypatch.setattr("bundle.run.training.LEAST_SCANS", 2)
    gain = 5.0 if wins else -5.0

    def validated(self, found):
        count = len(self.val.data)
        return torch.eye(100)[10 : 10 + count], gain + 0.01 * torch.arange(float(count))

    monkeypatch.setattr(Finish, "validated", validated)
    monkeypatch.setattr("bundle.run.training.log_likelihood_of", lambda objective, maps, outcome: torch.zeros(len(outcome)))
    auto = train(tiny_cohort, tmp_path / "auto", **{**BOOKS, "recipe": "auto", "max_epochs": 1})
    found = settings_of(auto)
    assert found["network"]["name"] == name and found["learnt"]["by"] == ("validation" if wins else "out of fold")
    if not wins:
        for key, value in torch.load(codebook, weights_only=True).items():
            assert torch.equal(torch.load(auto, weights_only=True)[key], value)
        return
    both, ensemble = [str(codebook), str(auto)], ["configs/ensemble.json"]
    curves = []
    for i, ckpt in enumerate(both):
        infer(ckpt, three, tmp_path / str(i), shifts=1)
        curves.append(pd.read_csv(tmp_path / str(i) / "survival_curves.csv").set_index("patient_id"))
    infer(both, three, tmp_path / "both", ensemble, shifts=1)
    joint = pd.read_csv(tmp_path / "both" / "survival_curves.csv").set_index("patient_id")
    np.testing.assert_allclose(joint, sum(curves) / 2, atol=2e-4)
    table = pd.read_csv(three)
    table.assign(patient_id=[f"new{i}" for i in range(3)]).to_csv(three, index=False)
    run(
        ["configs/evaluate.json", *ensemble],
        ckpt=both,
        cohort=str(three),
        output_dir=str(tmp_path / "e"),
        shifts=1,
        figures=False,
    )
    assert len(pd.read_csv(tmp_path / "e" / "metrics_per_scan.csv")) == 3


@pytest.mark.parametrize("objective, clinical", [("cox", {}), ("classical", {"age": "numeric"})])
def test_codebooks_of_other_objectives_and_with_covariates(objective, clinical, tiny_cohort, tmp_path):
    stack = ["configs/train.json", "configs/cohort/phantom.json", f"configs/objective/{objective}.json"]
    model = TrainedModel(str(train(tiny_cohort, tmp_path, stack, **BOOKS, clinical=clinical)))
    assert model.settings["objective"]["name"] == objective and model.network.clinical_dim == len(clinical)
    assert objective != "cox" or len(model.objective.baseline) == 100
    known = torch.ones(1, 1) if clinical else None
    found = model.network(torch.rand(1, 1, 8, 8, 8), None, known)
    assert float(model.objective.pmf(found).sum()) == pytest.approx(1, abs=1e-4)


def test_an_objective_without_codebooks_is_refused_or_left_to_the_network(tiny_cohort, tmp_path):
    stack = ["configs/train.json", "configs/cohort/phantom.json", "configs/objective/logistic_hazard.json"]
    with pytest.raises(InputError, match='recipe "codebook" needs an objective of months or hazards, not logistic_hazard'):
        train(tiny_cohort, tmp_path, stack, **BOOKS)
    found = settings_of(train(tiny_cohort, tmp_path, stack, **{**BOOKS, "recipe": "auto", "max_epochs": 1}))
    assert found["network"]["name"] == "SurvivalMapNet" and found["learnt"]["by"] == "validation" and found["familiarity"]


def test_export_to_torchscript(codebook, tmp_path):
    args = {"net_id": "network_def", "filepath": str(tmp_path / "model.ts"), "ckpt_file": str(codebook)}
    monai.bundle.ckpt_export(**args, config_file="configs/inference.json", ckpt=str(codebook))
    image, lung = (x[None, None] for x in scan())
    eager = TrainedModel(str(codebook)).network
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.ts")(image, lung), eager(image, lung))
