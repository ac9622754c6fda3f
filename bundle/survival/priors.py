# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What the training scans' deaths say of locations before anything is learnt."""

import numpy as np


def early_and_median_death(records: list[dict]) -> list[float]:
    """Tenth percentile and median of the months of those who died; one early death says nothing of others."""
    return np.quantile([r["time"] for r in records if r["event"]] or [0.0], [0.1, 0.5]).tolist()


def location_range(records: list[dict], tmax: int) -> list[float]:
    """Months between which a patch's location lies: a bound that follows the training scans' deaths, and 1.2 `tmax`.

    The softmin ties months to the log of the diseased share, so that a lesion's own location lies below the patient's.
    Where the lower bound leaves no room for that, all lesions lie at it, and a dangerous kind can't be told from a mild
    one. Where it leaves much, the patches of a lesion come out uneven. The bound is twice the way from the median death
    to the tenth percentile below that percentile, between -0.6 and 0.3 `tmax`. With :func:`softmin_beta` a lesion at
    the bound kills at the median death if it is 5 % of the lung, exp(-3), and at the tenth percentile if it is 14 %.
    """
    return location_bounds(*early_and_median_death(records), tmax)


def location_bounds(early: float, median: float, tmax: int) -> list[float]:
    """:func:`location_range` of a cohort by the tenth percentile and the median of its deaths, months."""
    return [float(np.clip(3 * early - 2 * median, -0.6 * tmax, 0.3 * tmax)), 1.2 * tmax]


def softmin_beta(records: list[dict], tmax: int) -> float:
    """Steepness of the softmin per month: one over the months from the tenth percentile to the median of the deaths.

    A scan with e times the disease of another dies 1/beta months earlier. If beta is steeper than the cohort's deaths
    are apart, those who die first can only be reached by covering lesions of the others in part. 1/beta is between
    0.08 and 0.3 `tmax`.
    """
    return steepness(*early_and_median_death(records), tmax)


def steepness(early: float, median: float, tmax: int) -> float:
    """:func:`softmin_beta` of a cohort by the tenth percentile and the median of its deaths, months."""
    return 1 / float(np.clip(median - early, 0.08 * tmax, 0.3 * tmax))
