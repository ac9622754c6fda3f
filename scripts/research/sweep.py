# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Train and measure many configurations on phantoms: phantoms x variants x seeds, one row each in a tidy CSV.

Every run goes through `monai.bundle run` with the shipped configs: phantoms of the seed to train on, phantoms of another
seed to measure on. A row is written when its run is complete, so a sweep that was killed goes on where it stopped.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from bundle.errors import InputError
from bundle.files import file_sha256, remove_leftovers, write_atomically, write_json, write_text
from bundle.metrics.survival import c_index
from bundle.phantoms import PHANTOMS, PhantomParams, phantom_name
from bundle.run.start import exit_on_sigterm
from bundle.survival.cox import cox_regression
from scripts.jobs import locked, overrides, run_jobs, run_module, threads_of
from scripts.research import tables
from scripts.research.plots import draw_maps
from scripts.research.variants import TESTS, VARIANTS

TRAINED = "trained.json"  # in the folder of a run whose training is complete
HELD_OUT = 10_000  # added to the seed of the phantoms to measure on
SURVIVAL = ["c_index", "integrated_brier", "mae_events", "correlation", "mean_time_censored"]
MAP = [
    "pointing_game",
    "average_precision",
    "average_precision_ceiling",
    "mass_accuracy",
    "confounder_mass",
    "survivor_heat",
]
# Phantoms in which not all that matters is equally dangerous: the mask of the one, and whether its heat is compared with
# that of the rest of the lesions or of the whole scan.
OTHER_MASKS = {"mild-severe": ("gt_severe_mask", "lesions"), "protective-honeycomb": ("confounder_mask", "scan")}
EXAMPLES = """\
examples:
  python -m scripts.research.sweep --phantoms spheres chest --seeds 0 1 2 --size 48 --jobs 2
  python -m scripts.research.sweep --phantoms spheres --variants objectives --size 48
  python -m scripts.research.sweep --table

"""
GROUPS = {name.lower().replace(" ", "-"): name for name in ("Heads", "Objectives", "Single settings", "Other cohorts")}


def name_of_run(phantom: str, size: int, variant: str, train_scans: int, seed: int) -> str:
    """Name of the folder of a run."""
    name = f"{phantom}_{variant}_{train_scans}_{seed}"
    return name if size == tables.usual_size(phantom) else f"{name}_size{size}"


class Runner:
    """Phantoms, trainings and evaluations in a folder of work; what is there already is not made again."""

    def __init__(self, work: Path, test_scans: int, threads: int) -> None:
        self.work = work
        self.test_scans = test_scans
        self.threads = threads

    def lock(self, name: str) -> AbstractContextManager[int]:
        """One process at a time makes a thing; its children hold the lock, too."""
        return locked(self.work / "locks" / f"{name}.lock")

    def python(self, *args: str, log: Path, lock: int | None = None) -> None:
        """Run a module of this repository; see :func:`~scripts.jobs.run_module`."""
        run_module(*args, log=log, threads=self.threads, lock=lock)

    def phantoms(self, phantom: str, size: int, num: int, seed: int, options: dict) -> Path:
        """Folder of a cohort of phantoms."""
        options = {"size": size, **options} if size != PhantomParams.size else options
        name = "_".join([phantom, str(num), str(seed), *(f"{k}{v}" for k, v in options.items())]).replace(" ", "-")
        folder = self.work / "phantoms" / name
        with self.lock(name) as lock:
            if not (folder / "cohort.csv").is_file():  # written last
                options = {key: str(value).split() for key, value in options.items()}
                self.python(
                    *("scripts.make_phantoms", "--phantom", phantom, "--num", str(num), "--seed", str(seed)),
                    *(word for key, values in options.items() for word in (f"--{key}", *values)),
                    *("--jobs", str(self.threads), "--out", str(folder)),
                    log=self.work / "phantoms" / f"{name}.log",
                    lock=lock,
                )
        return folder

    def moved(self, phantoms: Path, test: str) -> Path:
        """A copy of a cohort whose volumes, images and masks alike, went through the `move` of a test."""
        folder = phantoms.with_name(f"{phantoms.name}_{test}")
        with self.lock(folder.name):
            if not (folder / "cohort.csv").is_file():
                for source in phantoms.glob("*/*.nii.gz"):
                    target = folder / source.relative_to(phantoms)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    volume = nib.load(source)
                    nib.save(nib.Nifti1Image(TESTS[test]["move"](np.asarray(volume.dataobj)), volume.affine), target)
                write_atomically(folder / "cohort.csv", partial(shutil.copy, phantoms / "cohort.csv"))
        return folder

    def train(self, phantom: str, size: int, variant: str, train_scans: int, seed: int) -> tuple[Path, dict]:
        """Folder of the trained weights, and what is to be known of the training: `device`, and `train_seconds`, which are
        None where it was stopped and went on.

        Raises:
            RuntimeError: what is in the folder was trained with other settings.
        """
        options = dict(VARIANTS[variant])
        config = ["configs/train.json"] + ([] if phantom == "chest" else ["configs/cohort/phantom.json"])
        config += options.pop("config", [])
        settings = {"configs": {name: file_sha256(name) for name in config}, "overrides": VARIANTS[variant]}
        phantoms = self.phantoms(phantom, size, train_scans, seed, options.pop("phantoms", {}))
        name = name_of_run(phantom, size, variant, train_scans, seed)
        folder = self.work / "runs" / name
        done = folder / TRAINED
        with self.lock(name) as lock:
            if done.is_file():
                made = json.loads(done.read_text())
                if made.pop("settings") != settings:
                    raise RuntimeError(f"{folder} was trained with other settings: delete it, or choose another --work.")
                return folder, made
            table = phantoms / f"split_{variant}.csv"
            self.split(phantoms / "cohort.csv", table, seed if options.pop("shuffle", False) else None)
            start, whole = time.time(), not (folder / "last.pt").is_file()
            where = {"cohort": table, "ckpt_dir": folder, "output_dir": folder, "seed": seed}
            if variant != "default":  # a variant is of the network; codebooks must not be measured in its place
                where["recipe"] = "network"
            words = overrides({"config_file": config, **where, **options})
            self.python("monai.bundle", "run", *words, log=folder / "log.txt", lock=lock)
            shutil.rmtree(folder / "cache")
            made = {"train_seconds": round(time.time() - start) if whole else None}
            made["device"] = "cuda" if torch.cuda.is_available() else "cpu"
            write_json(done, {**made, "settings": settings})
        return folder, made

    @staticmethod
    def split(cohort: Path, table: Path, shuffle: int | None) -> None:
        """A tenth validates, with as many events as there are in the rest; outcomes may be shuffled by a seed."""
        scans = pd.read_csv(cohort)
        validates = scans.groupby("event").cumcount() % 10 == 5 - scans.event
        scans["split"] = np.where(validates, "val", "train")
        if shuffle is not None:
            order = np.random.default_rng(shuffle).permutation(len(scans))
            scans[["time", "event"]] = scans[["time", "event"]].to_numpy()[order]
        write_text(table, scans.to_csv(index=False))

    def row(self, phantom: str, size: int, variant: str, train_scans: int, seed: int, test: str) -> dict:
        """Train, unless that is done, and evaluate: one row of the table."""
        run, made = self.train(phantom, size, variant, train_scans, seed)
        own = VARIANTS[variant].get("phantoms", {})
        options = {**own, **TESTS[test].get("phantoms", {})}
        phantoms = self.phantoms(phantom, size, self.test_scans, seed + HELD_OUT, options)
        if "move" in TESTS[test]:
            phantoms = self.moved(phantoms, test)
        cohort, masks = pd.read_csv(phantoms / "cohort.csv"), OTHER_MASKS.get(phantom)
        values, scans = self.evaluate(phantoms, cohort, run, test, masks[0] if masks else None)

        row = dict(zip(tables.KEY, (phantom, size, variant, train_scans, seed, test), strict=True))
        row |= {"test_scans": len(cohort), **made}
        row |= {name: values[name]["value"] for name in MAP + SURVIVAL if name in values}
        if masks:
            row.pop("confounder_mass", None)  # neither is one
            row["heat_ratio"] = heat_ratio(scans, cohort, phantoms, *masks)
        row["inverted"] = int((scans.auroc < 0.5).sum())  # a map that ranks its lesion below the rest
        if "true_risk" in cohort:
            row["c_index_oracle"] = c_index(*(torch.tensor(cohort[k]) for k in ("true_risk", "time", "event")))
        if "gt_severe_mask" in cohort:
            row["heat_ratio_oracle"] = heat_ratio_of_true_volumes(self.phantoms(phantom, size, train_scans, seed, own))
        return row

    def evaluate(self, phantoms: Path, cohort: pd.DataFrame, run: Path, test: str, mask: str | None) -> tuple:
        """Metrics by name, and a table of those of each scan; a `mask` is scored in the place of the confounder's."""
        folder, table = run / f"test_{test}", phantoms / "cohort.csv"
        if mask:
            table = phantoms / "cohort_heat_ratio.csv"
            write_text(table, cohort.assign(confounder_mask=cohort[mask]).to_csv(index=False))
        words = {"config_file": "configs/evaluate.json", "cohort": table, "output_dir": folder}
        words |= {"ckpt": run / "model.pt", "figures": False, **TESTS[test].get("options", {})}
        self.python("monai.bundle", "run", *overrides(words), log=folder / "log.txt")
        found = json.loads((folder / "metrics.json").read_text())
        return {**found["survival"], **found["localisation"]}, pd.read_csv(folder / "metrics_per_scan.csv")

    def heat_of_one(self, phantom: str, size: int, variant: str, train_scans: int, seed: int) -> tuple[Path, Path, Path]:
        """Image, mask of the lesion and heat of the first held-out scan that dies."""
        run, _ = self.train(phantom, size, variant, train_scans, seed)
        options = VARIANTS[variant].get("phantoms", {})
        phantoms = self.phantoms(phantom, size, self.test_scans, seed + HELD_OUT, options)
        cohort = pd.read_csv(phantoms / "cohort.csv")
        scan = cohort[cohort.event == 1].iloc[0]
        folder, one = run / "picture", phantoms / "picture.csv"
        scan.to_frame().T.to_csv(one, index=False)
        words = {"config_file": "configs/inference.json", "output_dir": folder, "cohort": one, "ckpt": run / "model.pt"}
        self.python("monai.bundle", "run", *overrides(words), log=folder / "log.txt")
        return phantoms / scan.image, phantoms / scan.gt_mask, next(folder.glob("maps/*_heat.nii.gz"))


def read_mask(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj) > 0


def heat_ratio(scans: pd.DataFrame, cohort: pd.DataFrame, folder: Path, column: str, other: str) -> float | None:
    """Heat per voxel in one mask over that in the rest of the lesions, or over the scan's mean.

    Args:
        scans: `metrics_per_scan.csv` of an evaluation that had this mask in the place of the confounder's.
        cohort: of the same scans; its masks lie in `folder`.
        column: of the mask.
        other: "lesions" or "scan".

    Returns:
        The median over the scans that have lesions, this mask and the other; None without such a scan.
    """
    ratios = []
    for scan in scans.merge(cohort, on="patient_id").itertuples():
        if np.isnan(scan.confounder_mass) or np.isnan(scan.mass_accuracy):
            continue
        one, lesions = (read_mask(folder / getattr(scan, name)) for name in (column, "gt_mask"))
        if other == "scan":
            ratios.append(scan.confounder_mass / one.mean())
        elif (rest := lesions & ~one).any():
            heat = max(scan.mass_accuracy - scan.confounder_mass, 0.0)
            ratios.append(scan.confounder_mass / one.sum() / max(heat / rest.sum(), 1e-12))
    return float(np.median(ratios)) if ratios else None


def heat_ratio_of_true_volumes(train: Path) -> float:
    """How many times as dangerous severe lesions are than mild ones, as far as the training scans' outcomes tell.

    It is the ratio of the coefficients of Cox's regression on the true volumes of either kind.
    """
    cohort, volumes = pd.read_csv(train / "cohort.csv"), []
    for scan in cohort.itertuples():
        lesions, severe = read_mask(train / scan.gt_mask), read_mask(train / scan.gt_severe_mask)
        volumes.append([(lesions & ~severe).mean(), severe.mean()])
    volumes = torch.tensor(volumes, dtype=torch.float64)
    scale = volumes.std(0)
    mild, severe = cox_regression(volumes / scale, torch.tensor(cohort.time), torch.tensor(cohort.event)) / scale
    return float(severe / mild)


def variants_of(names: Sequence[str]) -> list[str]:
    """Names of variants; that of a group stands for its variants and the shipped configuration.

    Raises:
        InputError: there is no such variant.
    """
    found: list[str] = []
    for name in names:
        if name not in VARIANTS and name not in GROUPS:
            raise InputError(f"there is no variant {name}; --help lists them.")
        own = [v for v in VARIANTS if tables.section("spheres", v, tables.USUAL_SCANS, "same") == GROUPS.get(name)]
        found += ["default", *own] if name in GROUPS else [name]
    return list(dict.fromkeys(found))


def parser() -> argparse.ArgumentParser:
    lines = [f"  {name:20} {' '.join(overrides(options)) or '(as shipped)'}" for name, options in VARIANTS.items()]
    p = argparse.ArgumentParser(
        prog="python -m scripts.research.sweep",
        description=__doc__,
        epilog=EXAMPLES + f"variants, also by group ({', '.join(GROUPS)}):\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    many = {"nargs": "+", "metavar": "N"}
    p.add_argument("--phantoms", nargs="+", default=["central-sphere", "spheres"], help="names or numbers (default 1 2)")
    p.add_argument("--size", type=int, help="voxels a side of the phantoms (default 64; chest always has 107)")
    p.add_argument("--variants", nargs="+", default=["default"], help="see below (default: as shipped)")
    p.add_argument("--seeds", type=int, default=[0, 1, 2], **many, help="of network and data (default 0 1 2)")
    p.add_argument("--tests", nargs="+", default=["same"], help=f"to measure on: {', '.join(TESTS)} (default: same)")
    p.add_argument("--train_scans", type=int, default=[tables.USUAL_SCANS], **many, help="scans a run (default 100)")
    p.add_argument("--test_scans", type=int, default=24, help="held-out scans a run (default 24)")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default 1)")
    p.add_argument("--results", type=Path, default=Path("docs/results/localisation.csv"), help="CSV (default %(default)s)")
    p.add_argument("--work", type=Path, default=Path("runs/sweep"), help="phantoms and weights (default %(default)s)")
    p.add_argument("--table", action="store_true", help="write the page of the CSV, a .md beside it, and run nothing")
    p.add_argument("--pictures", type=Path, metavar="PNG", help="draw a map of each phantom and variant as well")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    rows, page = tables.read_rows(args.results), args.results.with_suffix(".md")
    if args.table:
        write_text(page, tables.page(rows))
        return
    try:
        sizes = {name: tables.usual_size(name) for name in map(phantom_name, args.phantoms)}
        sizes |= {name: args.size for name in sizes if args.size and PHANTOMS[name].body.FIELD is None}
        what = [(name, size, variant) for variant in variants_of(args.variants) for name, size in sizes.items()]
        PhantomParams(size=min(sizes.values()))
        if unknown := set(args.tests) - set(TESTS):
            raise InputError(f"there is no test {', '.join(unknown)}; --help lists them.")
        if min(args.jobs, args.test_scans, *args.train_scans) < 1:
            raise InputError("--jobs, --test_scans and --train_scans must be at least 1.")
    except InputError as e:
        sys.exit(f"error: {e}")
    wanted = [(*w, n, s, t) for s in args.seeds for w in what for n in args.train_scans for t in args.tests]
    measured = rows[rows.test_scans.fillna(args.test_scans) == args.test_scans]
    done = set(measured[tables.KEY].itertuples(index=False, name=None))
    todo = [key for key in wanted if key not in done]
    runner, failed = Runner(args.work.resolve(), args.test_scans, threads_of(args.jobs)), 0
    for folder in {path.parent for root in (args.results.parent, runner.work) for path in root.rglob(".tmp-*")}:
        remove_leftovers(folder)
    exit_on_sigterm()
    with (
        tqdm(total=len(wanted), initial=len(wanted) - len(todo)) as bar,
        closing(run_jobs(runner.row, todo, args.jobs)) as made,
    ):
        for row in made:
            if isinstance(row, Exception):
                failed += 1
                bar.write(f"failed, the others go on: {row}")
                continue
            with locked(Path(f"{args.results}.lock")):  # another sweep may write to it as well
                rows = tables.read_rows(args.results)
                same = (rows[tables.KEY] == [row[name] for name in tables.KEY]).all(axis=1)
                rows = pd.concat([rows[~same], pd.DataFrame([row])], ignore_index=True)
                tables.write_rows(args.results, rows)
                write_text(page, tables.page(rows))
            bar.update()
            bar.write(" ".join(f"{k}={row[k]}" for k in (*tables.KEY, "pointing_game", "average_precision", "mae_events")))
    if failed:
        raise SystemExit(f"error: {failed} of {len(todo)} runs failed; the same command tries them again.")
    if args.pictures:
        runner = Runner(args.work.resolve(), args.test_scans, os.cpu_count() or 1)
        draw_maps(runner.heat_of_one, args.pictures, [(*w, args.train_scans[0], args.seeds[0]) for w in what])


if __name__ == "__main__":
    main()
