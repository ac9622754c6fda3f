# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Three unequal sites that train together, beside all their scans in one place and each site alone: docs/results/federated.md.

Phantoms of bright spheres: site a has 24 scans, site b 24 of another scanner (more noise, other voxels), site c 12. All are
measured on the same unseen scans of both scanners. What is there already is not run again.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from bundle.errors import InputError
from bundle.files import write_json, write_text
from scripts.jobs import markdown, overrides, run_module

FIRST = {"size": 24, "spacing": 3.0, "noise": 0.2}
OTHER = {"size": 20, "spacing": 3.6, "noise": 0.8}  # a scanner with other voxels and four times the noise
SITES = {"a": (24, FIRST), "b": (24, OTHER), "c": (12, FIRST)}
TEST = {"test_first": (32, FIRST), "test_other": (16, OTHER)}
COMMON = {"lung_mask": "none", "margin": 0.0}
WAYS = {"pooled": "all scans in one place", "federated": "federated"} | {name: f"site {name} alone" for name in SITES}
PAGE = """\
# Federated training

Three sites train the network together, as `python -m scripts.federate simulate` runs it by NVIDIA FLARE: a has 24 scans,
b 24 of another scanner (other voxels, four times the noise), c 12. The phantoms are of bright spheres ({phantom}). Beside it:
the same network trained on all scans in one place, and on each site's alone. All are measured on the same {test} unseen
scans, two thirds of the first scanner. A cell is the mean over seeds ({seeds}), with the least and greatest.

    {command}

{table}
The federation is {rounds} rounds of one epoch at each site; the others train {epochs} epochs or, alone, as many steps as all scans
in one place. AP is of the scans with disease. Federated less pooled, seed by seed: C-index {c_index}; AP {ap}.
"""


class Runner:
    """Cohorts, trainings and measurements of one seed, in a folder of its own."""

    def __init__(self, work: Path, phantom: str, seed: int, epochs: int, rounds: int) -> None:
        self.work, self.phantom, self.seed = work / f"{phantom}_{seed}", phantom, seed
        self.epochs, self.rounds = epochs, rounds

    def python(self, *args: str) -> None:
        run_module(*args, log=self.work / "log.txt", threads=1)

    def cohort(self, name: str, num: int, scanner: dict, number: int) -> pd.DataFrame:
        """A site's phantoms, one in six of which validates; paths are absolute."""
        folder = (self.work / "phantoms" / name).resolve()
        where = {"phantom": self.phantom, "num": num, "seed": 100 * self.seed + number, "out": folder}
        self.python("scripts.make_phantoms", *overrides(where | scanner))
        table = pd.read_csv(folder / "cohort.csv")
        for column in {"image", "gt_mask", "confounder_mask"} & set(table.columns):
            table[column] = [str(folder / path) for path in table[column]]
        table["split"] = ["val" if i % 12 in (4, 9) else "train" for i in range(num)]
        return table

    def cohorts(self) -> None:
        """Write the CSV of each site, of all, and of the scans to measure on."""
        found = {}
        for number, (name, (num, scanner)) in enumerate({**SITES, **TEST}.items()):
            found[name] = self.cohort(name, num, scanner, number)
        for name in SITES:
            write_text(self.work / f"{name}.csv", found[name].to_csv(index=False))
        write_text(self.work / "pooled.csv", pd.concat([found[name] for name in SITES]).to_csv(index=False))
        write_text(self.work / "test.csv", pd.concat([found[name].drop(columns="split") for name in TEST]).to_csv(index=False))

    def train(self, way: str) -> Path:
        """Weights by one of the ways."""
        if way == "federated":
            sites = [str(self.work / f"{name}.csv") for name in SITES]
            options = {"out": self.work / way, "rounds": self.rounds, "seed": self.seed, "wait": 600, **COMMON}
            self.python("scripts.federate", "simulate", "--sites", *sites, *overrides(options))
            return self.work / way / "a" / "model.pt"
        share = 1.0 if way == "pooled" else SITES[way][0] / sum(num for num, _ in SITES.values())
        where = {"config_file": "configs/train.json", "cohort": self.work / f"{way}.csv", "ckpt_dir": self.work / way}
        options = {"recipe": "network", "severity": False, "seed": self.seed, "max_epochs": round(self.epochs / share)}
        self.python("monai.bundle", "run", *overrides({**where, **options, **COMMON}))
        return self.work / way / "model.pt"

    def row(self, way: str) -> dict:
        """C-index and AP by one of the ways."""
        kept = self.work / f"{way}.json"
        if not kept.is_file():
            folder = self.work / f"test_{way}"
            words = {"config_file": "configs/evaluate.json", "cohort": self.work / "test.csv", "output_dir": folder}
            self.python("monai.bundle", "run", *overrides({**words, "ckpt": self.train(way), "figures": False}))
            found = json.loads((folder / "metrics.json").read_text())
            scores = {"c_index": found["survival"]["c_index"], "ap": found["localisation"]["average_precision"]}
            write_json(kept, {"way": way, "seed": self.seed, **scores})
        return json.loads(kept.read_text())


def cell(values: pd.Series, sign: str = "") -> str:
    text = f"{values.mean():{sign}.3f}"
    return text if len(values) == 1 else f"{text} ({values.min():{sign}.3f} to {values.max():{sign}.3f})"


def page(rows: pd.DataFrame, args: argparse.Namespace, command: str) -> str:
    lines = []
    for way, title in WAYS.items():
        own = rows[rows.way == way]
        lines.append({"trained on": title, "C-index": cell(own.c_index), "AP": cell(own.ap)})
    of = {way: rows[rows.way == way].set_index("seed") for way in ("pooled", "federated")}
    return PAGE.format(
        phantom=f"`{args.phantom}`",
        test=sum(num for num, _ in TEST.values()),
        seeds=", ".join(map(str, args.seeds)),
        command=command,
        table=markdown(pd.DataFrame(lines)),
        rounds=args.rounds,
        epochs=args.epochs,
        c_index=cell(of["federated"].c_index - of["pooled"].c_index, "+"),
        ap=cell(of["federated"].ap - of["pooled"].ap, "+"),
    )


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m scripts.research.federated", description=__doc__)
    p.add_argument("--phantom", default="spheres", help="which one (default spheres)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="of network and data (default 0)")
    p.add_argument("--epochs", type=int, default=56, help="of pooled training (default 56: 700 steps)")
    p.add_argument("--rounds", type=int, default=60, help="of the federation (default 60)")
    p.add_argument("--work", type=Path, default=Path("runs/federated"), help="phantoms and weights (default %(default)s)")
    p.add_argument("--results", type=Path, default=Path("docs/results/federated.md"), help="page (default %(default)s)")
    args = p.parse_args(argv)
    rows = []
    try:
        for seed in args.seeds:
            runner = Runner(args.work, args.phantom, seed, args.epochs, args.rounds)
            runner.cohorts()
            rows += [runner.row(way) for way in tqdm(WAYS, desc=f"seed {seed}")]
    except (InputError, RuntimeError) as e:
        sys.exit(f"error: {e}")
    command = shlex.join(["python", "-m", "scripts.research.federated", *(sys.argv[1:] if argv is None else argv)])
    write_text(args.results, page(pd.DataFrame(rows), args, command))
    print(args.results)


if __name__ == "__main__":
    main()
