# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What each scan is for: training, validation and test, or the folds of a cross-validation. No patient is in two."""

import warnings
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from bundle.data.cohort import SPLITS, patient_of
from bundle.errors import InputError

_FRACTIONS = (0.7, 0.15, 0.15)  # of train, val and test
_TIME_BINS = 4  # strata of the deaths and of the censored, at most; each has at least one scan a fold
_VALIDATION = 8  # one in eight of the scans that are not held out validates


def split_cohort(records: Sequence[dict], *, fold: int | None = None, seed: int = 0) -> dict[str, list[dict]]:
    """Divide a cohort into train, val and test; all scans of a patient are in one part.

    A column `split` decides, if there is one. Else, for a given `fold`, the rows of that fold are val and all others
    train. Else 70, 15 and 15 % of the patients are drawn at random, with the same share of deaths in each part (at least
    one, if three or more died). The parts are the same for the same patients and seed, whatever the order of the rows.

    Raises:
        InputError: no such fold; a fold of a cohort with a column `split`; nothing left to train or to validate on.

    Example::

        >>> cohort = [{"patient_id": f"P{i}", "time": 10.0 + i, "event": i % 2} for i in range(20)]
        >>> {name: len(part) for name, part in split_cohort(cohort).items()}
        {'train': 14, 'val': 4, 'test': 2}
    """
    if all("split" in record for record in records):
        if fold is not None:
            raise InputError(f"fold is {fold}, but the cohort's column split already says what each scan is for")
        parts = {name: [record for record in records if record["split"] == name] for name in SPLITS}
    elif fold is not None:
        fold_of = [record.get("fold") for record in records]
        if fold not in fold_of:
            folds = sorted(set(fold_of) - {None})
            raise InputError(f"fold {fold} does not exist (expected one of column fold: {folds or 'there is none'})")
        val, train = _parted(records, fold_of, fold)
        parts = {"train": train, "val": val, "test": []}
    else:
        parts = _random_parts(records, seed)
    for name in ("train", "val"):
        if not parts[name]:
            sizes = ", ".join(f"{key} {len(part)}" for key, part in parts.items())
            raise InputError(f"{len(records)} scans leave none for {name}: {sizes} (expected at least 1)")
    return parts


def _random_parts(records: Sequence[dict], seed: int) -> dict[str, list[dict]]:
    parts: dict[str, list[dict]] = {name: [] for name in SPLITS}
    patients: dict[str, list[dict]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record["patient_id"]):
        patients[patient_of(record)].append(record)
    rng = np.random.default_rng(seed)
    for event in (1, 0):
        stratum = [scans for scans in patients.values() if max(scan["event"] for scan in scans) == event]
        ends = np.cumsum(_shares(len(stratum)))
        shuffled = [stratum[i] for i in rng.permutation(len(stratum))]
        for name, start, end in zip(SPLITS, (0, *ends), ends, strict=False):
            parts[name] += [scan for scans in shuffled[start:end] for scan in scans]
    return parts


def _shares(count: int) -> np.ndarray:
    """How many of `count` patients each part gets: near to the fractions, and not 0 where `count` allows."""
    exact = count * np.array(_FRACTIONS)
    shares = np.floor(exact + 1e-9).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: count - shares.sum()]] += 1
    for i in range(len(shares)):
        if shares[i] == 0 and shares.max() > 1:
            shares[shares.argmax()] -= 1
            shares[i] += 1
    return shares


def stratified_folds(records: Sequence[dict], folds: int, seed: int = 0) -> list[int]:
    """Fold 0, 1, ... of each scan: strata are quantiles of time, of the deaths and of the censored; groups are patients.

    Folds are the same for the same scans and seed, whatever the order of the rows.

    Raises:
        InputError: fewer than two folds, or fewer deaths than folds, or a fold in which nobody died.
    """
    if folds < 2:
        raise InputError(f"the number of folds is {folds} (expected at least 2).")
    count, deaths = len({patient_of(record) for record in records}), len(_dead(records))
    if deaths < folds:
        few = f"the cohort has {count} patients, {deaths} of whom died: too few for {folds} folds"
        raise InputError(f"{few} (expected at least one death in each).")
    found = draw_folds(records, folds, seed)
    _require_deaths(records, found)
    return found


def draw_folds(records: Sequence[dict], folds: int, seed: int) -> list[int]:
    """As :func:`stratified_folds`, but a fold in which nobody died is left as it is."""
    order = sorted(range(len(records)), key=lambda i: records[i]["patient_id"])
    time, event = (np.array([records[i][key] for i in order]) for key in ("time", "event"))
    patients = np.array([patient_of(records[i]) for i in order])
    strata = np.zeros(len(order), dtype=int)
    for value in (0, 1):
        rows = event == value
        bins = int(np.clip(rows.sum() // folds, 1, _TIME_BINS))
        if rows.any():
            edges = np.quantile(time[rows], np.arange(1, bins) / bins)
            strata[rows] = 1 + value * _TIME_BINS + np.searchsorted(edges, time[rows])
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

    Args:
        folds: how many to draw by :func:`stratified_folds`. None takes those of the column ``fold``, or 5 without it.
        seed: of the folds and of what validates.

    Raises:
        InputError: too few patients or deaths for the folds; fewer than two deaths outside one of them.
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
        test, rest = _parted(records, fold_of, fold)
        deaths = len(_dead(rest))
        if deaths < 2:
            raise InputError(
                f"without fold {fold}, {deaths} of the patients left died (expected at least two, one to train on and one "
                "to validate on); folds that are more alike, or more patients, are needed."
            )
        inner = draw_folds(rest, min(_VALIDATION, deaths), seed)
        val, train = _parted(rest, inner, next(of for record, of in zip(rest, inner) if record["event"]))
        parts[fold] = {"train": train, "val": val, "test": test}
    return parts


def _parted(records: Sequence[dict], fold_of: Sequence[int], fold: int) -> tuple[list[dict], list[dict]]:
    """Those of a fold, and the others."""
    pairs = list(zip(records, fold_of))
    return [record for record, of in pairs if of == fold], [record for record, of in pairs if of != fold]


def _dead(records: Sequence[dict]) -> set[str]:
    return {patient_of(record) for record in records if record["event"]}


def _require_deaths(records: Sequence[dict], fold_of: Sequence[int]) -> None:
    if without := sorted(set(fold_of) - {fold for record, fold in zip(records, fold_of) if record["event"]}):
        raise InputError(
            f"fold {', '.join(map(str, without))} has no event (expected a death in each, or nothing can be measured "
            "there); fewer folds, or another column fold, may help."
        )
