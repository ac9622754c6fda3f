# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Train and measure many configurations on phantoms: complexities x variants x seeds, one row each in a tidy CSV.

Every run goes through `monai.bundle run` with the shipped configs: phantoms of the seed to train on, phantoms of another
seed to measure on. A row is written when its run is complete, so a sweep that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from bundle.metrics.survival import c_index

KEY = ["complexity", "variant", "train_scans", "seed"]
SURVIVAL = ["c_index", "mae_events", "correlation", "mean_time_censored"]
MAP = [
    "pointing_game",
    "average_precision",
    "average_precision_ceiling",
    "mass_accuracy",
    "confounder_mass",
    "survivor_heat",
    "inverted",
]
COLUMNS = [*KEY, "overrides", "test_scans", "train_seconds", *MAP, *SURVIVAL, "c_index_oracle"]
HELD_OUT = 1000  # added to the seed of the phantoms to measure on

# What differs from the shipped configuration, by name of the variant.
VARIANTS: dict[str, dict] = {
    "default": {},
    "softmin": {"network_def#head": "softmin"},
    "no_window": {"network_def#window": 1},
    "window_4": {"network_def#window": 4},
    "global": {"network_def#window": 0, "network_def#patch_size": 8},
    "film_context": {"network_def#film_context": True},
    "no_entropy": {"loss#entropy": 0.0},
    "no_smoothness": {"loss#smoothness": 0.0},
    "no_anneal": {"train#handlers#1#vc_kwargs#start": 1.0},
    "severity": {"network_def#severity": True},
    "no_range": {"network_def#loc_range": None},
    "no_shift": {"train#random_transforms#0#prob": 0.0},
    "patch_8": {"network_def#patch_size": 8},
}


def python(*args: str, log: Path) -> None:
    """Run a module of this repository; a failure shows the end of its log."""
    with open(log, "a") as f:
        done = subprocess.run([sys.executable, "-m", *args], stdout=f, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(args)} failed:\n{log.read_text()[-2000:]}")


def one_run(complexity: int, variant: str, train_scans: int, seed: int, args: argparse.Namespace) -> dict:
    """Phantoms, training, evaluation of one configuration; returns its row."""
    overrides = VARIANTS[variant]
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        log = work / "log.txt"
        size = ["--size", "96"] if complexity == 9 else []
        for name, num, offset in (("train", train_scans, 0), ("test", args.test_scans, HELD_OUT)):
            what = ["--complexity", str(complexity), "--num", str(num), "--seed", str(seed + offset)]
            python("scripts.make_phantoms", *what, *size, "--out", str(work / name), log=log)
        config = ["configs/train.json"] + ([] if complexity == 9 else ["configs/cohort/phantom.json"])
        start = time.time()
        python(
            *("monai.bundle", "run", "--config_file", str(config), "--cohort", str(work / "train" / "cohort.csv")),
            *("--ckpt_dir", str(work / "run"), "--output_dir", str(work / "run"), "--seed", str(seed)),
            *(text for key, value in overrides.items() for text in (f"--{key}", str(value))),
            log=log,
        )
        seconds = time.time() - start
        python(
            *("monai.bundle", "run", "--config_file", "configs/evaluate.json"),
            *("--cohort", str(work / "test" / "cohort.csv"), "--ckpt", str(work / "run" / "model.pt")),
            *("--output_dir", str(work / "eval")),
            log=log,
        )
        found = json.loads((work / "eval" / "metrics.json").read_text())
        scans = pd.read_csv(work / "eval" / "metrics_per_scan.csv")
        cohort = pd.read_csv(work / "test" / "cohort.csv")
    values = {**found["survival"], **found["localisation"]}
    row = {"complexity": complexity, "variant": variant, "train_scans": train_scans, "seed": seed}
    row |= {"overrides": json.dumps(overrides), "test_scans": len(cohort), "train_seconds": round(seconds)}
    row |= {name: values[name]["value"] for name in MAP + SURVIVAL if name in values}
    row["inverted"] = int((scans.auroc < 0.5).sum())  # a map that ranks its lesion below the rest
    if "true_risk" in cohort:
        row["c_index_oracle"] = c_index(*(torch.tensor(cohort[k]) for k in ("true_risk", "time", "event")))
    return row


def read_rows(path: Path) -> list[dict]:
    return list(csv.DictReader(path.open())) if path.is_file() else []


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write the whole table to a temporary name, then rename."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=lambda r: (int(r["complexity"]), r["variant"], int(r["train_scans"]), int(r["seed"]))):
        writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text.getvalue())
    os.replace(temporary, path)


def markdown(rows: list[dict]) -> str:
    """Mean (min - max) over seeds of every measure, a line for each complexity and variant."""
    table = pd.DataFrame(rows)
    table = table.reindex(columns=COLUMNS)
    text = ["variant", "overrides"]
    table[table.columns.difference(text)] = table[table.columns.difference(text)].apply(pd.to_numeric)
    names = {"pointing_game": "pointing", "average_precision": "AP", "average_precision_ceiling": "AP ceiling"}
    names |= {"mass_accuracy": "heat in mask", "confounder_mass": "heat in confounder", "survivor_heat": "survivors / dead"}
    names |= {"inverted": "inverted maps", "c_index": "C-index", "c_index_oracle": "of the oracle", "mae_events": "MAE events, months"}
    names |= {"correlation": "correlation", "mean_time_censored": "mean time of censored", "train_seconds": "training, s"}
    lines = ["| phantom | variant | scans | seeds | " + " | ".join(names.values()) + " |", "|" + "---|" * (len(names) + 4)]
    for (complexity, variant, scans), group in table.groupby(KEY[:3]):
        cells = []
        for name in names:
            values = group[name].dropna()
            if not len(values):
                cells.append("–")
                continue
            digits = 0 if name in ("train_seconds", "mean_time_censored", "inverted") else 2 if name == "mae_events" else 3
            spread = f" ({values.min():.{digits}f}–{values.max():.{digits}f})" if len(values) > 1 else ""
            cells.append(f"{values.sum() if name == 'inverted' else values.mean():.{digits}f}{spread}")
        lines.append(f"| {complexity} | {variant} | {scans} | {len(group)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def renew_table(page: Path, rows: list[dict]) -> None:
    """Put the table between the two marks of the page, under a temporary name, then rename."""
    before, mark, rest = page.read_text().partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end of table -->\n")
    if not (mark and end):
        raise SystemExit(f"error: {page} lacks the marks <!-- table --> and <!-- end of table -->.")
    temporary = page.with_name(f".{page.name}.tmp")
    temporary.write_text(before + mark + markdown(rows) + end + after)
    os.replace(temporary, page)


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m scripts.sweep",
        description=__doc__,
        epilog="variants: "
        + "; ".join(f"{k} {' '.join(f'--{a} {b}' for a, b in v.items()) or '(as shipped)'}" for k, v in VARIANTS.items()),
    )
    p.add_argument("--complexities", type=int, nargs="+", default=[1, 2], help="phantoms (default 1 2)")
    p.add_argument("--variants", nargs="+", default=["default"], choices=VARIANTS, help="see below (default: default)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of network and data (default 0 1 2)")
    p.add_argument("--train_scans", type=int, default=96, help="scans a run, training and validation (default 96)")
    p.add_argument("--test_scans", type=int, default=32, help="held-out scans a run (default 32)")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1; a run uses all cores)")
    p.add_argument("--results", type=Path, default=Path("docs/results/localisation.csv"), help="the tidy CSV")
    p.add_argument("--work", type=Path, default=None, help="folder for temporary files")
    p.add_argument("--page", type=Path, default=Path("docs/localisation.md"), help="page whose table is renewed")
    p.add_argument("--table", action="store_true", help="renew the table and run nothing")
    args = p.parse_args()
    rows = read_rows(args.results)
    if args.table:
        renew_table(args.page, rows)
        return
    done = {tuple(str(row[k]) for k in KEY) for row in rows}
    wanted = [(c, v, args.train_scans, s) for s in args.seeds for v in args.variants for c in args.complexities]
    todo = [key for key in wanted if tuple(map(str, key)) not in done]
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(wanted), initial=len(wanted) - len(todo)) as bar:
        futures = [pool.submit(one_run, *key, args) for key in todo]
        for future in as_completed(futures):
            row = future.result()
            rows.append(row)
            write_rows(args.results, rows)
            bar.update()
            bar.write(" ".join(f"{k}={row[k]}" for k in (*KEY, "pointing_game", "average_precision", "mae_events")))
            renew_table(args.page, rows)


if __name__ == "__main__":
    main()
