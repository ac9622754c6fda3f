# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Clinical covariates as the vector that the network takes: scaled, one-hot, without gaps.

Everything is fitted on the training scans alone and kept in `settings.json`. So gaps are filled by a normal distribution,
which is plain JSON, and not by scikit-learn's `IterativeImputer`, which would have to be pickled.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from bundle.errors import InputError

logger = logging.getLogger(__name__)


def fill_in(x: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Replace what is missing (NaN) in x (n, d) by its expectation given what is there, under a normal distribution.

    Returns:
        the rows without gaps, and the covariance (d, d) that the missing values still have, summed over rows.
    """
    filled, left = x.copy(), np.zeros_like(covariance)
    gaps = np.isnan(x)
    for gap in np.unique(gaps, axis=0):
        rows, known = (gaps == gap).all(1), ~gap
        slope = np.linalg.solve(covariance[np.ix_(known, known)], covariance[np.ix_(known, gap)])
        filled[np.ix_(rows, gap)] = mean[gap] + (x[np.ix_(rows, known)] - mean[known]) @ slope
        left[np.ix_(gap, gap)] += rows.sum() * (covariance[np.ix_(gap, gap)] - covariance[np.ix_(gap, known)] @ slope)
    return filled, left


def em_step(x: np.ndarray, mean: np.ndarray, covariance: np.ndarray, ridge: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """One step of expectation-maximisation for a normal distribution with gaps: the next mean and covariance.

    The log-likelihood of the known values never falls; with a ridge, that less ``n ridge trace(covariance^-1) / 2``.

    Source: Little & Rubin, Statistical Analysis with Missing Data, 3rd ed. 2019, section 11.2.
    """
    filled, left = fill_in(x, mean, covariance)
    off = filled - filled.mean(0)
    return filled.mean(0), (off.T @ off + left) / len(x) + ridge * np.eye(len(mean))


def fit_gaussian(x: np.ndarray, ridge: float = 1e-3, tolerance: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of rows (n, d) with gaps, of about unit scale, by EM from the mean and variance of each column.

    Args:
        ridge: added to the variances, so that few scans or correlated columns don't make the covariance singular.
        tolerance: stop when nothing changes by more.
    """
    mean, covariance = np.nanmean(x, 0), np.diag(np.nanvar(x, 0) + ridge)
    for _ in range(1000):
        before = mean, covariance
        mean, covariance = em_step(x, mean, covariance, ridge)
        if max(np.abs(mean - before[0]).max(), np.abs(covariance - before[1]).max()) < tolerance:
            break
    return mean, covariance


def _numbers(covariates: Mapping, columns: Mapping) -> list[float]:
    """The covariates of a scan as numbers, NaN where missing."""
    row: list[float] = []
    for name, fitted in columns.items():
        value = covariates.get(name)
        if "categories" in fitted:
            known = value in fitted["categories"]
            row += [float(value == category) if known else np.nan for category in fitted["categories"][1:]]
        else:
            row.append(np.nan if value is None else (value - fitted["mean"]) / fitted["std"])
    return row


def _collinear_fault(x: np.ndarray, names: Sequence[str]) -> str | None:
    """Which column of x (n, d) follows from those before it (R² above 0.9999)."""
    x = x - x.mean(0)
    for j in range(1, len(names)):
        slope = np.linalg.lstsq(x[:, :j], x[:, j])[0]
        if np.square(x[:, j] - x[:, :j] @ slope).sum() < 1e-4 * np.square(x[:, j]).sum():
            share = np.abs(slope) * x[:, :j].std(0) > 0.01 * x[:, j].std()
            others = dict.fromkeys(name for name, counts in zip(names, share, strict=False) if counts and name != names[j])
            return (
                f"column {names[j]}: in the {len(x)} training scans a linear combination of {', '.join(others)} "
                "(expected columns of which none follows from the others)"
            )
    return None


def fit_clinical(records: Sequence[dict], columns: Mapping[str, str], missing_mask: bool = False) -> dict:
    """Learn from the training scans how covariates become the network's clinical vector, as plain JSON.

    Numeric columns are scaled to mean 0 and standard deviation 1. Categorical ones become 0 and 1 for each category but
    the first. A gap is filled with what is expected given the patient's other covariates, by :func:`fit_gaussian`.

    Args:
        records: training scans with `covariates`, from :func:`~bundle.data.read_cohort`.
        columns: kind of each column, "numeric" or "categorical"; the order is that of the vector.
        missing_mask: append for each column with gaps in training a number that is 1 where the value is missing.

    Raises:
        InputError: naming columns that are empty, constant, or a linear combination of others in training.
    """
    if not columns:
        return {}
    fitted: dict[str, dict] = {}
    faults: list[str] = []
    gaps: list[str] = []
    for name, kind in columns.items():
        values = [value for record in records if (value := record["covariates"][name]) is not None]
        if len(values) < len(records):
            gaps.append(name)
        if len(set(values)) < 2:
            found = f"{values[0]} in each of the {len(values)} training scans that have a value" if values else "empty"
            faults.append(f"column {name}: {found} (expected two different values at least)")
        elif kind == "categorical":
            fitted[name] = {"categories": sorted(set(values))}
        else:
            fitted[name] = {"mean": float(np.mean(values)), "std": float(np.std(values))}
    if not faults:
        x = np.array([_numbers(record["covariates"], fitted) for record in records])
        mean, covariance = fit_gaussian(x)
        names = [name for name, each in fitted.items() for _ in each.get("categories", [0, 1])[1:]]
        faults += filter(None, [_collinear_fault(fill_in(x, mean, covariance)[0], names)])
    if faults:
        raise InputError("clinical " + "; ".join(faults) + ": leave it out of the key clinical.")
    return {
        "columns": fitted,
        "imputation": {"mean": mean.tolist(), "covariance": covariance.tolist()},
        "missing_mask": gaps if missing_mask else [],
    }


def clinical_kinds(encoding: Mapping | list[Mapping]) -> dict[str, str]:
    """The columns that an encoding (or those of an ensemble) takes, as :func:`~bundle.data.read_cohort` wants them.

    Raises:
        InputError: a column is of one kind for one member, and of another for another.
    """
    kinds: dict[str, str] = {}
    for each in encoding if isinstance(encoding, list) else [encoding]:
        for name, fitted in (each["columns"] if each else {}).items():
            kind = "categorical" if "categories" in fitted else "numeric"
            if kinds.setdefault(name, kind) != kind:
                raise InputError(f"column {name} is numeric for one member of the ensemble, categorical for another.")
    return kinds


def clinical_names(encoding: Mapping) -> list[str]:
    """What each number of the clinical vector is."""
    names = []
    for name, fitted in encoding.get("columns", {}).items():
        names += [f"{name}={category}" for category in fitted["categories"][1:]] if "categories" in fitted else [name]
    return names + [f"{name} missing" for name in encoding.get("missing_mask", [])]


def encode_clinical(records: Sequence[dict], encoding: Mapping | list[Mapping]) -> list[dict]:
    """The records with `clinical`, the vector that the network takes, as floats.

    A gap, a column that the table lacks and a category that training had not seen are filled in, and `imputed` says so
    in a sentence. The last two are logged, once a column.

    Args:
        records: scans, with `covariates` where the table has any.
        encoding: from :func:`fit_clinical`; with an empty one the records stay as they are. Of an ensemble, those of
            its members, whose vectors are put one after the other.

    Example::

        >>> patients = [{"patient_id": name, "covariates": {"age": age}} for name, age in (("A", 50.0), ("B", 70.0))]
        >>> [record["clinical"] for record in encode_clinical(patients, fit_clinical(patients, {"age": "numeric"}))]
        [[-1.0], [1.0]]
    """
    if isinstance(encoding, list):
        joint = [{**record, "clinical": []} for record in records]
        for each in encoding:
            for record, one in zip(joint, encode_clinical(records, each), strict=True):
                record["clinical"] = record["clinical"] + one.get("clinical", [])
                record.update({key: one[key] for key in ("imputed",) if key in one})
        return joint
    if not encoding:
        return list(records)
    columns = encoding["columns"]
    mean, covariance = (np.array(encoding["imputation"][key]) for key in ("mean", "covariance"))
    encoded = []
    for record in records:
        covariates = record.get("covariates", {})
        filled = fill_in(np.array([_numbers(covariates, columns)]), mean, covariance)[0][0]
        absent: dict[str, str] = {}
        for name, fitted in columns.items():
            value = covariates.get(name)
            if value is None:
                absent[name] = name
            elif value not in fitted.get("categories", [value]):
                absent[name] = f"{name} ({value} was not seen in training)"
        record = {**record, "clinical": filled.tolist() + [float(name in absent) for name in encoding["missing_mask"]]}
        if absent:
            record["imputed"] = f"taken as missing: {', '.join(absent.values())}"
        encoded.append(record)
    _log_absent(records, columns)
    return encoded


def _log_absent(records: Sequence[dict], columns: Mapping) -> None:
    for name, fitted in columns.items():
        counts = Counter(record.get("covariates", {}).get(name) for record in records)
        if set(counts) == {None}:
            logger.warning(f"column {name}: no scan has a value; each gets the one expected of its other covariates.")
        for value, count in counts.items():
            if value is not None and value not in fitted.get("categories", [value]):
                seen = f"was not seen in training ({', '.join(fitted['categories'])})"
                logger.warning(f"column {name}: {value} {seen}; missing in {count} scan(s).")
