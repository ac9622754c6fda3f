# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Would it be found? A power analysis for maps, on your own scans.

Known disease is put into your scans, and shortens life by as much as you say. A map is learnt from the times alone, once
for each number of patients and each seed, and measured on anatomies that no training saw, where the truth is known.
"""

import argparse
import contextlib
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from bundle.data import read_cohort
from bundle.errors import InputError
from bundle.files import file_sha256, write_json, write_text
from bundle.metrics.survival import c_index
from bundle.phantoms.implants import DISEASES
from bundle.reading.tables import positive, raise_faults, read_table
from bundle.run.settings import differences
from bundle.run.start import exit_on_sigterm, make_folder
from bundle.survival.kaplan_meier import kaplan_meier
from scripts import make_implants
from scripts.cross_validate import CrossValidation, read_config
from scripts.implant_ceiling import mask_ceiling
from scripts.implant_test_report import report
from scripts.jobs import locked, options_of, overrides, run_jobs, run_module, threads_of

CONFIGS = ["configs/train.json", "configs/evaluate.json"]
OWN = ("num", "seed", "test_share", "overwrite", "picture")  # options of make_implants that are set here
STEPS = ("implants", "training", "measuring", "ceiling", "example")  # of a run
EXAMPLE = """\
A run takes what its training takes, ten minutes or so for 120 patients on two cores. The same command goes on where it was
stopped. More --patients or --seeds may be asked for later: what is done is kept. After every run DIR has

  implant_test.html   the answer, the two curves, the numbers, and maps beside the truth
  implant_test.csv    the numbers, a row for each run
  runs/N_seedS/       implants, weights and measurements of N patients; log.txt

example: you have 120 scans of which 60 % are censored, and expect a disease such that a tenth of the lung shortens life to
a quarter (exp(-14 x 0.1) = 0.25). Would a map show where it is, or do you need more patients?

  python -m scripts.implant_test --backgrounds MY.csv --like MY.csv --disease fibrosis --effect 14 --noise 0.35 --out runs/a

--disease --effect --noise and any other option of `python -m scripts.make_implants --help` are those of the implants:
--diseased 0.5 --radius 10 20 --lookalikes none --test_anatomies ID ID. After --, any key of configs/train.json or
configs/evaluate.json may follow: -- --max_epochs 50
"""


def like(path: Path) -> tuple[float, tuple[float, float], int]:
    """Share censored, window of follow-up (months) and number of patients of a table with columns time and event.

    The window reaches from the 5th to the 95th percentile of follow-up by the reverse Kaplan-Meier estimate (Schemper and
    Smith, Controlled Clinical Trials 1996): a death ends the watching of a patient, and a censoring is what is awaited.

    Raises:
        InputError: a column is missing, a value can't be used, or nobody died.
    """
    header, rows = read_table(path)
    raise_faults(path, [f"row 1, column {name}: missing" for name in ("time", "event") if name not in header])
    found = [
        (row.parse("time", positive, "months > 0"), row.parse("event", lambda text: (0, 1).index(float(text)), "1 or 0"))
        for row in rows
        if row.cells
    ]
    raise_faults(path, [fault for row in rows for fault in row.faults])
    time, event = np.array(found, float).reshape(-1, 2).T
    if not event.any():
        raise InputError(f"{path}: nobody died (expected at least one row with event 1).")
    curve = kaplan_meier(time, 1 - event)
    ends = [next((t for t, s in zip(curve.quantiles, curve.probabilities) if s <= 1 - q), time.max()) for q in (0.05, 0.95)]
    return float(1 - event.mean()), (float(ends[0]), float(ends[1])), len(time)


@dataclass(frozen=True)
class ImplantTest:
    """What is asked; and the doing of one run.

    Args:
        out: folder of all that is written.
        words: options of `scripts.make_implants`.
        test_scans: of each run, to measure on.
        training, evaluation: overrides of config keys.
        threads: of a run.
    """

    out: Path
    words: list[str]
    test_scans: int
    training: dict[str, str]
    evaluation: dict[str, str]
    threads: int

    def folder(self, patients: int, seed: int) -> Path:
        return self.out / "runs" / f"{patients}_seed{seed}"

    def implants(self, patients: int, seed: int) -> list[str]:
        """The command line of make_implants."""
        num = patients + self.test_scans
        own = {"num": num, "seed": seed, "test_share": self.test_scans / num, "jobs": self.threads}
        return self.words + overrides(own | {"out": self.folder(patients, seed) / "implants"})

    def claim(self, patients: Sequence[int], seeds: Sequence[int]) -> None:
        """Check all that is asked, and make the folder this test's own.

        Raises:
            InputError: something is at fault, or the folder holds a test of something else.
        """
        args = make_implants.parser().parse_args(self.words)
        defaults = make_implants.parser().parse_args([])
        if given := [f"--{name}" for name in OWN if getattr(args, name) != getattr(defaults, name)]:
            raise InputError(f"{', '.join(given)} can't be given here: this script sets it (see --patients and --seeds).")
        params = make_implants.params_of(args)
        backgrounds = read_cohort(args.backgrounds, need_outcome=False)
        names = [record["patient_id"] for record in backgrounds]
        for key in [(n, seed) for n in patients for seed in seeds]:
            plan = make_implants.plan(names, make_implants.parser().parse_args(self.implants(*key)))
            if {scan["split"] == "test" for scan in plan if scan["diseased"]} != {True, False}:
                raise InputError(
                    f"{args.backgrounds}: {len(names)} anatomies, with these options, leave no diseased scan to learn "
                    "from or none to test on (expected two anatomies, not all in --test_anatomies, and --diseased over 0)."
                )
        settings = {
            "implants": json.loads(json.dumps(asdict(params))) | {"spacing": args.spacing, "val_share": args.val_share},
            "test_anatomies": args.test_anatomies,
            "test_scans": self.test_scans,
            "backgrounds": [[r["patient_id"], r["image"], r.get("lung_mask")] for r in backgrounds],
            "configs": {name: file_sha256(name) for name in CONFIGS},
            "overrides": self.training | self.evaluation,
        }
        path = self.out / "implant_test.json"
        make_folder(str(self.out))
        if path.is_file() and (differ := differences(json.loads(path.read_text()), settings)):
            raise InputError(
                f"{self.out} holds another implant test: {'; '.join(differ)}. Choose another --out, or delete it."
            )
        write_json(path, settings)

    def run(self, patients: int, seed: int, tell: Callable[[str], None]) -> None:
        """Implant, train, measure; `run.json`, the numbers, is written last. `tell` is called before each of STEPS."""
        folder = self.folder(patients, seed)
        with locked(folder / ".run.lock") as lock:
            start = partial(run_module, log=folder / "log.txt", threads=self.threads, lock=lock)
            bundle = partial(start, "monai.bundle", "run")
            implants, example = folder / "implants", folder / "implants" / "example.csv"
            tell("implants")
            start("scripts.make_implants", *self.implants(patients, seed))
            last = json.loads((implants / "implants.json").read_text())["last"]
            test = followed_to_the_end(pd.read_csv(implants / "cohort.csv"), last)
            write_text(implants / "test.csv", test.to_csv(index=False))
            tell("training")
            train = {"config_file": CONFIGS[0], "cohort": implants / "cohort.csv", "seed": seed}
            train |= {"ckpt_dir": folder / "train", "cache_dir": folder / "cache", **self.training}
            bundle(*overrides(train))
            tell("measuring")
            measure = {"config_file": CONFIGS[1], "ckpt": folder / "train" / "model.pt", "cohort": implants / "test.csv"}
            bundle(*overrides({**measure, "output_dir": folder / "test", "figures": "false", **self.evaluation}))
            tell("ceiling")
            ceiling = mask_ceiling(implants / "cohort.csv", seed)
            tell("example")
            middle = middle_scan(folder / "test")
            write_text(example, test[test.patient_id == middle].to_csv(index=False))
            predict = {"config_file": "configs/inference.json", "cohort": example, "output_dir": folder / "example"}
            bundle(*overrides(measure | predict))
            row = {"patients": patients, "seed": seed, **numbers(folder), "ceiling": ceiling, "example": middle}
            write_json(folder / "run.json", row)
            shutil.rmtree(folder / "cache", ignore_errors=True)

    def rows(self) -> pd.DataFrame:
        """Numbers of the runs that are done."""
        rows = pd.DataFrame([json.loads(path.read_text()) for path in self.out.glob("runs/*/run.json")])
        return rows.sort_values(["patients", "seed"], ignore_index=True) if len(rows) else rows


def followed_to_the_end(cohort: pd.DataFrame, last: float) -> pd.DataFrame:
    """The test scans, nobody lost before month `last`: few deaths there would only blur what was learnt."""
    test = cohort[cohort.split == "test"]
    return test.assign(time=np.minimum(test.true_time, last), event=(test.true_time <= last).astype(int))


def middle_scan(measured: Path) -> str:
    """The scan whose map is neither among the better half nor among the worse."""
    scans = pd.read_csv(measured / "metrics_per_scan.csv").dropna(subset="average_precision")
    if scans.empty:
        raise InputError("no test scan has a voxel of disease (expected larger lesions, a smaller spacing or more scans).")
    return scans.sort_values("average_precision").patient_id.iloc[len(scans) // 2]


def numbers(folder: Path) -> dict[str, float | int]:
    """What a run was measured to be, and what is possible there."""
    cohort, test = (pd.read_csv(folder / "implants" / name) for name in ("cohort.csv", "test.csv"))
    metrics, settings = (json.loads((folder / name).read_text()) for name in ("test/metrics.json", "train/settings.json"))
    share, time, event = (torch.tensor(test[name].to_numpy()) for name in ("share", "time", "event"))
    learnt_from = cohort[cohort.split != "test"]
    maps = {name: metrics["localisation"][name]["value"] for name in ("average_precision", "pointing_game")}
    return {
        "deaths": int(learnt_from.event.sum()),
        "most_a_chest": int(learnt_from.site.value_counts().max()),
        "test_scans": len(test),
        "test_anatomies": ", ".join(sorted(set(test.anatomy.astype(str)))),
        "c_index": metrics["survival"]["c_index"]["value"],
        "c_index_oracle": c_index(share, time, event),
        **maps,
        "learnt": settings["learnt"]["verdict"],
        "base_rate": float(test.share[test.share > 0].mean()),
    }


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m scripts.implant_test",
        usage="%(prog)s --backgrounds MY.csv --out DIR [options] [options of make_implants] [-- --key value ...]",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--backgrounds", required=True, metavar="CSV", help="your scans: patient_id, image, and lung_mask if any")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of all that is written")
    p.add_argument("--patients", type=int, nargs="+", metavar="N", help="to learn from (default 60 120 300; see --like)")
    p.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="S", help="of all that is drawn (default 0 1 2)"
    )
    p.add_argument("--disease", default="fibrosis", choices=list(DISEASES), help="what kills (default fibrosis)")
    p.add_argument("--censored", type=float, metavar="SHARE", help="of the patients (default: half or so, by follow-up)")
    p.add_argument(
        "--like",
        type=Path,
        metavar="CSV",
        help="a cohort's times and events: its share censored and its follow-up are used, stretched to the months of the "
        "implants, and --patients are half of its patients, as many, and twice as many",
    )
    p.add_argument("--test_scans", type=int, default=40, metavar="N", help="of each run, to measure on (default 40)")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default 1)")
    return p


def prepare(words: Sequence[str]) -> tuple[ImplantTest, list[tuple[int, int]], int]:
    """What a command line asks: the test, its numbers of patients and seeds, and the jobs."""
    cut = words.index("--") if "--" in words else len(words)
    args, rest = parser().parse_known_args(words[:cut])
    implants, patients = ["--backgrounds", args.backgrounds, "--disease", args.disease], [60, 120, 300]
    if args.like:
        share, window, count = like(args.like)
        implants += ["--censoring", f"{share:.6g}", "--censoring_window", *map(str, window)]
        patients = [max(2, count // 2), count, 2 * count]
    if args.censored is not None:
        implants += ["--censoring", str(args.censored)]
    patients = args.patients or patients
    if min(args.jobs, args.test_scans) < 1 or min(patients) < 4 or min(args.seeds) < 0:
        raise InputError("--jobs and --test_scans must be at least 1, --patients at least 4, and --seeds from 0 up.")
    options = options_of(words[cut + 1 :])
    training = CrossValidation.training_options(read_config(CONFIGS[:1]), options)
    evaluation = {key: value for key, value in options.items() if key not in training}
    test = ImplantTest(args.out, implants + rest, args.test_scans, training, evaluation, threads_of(args.jobs))
    seeds = list(dict.fromkeys(args.seeds))
    patients = sorted(set(patients))
    test.claim(patients, seeds)
    return test, [(n, seed) for seed in seeds for n in patients], args.jobs


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        test, wanted, jobs = prepare(words)
    except InputError as e:
        raise SystemExit(f"error: {e}") from None
    command = shlex.join(["python", "-m", "scripts.implant_test", *words])
    todo = [key for key in wanted if not (test.folder(*key) / "run.json").is_file()]
    failed, steps = 0, len(STEPS)
    with tqdm(total=steps * len(wanted), initial=steps * (len(wanted) - len(todo)), desc="would it be found?") as bar:

        def run(patients: int, seed: int) -> None:
            def tell(step: str) -> None:
                bar.set_postfix_str(f"{patients} patients, seed {seed}: {step}")
                bar.update(step != STEPS[0])

            test.run(patients, seed, tell)
            bar.update()

        with contextlib.closing(run_jobs(run, todo, jobs)) as results:
            for result in results:
                if isinstance(result, Exception):
                    failed += 1
                    bar.write(f"failed, the others go on: {result}", file=sys.stderr)
                elif len(rows := test.rows()):
                    report(test.out, rows, len(wanted), command)
    if failed:
        raise SystemExit(f"error: {failed} of {len(todo)} runs failed; the same command tries them again.")
    print("\n".join(report(test.out, test.rows(), len(wanted), command)))
    print(test.out / "implant_test.html")


if __name__ == "__main__":
    exit_on_sigterm()
    main()
