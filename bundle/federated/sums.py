# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What sites must know of each other's patients before they train: means and spreads, from sums that reveal nobody."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from bundle.errors import InputError
from bundle.maps.familiarity import Familiarity, distance, floored, rounded
from bundle.survival.priors import location_bounds, steepness

MINIMUM = 5  # patients: of fewer nothing is said
TENTH = 1.2816  # standard deviations from the median of a normal distribution to its tenth percentile

Clinical = Mapping[str, "str | Sequence[str]"]  # each column "numeric", or its categories


def kinds(clinical: Clinical) -> dict[str, str]:
    """The columns as :func:`bundle.data.read_cohort` wants them."""
    return {name: "numeric" if kind == "numeric" else "categorical" for name, kind in clinical.items()}


def quantities(record: dict, clinical: Clinical) -> list[float]:
    """The numbers of a patient that are summed up, NaN where there is none: months of death, and covariates.

    A category but the first is 0 or 1, as :func:`bundle.data.clinical_names` orders them.
    """
    row = [record["time"] if record["event"] else np.nan]
    for name, kind in clinical.items():
        value = record["covariates"][name]
        if kind == "numeric":
            row.append(np.nan if value is None else value)
        else:
            row += [float(value == category) if value in kind else np.nan for category in kind[1:]]
    return row


def site_sums(records: Sequence[dict], clinical: Clinical) -> np.ndarray:
    """Count, sum and sum of squares of each of the :func:`quantities`, a patient: (3, Q) over the number of patients.

    A quantity that fewer than :data:`MINIMUM` patients of the site have is told as nobody's, and so is a category that
    fewer than that are in, or out of.

    Raises:
        InputError: the site has too few patients.
    """
    if len(records) < MINIMUM:
        raise InputError(f"the site trains on {len(records)} scans (expected {MINIMUM} or more: fewer are told apart).")
    x = np.array([quantities(record, clinical) for record in records])
    known = ~np.isnan(x)
    x = np.where(known, x, 0.0)
    sums = np.stack([known.sum(0), x.sum(0), (x**2).sum(0)])
    told = sums[0] >= MINIMUM
    binary = ((x == 0) | (x == 1)).all(0)
    fewest = np.minimum(sums[1], sums[0] - sums[1])
    told &= ~binary | (fewest >= MINIMUM) | (fewest == 0)
    return sums * told / len(records)


def moments(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each quantity, from the mean of the sites' :func:`site_sums`; NaN where unknown."""
    count, total, squares = sums
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / count
        return mean, np.sqrt(np.maximum(squares / count - mean**2, 0.0))


def clinical_encoding(sums: np.ndarray, clinical: Clinical) -> dict:
    """How covariates become the clinical vector, as of :func:`bundle.data.fit_clinical`; gaps are filled by the mean.

    Raises:
        InputError: a column has too few values at every site, or the same everywhere.
    """
    mean, std = (part[1:] for part in moments(sums))
    names = [name for name, kind in clinical.items() for _ in (["numeric"] if kind == "numeric" else kind[1:])]
    for name, spread in zip(names, std, strict=True):
        if not spread > 0:
            raise InputError(f"column {name}: no site has {MINIMUM} values that differ: leave it out of clinical.")
    columns, at = {}, 0
    filled, variance = mean.copy(), std**2
    for name, kind in clinical.items():
        if kind == "numeric":
            columns[name] = {"mean": float(mean[at]), "std": float(std[at])}
            filled[at], variance[at] = 0.0, 1.0
            at += 1
        else:
            columns[name] = {"categories": list(kind)}
            at += len(kind) - 1
    if not columns:
        return {}
    imputation = {"mean": filled.tolist(), "covariance": np.diag(variance + 1e-3).tolist()}
    return {"columns": columns, "imputation": imputation, "missing_mask": []}


def death_priors(sums: np.ndarray, tmax: int) -> dict:
    """``loc_range`` and ``beta`` of the network, as of :mod:`bundle.survival.priors`; deaths are taken as normal.

    Raises:
        InputError: no site has enough deaths.
    """
    mean, std = moments(sums)
    if np.isnan(mean[0]):
        raise InputError(f"no site has {MINIMUM} deaths to train on.")
    early, median = float(mean[0] - TENTH * std[0]), float(mean[0])
    return {"loc_range": location_bounds(early, median, tmax), "beta": steepness(early, median, tmax)}


def look_sums(looks: Tensor, index: int, sites: int) -> np.ndarray:
    """Count, sum and sum of squares of the looks (n, 108) of a site's scans, a scan: (1 + sites, 3, 108) over n.

    The first is for all sites' scans; 1 + k is for all but those of site k, and 0 from that site.
    """
    x = looks.double()
    sums = torch.stack([torch.ones_like(x), x, x.square()]).mean(1).repeat(1 + sites, 1, 1)
    sums[1 + index] = 0
    return sums.numpy()


def shared_familiarity(sums: np.ndarray, looks: Tensor, index: int) -> Familiarity:
    """The look of all sites' scans, from the mean of their :func:`look_sums`.

    How far a scan may be from it is told by this site's own scans, (n, 108), from those of the others.
    """
    everybody, others = ([torch.tensor(part).float() for part in moments(sums[fit])] for fit in (0, 1 + index))
    return rounded(*floored(*everybody), [distance(seen, *floored(*others)) for seen in looks])
