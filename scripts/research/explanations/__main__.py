# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Train small networks on phantoms and implants, and measure every explanation of them by the same numbers.

A result is kept for each cohort and seed: a command that was stopped goes on where it was.
"""

import argparse
import contextlib
import json
import logging
import shutil
import sys
from pathlib import Path

import monai.bundle
import numpy as np
import torch
from tqdm import tqdm

from bundle.errors import InputError, input_error_of
from bundle.files import write_atomically, write_json
from bundle.phantoms import PHANTOMS, PhantomParams, phantom_name
from bundle.phantoms.implants import DISEASES
from bundle.run import TrainedModel
from bundle.run.start import exit_on_sigterm
from scripts import make_implants, make_phantoms
from scripts.research.explanations.measure import diseased, measure
from scripts.research.explanations.page import around, write_results
from scripts.research.sweep import HELD_OUT, Runner

USUAL = [name for name, kind in PHANTOMS.items() if not kind.drawn_outcome] + ["fibrosis", "nodules", "ground_glass"]
NOISE = 0.05  # of implants' log months, a seventh of the usual: so few scans teach nothing else
CHEST = 2  # times as many voxels a side as other phantoms: its lungs are a part of it
CHECKED = ["central-sphere", "spheres", "fibrosis"]
SETTINGS = ("checked", "size", "train_scans", "epochs", "implant_scans", "spacing", "test_anatomies", "test_scans")


class Work:
    """Cohorts, trainings and results in a folder; what is there is not made again."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out = args.out.absolute()
        record, wanted = self.out / "explanations.json", {name: getattr(args, name) for name in SETTINGS}
        if record.is_file() and (found := json.loads(record.read_text())) != wanted:
            changed = ", ".join(key for key in wanted if found.get(key) != wanted[key])
            raise InputError(f"{args.out} holds results of other {changed}; choose another --out.")
        self.out.mkdir(parents=True, exist_ok=True)
        write_json(record, wanted)

    def cohort(self, name: str, seed: int, test: bool) -> Path:
        """The table of a cohort to train on, or of scans to measure on, which are those of all seeds."""
        args, part = self.args, "test" if test else seed
        folder, seed = self.out / "cohorts" / f"{name}_{part}", HELD_OUT if test else seed
        if (folder / "cohort.csv").is_file():  # written last
            return folder / "cohort.csv"
        words = {"seed": seed, "out": folder}
        if name not in PHANTOMS:
            num = 2 * args.test_scans + 1 if test else args.implant_scans  # seven of ten are diseased
            words |= {"backgrounds": args.backgrounds, "disease": name, "num": num, "spacing": args.spacing}
            words |= {"noise": NOISE}
            words |= {"test_share": (num - 1) / num if test else 0}
            anatomies = ["--test_anatomies", *args.test_anatomies]
            make_implants.main([str(w) for key, value in words.items() for w in (f"--{key}", value)] + anatomies)
        else:
            num = 2 * args.test_scans if test else args.train_scans  # every second one is diseased
            words |= {"phantom": name, "num": num, "size": args.size * (CHEST if name == "chest" else 1)}
            make_phantoms.main([str(w) for key, value in words.items() for w in (f"--{key}", value)])
        return folder / "cohort.csv"

    def train(self, name: str, seed: int, shuffle: bool) -> TrainedModel:
        """The weights of a cohort and seed, of its own outcomes or of shuffled ones; a stopped training goes on."""
        cohort, runs = self.cohort(name, seed, test=False), self.out / "runs" / f"{name}_{seed}"
        folder = runs / ("shuffled" if shuffle else "trained")
        if not (folder / "done").is_file():
            table = cohort.parent / f"split{'_shuffled' * shuffle}.csv"
            Runner.split(cohort, table, seed if shuffle else None)
            where = {"cohort": str(table), "ckpt_dir": str(folder), "output_dir": str(folder), "seed": seed}
            where |= {"cache_dir": str(runs / "cache"), "severity": False}  # maps don't need it
            config = ["configs/train.json"]
            if name not in PHANTOMS:
                where |= {"recipe": "codebook", "spacing": [self.args.spacing] * 3}
            else:
                where |= {"recipe": "network", "max_epochs": self.args.epochs}
                mm = PHANTOMS[name].body.FIELD
                where |= {"spacing": [mm / self.args.size / CHEST] * 3} if mm else {}
                config += [] if mm else ["configs/cohort/phantom.json"]
            monai.bundle.run(config_file=config, **where)
            (folder / "done").touch()
        model = TrainedModel(str(folder / "model.pt"))
        model.network.eval().requires_grad_(False)
        return model

    def files(self, name: str, seed: int) -> tuple[Path, Path]:
        """Rows, written last, and maps."""
        file = self.out / "results" / f"{name}_{seed}.json"
        return file, file.with_suffix(".npz")

    def measure(self, name: str, seed: int) -> None:
        """Train, measure, and write the result; what others print goes to a log."""
        log = self.out / "logs" / f"{name}_{seed}.txt"
        log.parent.mkdir(exist_ok=True)
        with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            model = self.train(name, seed, shuffle=False)
            shuffled = self.train(name, seed, shuffle=True) if seed == 0 and name in self.args.checked else None
            scans = diseased(self.cohort(name, seed, test=True), self.args.test_scans, model.preprocessing["hu_window"])
            rows, kept = measure(model, shuffled, scans)
        rows = [{"cohort": name, "seed": seed, "scans": len(scans), **row} for row in rows]
        record, maps = self.files(name, seed)
        record.parent.mkdir(exist_ok=True)
        write_atomically(maps, lambda path: np.savez_compressed(open(path, "wb"), **kept))
        write_json(record, rows)
        shutil.rmtree(self.out / "runs" / f"{name}_{seed}" / "cache", ignore_errors=True)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m scripts.research.explanations", description=__doc__)
    p.add_argument("--cohorts", nargs="+", default=USUAL, metavar="NAME", help=f"phantoms, diseases ({' '.join(USUAL)})")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="of data and networks (0 1 2)")
    what = f"cohorts of which seed 0 is seen with random weights, random labels and moved ({' '.join(CHECKED)})"
    p.add_argument("--checked", nargs="*", default=CHECKED, metavar="NAME", help=what)
    p.add_argument("--size", type=int, default=24, help="voxels a side of phantoms, half those of chest (default 24)")
    p.add_argument("--train_scans", type=int, default=40, help="phantoms a training (default 40)")
    p.add_argument("--epochs", type=int, default=16, help="of a training on phantoms (default 16)")
    p.add_argument("--implant_scans", type=int, default=48, help="implants a training (default 48)")
    p.add_argument("--spacing", type=float, default=5.0, help="mm, of implants (default 5)")
    p.add_argument("--backgrounds", type=Path, default=Path("demo/anatomies.csv"), metavar="CSV", help="of implants")
    p.add_argument("--test_anatomies", nargs="+", default=["lidc-idri_0002", "lidc-idri_0350"], metavar="ID")
    p.add_argument("--test_scans", type=int, default=2, help="diseased scans to measure on (default 2)")
    p.add_argument("--out", type=Path, default=Path("runs/explanations"), help="work folder (default %(default)s)")
    p.add_argument("--table", type=Path, default=Path("docs/results/explanations.csv"), help="default %(default)s")
    p.add_argument("--page", type=Path, default=Path("docs/explanations.md"), help="its tables are replaced; with a .png")
    p.add_argument("--draw", action="store_true", help="write the table, the page and its picture of what is there, no more")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        names = [name if name in DISEASES and name not in PHANTOMS else phantom_name(name) for name in args.cohorts]
        PhantomParams(size=args.size)
        if min(args.train_scans, args.epochs, args.implant_scans, args.test_scans) < 1:
            raise InputError("numbers of scans and epochs must be at least 1.")
        around(args.page)  # now, not after hours
        work = Work(args)
    except InputError as e:
        sys.exit(f"error: {e}")
    exit_on_sigterm()
    torch.set_flush_denormal(True)
    for name in ("scripts", "workflows"):  # whose summaries would tear the progress bar
        logging.getLogger(f"monai.bundle.{name}").setLevel(logging.ERROR)
    wanted, failed = [(name, seed) for seed in args.seeds for name in names], 0
    done = [key for key in wanted if work.files(*key)[0].is_file()]
    with tqdm(total=len(wanted), initial=len(done), desc="explanations", unit="network") as bar:
        for key in wanted:
            if key in done or args.draw:
                continue
            bar.set_postfix_str(f"{key[0]}, seed {key[1]}")
            try:
                work.measure(*key)
            except Exception as e:  # one cohort's failure must not end the others
                failed += 1
                bar.write(f"failed, the others go on: {key[0]}, seed {key[1]}: {input_error_of(e) or e!r}", file=sys.stderr)
                continue
            done.append(key)
            bar.update()
    if done:
        write_results(args.table, args.page, [work.files(*key) for key in wanted if key in done])
    if failed:
        sys.exit(f"error: {failed} of {len(wanted)} networks are missing; the same command tries them again.")


if __name__ == "__main__":
    main()
