# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Cross-validate objectives on a cohort: every objective is trained without each fold in turn and measured on it.

Folds are alike in deaths and times, and all scans of a patient are in one. Every run goes through `monai.bundle run` with
the shipped configs. The same command goes on where it was stopped. In the folder --out it leaves:

  cross_validation.md, .csv    every metric: mean and standard deviation over the folds, and a paired bootstrap test of
                               each objective against the first
  out_of_fold.csv              what each scan was predicted by the models that had not seen its patient
  folds/fold_K.csv             the cohort with the column split: what fold K trains, validates (weights are chosen by it)
                               and is measured on
  NAME/fold_K/                 weights, settings, log, and test/ with what configs/evaluate.json writes; NAME is that of
                               the objective, or BASELINE_OBJECTIVE

NAME is an ensemble: its folds' mean distribution and mean heat are predicted by
  python -m monai.bundle run --config_file "['configs/inference.json','configs/ensemble.json']" --ckpt OUT/NAME ...
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from monai.bundle import ConfigParser
from tqdm import tqdm

from bundle.data import cross_validation_parts, fit_clinical, patient_of, read_cohort
from bundle.data.cohort import MASK_COLUMNS
from bundle.errors import InputError
from bundle.files import file_sha256, write_json, write_text
from bundle.metrics import LocalisationMetric, SurvivalMetric
from bundle.metrics.bootstrap import draw_patients, paired_difference
from bundle.run.settings import differences
from bundle.run.start import exit_on_sigterm, flag, make_folder
from bundle.survival import OBJECTIVES

from scripts.jobs import literal, locked, run_jobs, run_module, threads_of

BASELINES = ("clinical_only", "image_only")
OWN = ("cohort", "fold", "split", "ckpt_dir", "output_dir", "resume", "seed", "objective", "ckpt", "maps_dir")
BOTH = ("device", "lungmask_weights", "on_fault")  # keys of training and of evaluation that settings.json doesn't carry

# Columns of the page, and whether more is better; None where neither is. The CSV has every metric.
METRICS = {
    "c_index": ("C-index", True),
    "c_index_ipcw": ("Uno's C-index", True),
    "integrated_brier": ("integrated Brier", False),
    "mae_events": ("MAE of events, months", False),
    "mae_censored": ("hinge MAE of censored, months", False),
    "mae_pseudo_observation": ("MAE-PO, months", False),
    "d_calibration_p": ("D-calibration p", None),
    "pointing_game": ("pointing game", True),
    "average_precision": ("average precision of maps", True),
}


@dataclass(frozen=True)
class Model:
    """One line of the table: its name and that of its folder (a baseline's has the objective, too, lest another first
    objective find it done), the configs stacked on `configs/train.json`, and the overrides of its training."""

    name: str
    folder: str
    configs: tuple[str, ...]
    overrides: tuple[tuple[str, str], ...]


def options_of(words: Sequence[str]) -> dict[str, str]:
    """Config overrides, ``--key value`` or ``--key=value``."""
    found: dict[str, str] = {}
    rest = list(words)
    while rest:
        key, given, value = rest.pop(0).partition("=")
        if not key.startswith("--") or len(key) == 2 or not (given or rest):
            raise InputError(f"after --, {key} is no override (expected --key value, such as --max_epochs 50).")
        found[key[2:]] = value if given else rest.pop(0)
    return found


def read_config(files: Sequence[str]) -> ConfigParser:
    """Configs, stacked.

    Raises:
        InputError: one is missing or no JSON.
    """
    for name in files:
        try:
            json.loads(Path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise InputError(f"config {name}: {e} (expected a JSON file to stack on configs/train.json).") from e
    parser = ConfigParser()
    parser.read_config(list(files))
    return parser


class CrossValidation:
    """What is to be done, checked before anything runs; and the doing of one fold.

    Args:
        out: folder of all that is written.
        cohort: CSV file.
        objectives: names of files in `configs/objective`; the first one is what others are compared with.
        baselines: of BASELINES, under the first objective.
        folds: how many; None for those of the column ``fold``, or 5.
        seed: of folds and trainings.
        configs: files to stack on `configs/train.json`.
        overrides: of config keys, for training or evaluation.
        threads: of a run.

    Raises:
        InputError: the cohort, a name or an override is at fault, there are too few patients or deaths for the folds, or
            `out` holds a cross-validation of something else.
    """

    def __init__(
        self,
        out: Path,
        cohort: str,
        objectives: Sequence[str],
        baselines: Sequence[str] = (),
        folds: int | None = None,
        seed: int = 0,
        configs: Sequence[str] = (),
        overrides: dict[str, str] | None = None,
        threads: int = 1,
    ) -> None:
        self.out, self.seed, self.threads = out, seed, threads
        for what, names, known in (("objective", objectives, OBJECTIVES), ("baseline", baselines, BASELINES)):
            for name in names:
                if name not in known or names.count(name) > 1:
                    raise InputError(f"{what} {name}: unknown or named twice (expected some of {', '.join(known)}).")
        overrides = dict(overrides or {})
        config = read_config(["configs/train.json", *configs])
        evaluation = read_config(["configs/evaluate.json"])
        for key in overrides:
            root = key.split("#")[0]
            if root in OWN:
                raise InputError(f"--{key} can't be overridden here: cross-validation sets it.")
            if root not in config.config and root not in evaluation.config:
                raise InputError(f"--{key} is a key neither of the stacked training config nor of configs/evaluate.json.")
        training = {key: value for key, value in overrides.items() if key.split("#")[0] in config.config}
        self.evaluation = {"figures": "false"}
        self.evaluation |= {k: v for k, v in overrides.items() if k not in training or k in BOTH}

        def setting(key: str) -> object:
            return literal(training[key]) if key in training else config.get_parsed_content(key)

        clinical = setting("clinical")
        if baselines and not clinical:
            raise InputError("baselines compare with the use of covariates: name columns with --clinical (see README).")
        self.models = [self.model(name, configs, training) for name in objectives]
        self.models += [self.model(objectives[0], configs, training, baseline) for baseline in baselines]

        on_fault = str(setting("on_fault"))
        records = read_cohort(cohort, clinical=clinical, tmax=setting("tmax"), on_fault=on_fault)
        self.parts = cross_validation_parts(records, folds, seed)
        for fold, parts in self.parts.items():
            try:
                fit_clinical(parts["train"], clinical, flag(setting("missing_mask")))
            except InputError as e:
                raise InputError(f"fold {fold}: {e}") from e
        files = ["configs/train.json", "configs/evaluate.json", *configs]
        columns = ("patient_id", "image", *MASK_COLUMNS, "time", "event", "covariates")
        self.claim(
            {
                "cohort": [[r.get(column) for column in columns] for r in records],
                "folds": {str(fold): [r["patient_id"] for r in parts["test"]] for fold, parts in self.parts.items()},
                "seed": seed,
                "configs": {name: file_sha256(name) for name in files},
                "overrides": overrides,
            }
        )
        self.write_folds(clinical)

    @staticmethod
    def model(objective: str, configs: Sequence[str], training: dict[str, str], baseline: str | None = None) -> Model:
        """A line of the table: an objective, or a baseline under it."""
        stack, options = [*configs, f"configs/objective/{objective}.json"], dict(training)
        if baseline == "image_only":
            options["clinical"] = "{}"
        elif baseline == "clinical_only":
            stack.append("configs/network/clinical_only.json")
            # What shapes the image's network means nothing to that of the covariates.
            options = {key: value for key, value in options.items() if key.split("#")[0] != "network_def"}
        folder = f"{baseline}_{objective}" if baseline else objective
        return Model(baseline or objective, folder, tuple(stack), tuple(options.items()))

    def claim(self, settings: dict) -> None:
        """Make the folder this cross-validation's own."""
        path = self.out / "cross_validation.json"
        make_folder(str(self.out))
        if path.is_file():
            differ = differences(json.loads(path.read_text()), settings)
            if differ:
                raise InputError(
                    f"{self.out} holds another cross-validation: {'; '.join(differ)}. Choose another --out, or delete it."
                )
        write_json(path, settings)

    def write_folds(self, clinical: dict) -> None:
        """The cohort as each fold sees it, with absolute paths and the columns that are used."""
        for fold, parts in self.parts.items():
            rows = []
            for split, records in parts.items():
                for r in records:
                    row = {"patient_id": patient_of(r), **{key: r[key] for key in ("image", "time", "event")}}
                    rows.append(row | {key: r.get(key) for key in MASK_COLUMNS} | {"split": split} | r.get("covariates", {}))
            columns = ["patient_id", "image", "time", "event", *MASK_COLUMNS, "split", *clinical]
            write_text(self.table(fold), pd.DataFrame(rows, columns=columns).to_csv(index=False))

    def table(self, fold: int) -> Path:
        return self.out / "folds" / f"fold_{fold}.csv"

    def owners(self, fold: int) -> dict[str, str]:
        """Whose each scan is, by the names that the fold's own table gives, in which scans at fault are left out."""
        return {r["patient_id"]: patient_of(r) for r in read_cohort(self.table(fold), check_files=False)}

    def folder(self, model: Model, fold: int) -> Path:
        return self.out / model.folder / f"fold_{fold}"

    def done(self, model: Model, fold: int) -> bool:
        """Whether a fold is measured, by the weights that are there and the model's configs as they are."""
        folder = self.folder(model, fold)
        if not (folder / "done.json").is_file() or not (folder / "model.pt").is_file():
            return False
        return json.loads((folder / "done.json").read_text()) == self.made(model, fold)

    def made(self, model: Model, fold: int) -> dict:
        """What a measured fold rests on."""
        weights = file_sha256(self.folder(model, fold) / "model.pt")
        return {"weights_sha256": weights, "configs": {name: file_sha256(name) for name in model.configs}}

    def run(self, model: Model, fold: int) -> None:
        """Train without a fold and measure on it, unless that is done."""
        folder, table = self.folder(model, fold), str(self.table(fold))
        with locked(folder / ".fold.lock") as lock:
            if self.done(model, fold):
                return
            bundle = partial(run_module, "monai.bundle", "run", log=folder / "log.txt", threads=self.threads, lock=lock)
            cache = [word for part in ("train", "validate") for word in (f"--{part}#dataset#cache_dir", str(self.cache))]
            bundle(
                *("--config_file", str(["configs/train.json", *model.configs]), "--cohort", table, "--seed", str(self.seed)),
                *("--ckpt_dir", str(folder), "--output_dir", str(folder), *cache),
                *(word for key, value in model.overrides for word in (f"--{key}", value)),
            )
            bundle(
                *("--config_file", "configs/evaluate.json", "--cohort", table, "--ckpt", str(folder / "model.pt")),
                *("--output_dir", str(folder / "test")),
                *(word for key, value in self.evaluation.items() for word in (f"--{key}", value)),
            )
            write_json(folder / "done.json", self.made(model, fold))

    @property
    def cache(self) -> Path:
        """Preprocessed scans, shared by all runs; deleted when all are done."""
        return self.out / "cache"


class Scores:
    """What a model's folds were measured to be, and how to measure resamples of them.

    Args:
        cv: the cross-validation.
        model: all of whose folds are done.
    """

    def __init__(self, cv: CrossValidation, model: Model) -> None:
        self.name = model.name
        self.values: dict[str, list[float]] = {}
        self.patients: list[list[str]] = []
        self.statistics: list[dict] = []
        rows = []
        for fold in cv.parts:
            folder = cv.folder(model, fold) / "test"
            for group in json.loads((folder / "metrics.json").read_text()).values():
                for name, entry in group.items():
                    if isinstance(entry, dict):
                        value = np.nan if entry["value"] is None else entry["value"]
                        self.values.setdefault(name, []).append(value)
            scans = pd.read_csv(folder / "metrics_per_scan.csv", dtype={"patient_id": str}, keep_default_na=False, na_values="")
            curves = pd.read_csv(folder / "survival_curves.csv", dtype={"patient_id": str}, keep_default_na=False)
            metric = SurvivalMetric(num_resamples=0)
            curves = curves.set_index("patient_id").loc[scans.patient_id].to_numpy()
            survival = np.column_stack([np.ones(len(curves)), curves])
            metric(torch.from_numpy(-np.diff(survival)).clamp_min(0), torch.tensor(scans[["time", "event"]].to_numpy()))
            self.statistics.append({name: statistic for name, (statistic, _) in metric.statistics().items()})
            for name in LocalisationMetric.SCORES:
                if name in scans and scans[name].notna().any():
                    self.statistics[-1][name] = partial(mean_of, scans[name].to_numpy())
            owner = cv.owners(fold)
            self.patients.append([owner[name] for name in scans.patient_id])
            rows.append(scans.assign(model=model.name, fold=fold))
        self.rows = pd.concat(rows)

    def resampled(self, metric: str, draws: list[list[np.ndarray]]) -> np.ndarray:
        """The metric of each resample: the mean over its folds that have one, NaN if none has."""
        found = np.full((len(draws), len(self.patients)), np.nan)
        for fold, statistics in enumerate(self.statistics):
            if metric in statistics:
                values = (statistics[metric](draw[fold]) for draw in draws)
                found[:, fold] = [np.nan if value is None else value for value in values]
        count = (~np.isnan(found)).sum(1)
        return np.where(count > 0, np.nansum(found, 1) / np.maximum(count, 1), np.nan)


def mean_of(values: np.ndarray, rows: np.ndarray) -> float | None:
    """Mean of the drawn rows that have a value."""
    drawn = values[rows]
    return float(np.nanmean(drawn)) if (~np.isnan(drawn)).any() else None


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
            known = np.array(values)[~np.isnan(values)]
            row = {"model": score.name, "metric": metric, "folds": len(known)}
            row["mean"] = known.mean() if len(known) else None
            row["std"] = known.std(ddof=1) if len(known) > 1 else None
            if len(scores) > 1 and metric in METRICS and METRICS[metric][1] is not None:
                resampled = score.resampled(metric, draws)
                if score is scores[0]:
                    first[metric] = resampled
                elif metric in first:
                    differ = np.array(values) - np.array(scores[0].values[metric])
                    row["difference"] = np.nanmean(differ) if (~np.isnan(differ)).any() else None
                    row |= paired_difference(first[metric], resampled)
            rows.append(row)
    numbers = ["folds", "mean", "std", "difference", "lower", "upper", "p"]
    return pd.DataFrame(rows, columns=["model", "metric", *numbers]).astype({name: float for name in numbers[1:]})


def page(table: pd.DataFrame, parts: dict[int, dict], num_resamples: int, command: str) -> str:
    """The table as Markdown."""
    scans = [r for part in next(iter(parts.values())).values() for r in part]
    patients, deaths = len({patient_of(r) for r in scans}), sum(r["event"] for r in scans)
    held = ", ".join(f"{k}: {len(p['test'])} ({sum(r['event'] for r in p['test'])})" for k, p in parts.items())
    shown = [m for m in METRICS if table[table.metric == m]["mean"].notna().any()]
    titles = [METRICS[m][0] + {True: " ↑", False: " ↓", None: ""}[METRICS[m][1]] for m in shown]
    names = list(table.model.unique())
    cells = table.set_index(["model", "metric"])
    lines = [
        "# Cross-validation",
        "",
        f"{len(scans)} scans of {patients} patients, {deaths} of them with a death. Held out in each fold (deaths): {held}.",
        "",
        "Mean ± standard deviation over the folds. ↑: more is better, ↓: less is better.",
        "",
        "| model | " + " | ".join(titles) + " |",
        "|" + "---|" * (len(shown) + 1),
    ]
    for name in names:
        values = (spread(r.Index, r.mean, r.std) for r in cells.loc[name].reindex(shown).itertuples())
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    if len(names) > 1:
        lines += [
            "",
            f"## Difference from {names[0]}",
            "",
            f"Mean over the folds, 95 % interval and two-sided p of a paired bootstrap: {num_resamples} times patients are drawn "
            "within folds, with all their scans and the same for both models. It asks what other patients of this kind would "
            "have shown of these trained models, not how another training would have gone. The p-values aren't corrected "
            "for their number.",
            "",
            "| model | metric | difference | 95 % interval | p |",
            "|---|---|---|---|---|",
        ]
        for name in names[1:]:
            for r in cells.loc[name].reindex(shown).dropna(subset="p").itertuples():
                values = [f"{value:+.{digits(r.Index)}f}" for value in (r.difference, r.lower, r.upper)]
                title = METRICS[r.Index][0]
                lines.append(f"| {name} | {title} | {values[0]} | {values[1]} to {values[2]} | {r.p:.2g} |")
    return "\n".join(lines) + f"\n\nMade by `{command}`.\n"


def digits(metric: str) -> int:
    """After the point: fewer for months."""
    return 1 if "months" in METRICS[metric][0] else 3


def spread(metric: str, mean: float, std: float) -> str:
    """Mean ± standard deviation, as far as there are any."""
    if np.isnan(mean):
        return "–"
    return f"{mean:.{digits(metric)}f}" + ("" if np.isnan(std) else f" ± {std:.{digits(metric)}f}")


def report(cv: CrossValidation, num_resamples: int, command: str) -> None:
    """Write the tables of the models all of whose folds are done; nothing before those of the first one are."""
    finished = [model for model in cv.models if all(cv.done(model, fold) for fold in cv.parts)]
    if finished[:1] != cv.models[:1]:
        return
    scores = [Scores(cv, model) for model in finished]
    table = compare(scores, num_resamples, cv.seed)
    rows = pd.concat([score.rows for score in scores])
    rows = rows[["model", "fold", *rows.columns.drop(["model", "fold"])]]
    options = {"index": False, "float_format": "%.6g", "quoting": csv.QUOTE_MINIMAL}
    write_text(cv.out / "out_of_fold.csv", rows.to_csv(**options))
    write_text(cv.out / "cross_validation.csv", table.to_csv(**options))
    write_text(cv.out / "cross_validation.md", page(table, cv.parts, num_resamples, command))


def names_of(text: str) -> list[str]:
    """Names with commas between them."""
    return [name.strip() for name in text.split(",") if name.strip()]


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    p = argparse.ArgumentParser(
        prog="python -m scripts.cross_validate",
        usage="%(prog)s --cohort C.csv --out DIR [options] [-- --key value ...]",
        description=__doc__,
        epilog="After --, any key of configs/train.json or configs/evaluate.json may follow, as for monai.bundle run: "
        "-- --max_epochs 50 --shifts 1. Those of network_def don't reach clinical_only.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--cohort", required=True, help="cohort CSV (see README); a patient may have several scans")
    p.add_argument("--out", type=Path, required=True, help="folder of all results, and of what is done so far")
    p.add_argument("--folds", type=int, help="folds to draw (default: those of the column fold, else 5)")
    p.add_argument("--objectives", default="centime", help=f"with commas, of {', '.join(OBJECTIVES)} (default centime)")
    p.add_argument("--baselines", default="", help=f"with commas, of {', '.join(BASELINES)}, under the first objective")
    p.add_argument("--clinical", help="clinical columns and their kinds, as for training: \"{'age': 'numeric'}\"")
    p.add_argument("--config", nargs="+", default=[], metavar="FILE", help="stack on configs/train.json, before objectives")
    p.add_argument("--seed", type=int, default=0, help="of folds, trainings and bootstrap (default 0)")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default 1)")
    p.add_argument("--resamples", type=int, default=1000, help="of the bootstrap (default 1000)")
    args = p.parse_args(words[:cut])
    try:
        overrides = options_of(words[cut + 1 :])
        if args.clinical is not None:
            overrides["clinical"] = args.clinical
        if args.jobs < 1 or args.resamples < 1 or not names_of(args.objectives):
            raise InputError("--jobs and --resamples must be at least 1, and --objectives name one.")
        cv = CrossValidation(
            args.out,
            args.cohort,
            names_of(args.objectives),
            names_of(args.baselines),
            args.folds,
            args.seed,
            args.config,
            overrides,
            threads_of(args.jobs),
        )
    except InputError as e:
        raise SystemExit(f"error: {e}") from None
    wanted = [(model, fold) for fold in cv.parts for model in cv.models]
    todo = [key for key in wanted if not cv.done(*key)]
    failed = 0
    with (
        tqdm(total=len(wanted), initial=len(wanted) - len(todo), desc="cross-validation", unit="fold") as bar,
        contextlib.closing(run_jobs(cv.run, todo, args.jobs)) as results,
    ):
        for result in results:
            if isinstance(result, Exception):
                failed += 1
                bar.write(f"failed, the others go on: {result}", file=sys.stderr)
            else:
                bar.update()
    command = shlex.join(["python", "-m", "scripts.cross_validate", *words])
    report(cv, args.resamples, command)
    if failed:
        raise SystemExit(f"error: {failed} of {len(todo)} runs failed; the same command tries them again.")
    shutil.rmtree(cv.cache, ignore_errors=True)
    print((cv.out / "cross_validation.md").read_text())


if __name__ == "__main__":
    exit_on_sigterm()
    main()
