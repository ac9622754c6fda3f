# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Folds of a cross-validation: alike in deaths and times, and no patient in two of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from bundle.data.cohort import SPLITS, patient_of
from bundle.errors import InputError

__all__ = ["cross_validation_parts", "split_cohort", "stratified_folds"]

TIME_BINS = 4  # of the deaths and of the censored, at most; each has at least one scan a fold
VALIDATION = 8  # one in eight of the scans that are not held out validates


def stratified_folds(records: Sequence[dict], folds: int, seed: int = 0) -> list[int]:
    """Fold 0, 1, ... of each scan, by scikit-learn's `StratifiedGroupKFold`.

    Strata are quantiles of time, of the deaths and of the censored; groups are patients, all of whose scans come into
    the same fold. The same for the same scans and seed, whatever the order of the rows.

    Args:
        records: from :func:`~bundle.data.read_cohort`.
        folds: how many.
        seed: of the shuffle.

    Raises:
        InputError: fewer patients than folds, or none who died in one of them.
    """
    if folds < 2:
        raise InputError(f"the number of folds is {folds} (expected at least 2).")
    count, deaths = len({patient_of(record) for record in records}), len(_dead(records))
    if deaths < folds:
        raise InputError(
            f"the cohort has {count} patients, {deaths} of whom died: too few for {folds} folds "
            "(expected at least one death in each)."
        )
    found = _draw(records, folds, seed)
    _require_deaths(records, found)
    return found


def _draw(records: Sequence[dict], folds: int, seed: int) -> list[int]:
    order = sorted(range(len(records)), key=lambda i: records[i]["patient_id"])
    time, event = (np.array([records[i][key] for i in order]) for key in ("time", "event"))
    patients = np.array([patient_of(records[i]) for i in order])
    strata = np.zeros(len(order), dtype=int)
    for value in (0, 1):
        rows = event == value
        bins = int(np.clip(rows.sum() // folds, 1, TIME_BINS))
        if rows.any():
            edges = np.quantile(time[rows], np.arange(1, bins) / bins)
            strata[rows] = 1 + value * TIME_BINS + np.searchsorted(edges, time[rows])
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    found = [0] * len(records)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of strata with fewer scans than folds
        for fold, (_, held_out) in enumerate(splitter.split(strata, strata, patients)):
            for i in held_out:
                found[order[i]] = fold
    return found


def cross_validation_parts(records: Sequence[dict], folds: int | None = None, seed: int = 0) -> dict[int, dict]:
    """For each fold train, val and test: the fold itself is the test, an eighth of the other patients validates.

    Which weights are best is then decided without the scans that they are measured on.

    Args:
        records: from :func:`~bundle.data.read_cohort`.
        folds: how many to draw by :func:`stratified_folds`; None for those of the column ``fold``, or 5 without it.
        seed: of the folds and of what validates.

    Returns:
        {fold: {"train": [...], "val": [...], "test": [...]}}.

    Raises:
        InputError: too few patients or deaths for the folds; fewer than two deaths outside one of them, of which one is
            needed to train on and one to validate on.
    """
    if folds is None and any("fold" in record for record in records):
        fold_of = [record["fold"] for record in records]
        if len(set(fold_of)) < 2:
            raise InputError(f"column fold: {fold_of[0]} in every row (expected at least two folds).")
        _require_deaths(records, fold_of)
    else:
        fold_of = stratified_folds(records, 5 if folds is None else folds, seed)
    parts = {}
    for fold in sorted(set(fold_of)):
        rest = [record for record, of in zip(records, fold_of) if of != fold]
        deaths = len(_dead(rest))
        if deaths < 2:
            raise InputError(
                f"without fold {fold}, {deaths} of the patients left died (expected at least two, one to train on and one "
                "to validate on); folds that are more alike, or more patients, are needed."
            )
        inner = _draw(rest, min(VALIDATION, deaths), seed)
        validates = next(of for record, of in zip(rest, inner) if record["event"])
        parts[fold] = {
            "train": [record for record, of in zip(rest, inner) if of != validates],
            "val": [record for record, of in zip(rest, inner) if of == validates],
            "test": [record for record, of in zip(records, fold_of) if of == fold],
        }
    return parts


def _dead(records: Sequence[dict]) -> set[str]:
    return {patient_of(record) for record in records if record["event"]}


def _require_deaths(records: Sequence[dict], fold_of: Sequence[int]) -> None:
    without = sorted(set(fold_of) - {fold for record, fold in zip(records, fold_of) if record["event"]})
    if without:
        raise InputError(
            f"fold {', '.join(map(str, without))} has no event (expected a death in each, or nothing can be measured "
            "there); fewer folds, or another column fold, may help."
        )


def split_cohort(
    records: Sequence[dict],
    *,
    fold: int | None = None,
    seed: int = 0,
    fractions: Sequence[float] = (0.7, 0.15, 0.15),
) -> dict[str, list[dict]]:
    """Divide a cohort into train, val and test.

    By the `split` column if there is one; else, for a given `fold`, the rows of that fold are val and all others
    train; else at random, the same for the same patients and seed whatever the order of the rows, with the same
    share of deaths in each part (at least one, if three or more died). All scans of a patient are in one part.

    Args:
        records: from :func:`read_cohort`.
        fold: which fold to validate on.
        seed: of the random split.
        fractions: of train, val and test in the random split; sum 1.

    Returns:
        {"train": [...], "val": [...], "test": [...]}; test may be empty.

    Raises:
        InputError: no such fold, a fold asked of a cohort with a `split` column, fractions that do not sum to 1,
            or nothing left to train or to validate on.
    """
    parts: dict[str, list[dict]] = {name: [] for name in SPLITS}
    if all("split" in record for record in records):
        if fold is not None:
            raise InputError(f"fold is {fold}, but the cohort's column split already says what each scan is for")
        for record in records:
            parts[record["split"]].append(record)
    elif fold is not None:
        folds = sorted({record["fold"] for record in records if "fold" in record})
        if fold not in folds:
            raise InputError(f"fold {fold} does not exist (expected one of column fold: {folds or 'there is none'})")
        for record in records:
            parts["val" if record["fold"] == fold else "train"].append(record)
    else:
        if len(fractions) != len(SPLITS) or min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
            raise InputError(f"split fractions are {list(fractions)} (expected three numbers >= 0 with sum 1)")
        rng = np.random.default_rng(seed)
        patients: dict[str, list[dict]] = {}
        for record in sorted(records, key=lambda record: record["patient_id"]):
            patients.setdefault(patient_of(record), []).append(record)
        for event in (1, 0):
            stratum = [scans for scans in patients.values() if max(scan["event"] for scan in scans) == event]
            ends = np.cumsum(_shares(len(stratum), fractions))
            shuffled = [stratum[i] for i in rng.permutation(len(stratum))]
            for name, start, end in zip(SPLITS, (0, *ends), ends):
                parts[name] += [scan for scans in shuffled[start:end] for scan in scans]
    for name in ("train", "val"):
        if not parts[name]:
            sizes = ", ".join(f"{key} {len(part)}" for key, part in parts.items())
            raise InputError(f"{len(records)} scans leave none for {name}: {sizes} (expected at least 1)")
    return parts


def _shares(count: int, fractions: Sequence[float]) -> np.ndarray:
    """Whole numbers with sum `count`, as near to the fractions as can be, none of them 0 where `count` allows."""
    exact = count * np.asarray(fractions, dtype=float)
    shares = np.floor(exact + 1e-9).astype(int)
    for i in np.argsort(shares - exact, kind="stable")[: count - shares.sum()]:
        shares[i] += 1
    for i in range(len(shares)):
        if shares[i] == 0 and fractions[i] > 0 and shares.max() > 1:
            shares[shares.argmax()] -= 1
            shares[i] += 1
    return shares
