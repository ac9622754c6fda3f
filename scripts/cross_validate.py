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

import argparse
import contextlib
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from monai.bundle import ConfigParser
from tqdm import tqdm

from bundle.data import cross_validation_parts, fit_clinical, patient_of, read_cohort
from bundle.data.cohort import MASK_COLUMNS
from bundle.errors import InputError
from bundle.files import file_sha256, write_json, write_text
from bundle.run.config import check_config
from bundle.run.settings import differences
from bundle.run.start import exit_on_sigterm, make_folder
from bundle.survival import OBJECTIVES
from scripts.cross_validation_report import Scores, compare, page
from scripts.jobs import literal, locked, options_of, overrides, run_jobs, run_module, threads_of

BASELINES = ("clinical_only", "image_only")
OF_IMAGES = ("network_def", "codebook_def", "recipe")  # keys of training that don't reach clinical_only
OWN = ("cohort", "fold", "split", "ckpt_dir", "output_dir", "resume", "seed", "objective", "ckpt", "maps_dir")
BOTH = ("device", "lungmask_weights", "on_fault")  # keys of training and of evaluation that settings.json doesn't carry


@dataclass(frozen=True)
class Model:
    """One line of the table.

    Args:
        name: of the objective or baseline.
        folder: a baseline's has the objective, too: under another objective it is another model.
        files: `configs/train.json` and what is stacked on it.
        options: overrides of its training.
    """

    name: str
    folder: str
    files: list[str]
    options: dict[str, str]


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


def check_names(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known or names.count(name) > 1:
            raise InputError(f"{what} {name}: unknown or named twice (expected some of {', '.join(known)}).")


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
        options: overrides of config keys, for training or evaluation.
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
        options: dict[str, str] | None = None,
        threads: int = 1,
    ) -> None:
        self.out, self.seed, self.threads = out, seed, threads
        self.cache = out / "cache"  # preprocessed scans, shared by all runs; deleted when all are done
        check_names("objective", objectives, list(OBJECTIVES))
        check_names("baseline", baselines, BASELINES)
        options = dict(options or {})
        config = read_config(["configs/train.json", *configs])
        config["cohort"] = cohort  # which says how far tmax must reach
        training = self.training_options(config, options)
        self.evaluation = {"figures": "false"}
        self.evaluation |= {k: v for k, v in options.items() if k not in training or k in BOTH}

        def setting(key: str) -> Any:
            return literal(training[key]) if key in training else config.get_parsed_content(key)

        self.models = [self.model(name, configs, training) for name in objectives]
        self.models += [self.model(objectives[0], configs, training, baseline) for baseline in baselines]
        for files, given in [(["configs/evaluate.json"], self.evaluation)] + [(m.files, m.options) for m in self.models]:
            stacked = read_config(files)
            stacked.update({key: literal(value) for key, value in given.items()})
            check_config(stacked, files[0])
        clinical = setting("clinical")
        if baselines and not clinical:
            raise InputError("baselines compare with the use of covariates: name columns with --clinical (see README).")
        records = read_cohort(cohort, clinical=clinical, tmax=setting("tmax"), on_fault=str(setting("on_fault")))
        self.parts = cross_validation_parts(records, folds, seed)
        for fold, parts in self.parts.items():
            try:
                fit_clinical(parts["train"], clinical)
            except InputError as e:
                raise InputError(f"fold {fold}: {e}") from e
        files = ["configs/train.json", "configs/evaluate.json", *configs]
        self.claim(records, {"seed": seed, "configs": {name: file_sha256(name) for name in files}, "overrides": options})
        self.write_folds(clinical)

    @staticmethod
    def training_options(config: ConfigParser, options: dict[str, str]) -> dict[str, str]:
        """The overrides that are for the training; all others must be for the evaluation."""
        training, evaluation = {}, read_config(["configs/evaluate.json"]).config
        for key, value in options.items():
            root = key.split("#")[0]
            if root in OWN:
                raise InputError(f"--{key} can't be overridden here: this script sets it.")
            if root in config.config:
                training[key] = value
            elif root not in evaluation:
                raise InputError(f"--{key} is a key neither of the stacked training config nor of configs/evaluate.json.")
        return training

    @staticmethod
    def model(objective: str, configs: Sequence[str], training: dict[str, str], baseline: str | None = None) -> Model:
        """A line of the table: an objective, or a baseline under it."""
        files, options = ["configs/train.json", *configs, f"configs/objective/{objective}.json"], dict(training)
        if baseline == "image_only":
            options["clinical"] = "{}"
        elif baseline == "clinical_only":
            files.append("configs/network/clinical_only.json")
            # What shapes the image's networks, or chooses one, is not for that of the covariates, which sees no image.
            options = {key: value for key, value in options.items() if key.split("#")[0] not in OF_IMAGES}
        return Model(baseline or objective, f"{baseline}_{objective}" if baseline else objective, files, options)

    def claim(self, records: list[dict], settings: dict) -> None:
        """Make the folder this cross-validation's own."""
        columns = ("patient_id", "image", *MASK_COLUMNS, "time", "event", "covariates")
        settings["cohort"] = [[r.get(column) for column in columns] for r in records]
        settings["folds"] = {str(fold): [r["patient_id"] for r in parts["test"]] for fold, parts in self.parts.items()}
        path = self.out / "cross_validation.json"
        make_folder(str(self.out))
        if path.is_file() and (differ := differences(json.loads(path.read_text()), settings)):
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
        return {"weights_sha256": weights, "configs": {name: file_sha256(name) for name in model.files}}

    def run(self, model: Model, fold: int) -> None:
        """Train without a fold and measure on it, unless that is done."""
        folder, table = self.folder(model, fold), self.table(fold)
        with locked(folder / ".fold.lock") as lock:
            if self.done(model, fold):
                return
            bundle = partial(run_module, "monai.bundle", "run", log=folder / "log.txt", threads=self.threads, lock=lock)
            train = {"config_file": model.files, "cohort": table, "seed": self.seed}
            train |= {"ckpt_dir": folder, "output_dir": folder, "cache_dir": self.cache, **model.options}
            bundle(*overrides(train))
            measure = {"config_file": "configs/evaluate.json", "cohort": table, "ckpt": folder / "model.pt"}
            bundle(*overrides({**measure, "output_dir": folder / "test", **self.evaluation}))
            write_json(folder / "done.json", self.made(model, fold))

    def scores(self, model: Model) -> Scores:
        """What a model all of whose folds are done was measured to be."""
        folders = {fold: self.folder(model, fold) / "test" for fold in self.parts}
        return Scores(model.name, folders, {fold: self.owners(fold) for fold in self.parts})


def report(cv: CrossValidation, num_resamples: int, command: str) -> None:
    """Write the tables of the models all of whose folds are done; nothing before those of the first one are."""
    finished = [model for model in cv.models if all(cv.done(model, fold) for fold in cv.parts)]
    if finished[:1] != cv.models[:1]:
        return
    scores = [cv.scores(model) for model in finished]
    table = compare(scores, num_resamples, cv.seed)
    rows = pd.concat([score.rows for score in scores])
    rows = rows[["model", "fold", *rows.columns.drop(["model", "fold"])]]
    for name, content in (("out_of_fold", rows), ("cross_validation", table)):
        write_text(cv.out / f"{name}.csv", content.to_csv(index=False, float_format="%.6g"))
    write_text(cv.out / "cross_validation.md", page(table, cv.parts, num_resamples, command))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m scripts.cross_validate",
        usage="%(prog)s --cohort C.csv --out DIR [options] [-- --key value ...]",
        description=__doc__,
        epilog="After --, any key of configs/train.json or configs/evaluate.json may follow, as for monai.bundle run: "
        f"-- --max_epochs 50 --shifts 1. {', '.join(OF_IMAGES)} don't reach clinical_only.",
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
    return p


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    args = parser().parse_args(words[:cut])
    try:
        options = options_of(words[cut + 1 :]) | ({"clinical": args.clinical} if args.clinical is not None else {})
        objectives, baselines = (names.replace(",", " ").split() for names in (args.objectives, args.baselines))
        if args.jobs < 1 or args.resamples < 1 or not objectives:
            raise InputError("--jobs and --resamples must be at least 1, and --objectives name one.")
        split, threads = (args.folds, args.seed), threads_of(args.jobs)
        cv = CrossValidation(args.out, args.cohort, objectives, baselines, *split, args.config, options, threads)
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
    report(cv, args.resamples, shlex.join(["python", "-m", "scripts.cross_validate", *words]))
    if failed:
        raise SystemExit(f"error: {failed} of {len(todo)} runs failed; the same command tries them again.")
    shutil.rmtree(cv.cache, ignore_errors=True)
    print((cv.out / "cross_validation.md").read_text())


if __name__ == "__main__":
    exit_on_sigterm()
    main()
