# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Kaplan-Meier estimates in double precision, as step functions of time (`scipy.stats.ecdf`)."""

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import CensoredData, ecdf


def censored_data(time: ArrayLike, event: ArrayLike) -> CensoredData:
    """Times (N,) and events (N,), 1 died, 0 censored, as scipy's survival statistics take them."""
    time, died = np.asarray(time, float), np.asarray(event) == 1
    return CensoredData(uncensored=time[died], right=time[~died])


def kaplan_meier(time: ArrayLike, event: ArrayLike):
    """Kaplan-Meier estimate of S(t) = P(T > t) from months (N,) and events (N,), constant beyond the last time.

    It is scipy's `EmpiricalDistributionFunction`: `evaluate(t)`, and `quantiles`, `probabilities`, the steps.
    """
    return ecdf(censored_data(time, event)).sf


def kaplan_meier_censoring(time: ArrayLike, event: ArrayLike):
    """Kaplan-Meier estimate of P(not censored by t), for IPCW; who dies at t is no longer at risk of censoring at t."""
    time, died = np.asarray(time, float), np.asarray(event) == 1
    return kaplan_meier(np.where(died, np.nextafter(time, 0), time), ~died)


def restricted_mean(time: ArrayLike, event: ArrayLike, horizon: float) -> float | None:
    """Restricted mean survival time: the area under :func:`kaplan_meier` from 0 to `horizon`, months.

    None where the curve is not known up to the horizon: it lies beyond the last time, of a censored patient.

    Source: Royston and Parmar, BMC Medical Research Methodology 2013.
    """
    curve = kaplan_meier(time, event)
    if not len(curve.quantiles) or (horizon > curve.quantiles[-1] and curve.probabilities[-1] > 0):
        return None
    within = curve.quantiles < horizon
    knots = np.concatenate([[0.0], curve.quantiles[within], [horizon]])
    return float(np.diff(knots) @ np.concatenate([[1.0], curve.probabilities[within]]))
