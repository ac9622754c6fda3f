# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Bootstrap intervals: how far a metric could move had other scans of the same kind been scored."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np


def bootstrap(
    rows: int, statistic: Callable[[np.ndarray], float | None], num: int = 1000, seed: int = 0
) -> tuple[float | None, float | None]:
    """95 % percentile interval of a statistic over scans (Efron and Tibshirani 1993, section 13.3).

    Args:
        rows: number of scans.
        statistic: from the indices (rows,) of the scans drawn, with repetition, to a value; None where the resample has
            none (e.g. no deaths): such resamples are left out.
        num: number of resamples; 0 for no interval. About 200 for a statistic over pairs of patients (C-index), which
            costs milliseconds each.
        seed: fixes the resamples.

    Returns:
        (lower, upper); both None with no rows, or if fewer than half of the resamples have a value.

    Example:
        >>> ages = np.array([50.0, 60.0, 70.0, 80.0])
        >>> bootstrap(4, lambda drawn: ages[drawn].mean())
        (55.0, 75.0)
    """
    if rows < 1:
        return None, None
    draws = np.random.default_rng(seed).integers(0, rows, (num, rows))
    values = [value for value in map(statistic, draws) if value is not None]
    if not values or 2 * len(values) < num:
        return None, None
    lower, upper = np.percentile(values, [2.5, 97.5])
    return float(lower), float(upper)


def with_interval(
    rows: int, statistic: Callable[[np.ndarray], float | None], num_scans: int, num: int = 1000, seed: int = 0
) -> dict[str, float | int | None]:
    """A statistic of all rows and its :func:`bootstrap` interval, as one entry of ``metrics.json``.

    Args:
        num_scans: how many of the rows the statistic stands on (e.g. the deaths).

    Returns:
        ``{"value", "lower", "upper", "num_scans"}``; without a value all three are None and ``num_scans`` is 0.
    """
    value = statistic(np.arange(rows)) if rows else None
    if value is None:
        return {"value": None, "lower": None, "upper": None, "num_scans": 0}
    lower, upper = bootstrap(rows, statistic, num, seed)
    return {"value": float(value), "lower": lower, "upper": upper, "num_scans": int(num_scans)}


def draw_patients(folds: Sequence[Sequence[str]], num: int = 1000, seed: int = 0) -> Iterator[list[np.ndarray]]:
    """Resamples of a cross-validation: in each fold as many patients as it has, with repetition, all scans of each.

    Args:
        folds: for each fold the patient of each of its scans.
        num: number of resamples.
        seed: fixes them, so that every model is measured on the same ones.

    Yields:
        for each fold the indices of the scans that were drawn.
    """
    rng = np.random.default_rng(seed)
    scans_of = [[np.flatnonzero(np.array(fold) == patient) for patient in sorted(set(fold))] for fold in folds]
    for _ in range(num):
        yield [np.concatenate([own[i] for i in rng.integers(0, len(own), len(own))]) for own in scans_of]


def paired_difference(first: np.ndarray, other: np.ndarray) -> dict[str, float | None]:
    """Is a metric of one model another than that of the first? From both metrics on the same resamples.

    The p-value is twice the share of resamples in which the difference is not on the side where most of them are, ties
    counting on both sides, with one resample added to either, so that it is never 0 (Efron and Tibshirani 1993, sections
    13.3 and 15.4; Davison and Hinkley 1997, section 4.2).

    Args:
        first, other: of each resample, NaN where it has none.

    Returns:
        ``{"lower", "upper", "p"}``: the 95 % percentile interval of other - first and the two-sided p-value; all None if
        fewer than half of the resamples have both values.
    """
    difference = (other - first)[~np.isnan(other - first)]
    if not len(difference) or 2 * len(difference) < len(first):
        return {"lower": None, "upper": None, "p": None}
    lower, upper = np.percentile(difference, [2.5, 97.5])
    side = min((difference <= 0).sum(), (difference >= 0).sum())
    p = min(1.0, 2 * (side + 1) / (len(difference) + 1))
    return {"lower": float(lower), "upper": float(upper), "p": float(p)}
