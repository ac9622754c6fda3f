# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Each objective against formulas written out in numpy, or another library; on random numbers and on real tables."""

from __future__ import annotations

import copy
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lifelines import CoxPHFitter, KaplanMeierFitter
from lifelines.utils import concordance_index
from monai.bundle import ConfigParser
from sksurv.linear_model import CoxPHSurvivalAnalysis
from torch import Tensor
from torchsurv.loss.cox import neg_partial_log_likelihood
from torchsurv.loss.momentum import Momentum

from bundle.errors import InputError
from bundle.networks import ClinicalNet, SurvivalMapNet
from bundle.networks.heads import HEADS
from bundle.run import Finish
from bundle.survival import OBJECTIVES, CenTime, Cox, CoxMemory, objective_from, patient_numbers, seen_until
from bundle.survival.cox import breslow_baseline, partial_log_likelihood
from bundle.survival.discrete import DeepHit, Logistic, LogisticHazard, deephit_ranking
from bundle.survival.objectives import Classical

TMAX = 100

# File, time, event, covariates. The time in bins has its largest at 90, with many ties.
TABLES = {
    "veteran_lung_137.csv": ("Survival_in_days", "Status", "Treatment Celltype Karnofsky_score Age_in_years"),
    "ncctg_lung_228.csv": ("time", "status", "age sex ph.ecog ph.karno pat.karno wt.loss"),
    "gbsg2_686.csv": ("time", "cens", "horTh age menostat tsize tgrade pnodes progrec estrec"),
    "rossi_432.csv": ("week", "arrest", "fin age race wexp mar paro prio"),
    "nsclc_radiogenomics_143.csv": ("Survival.time", "deadstatus.event", "Age Gender Smoking Pathological_N_stage"),
    "whas500_500.csv": ("lenfol", "fstat", "age gender hr sysbp diasbp bmi cvd afb sho chf av3 miord mitype"),
}


def read_table(folder: Path, name: str) -> tuple[np.ndarray, Tensor]:
    """Standardised covariates (N, K) and the outcome (N, 2)."""
    time, event, columns = TABLES[name]
    table = pd.read_csv(folder / "survival" / name).rename(
        columns={"Age at Histological Diagnosis": "Age", "Smoking status": "Smoking"}
    )
    table.columns = table.columns.str.replace(" ", "_")
    x = pd.get_dummies(table[columns.split()], drop_first=True, dtype=float)
    x = x.fillna(x.median()).to_numpy()
    months = np.ceil(table[time] / table[time].max() * 90).clip(1)
    died = table[event].isin([1, "dead"])
    return (x - x.mean(0)) / x.std(0), torch.tensor(np.column_stack([months, died]), dtype=torch.float64)


@pytest.fixture(params=TABLES)
def table(request, shared_data) -> tuple[np.ndarray, Tensor]:
    return read_table(shared_data, request.param)


def random_outcome(num: int, seed: int = 0, last: int = TMAX - 1) -> Tensor:
    """Times with many ties, from 1 to `last`, both among the deaths and the censored."""
    rng = np.random.default_rng(seed)
    time = np.clip(rng.choice([1, 2, 3, 7, 7, 20, 21, 50, last], num) + rng.integers(0, 2, num), 1, last)
    return torch.tensor(np.column_stack([time, rng.random(num) < 0.6]), dtype=torch.float64)


OUTCOMES = {
    "ties": random_outcome(20),
    "all censored": torch.tensor([[3.0, 0], [50, 0], [TMAX - 1, 0]], dtype=torch.float64),
    "single event": torch.tensor([[3.0, 0], [7, 1], [50, 0], [7, 0]], dtype=torch.float64),
    "one patient": torch.tensor([[7.0, 1]], dtype=torch.float64),
    "ends": torch.tensor([[1.0, 1], [1, 0], [TMAX - 1, 1], [TMAX - 1, 0], [TMAX, 1]], dtype=torch.float64),
    "all at once": torch.tensor([[9.0, 1]] * 4 + [[9.0, 0]], dtype=torch.float64),
}


@pytest.fixture(params=OUTCOMES)
def outcome(request) -> Tensor:
    return OUTCOMES[request.param]


def map_of(location: Tensor, extra: Tensor | None = None) -> Tensor:
    """Survival maps of one patch a patient."""
    extra = location.new_zeros(len(location), 0) if extra is None else extra
    return torch.cat([location[:, None], extra, torch.ones_like(location)[:, None]], 1)[..., None, None, None]


def random_map(num: int, extra: int, grid: tuple[int, int, int] = (1, 2, 2), seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    location = 5 + 80 * torch.rand(num, 1, *grid, generator=g, dtype=torch.float64)
    shape = torch.randn(num, extra, *grid, generator=g, dtype=torch.float64)
    weight = 0.1 + torch.rand(num, 1, *grid, generator=g, dtype=torch.float64)
    return torch.cat([location, shape, weight / weight.sum((2, 3, 4), keepdim=True)], 1)


def each(**arguments) -> list:
    """One of every kind, and what their options make of them."""
    return [
        CenTime(**arguments),
        CenTime(learn_variance=True, alpha_censored=0.5, **arguments),
        CenTime(predict_variance=True, **arguments),
        Classical(**arguments),
        Classical(predict_variance=True, learn_variance=True, **arguments),
        Cox(**arguments),
        Cox(scale=7.0, **arguments),
        CoxMemory(memory=8, **arguments),
        DeepHit(intervals=3, **arguments),
        DeepHit(intervals=2, alpha=0.3, sigma=0.5, learn_variance=True, **arguments),
        LogisticHazard(intervals=3, **arguments),
        LogisticHazard(intervals=2, learn_variance=True, **arguments),
        Logistic(by=30, **arguments),
        Logistic(by=30, censoring=[1 - t / 200 for t in range(TMAX)], **arguments),
    ]


@pytest.fixture(params=each(tmax=TMAX), ids=lambda o: f"{o.name}-{o.extra}")
def objective(request) -> torch.nn.Module:
    return copy.deepcopy(request.param)


# ------------------------------------------------------------------------------------------- what all have in common


def test_distributions_sum_to_one_and_their_logs_agree(objective):
    for location in (-1e3, -5.0, 30.0, 119.0, 1e3):
        pmf = objective.pmf(map_of(torch.full((2,), location), torch.randn(2, objective.extra)))
        assert pmf.shape == (2, TMAX) and bool((pmf >= 0).all())
        torch.testing.assert_close(pmf.sum(1), torch.ones(2))
    survival_map = random_map(5, objective.extra)
    pmf, log_pmf = objective.pmf(survival_map), objective.log_pmf(survival_map)
    torch.testing.assert_close(pmf, log_pmf.exp(), atol=1e-12, rtol=1e-6)


def test_an_earlier_location_means_an_earlier_death(objective):
    location = torch.arange(0, 115, 5.0, dtype=torch.float64)
    pmf = objective.pmf(map_of(location, torch.zeros(len(location), objective.extra, dtype=torch.float64)))
    assert bool((pmf.cumsum(1).diff(dim=0) <= 1e-12).all())


def test_its_arguments_and_state_make_it_again(objective):
    for parameter in objective.parameters():
        torch.nn.init.constant_(parameter, 0.3)
    settings = json.loads(json.dumps({"name": objective.name, **objective.arguments}))
    again, survival_map = objective_from(settings), random_map(4, objective.extra)
    assert type(again) is type(objective) and again.extra == objective.extra
    torch.testing.assert_close(again.pmf(survival_map), objective.pmf(survival_map), rtol=1e-5, atol=1e-9)


def test_gradients(objective, outcome):
    objective = objective.double()
    survival_map = random_map(len(outcome), objective.extra)
    weight = survival_map[:, -1:]
    for remembered in objective.buffers():
        remembered[3:] = torch.tensor([[20.0, 7, 1], [40, 7, 0], [30, 9, 1], [80, 60, 0], [70, 3, 1]])
    buffers = dict(objective.named_buffers())  # given, so that a call does not change them

    def loss(said: Tensor, *parameters: Tensor) -> Tensor:
        # The extra numbers take the weights as given, so only what the patches say is moved.
        named = {**buffers, **dict(zip(dict(objective.named_parameters()), parameters))}
        return torch.func.functional_call(objective, named, (torch.cat([said, weight], 1), outcome))

    said = survival_map[:, :-1].requires_grad_()
    assert torch.autograd.gradcheck(loss, (said, *objective.parameters()), atol=1e-6)


def test_extra_channels_do_not_move_the_weights(objective):
    survival_map = random_map(6, objective.extra).requires_grad_()
    location, extra = patient_numbers(survival_map)
    (by_extra,) = torch.autograd.grad(extra.sum() + 0 * location.sum(), survival_map, retain_graph=True)
    assert bool((by_extra[:, [0, -1]] == 0).all())


def test_losses_are_finite_for_any_location(objective, outcome):
    for location in (-5.0, 120.0, -1e4, 1e4):
        said = torch.full((len(outcome),), location), torch.zeros(len(outcome), objective.extra)
        survival_map = map_of(*said).requires_grad_()
        loss = objective.float()(survival_map, outcome.float())
        loss.backward()
        assert math.isfinite(loss.item()) and bool(survival_map.grad.isfinite().all())


def test_every_file_of_configs_makes_the_objective_of_its_name(root):
    assert {path.stem for path in (root / "configs" / "objective").glob("*.json")} == set(OBJECTIVES)
    for name in OBJECTIVES:
        config = ConfigParser()
        config.read_config([str(root / "configs" / "train.json"), str(root / "configs" / "objective" / f"{name}.json")])
        objective = config.get_parsed_content("objective")
        assert objective.name == name and objective.tmax == 100
        assert config.get_parsed_content("network_def").arguments["extra"] == objective.extra


def test_settings_without_a_name_are_those_of_centime():
    assert type(objective_from({"tmax": 60, "variance": 9.0, "alpha_censored": 1.0, "mixture": True})) is CenTime


@pytest.mark.parametrize(
    "make",
    [
        lambda: CenTime(tmax=1),
        lambda: CenTime(mixture=True, predict_variance=True),
        lambda: Classical(variance=-1.0),
        lambda: Cox(scale=0.0),
        lambda: Cox(baseline=[0.1] * 99),
        lambda: CoxMemory(memory=0),
        lambda: DeepHit(sigma=0.0),
        lambda: DeepHit(intervals=101),
        lambda: LogisticHazard(intervals=0),
        lambda: Logistic(by=100),
        lambda: Logistic(by=0),
        lambda: Logistic(censoring=[1.0]),
    ],
)
def test_arguments_out_of_range(make):
    with pytest.raises(InputError):
        make()


def test_times_beyond_tmax_have_no_loss(objective):
    if isinstance(objective, Cox):
        return  # nothing but the order counts
    for late in ((TMAX, 0.0), (TMAX + 1, 1.0)):
        with pytest.raises(InputError, match=f"tmax = {TMAX}"):
            objective(map_of(torch.ones(1), torch.zeros(1, objective.extra)), torch.tensor([late]))


def test_cohorts_that_teach_nothing():
    alive, dead = torch.tensor([[70.0, 0], [80, 0]]), torch.tensor([[20.0, 1], [30, 1]])
    for kind in OBJECTIVES.values():
        with pytest.raises(InputError, match="none of the 2 training scans|0 training scans died by then and 2"):
            kind().check(alive)
        kind().check(torch.cat([alive, dead]))
    for outcome in (alive, dead):
        with pytest.raises(InputError, match="death by month 60"):
            Logistic(by=60).check(outcome)
    with pytest.raises(InputError, match="2 training scans died by then and 0"):
        Logistic(by=90).check(torch.cat([alive, dead]))
    Logistic(by=60).check(torch.cat([alive, dead]))


@pytest.mark.parametrize("head", [*HEADS, None])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_learns_with_every_head(name, head):
    """Who has a bright block dies, the sooner the larger it is; None is the network of covariates alone."""
    torch.manual_seed(0)
    objective = OBJECTIVES[name]()
    image = torch.rand(6, 1, 8, 8, 8) * 0.1
    for k in range(4):
        image[k, :, : 8 - k, :4] = 0.9
    outcome = torch.tensor([[10.0, 1], [20, 1], [30, 1], [40, 1], [95, 0], [95, 0]])
    arguments = {}
    if head is None:
        arguments["clinical"] = torch.tensor([[2.0], [1.5], [1.0], [0.5], [-1.0], [-1.0]])
        net = ClinicalNet(1, extra=objective.extra)
    else:
        net = SurvivalMapNet(dim=8, depth=1, head=head, extra=objective.extra)
    parameters = [*net.parameters(), *objective.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = objective(net(image, **arguments), outcome)
        loss.backward()
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in parameters)
        optimizer.step()
        losses.append(loss.item())
    found = patient_numbers(net(image, **arguments))[0].detach()
    assert name == "cox_memory" or losses[-1] < losses[0]  # risk sets grow with what is remembered, and the loss with them
    assert found[:4].max() < found[4:].min()


def test_a_mixture_needs_a_head_that_mixes():
    outcome, heads = OUTCOMES["ties"], {name: SurvivalMapNet(dim=8, head=name).head for name in HEADS}
    for name in ("hazard", "mean"):
        with pytest.raises(InputError, match=f"mixture has no meaning with the head {type(heads[name]).__name__}"):
            CenTime(mixture=True).check(outcome, heads[name])
    for head in (heads["softmin"], heads["lse"], heads["attention"], None):
        CenTime(mixture=True).check(outcome, head)
    CenTime().check(outcome, heads["mean"])


def test_censored_just_below_tmax_is_alive_in_the_month_before():
    for kind in (CenTime, Classical, DeepHit, LogisticHazard, Logistic):
        objective = kind(tmax=TMAX)
        survival_map = map_of(torch.tensor([50.0, 90.0]), torch.zeros(2, objective.extra))
        late, before = (torch.tensor([[30.0, 1], [time, 0]]) for time in (TMAX - 0.4, TMAX - 1.0))
        assert torch.equal(objective(survival_map, late), objective(survival_map, before))


# ------------------------------------------------------------------------------------------------ CenTime, classical


def pmf_of(location: float, variance: float) -> np.ndarray:
    p = np.exp(-((np.arange(1, TMAX + 1) - location) ** 2) / (2 * variance))
    return p / p.sum()


def sums_over_months(p: np.ndarray, outcome: Tensor, share) -> float:
    """Mean negative log-likelihood, patient by patient and month by month."""
    total = 0.0
    for row, (time, event) in zip(p, outcome.tolist()):
        likelihood = row[int(time) - 1] if event else sum(row[t - 1] * share(t) for t in range(int(time) + 1, TMAX + 1))
        total -= math.log(likelihood)
    return total / len(p)


@pytest.mark.parametrize("kind, share", [(CenTime, lambda t: 1 / (t - 1)), (Classical, lambda t: 1.0)])
@pytest.mark.parametrize("predicted", [False, True])
def test_likelihoods_of_a_normal_equal_sums_over_months(kind, share, predicted, outcome):
    location, extra = patient_numbers(random_map(len(outcome), int(predicted)))
    objective = kind(variance=150.0, predict_variance=predicted)
    variance = 150 * extra[:, 0].exp() if predicted else torch.full_like(location, 150.0)
    p = np.array([pmf_of(*pair) for pair in zip(location.tolist(), variance.tolist())])
    expected = sums_over_months(p, outcome, share)
    assert float(objective(map_of(location, extra), outcome)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind, share", [(CenTime, lambda t: 1 / (t - 1)), (Classical, lambda t: 1.0)])
def test_likelihoods_of_a_normal_on_real_tables(kind, share, table):
    x, outcome = table
    location = torch.tensor(50 + 5 * x[:, :3].sum(1))
    p = np.array([pmf_of(loc, 400.0) for loc in location.tolist()])
    expected = sums_over_months(p, outcome, share)
    assert float(kind(variance=400.0)(map_of(location), outcome)) == pytest.approx(expected, rel=1e-9)


def test_a_learnt_variance_comes_to_that_of_the_times():
    """The most likely variance of a normal, all times well within the range, is their mean square."""
    time = 50 + 4 * torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outcome = torch.stack([time.round(), torch.ones_like(time)], 1)
    objective = CenTime(variance=36.0, learn_variance=True).double()
    optimizer = torch.optim.LBFGS(objective.parameters(), line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective(map_of(torch.full_like(time, 50.0)), outcome)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert objective.arguments["variance"] == pytest.approx(float((outcome[:, 0] - 50).square().mean()), rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------- Cox


def partial_likelihood_by_hand(log_hazard: list[float], outcome: Tensor) -> float:
    """Straight from the definition, death by death."""
    time, event = outcome.T.tolist()
    total = 0.0
    for t in {t for t, e in zip(time, event) if e}:
        deaths = [h for h, u, e in zip(log_hazard, time, event) if u == t and e]
        risk = sum(math.exp(h) for h, u in zip(log_hazard, time) if u >= t)
        tied = sum(map(math.exp, deaths))
        for rank, h in enumerate(deaths):
            total += h - math.log(risk - rank / len(deaths) * tied)
    return total


def test_partial_likelihood(outcome):
    log_hazard = torch.randn(len(outcome), dtype=torch.float64)
    found = float(partial_log_likelihood(log_hazard, *outcome.T))
    assert found == pytest.approx(partial_likelihood_by_hand(log_hazard.tolist(), outcome), rel=1e-10, abs=1e-12)
    if outcome[:, 1].any() and len(outcome) > 1:  # torchsurv, in single precision, takes no other
        theirs = -neg_partial_log_likelihood(log_hazard, outcome[:, 1] > 0, outcome[:, 0], "efron", reduction="sum")
        assert found == pytest.approx(float(theirs), rel=1e-5, abs=1e-5)


def test_partial_likelihood_equals_lifelines_on_real_tables(table):
    x, outcome = table
    frame = pd.DataFrame(x).assign(time=outcome[:, 0], event=outcome[:, 1])
    fitted = CoxPHFitter().fit(frame, "time", "event")
    log_hazard = torch.tensor(x @ fitted.params_.to_numpy())
    assert float(partial_log_likelihood(log_hazard, *outcome.T)) == pytest.approx(fitted.log_likelihood_, rel=1e-9)
    loss = Cox(scale=1.0)(map_of(-log_hazard), outcome)
    assert float(loss) == pytest.approx(-fitted.log_likelihood_ / len(x), rel=1e-9)


def test_partial_likelihood_is_finite_where_exponentials_overflow():
    log_hazard = torch.tensor([900.0, -900.0, 900.0, 0.0], requires_grad=True)
    found = partial_log_likelihood(log_hazard, torch.tensor([3.0, 1, 3, 5]), torch.ones(4))
    found.backward()
    # Of the two who die at 3 with nearly all of the risk, the second has it alone; the one who died at 1 had none.
    assert found.item() == pytest.approx(-1800 - 2 * math.log(2))
    assert bool(log_hazard.grad.isfinite().all())


def test_baseline_and_survival_equal_scikit_survival(table):
    x, outcome = table
    target = np.array([(bool(e), t) for t, e in outcome.tolist()], dtype=[("event", bool), ("time", float)])
    fitted = CoxPHSurvivalAnalysis(ties="breslow").fit(x, target)
    log_hazard = torch.tensor(x @ fitted.coef_)
    baseline = breslow_baseline(log_hazard, *outcome.T, TMAX)
    theirs = fitted.cum_baseline_hazard_
    np.testing.assert_allclose(baseline[theirs.x.astype(int) - 1], theirs.y, rtol=1e-6)
    objective = Cox(scale=1.0)
    objective.fit_baseline(-log_hazard, outcome)
    pmf = objective.pmf(map_of(-log_hazard[:20])).detach()
    curves = fitted.predict_survival_function(x[:20])
    t = theirs.x.astype(int)
    for row, curve in zip(1 - pmf.cumsum(1), curves):
        np.testing.assert_allclose(row[t - 1], curve(t), atol=1e-6)


def test_before_the_baseline_is_fitted_the_location_is_the_month_with_cumulative_hazard_one():
    dead_by = Cox(scale=8.0).pmf(map_of(torch.tensor([20.0, 47.0, 80.0]))).cumsum(1)
    for row, t in zip(dead_by, (20, 47, 80)):
        assert float(row[t - 1]) == pytest.approx(1 - math.exp(-1), abs=1e-5)


def test_memory_that_holds_all_has_the_gradient_of_the_whole_cohort():
    outcome, location = random_outcome(24), 50 + 20 * torch.randn(24, dtype=torch.float64)
    whole = location.clone().requires_grad_()
    Cox()(map_of(whole), outcome).backward()
    for batch in torch.arange(24).split(3):
        rest = torch.tensor([i for i in range(24) if i not in batch])
        objective = CoxMemory(memory=21).double()
        objective(map_of(location[rest].requires_grad_()), outcome[rest])  # remembers them
        part = location[batch].clone().requires_grad_()
        objective(map_of(part), outcome[batch]).backward()
        torch.testing.assert_close(part.grad / 8, whole.grad[batch])


@pytest.mark.filterwarnings("ignore:No events OR single sample", "ignore:Ties in")
@pytest.mark.parametrize("batch", [2, 4])
def test_memory_has_the_gradient_of_torchsurvs_momentum_without_a_delay(batch):
    """At rate 0 its second network is the first one, and what is remembered the same."""
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    outcome = random_outcome(24, seed=1).float()
    net = torch.nn.Linear(3, 1, bias=False)
    loss = partial(neg_partial_log_likelihood, reduction="sum")
    momentum = Momentum(net, loss, batch, 12 // batch + 1, rate=0.0)  # it forgets a batch before it adds the next
    objective = CoxMemory(scale=1.0, memory=12)
    for rows in torch.arange(24).split(batch):
        net.zero_grad()
        momentum.zero_grad()
        objective(map_of(objective.tmax / 2 - net(x[rows])[:, 0]), outcome[rows]).backward()
        momentum(x[rows], outcome[rows, 1] > 0, outcome[rows, 0]).backward()
        theirs = momentum.online.weight.grad
        theirs = torch.zeros(1, 3) if theirs is None else theirs  # no deaths so far
        torch.testing.assert_close(net.weight.grad * batch, theirs, rtol=1e-4, atol=1e-4)
    assert bool(net.weight.grad.any())


def test_memory_keeps_the_last_patients_that_were_learnt_from_and_is_part_of_the_state():
    outcome, location = random_outcome(10), torch.arange(10.0, dtype=torch.float64).requires_grad_()
    objective = CoxMemory(memory=4).double()
    for batch in torch.arange(10).split(3):
        objective(map_of(location[batch]), outcome[batch])
    torch.testing.assert_close(objective.remembered, torch.cat([location.detach()[:, None], outcome], 1)[-4:])
    again = CoxMemory(memory=4).double()
    again.load_state_dict(objective.state_dict())
    with torch.no_grad():  # validation
        batch = map_of(location[:3]), outcome[:3]
        assert torch.equal(objective(*batch), again(*batch))
    assert torch.equal(objective.remembered, again.remembered)


# --------------------------------------------------------------------------------- DeepHit, logistic hazard, logistic


def intervals_of(extra: Tensor, intervals: int) -> np.ndarray:
    """The extra number of each month, (B, TMAX)."""
    return np.array([[row[int((t - 1) * intervals / TMAX)] for t in range(1, TMAX + 1)] for row in extra.tolist()])


def deephit_by_hand(location: Tensor, extra: Tensor, outcome: Tensor, alpha: float, sigma: float) -> float:
    logits = intervals_of(extra, extra.shape[1])
    p = []
    for loc, row in zip(location.tolist(), logits):
        q = np.exp([-((t - loc) ** 2) / 72 + row[t - 1] for t in range(1, TMAX + 1)])
        p.append(q / q.sum())
    loss = sums_over_months(np.array(p), outcome, lambda t: 1.0)
    eta = [
        math.exp(-(p[i][: int(ti)].sum() - p[j][: int(ti)].sum()) / sigma)
        for i, (ti, ei) in enumerate(outcome.tolist())
        for j, (tj, _) in enumerate(outcome.tolist())
        if ei and ti < tj
    ]
    return loss + alpha * (sum(eta) / len(eta) if eta else 0.0)


def test_deephit_equals_its_paper(outcome):
    location, extra = patient_numbers(random_map(len(outcome), 7))
    objective = DeepHit(intervals=7, alpha=0.4, sigma=0.3)
    expected = deephit_by_hand(location, extra, outcome, 0.4, 0.3)
    assert float(objective(map_of(location, extra), outcome)) == pytest.approx(expected, rel=1e-9)


def test_deephit_on_real_tables(table):
    x, outcome = table
    location, extra = torch.tensor(50 + 5 * x[:, :3].sum(1)), torch.tensor(x[:, :4])
    objective = DeepHit(intervals=4, alpha=0.4, sigma=0.3)
    expected = deephit_by_hand(location, extra, outcome, 0.4, 0.3)
    assert float(objective(map_of(location, extra), outcome)) == pytest.approx(expected, rel=1e-9)


def test_ranking_of_one_pair():
    pmf = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]])
    ranking = deephit_ranking(pmf, torch.tensor([1, 3]), torch.tensor([1.0, 0.0]), 0.5)
    assert float(ranking) == pytest.approx(math.exp(-(0.5 - 0.1) / 0.5))
    assert float(deephit_ranking(pmf, torch.tensor([1, 1]), torch.tensor([1.0, 0.0]), 0.5)) == 0


def hazards_by_hand(location: Tensor, extra: Tensor, variance: float) -> np.ndarray:
    scale = math.sqrt(6 * variance) / math.pi
    logit = (np.arange(1, TMAX + 1) - location.numpy()[:, None]) / scale - math.log(scale)
    return 1 / (1 + np.exp(-logit - intervals_of(extra, extra.shape[1])))


def logistic_hazard_by_hand(hazard: np.ndarray, outcome: Tensor) -> float:
    """Months survived and the month died in, as binary cross-entropies."""
    hazard = hazard.copy()
    hazard[:, -1] = 1  # whoever is left dies in the last month
    total = 0.0
    for h, (time, event) in zip(hazard, outcome.tolist()):
        survived = int(time) - int(event)
        total -= sum(math.log(1 - h[t]) for t in range(survived)) + (math.log(h[int(time) - 1]) if event else 0)
    return total / len(hazard)


def test_logistic_hazard_equals_its_paper(outcome):
    location, extra = patient_numbers(random_map(len(outcome), 7))
    loss = LogisticHazard(intervals=7, variance=80.0)(map_of(location, extra), outcome)
    expected = logistic_hazard_by_hand(hazards_by_hand(location, extra, 80.0), outcome)
    assert float(loss) == pytest.approx(expected, rel=1e-9)


def test_logistic_hazard_on_real_tables(table):
    x, outcome = table
    location, extra = torch.tensor(50 + 5 * x[:, :3].sum(1)), torch.tensor(x[:, :4])
    loss = LogisticHazard(intervals=4, variance=400.0)(map_of(location, extra), outcome)
    expected = logistic_hazard_by_hand(hazards_by_hand(location, extra, 400.0), outcome)
    assert float(loss) == pytest.approx(expected, rel=1e-9)


def test_logistic_hazards_start_with_about_the_variance_they_are_given():
    for variance in (9.0, 36.0, 100.0):
        pmf = LogisticHazard(200, variance).pmf(map_of(torch.tensor([100.0]), torch.zeros(1, 20)))[0]
        t = torch.arange(1, 201)
        mean = (t * pmf).sum()
        assert abs(float(mean) - 100) < 10
        assert float((pmf * (t - mean).square()).sum()) == pytest.approx(variance, rel=0.15)


def censored_after(outcome: Tensor) -> np.ndarray:
    """P(C >= t) at t = 1..TMAX by lifelines: in a month deaths come before censorings."""
    time, event = outcome.T.numpy()
    fitted = KaplanMeierFitter().fit(time + 0.5 * (event == 0), event == 0)
    return fitted.predict(np.arange(1, TMAX + 1)).to_numpy()


@pytest.mark.parametrize("weighted", [False, True])
def test_logistic(weighted, outcome):
    location = 60 + 20 * torch.randn(len(outcome), dtype=torch.float64)
    seen = seen_until(outcome, TMAX) if weighted else None
    g = np.maximum(censored_after(outcome), 0.05) if weighted else np.ones(TMAX)
    found = float(Logistic(by=20, scale=9.0, censoring=seen)(map_of(location), outcome))
    total, known = 0.0, 0
    for loc, (time, event) in zip(location.tolist(), outcome.tolist()):
        p = 1 / (1 + math.exp(-(20 - loc) / 9))
        if event and time <= 20:
            total, known = total - math.log(p) / g[int(time) - 1], known + 1
        elif time > 20 or (time == 20 and not event):
            total, known = total - math.log(1 - p) / g[19], known + 1
    assert found == pytest.approx(total / (len(outcome) if weighted else max(1, known)), rel=1e-6)


def test_logistic_on_real_tables(table):
    x, outcome = table
    location = torch.tensor(50 + 5 * x[:, :3].sum(1))
    g = np.maximum(censored_after(outcome), 0.05)
    np.testing.assert_allclose(np.maximum(seen_until(outcome, TMAX), 0.05), g, atol=1e-6)
    time, event = outcome.T.numpy()
    died, alive = (event == 1) & (time <= 40), time >= 40 + event
    log_p = -np.logaddexp(0, -(40 - location.numpy()) / 10)
    log_q = -np.logaddexp(0, (40 - location.numpy()) / 10)
    at = g[np.minimum(time, 40).astype(int) - 1]
    plain, weighted = Logistic(by=40), Logistic(by=40, censoring=seen_until(outcome, TMAX))
    expected = -np.where(died, log_p, 0) - np.where(alive, log_q, 0)
    assert float(plain(map_of(location), outcome)) == pytest.approx(expected.sum() / (died | alive).sum(), rel=1e-9)
    assert float(weighted(map_of(location), outcome)) == pytest.approx((expected / at).mean(), rel=1e-6)


def test_logistic_reads_the_probability_that_it_was_trained_for():
    location = torch.tensor([10.0, 55.0, 90.0])
    found = Logistic(by=60, scale=7.0).pmf(map_of(location))[:, :60].sum(1)
    torch.testing.assert_close(found, torch.sigmoid((60 - location) / 7))


# ------------------------------------------------------------------------------------------------- do they rank alike


def linear_fit(objective: torch.nn.Module, x: Tensor, outcome: Tensor) -> Tensor:
    """Slopes of the best linear location; the extra numbers are the same for all patients."""
    objective = objective.double()
    slope = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    others = torch.zeros(1 + objective.extra, dtype=torch.float64, requires_grad=True)
    variables = [slope, others, *objective.parameters()]

    def loss(rows: Tensor) -> Tensor:
        location = 50 + 10 * (x[rows] @ slope + others[0])
        return objective(map_of(location, 3 * torch.tanh(others[1:]).expand(len(rows), -1)), outcome[rows])

    rows = torch.arange(len(x))
    if isinstance(objective, CoxMemory):  # batches of four, as in training
        steps = 400
        optimizer = torch.optim.Adam(variables, 0.02)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            first = 4 * (step % (len(x) // 4))
            rows = torch.randperm(len(x)) if first == 0 else rows
            optimizer.zero_grad()
            loss(rows[first : first + 4]).backward()
            optimizer.step()
            schedule.step()
        return slope.detach()
    optimizer = torch.optim.LBFGS(variables, max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(rows) + 1e-4 * slope.square().sum()
        value.backward()
        return value

    optimizer.step(closure)
    return slope.detach()


LINEAR = {
    "centime": lambda by: CenTime(variance=400.0, learn_variance=True),
    "classical": lambda by: Classical(variance=400.0, learn_variance=True),
    "cox": lambda by: Cox(),
    "cox_memory": lambda by: CoxMemory(),
    "deephit": lambda by: DeepHit(variance=400.0, learn_variance=True),
    "logistic_hazard": lambda by: LogisticHazard(variance=400.0, learn_variance=True),
    "logistic": lambda by: Logistic(by=by),
}


@pytest.mark.parametrize("kind", LINEAR)
@pytest.mark.parametrize("name", ["veteran_lung_137.csv", "ncctg_lung_228.csv", "rossi_432.csv"])
def test_a_linear_model_ranks_as_well_as_lifelines_cox_fit(kind, name, shared_data):
    x, outcome = read_table(shared_data, name)
    fold = np.random.default_rng(0).permutation(len(x)) % 5
    time, event = outcome.T.numpy()
    ours, theirs = [], []
    for k in range(5):
        train, test = fold != k, fold == k
        frame = pd.DataFrame(x[train]).assign(time=time[train], event=event[train])
        theirs.append(-x[test] @ CoxPHFitter().fit(frame, "time", "event").params_.to_numpy())
        objective = LINEAR[kind](by=int(np.median(time[train][event[train] > 0])))
        ours.append(x[test] @ linear_fit(objective, torch.tensor(x[train]), outcome[train]).numpy())
    found, expected = (
        np.mean([concordance_index(time[fold == k], risk[k], event[fold == k]) for k in range(5)]) for risk in (ours, theirs)
    )
    assert found > expected - 0.01


def test_a_mixture_over_patches_is_left_without_severity():
    """Severity's variance is that of one number a patient; a mixture is as wide as patches differ."""
    settings = {"name": "centime", **CenTime(mixture=True).arguments}
    finish = Finish(SurvivalMapNet(dim=16, head="softmin"), None, None, torch.device("cpu"), codebooks=None)
    assert finish.fitted(settings) == {"objective": settings, "severity": None}


def test_severity_needs_a_head_whose_map_shows_danger():
    net, rest = SurvivalMapNet(dim=16, head="mean"), (None, None, torch.device("cpu"), None)
    with pytest.raises(InputError, match="severity can't be read off the maps of the head mean: add --severity false"):
        Finish(net, *rest)
    assert not Finish(net, *rest, severity=False).severity
    assert not Finish(ClinicalNet(2), *rest).severity


@pytest.mark.parametrize("file", ["objective/logistic.json", "network/clinical_only.json"])
def test_what_has_no_fit_after_training_sees_the_cohorts_own_share_of_deaths(file):
    assert json.loads(Path("configs", file).read_text())["train#sampler#min_event_share"] == 0
