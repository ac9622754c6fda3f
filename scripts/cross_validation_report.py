# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Tables of a cross-validation: every metric's mean over the folds, and whether models differ."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from bundle.data import patient_of
from bundle.errors import InputError
from bundle.metrics import LocalisationMetric, SurvivalMetric
from bundle.metrics.bootstrap import draw_patients, paired_difference
from scripts.jobs import markdown

# Columns of the page (the CSV has every metric): their titles, whether more is better, None where neither is, and digits.
METRICS = {
    "c_index": ("C-index", True, 3),
    "c_index_ipcw": ("Uno's C-index", True, 3),
    "integrated_brier": ("integrated Brier", False, 3),
    "mae_events": ("MAE of events, months", False, 1),
    "mae_censored": ("hinge MAE of censored, months", False, 1),
    "mae_pseudo_observation": ("MAE-PO, months", False, 1),
    "d_calibration_p": ("D-calibration p", None, 3),
    "pointing_game": ("pointing game", True, 3),
    "average_precision": ("average precision of maps", True, 3),
}
ARROWS = {True: " ↑", False: " ↓", None: ""}
DIFFERENCE = """
## Difference from {first}

Mean over the folds, 95 % interval and two-sided p of a paired bootstrap: {num} times patients are drawn within folds,
with all their scans and the same for both models. It asks what other patients of this kind would have shown of these
trained models, not how another training would have gone. The p-values aren't corrected for their number.

"""


class Scores:
    """What a model's folds were measured to be, and how to measure resamples of them.

    Args:
        name: of the model.
        folders: of the evaluation of each fold.
        owners: of each fold, whose each scan is.
    """

    def __init__(self, name: str, folders: dict[int, Path], owners: dict[int, dict[str, str]]) -> None:
        self.name = name
        self.values: dict[str, list[float]] = {}
        self.patients: list[list[str]] = []
        self.statistics: list[dict] = []
        rows = []
        for fold, folder in folders.items():
            for group in json.loads((folder / "metrics.json").read_text()).values():
                for metric, entry in group.items():
                    if isinstance(entry, dict):
                        self.values.setdefault(metric, []).append(np.nan if entry["value"] is None else entry["value"])
            scans, curves = (
                pd.read_csv(folder / f"{name}.csv", dtype={"patient_id": str}, keep_default_na=False, na_values="")
                for name in ("metrics_per_scan", "survival_curves")
            )
            self.statistics.append(statistics_of(scans, curves))
            self.patients.append([owners[fold][name] for name in scans.patient_id])
            rows.append(scans.assign(model=name, fold=fold))
        self.rows = pd.concat(rows)

    def resampled(self, metric: str, draws: list[list[np.ndarray]]) -> np.ndarray:
        """The metric of each resample: the mean over its folds that have one, NaN if none has."""
        found = pd.DataFrame(np.nan, range(len(draws)), range(len(self.patients)))
        for fold, statistics in enumerate(self.statistics):
            if metric in statistics:
                found[fold] = [statistics[metric](draw[fold]) for draw in draws]
        return found.astype(float).mean(axis=1).to_numpy()


def statistics_of(scans: pd.DataFrame, curves: pd.DataFrame) -> dict:
    """By metric a function from the indices of scans, drawn with repetition, to its value; None where there is none."""
    alive = curves.set_index("patient_id").loc[scans.patient_id].to_numpy()
    pmf = -np.diff(np.column_stack([np.ones(len(alive)), alive]))
    metric = SurvivalMetric(num_resamples=0)
    metric(torch.from_numpy(pmf).clamp_min(0), torch.tensor(scans[["time", "event"]].to_numpy()))
    found = {name: statistic for name, (statistic, _) in metric.statistics().items()}
    maps = [name for name in LocalisationMetric.SCORES if name in scans and scans[name].notna().any()]
    return found | {name: lambda rows, values=scans[name]: float(values.iloc[rows].mean()) for name in maps}


def compare(scores: Sequence[Scores], num_resamples: int, seed: int) -> pd.DataFrame:
    """One row for each model and metric: its mean and spread over the folds, and its difference from the first model.

    The bootstrap draws patients within folds, the same for every model, and averages the metric over the folds. Pooled
    scans of all folds would be compared across models that were trained apart, whose risks needn't have one scale.
    """
    draws = list(draw_patients(scores[0].patients, num_resamples, seed))
    rows: list[dict] = []
    first: dict[str, np.ndarray] = {}
    for score in tqdm(scores, desc="bootstrap", unit="model", disable=len(scores) < 2):
        if score.patients != scores[0].patients:
            raise InputError(f"{score.name} was not measured on the same scans as {scores[0].name}; delete its folder.")
        for metric, values in score.values.items():
            known = pd.Series(values, dtype=float)
            row = {"model": score.name, "metric": metric, "folds": known.count(), "mean": known.mean(), "std": known.std()}
            if len(scores) > 1 and metric in METRICS and METRICS[metric][1] is not None:
                resampled = score.resampled(metric, draws)
                if score is scores[0]:
                    first[metric] = resampled
                elif metric in first:
                    row["difference"] = (known - pd.Series(scores[0].values[metric])).mean()
                    row |= paired_difference(first[metric], resampled)
            rows.append(row)
    numbers = ["mean", "std", "difference", "lower", "upper", "p"]
    return pd.DataFrame(rows, columns=["model", "metric", "folds", *numbers]).astype(dict.fromkeys(numbers, float))


def page(table: pd.DataFrame, parts: dict[int, dict], num_resamples: int, command: str) -> str:
    """The table as Markdown.

    Args:
        table: from :func:`compare`.
        parts: records of the scans that each fold trains, validates and is measured on.
    """
    scans = [r for part in next(iter(parts.values())).values() for r in part]
    patients, deaths = len({patient_of(r) for r in scans}), sum(r["event"] for r in scans)
    held = ", ".join(f"{k}: {len(p['test'])} ({sum(r['event'] for r in p['test'])})" for k, p in parts.items())
    shown = [m for m in METRICS if table[table.metric == m]["mean"].notna().any()]
    first, *others = table.model.unique()
    cells, titles = table.set_index(["model", "metric"]), {m: METRICS[m][0] + ARROWS[METRICS[m][1]] for m in shown}
    means, differences = [], []
    for name in (first, *others):
        rows = cells.loc[name].reindex(shown)
        means.append({"model": name} | {titles[r.Index]: with_deviation(r) for r in rows.itertuples()})
        for r in rows.dropna(subset="p").itertuples():
            title, _, digits = METRICS[r.Index]
            change, low, high = (f"{value:+.{digits}f}" for value in (r.difference, r.lower, r.upper))
            row = {"model": name, "metric": title, "difference": change, "95 % interval": f"{low} to {high}"}
            differences.append(row | {"p": f"{r.p:.2g}"})
    text = (
        f"# Cross-validation\n\n{len(scans)} scans of {patients} patients, {deaths} of them with a death. Held out in each "
        f"fold (deaths): {held}.\n\nMean ± standard deviation over the folds. ↑: more is better, ↓: less is better.\n\n"
        f"{markdown(pd.DataFrame(means))}"
    )
    if others:
        columns = ["model", "metric", "difference", "95 % interval", "p"]
        text += DIFFERENCE.format(first=first, num=num_resamples) + markdown(pd.DataFrame(differences, columns=columns))
    return f"{text}\nMade by `{command}`.\n"


def with_deviation(row: tuple) -> str:
    """Mean ± standard deviation, as far as there are any."""
    digits = METRICS[row.Index][2]
    if np.isnan(row.mean):
        return "–"
    return f"{row.mean:.{digits}f}" + ("" if np.isnan(row.std) else f" ± {row.std:.{digits}f}")
