# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Measure Survival Map and its peers on real chests with implanted disease: a page, and a picture.

A result is kept for each disease, seed, number of scans and method: a command that was stopped goes on where it was. To
measure one again, delete its file in OUT/results.
"""

import argparse
import importlib
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from bundle.data import read_cohort
from bundle.errors import InputError
from bundle.files import write_atomically, write_json, write_text
from bundle.phantoms.implants import DISEASES
from scripts import make_implants
from scripts.jobs import cpu_seconds, version_of
from scripts.research.peers import ours
from scripts.research.peers.cohort import Cohort
from scripts.research.peers.measure import measure
from scripts.research.peers.page import draw, page

METHODS = ("ours", "codebooks", "ridge", "resnet", "attention", "density", "masked", "ceiling")
KEY = ("disease", "seed", "num", "method")


def module_of(method: str) -> ModuleType:
    return importlib.import_module(f"scripts.research.peers.{method}")


def merge(tables: list[Path], out: Path) -> Path:
    """One table of the backgrounds of all."""
    keys = ("patient_id", "image", "lung_mask")
    rows = [{k: r[k] for k in keys if k in r} for table in tables for r in read_cohort(table, need_outcome=False)]
    path = out / "backgrounds.csv"
    write_text(path, pd.DataFrame(rows).to_csv(index=False))
    read_cohort(path, need_outcome=False)  # names that come twice
    return path


def check(args: argparse.Namespace, anatomies: list[str]) -> int:
    """Results of one folder are of the same scans; how many a cohort has to train on: the most that were ever asked for.

    Raises:
        InputError: they aren't, or cohorts would have to grow.
    """
    record = args.out / "peers.json"
    wanted = {"backgrounds": anatomies, "test_anatomies": args.test_anatomies, "test_scans": args.test_scans}
    found = json.loads(record.read_text()) if record.is_file() else {**wanted, "num": max(args.num)}
    changed = [key for key in wanted if found.get(key) != wanted[key]] + ["num"] * (found["num"] < max(args.num))
    if changed:
        raise InputError(f"{args.out} holds results of other {', '.join(changed)}; choose another --out.")
    write_json(record, found)
    return found["num"]


def cohort_of(args: argparse.Namespace, backgrounds: Path, most: int, disease: str, seed: int, num: int) -> Cohort:
    """Make the implants and their tokens, unless they are there; a smaller cohort is the first scans of the largest."""
    folder, scans = args.out / "cohorts" / f"{disease}_{seed}", most + args.test_scans
    words = ["--backgrounds", backgrounds, "--disease", disease, "--seed", seed, "--num", scans, "--out", folder]
    words += ["--test_share", args.test_scans / scans, "--jobs", args.jobs]
    words += ["--test_anatomies", *args.test_anatomies]
    make_implants.main([str(word) for word in words])
    cohort = Cohort(folder / "cohort.csv", num)
    cohort.describe(args.jobs)
    return cohort


def measure_one(out: Path, cohort: Cohort, key: dict) -> dict:
    """Fit and measure a method; its result and the planes of the picture are written."""
    torch.manual_seed(key["seed"])
    start = cpu_seconds()
    predict = module_of(key["method"]).fit(cohort, key["seed"])
    fitted = cpu_seconds()
    found, planes = measure(cohort, predict)
    if key["method"] == "ours":
        found["learnt"] = ours.verdict_of(cohort)
    code = version_of("bundle", "configs", "scripts/research/peers", but="scripts/research/peers/page.py")
    row = {**key, "code": code, **found, "fit_seconds": fitted - start, "test_seconds": cpu_seconds() - fitted}
    name = "_".join(str(key[k]) for k in KEY)
    (out / "results").mkdir(exist_ok=True)
    if planes:
        write_atomically(out / "results" / f"{name}.npz", lambda path: np.savez_compressed(open(path, "wb"), **planes))
    write_json(out / "results" / f"{name}.json", row)
    return row


def results(out: Path, wanted: list[dict]) -> list[dict]:
    """What was measured of what is wanted, in that order."""
    files = [out / "results" / ("_".join(str(key[k]) for k in KEY) + ".json") for key in wanted]
    return [json.loads(file.read_text()) for file in files if file.is_file()]


def write_page(args: argparse.Namespace, wanted: list[dict], command: str) -> None:
    rows, titles = results(args.out, wanted), {method: module_of(method).TITLE for method in args.methods}
    if not rows:
        return
    write_text(args.page, page(pd.DataFrame(rows), titles, command, args.test_anatomies))
    planes: dict[str, dict[str, Path]] = {}
    for row in rows:
        file = args.out / "results" / ("_".join(str(row[k]) for k in KEY) + ".npz")
        if (row["seed"], row["num"]) == (args.seeds[0], args.num[0]) and file.is_file():
            planes.setdefault(row["disease"], {})[row["method"]] = file
    if planes:
        draw(args.page.with_suffix(".png"), planes, titles)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m scripts.research.peers", description=__doc__)
    several = {"nargs": "+", "metavar": "N", "type": int}
    p.add_argument("--diseases", nargs="+", default=["fibrosis", "nodules", "ground_glass"], choices=list(DISEASES))
    p.add_argument("--seeds", default=[0, 1, 2], **several, help="of cohorts and methods (default 0 1 2)")
    p.add_argument("--num", default=[120], **several, help="training scans (default 120)")
    p.add_argument("--test_scans", type=int, default=40, help="scans to measure on (default 40)")
    p.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="default: all")
    p.add_argument("--backgrounds", nargs="+", type=Path, default=[Path("demo/anatomies.csv")], metavar="CSV")
    p.add_argument("--test_anatomies", nargs="+", default=["lidc-idri_0002", "lidc-idri_0350"], metavar="ID")
    p.add_argument("--jobs", type=int, default=1, help="processes that make scans (default 1)")
    p.add_argument("--out", type=Path, default=Path("runs/peers"), help="work folder (default %(default)s)")
    p.add_argument("--page", type=Path, default=Path("docs/results/peers.md"), help="default %(default)s; beside it a .png")
    return p


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(words)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        backgrounds = merge(args.backgrounds, args.out)
        most = check(args, sorted(record["patient_id"] for record in read_cohort(backgrounds, need_outcome=False)))
    except InputError as e:
        sys.exit(f"error: {e}")
    command, failed = shlex.join(["python", "-m", "scripts.research.peers", *words]), 0
    cohorts = [(disease, seed, num) for num in args.num for disease in args.diseases for seed in args.seeds]
    wanted = [dict(zip(KEY, (*cohort, method))) for cohort in cohorts for method in args.methods]
    with tqdm(total=len(wanted), initial=len(results(args.out, wanted)), desc="peers", unit="result") as bar:
        for which in cohorts:
            todo = [key for key in wanted if tuple(key.values())[:3] == which and not results(args.out, [key])]
            cohort = cohort_of(args, backgrounds, most, *which) if todo else None
            for key in todo:
                bar.set_postfix_str(" ".join(map(str, key.values())))
                try:
                    row = measure_one(args.out, cohort, key)
                except RuntimeError as e:
                    failed += 1
                    bar.write(f"failed, the others go on: {' '.join(map(str, key.values()))}: {e}", file=sys.stderr)
                    continue
                bar.update()
                bar.write(" ".join(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
                write_page(args, wanted, command)
    write_page(args, wanted, command)
    if failed:
        sys.exit(f"error: {failed} of {len(wanted)} results are missing; the same command tries them again.")


if __name__ == "__main__":
    main()
