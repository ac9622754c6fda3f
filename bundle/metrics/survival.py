# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""How right are the predicted survival times? Metrics of a cohort's predicted distributions against what happened.

In all functions `risk` and `predicted` are (N,), `time` (N,) is in months, above 0, `event` (N,) is 1 for a death and 0
for a censored patient, and `pmf` is P(T = 1..tmax months), (N, tmax). The risk that ranks patients is minus the mean of
the distribution; the point prediction whose error is measured is its median. A metric is None where the cohort can't
tell: the docstrings say when.

Metrics that weight by the probability of not being censored (IPCW) estimate it by Kaplan-Meier on the scored patients. A
death at T is seen if C >= T, so that is the probability its weight is of: with times in whole months, P(C > T), which
scikit-survival takes, is too small where somebody is censored at T, and 0 at the last time.

Functions compute in the precision they are given; :class:`SurvivalMetric` gives them double.
"""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from scipy.stats import chi2
from torch import Tensor
from torchsurv.metrics.auc import Auc
from torchsurv.metrics.brier_score import BrierScore
from torchsurv.metrics.cindex import ConcordanceIndex

from bundle.errors import InputError
from bundle.metrics.scan_metric import ScanMetric, Statistic
from bundle.survival import death_by, mean_months, quantile_months, restricted_mean_months, survival_curve
from bundle.survival.kaplan_meier import kaplan_meier, kaplan_meier_censoring, restricted_mean
from bundle.survival.readout import dead_at

HORIZONS = (12, 24, 36, 60)  # months


def _number(value: Tensor) -> float | None:
    """A tensor's number, None for 0 / 0 and for the mean of nothing."""
    return float(value) if math.isfinite(value) else None


def _alive_weight(at: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """1 / P(C > at), of who is seen alive at `at`, and 0 where that probability is 0."""
    free = torch.from_numpy(kaplan_meier_censoring(time, event).evaluate(at)).to(time)
    return torch.where(free > 0, 1 / free, 0)


def _death_weight(time: Tensor, event: Tensor) -> Tensor:
    """1 / P(C >= time), of who is seen to die at `time`, and 0 where that probability is 0."""
    return _alive_weight(time.double().nextafter(torch.zeros(())), time, event)


def _concordance(risk: Tensor, time: Tensor, event: Tensor, weight: Tensor | None) -> float | None:
    died = event == 1
    first = time[died].min() if died.any() else torch.inf
    if not ((time > first) | ((time == first) & ~died)).any():
        return None
    # Times in double make torchsurv sum the weighted pairs in double.
    return _number(ConcordanceIndex()(risk, died, time.double(), weight=weight, instate=False))


def c_index(risk: Tensor, time: Tensor, event: Tensor) -> float | None:
    """Harrell's concordance: of the pairs whose order of deaths is known, the share in which the first had more risk.

    Equal risks count half; all risks equal give 0.5. A death and a censoring at the same time are comparable, two
    deaths are not. Computed by torchsurv; Harrell et al., Statistics in Medicine 1996.

    Returns:
        None without comparable pairs: no deaths, one patient, or no one left after the first death.

    Example:
        >>> c_index(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([5.0, 20.0, 30.0]), torch.tensor([1, 1, 0]))
        1.0
    """
    return _concordance(risk, time, event, None)


def c_index_ipcw(risk: Tensor, time: Tensor, event: Tensor) -> float | None:
    """Uno's concordance: :func:`c_index` with pairs weighted by 1 / P(not censored before the first death)^2.

    Computed by torchsurv; Uno et al., Statistics in Medicine 2011. None without comparable pairs of non-zero weight.
    """
    if not (event == 1).any():
        return None
    return _concordance(risk, time, event, _death_weight(time.double(), event))


def integrated_brier(pmf: Tensor, time: Tensor, event: Tensor) -> float | None:
    """Brier score of S(t), weighted for censoring, averaged over the follow-up by the trapezoidal rule; 0 is best.

    Over the whole months from the first time of the cohort to just before its last, and no further than `tmax`. Computed
    by torchsurv; Graf et al., Statistics in Medicine 1999. None without deaths, or if the follow-up holds fewer than two
    whole months.
    """
    start, end = math.ceil(time.min()), min(math.ceil(time.max()), pmf.shape[1] + 1)
    if end - start < 2 or not (event == 1).any():
        return None
    grid = torch.arange(start, end)
    at_time, at_grid = _death_weight(time, event), _alive_weight(grid, time, event)
    brier = BrierScore()
    brier(survival_curve(pmf)[:, grid - 1], event == 1, time, grid.to(time), at_time, at_grid)
    return _number(brier.integral())


def cumulative_auc(risk: Tensor, time: Tensor, event: Tensor, horizon: float) -> float | None:
    """Cumulative/dynamic AUC: does risk tell those dead by the horizon (months) from those alive after it?

    0.5 is chance. The dead are weighted by 1 / P(not censored before their death), equal risks count half. Computed by
    torchsurv; Uno et al., JASA 2007. None with no death by the horizon, or no one followed beyond it.
    """
    died = event == 1
    if not (died & (time <= horizon)).any() or horizon >= time.max():
        return None
    at, weight = time.new_tensor([horizon]), _death_weight(time, event)
    # torchsurv asks for weights at the horizon, but this kind of AUC doesn't use them.
    auc = Auc()(risk, died, time, new_time=at, weight=weight, weight_new_time=torch.ones_like(at), instate=False)
    return _number(auc.squeeze())


def d_calibration(pmf: Tensor, time: Tensor, event: Tensor, bins: int = 10) -> float | None:
    """p-value of D-calibration: small if predicted probabilities of living to the actual time aren't uniform.

    S_i(t_i) is uniform on 0..1 if the distributions are right. A death counts in the bin of its S_i(t_i); a patient
    censored at S_i(c_i) = s is spread evenly over 0..s. Chi-square test of the counts against N / bins with bins - 1
    degrees of freedom; rough below about 5 patients a bin. Bin t of the distribution is spread evenly over the month
    that ends half a month after t, so whole-month times aren't biased to one side. Haider et al., JMLR 2020.

    None only for no patients; without deaths it has a value, but little power.
    """
    if not len(time):
        return None
    expected = len(time) / bins
    count = calibration_counts(pmf, time, event, bins)
    return float(chi2.sf(float((count - expected).square().sum()) / expected, bins - 1))


def calibration_counts(pmf: Tensor, time: Tensor, event: Tensor, bins: int) -> Tensor:
    """Patients in each of the `bins` of :func:`d_calibration`, (bins,), in double."""
    pmf, time = pmf.double(), time.double()
    alive = (1 - dead_at(pmf, time)).unsqueeze(1)
    lower = torch.arange(bins, dtype=torch.float64) / bins
    death = torch.nn.functional.one_hot((alive[:, 0] * bins).long().clamp_max(bins - 1), bins)
    # Share of 0..s in each bin; for s = 0 all of it is in the first.
    alive = alive.clamp_min(1e-12)
    spread = (alive - lower).clamp(0, 1 / bins) / alive
    return torch.where(event.unsqueeze(1) == 1, death, spread).sum(0)


def mae_events(predicted: Tensor, time: Tensor, event: Tensor) -> float | None:
    """Mean |predicted - time| of those who died, months. None without deaths."""
    return _number((predicted - time)[event == 1].abs().mean())


def rae_events(predicted: Tensor, time: Tensor, event: Tensor) -> float | None:
    """Mean |predicted - time| / time of those who died. None without deaths."""
    return _number(((predicted - time).abs() / time)[event == 1].mean())


def mae_censored(predicted: Tensor, time: Tensor, event: Tensor) -> float | None:
    """Mean of max(0, time - predicted) of the censored, months: a hinge. None without censored.

    Only a death predicted before the patient was last seen alive is an error; all censored count in the mean.
    """
    return _number((time - predicted)[event != 1].clamp_min(0).mean())


def mae_pseudo_observation(predicted: Tensor, time: Tensor, event: Tensor) -> float | None:
    """Weighted mean |predicted - time| of all patients, months, with pseudo-observations for the censored (MAE-PO).

    The pseudo-observation of a patient is what they add to the mean lifetime of the N patients they are among:
    N * mean(all) - (N - 1) * mean(all others). A censored patient has weight 1 - S(c), a death 1. The mean lifetime is
    the area under the Kaplan-Meier curve, taken as linear between deaths and, from the last time on, along the line
    from (0, 1) through the last point down to 0.
    Qi et al., An effective meaningful way to evaluate survival models, ICML 2023; same as their package SurvivalEVAL.

    None without deaths.
    """
    if not (event == 1).any():
        return None
    predicted, time = predicted.double(), time.double()
    deaths, count = time[event == 1].unique(return_counts=True)
    at_risk = (time >= deaths.unsqueeze(1)).sum(1)
    order = time.sort().values
    censored = time[event != 1]

    # Curves of the cohort without each censored patient, all at once: one by one they would take minutes.
    def mean_lifetime(at_risk: Tensor, last: Tensor) -> Tensor:
        curve = (1 - count / at_risk.double()).cumprod(1)
        curve = torch.cat([torch.ones_like(curve[:, :1]), curve, curve[:, -1:]], 1)
        knots = torch.cat([torch.zeros_like(last), deaths.expand(len(last), -1), last], 1)
        end = curve[:, -1]
        return torch.trapezoid(curve, knots) + 0.5 * end.square() / (1 - end) * last[:, 0]

    # A patient who leaves is missing among those at risk up to c, and may move the last time.
    last = torch.where(censored == order[-1], order[-2:][0], order[-1])
    base = mean_lifetime(at_risk.unsqueeze(0), order[-1:].unsqueeze(1))
    other = mean_lifetime(at_risk - (deaths <= censored.unsqueeze(1)).int(), last.unsqueeze(1))
    target, weight = time.clone(), torch.ones_like(time)
    target[event != 1] = len(time) * base - (len(time) - 1) * other
    weight[event != 1] -= torch.from_numpy(kaplan_meier(time, event).evaluate(censored))
    return _number((weight * (predicted - target).abs()).sum() / weight.sum())


def rmst_bias(pmf: Tensor, time: Tensor, event: Tensor, horizon: float) -> float | None:
    """Mean predicted minus observed restricted mean survival time, months: above 0 if predictions are too hopeful.

    Predicted is the mean of E[min(T, horizon)] over patients, observed the area under their Kaplan-Meier curve from 0
    to the horizon (months). It measures calibration in the large, without the tail that nobody has seen. It is a
    difference of means, because a censored patient's own is not known. None with no patients, or if the horizon lies
    beyond the last time and that is of a censored patient.
    """
    observed = restricted_mean(time, event, horizon)
    return None if observed is None else float(restricted_mean_months(pmf, horizon).mean()) - observed


def correlation(predicted: Tensor, time: Tensor, event: Tensor) -> float | None:
    """Pearson correlation of predicted and actual time of those who died.

    None with fewer than three deaths (two always give 1 or -1), or if all predictions or all times are equal.
    """
    pair = torch.stack([predicted, time])[:, event == 1].double()
    if pair.shape[1] < 3 or (pair.amax(1) == pair.amin(1)).any():
        return None
    return _number(torch.corrcoef(pair)[0, 1])


def mean_time_censored(predicted: Tensor, event: Tensor) -> float | None:
    """Mean predicted time of the censored, months. None without censored."""
    return _number(predicted[event != 1].mean())


def _over(score: Any, *columns: Tensor, **fixed: Any) -> Statistic:
    """A score as a function of the indices of the patients that count."""
    return lambda drawn: score(*(column[drawn] for column in columns), **fixed)


class SurvivalMetric(ScanMetric):
    """Survival metrics of a cohort with bootstrap intervals over scans; each scan counts as a patient.

    As input it takes, for each batch, as a tensor or as a list of one a scan:

    - ``y_pred``: P(T = 1..tmax months), (B, tmax).
    - ``y``: (time in months, event), (B, 2).
    - ``patient_id``: names, (B,), for the table; patients that come twice are scored once. May be left out, which is how
      MONAI's `IgniteMetricHandler` calls it.

    As output, :meth:`aggregate` gives every metric with its interval, :meth:`table` one row a scan, and :meth:`curves`
    the survival curves.

    Args:
        num_resamples, seed: of the bootstrap.

    Raises:
        InputError: shapes that differ, probabilities that don't sum to 1, a time that isn't above 0 or an event that
            isn't 0 or 1.

    Example:
        >>> metric = SurvivalMetric(num_resamples=0)
        >>> metric(torch.eye(30)[[4, 19, 29]], torch.tensor([[5.0, 1.0], [20.0, 1.0], [25.0, 0.0]]))
        >>> metric.aggregate()["c_index"]
        {'value': 1.0, 'lower': None, 'upper': None, 'num_scans': 3}
    """

    def __init__(self, num_resamples: int = 200, seed: int = 0) -> None:
        super().__init__(num_resamples, seed)

    def __call__(self, y_pred: Any, y: Any = None, patient_id: Sequence[str] | None = None) -> None:
        pmf, outcome = (
            torch.stack([torch.as_tensor(scan).detach().cpu() for scan in batch]).double() for batch in (y_pred, y)
        )
        if pmf.ndim != 2 or outcome.shape != (len(pmf), 2):
            raise InputError(
                f"expected probabilities (B, tmax) and outcomes (B, 2), got {tuple(pmf.shape)}, {tuple(outcome.shape)}."
            )
        # Not >, so that NaN fails too.
        if not bool((pmf >= 0).all() and ((pmf.sum(1) - 1).abs() < 1e-3).all()):
            raise InputError("predicted probabilities P(T = 1..tmax) must be >= 0 and sum to 1 for each patient.")
        _check_outcome(*outcome.unbind(1))
        self.keep(patient_id, [{"pmf": p, "outcome": o} for p, o in zip(pmf, outcome)])

    def _scans(self) -> tuple[Tensor, Tensor, Tensor, list[str | None]]:
        """pmf (N, tmax), time, event (N,) and patient ids of all processes' scans."""
        rows = self.get_buffer()
        pmf = torch.stack([row["pmf"] for row in rows]) if rows else torch.zeros(0, 1, dtype=torch.float64)
        outcome = torch.stack([row["outcome"] for row in rows]) if rows else torch.zeros(0, 2, dtype=torch.float64)
        return pmf, outcome[:, 0], outcome[:, 1], [row["patient_id"] for row in rows]

    def table(self) -> pd.DataFrame:
        """One row a scan: `patient_id` (None if not given), `time`, `event`, then what was predicted.

        `median_months`, `mean_months`, `death_12m` ..., P(T <= 12 months), and `rmst_60m`, the restricted mean.
        """
        pmf, time, event, ids = self._scans()
        numbers = {"time": time, "event": event, "median_months": quantile_months(pmf, 0.5)}
        numbers |= {"mean_months": mean_months(pmf)} | {f"death_{h}m": death_by(pmf, h) for h in HORIZONS}
        numbers[f"rmst_{HORIZONS[-1]}m"] = restricted_mean_months(pmf, HORIZONS[-1])
        return pd.DataFrame({"patient_id": ids} | {name: values.numpy() for name, values in numbers.items()})

    def curves(self) -> pd.DataFrame:
        """One row a scan: `patient_id` (None if not given), then `survival_1m` ..., S(t) = P(T > t)."""
        pmf, _, _, ids = self._scans()
        table = pd.DataFrame(survival_curve(pmf).numpy(), columns=[f"survival_{t}m" for t in range(1, pmf.shape[1] + 1)])
        table.insert(0, "patient_id", ids)
        return table

    def statistics(self) -> dict[str, tuple[Statistic, int]]:
        """Each metric as a function of the rows of :meth:`table` to count, and the number of patients it stands on."""
        pmf, time, event, _ = self._scans()
        outcome = (time, event)
        median, mean = quantile_months(pmf, 0.5), mean_months(pmf)
        everybody, deaths = len(time), int((event == 1).sum())
        auc = {f"auc_{h}m": _over(cumulative_auc, -mean, *outcome, horizon=h) for h in HORIZONS}
        bias = {f"rmst_bias_{h}m": _over(rmst_bias, pmf, *outcome, horizon=h) for h in HORIZONS}
        return {
            "c_index": (_over(c_index, -mean, *outcome), everybody),
            "c_index_ipcw": (_over(c_index_ipcw, -mean, *outcome), everybody),
            "integrated_brier": (_over(integrated_brier, pmf, *outcome), everybody),
            **{name: (statistic, everybody) for name, statistic in auc.items()},
            "d_calibration_p": (_over(d_calibration, pmf, *outcome), everybody),
            "mae_events": (_over(mae_events, median, *outcome), deaths),
            "rae_events": (_over(rae_events, median, *outcome), deaths),
            "mae_censored": (_over(mae_censored, median, *outcome), everybody - deaths),
            "mae_pseudo_observation": (_over(mae_pseudo_observation, median, *outcome), everybody),
            **{name: (statistic, everybody) for name, statistic in bias.items()},
            "correlation": (_over(correlation, mean, *outcome), deaths),
            "mean_time_censored": (_over(mean_time_censored, mean, event), everybody - deaths),
        }

    def aggregate(self) -> dict[str, Any]:
        """Each metric as ``{"value", "lower", "upper", "num_scans"}``, then the counts `num_scans`, `num_events`."""
        event = self._scans()[2]
        counts = {"num_scans": len(event), "num_events": int((event == 1).sum())}
        return {**self.intervals(self.statistics(), len(event)), **counts}


def _check_outcome(time: Tensor, event: Tensor) -> None:
    """Raise an InputError unless all times are above 0 and all events 0 or 1."""
    bad = time[~(time.isfinite() & (time > 0))]
    if len(bad):
        raise InputError(f"times must be above 0 months, got {bad[0].item()}.")
    bad = event[(event != 0) & (event != 1)]
    if len(bad):
        raise InputError(f"event must be 1 (died) or 0 (censored), got {bad[0].item()}.")
