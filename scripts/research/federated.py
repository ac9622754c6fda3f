# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Three unequal sites that train together, beside all their scans in one place and the smallest site alone.

Phantoms: site a has 24 scans, site b 24 of another scanner (more noise, other voxels), site c 12. All models are measured on
the same unseen scans of both scanners. It writes docs/results/federated.md. What is there already is not run again.
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
from scripts.research.peers.page import cell

FIRST = {"size": 24, "spacing": 3.0, "noise": 0.2}
OTHER = {"size": 20, "spacing": 3.6, "noise": 0.8}  # a scanner with other voxels and four times the noise
SITES = {"a": (24, FIRST), "b": (24, OTHER), "c": (12, FIRST)}
TEST = {"test_first": (24, FIRST), "test_other": (12, OTHER)}
COMMON = {"lung_mask": "none", "margin": 0.0, "severity": False}
LOCAL_EPOCHS = 2  # of a round
WAYS = {
    "pooled": "all scans in one place",
    "sited": "all scans in one place, `site` given",
    "federated": "federated",
    "c": "site c alone",
}
RECIPES = {"codebook": list(WAYS), "network": ["pooled", "federated"]}  # a network takes no heed of `site`
AIMS = {"c_index": 0.03, "ap": 0.05}  # a federated result may be less by so much, on average
NAMES = {"c_index": "C-index", "ap": "AP"}
PAGE = """\
# Federated training

Three sites train together, as `python -m scripts.federate simulate` runs it by NVIDIA FLARE: a has 24 scans, b 24 of another
scanner (other voxels, four times the noise), c 12. Beside it: the same training on all scans in one place, and on those of
site c alone. All are measured on the same {test} unseen scans, two thirds of them of the first scanner. They are
phantoms, `{phantom}`, of 20 or 24 voxels a side. A cell is the mean over seeds ({seeds}), with the least and greatest.

    {command}

{table}
A federated network has {rounds} rounds of {local_epochs} epochs at each site; one of all scans has {epochs} epochs. AP is of
the scans with disease. The last column is the difference from all scans in one place, seed by seed.

The aim is a C-index within {c_index} and an AP within {ap} of all scans in one place, on average: {verdict}.

All scans in one place are compared with each other, whatever their hospital. With the column `site` they are compared
within theirs alone, as federated ones always are, and months are fitted to risks of hospitals left out.
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
        """Write the CSV of each site, of all with and without a column `site`, and of the scans to measure on."""
        found = {}
        for number, (name, (num, scanner)) in enumerate({**SITES, **TEST}.items()):
            found[name] = self.cohort(name, num, scanner, number)
        for name in SITES:
            write_text(self.work / f"{name}.csv", found[name].to_csv(index=False))
        sited = pd.concat([found[name].assign(site=name) for name in SITES])
        write_text(self.work / "sited.csv", sited.to_csv(index=False))
        write_text(self.work / "pooled.csv", sited.drop(columns="site").to_csv(index=False))
        test = pd.concat([found[name].drop(columns="split") for name in TEST])
        write_text(self.work / "test.csv", test.to_csv(index=False))

    def train(self, recipe: str, way: str) -> Path:
        """Weights by one of the ways."""
        folder, options = self.work / f"{recipe}_{way}", {"recipe": recipe, "seed": self.seed, **COMMON}
        if way == "federated":
            sites = [str(self.work / f"{name}.csv") for name in SITES]
            words = overrides({"out": folder, "rounds": self.rounds, "local_epochs": LOCAL_EPOCHS, **options})
            self.python("scripts.federate", "simulate", "--sites", *sites, *words)
            return folder / "a" / "model.pt"
        options["max_epochs"] = self.epochs
        where = {"config_file": "configs/train.json", "cohort": self.work / f"{way}.csv", "ckpt_dir": folder}
        self.python("monai.bundle", "run", *overrides(where | options))
        return folder / "model.pt"

    def row(self, recipe: str, way: str) -> dict:
        """C-index and AP by one of the ways."""
        kept = self.work / f"{recipe}_{way}.json"
        if not kept.is_file():
            folder = self.work / f"test_{recipe}_{way}"
            words = {"config_file": "configs/evaluate.json", "cohort": self.work / "test.csv", "output_dir": folder}
            self.python("monai.bundle", "run", *overrides({**words, "ckpt": self.train(recipe, way), "figures": False}))
            found = json.loads((folder / "metrics.json").read_text())
            scores = {"c_index": found["survival"]["c_index"], "ap": found["localisation"]["average_precision"]}
            scores = {name: score["value"] for name, score in scores.items()}
            write_json(kept, {"recipe": recipe, "way": way, "seed": self.seed, **scores})
        return json.loads(kept.read_text())


def page(rows: pd.DataFrame, args: argparse.Namespace, command: str) -> str:
    lines, verdicts = [], []
    scores = rows.set_index(["recipe", "way", "seed"])[list(AIMS)].sort_index()
    for recipe in args.recipes:
        for way in RECIPES[recipe]:
            own = scores.loc[recipe, way]
            gap = own - scores.loc[recipe, "pooled"]
            line = {"recipe": recipe, "trained on": WAYS[way], "C-index": cell(own.c_index, 2), "AP": cell(own.ap, 2)}
            less = "" if way == "pooled" else f"{cell(gap.c_index, 2, '+')}, {cell(gap.ap, 2, '+')}"
            lines.append(line | {"C-index, AP less": less})
            if way == "federated":
                missed = [NAMES[score] for score, most in AIMS.items() if gap[score].mean() < -most]
                verdicts.append(f"{recipe}, {'missed in the ' + ' and '.join(missed) if missed else 'met'}")
    return PAGE.format(
        phantom=args.phantom,
        test=sum(num for num, _ in TEST.values()),
        seeds=", ".join(map(str, args.seeds)),
        command=command,
        table=markdown(pd.DataFrame(lines)),
        rounds=args.rounds,
        local_epochs=LOCAL_EPOCHS,
        epochs=args.epochs,
        **AIMS,
        verdict="; ".join(verdicts),
    )


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m scripts.research.federated", description=__doc__)
    p.add_argument("--phantom", default="spheres-honeycomb", help="which one (default %(default)s)")
    p.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="(default: both)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of network and data (default 0 1 2)")
    p.add_argument("--epochs", type=int, default=40, help="of a network trained in one place (default 40)")
    p.add_argument("--rounds", type=int, default=60, help="of the federation (default 60)")
    p.add_argument("--work", type=Path, default=Path("runs/federated"), help="phantoms and weights (default %(default)s)")
    p.add_argument("--results", type=Path, default=Path("docs/results/federated.md"), help="page (default %(default)s)")
    args = p.parse_args(argv)
    rows = []
    try:
        for seed in args.seeds:
            runner = Runner(args.work, args.phantom, seed, args.epochs, args.rounds)
            runner.cohorts()
            todo = [(recipe, way) for recipe in args.recipes for way in RECIPES[recipe]]
            rows += [runner.row(recipe, way) for recipe, way in tqdm(todo, desc=f"seed {seed}")]
    except (InputError, RuntimeError) as e:
        sys.exit(f"error: {e}")
    command = shlex.join(["python", "-m", "scripts.research.federated", *(sys.argv[1:] if argv is None else argv)])
    write_text(args.results, page(pd.DataFrame(rows), args, command))
    print(args.results)


if __name__ == "__main__":
    main()
