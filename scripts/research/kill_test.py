# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Kill training, preprocessing, inference and a sweep at random moments, start them again, compare with a run left alone.

Each job runs as a fork of this process, which has the imports done: once uninterrupted, and then killed by SIGKILL after a
random time, or as it flushes or renames its n-th file; it alone, or with its children. It is started again, and killed
again, until it is left to end. A kill counts as passed when the files that the job leaves have the same SHA-256 as those
of the uninterrupted run.
"""

import argparse
import itertools
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the same everywhere, before torch looks

import monai.bundle  # noqa: E402, F401  what the jobs import, so that their forks needn't
import pandas as pd  # noqa: E402

import bundle.run  # noqa: E402, F401
from bundle.data.fingerprint import describe  # noqa: E402
from bundle.files import file_sha256, load_checked  # noqa: E402
from scripts import make_phantoms, preprocess  # noqa: E402, F401
from scripts.jobs import overrides  # noqa: E402
from scripts.research import sweep  # noqa: E402, F401

TRAIN = ["configs/train.json", "configs/cohort/phantom.json"]
TINY = {"network_def#dim": 16, "max_epochs": 4, "val_interval": 1}
KILLS_A_RUN = 3


@dataclass
class Job:
    """What is killed: arguments of `python -m` that write into a folder, and the files to compare."""

    name: str
    arguments: Callable[[Path], list[str]]
    files: tuple[str, ...]

    def found(self, folder: Path) -> dict[str, str]:
        """SHA-256 of each file that the job left, what `last.pt` holds; temporary files that are left count as well."""
        paths = {p for pattern in (*self.files, "**/.tmp-*") for p in folder.glob(pattern)}
        return {str(p.relative_to(folder)): digest(p) for p in sorted(paths)}

    def run(self, folder: Path) -> None:
        module, *arguments = self.arguments(folder)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def digest(path: Path) -> str:
    """SHA-256 of a file; of `last.pt` what it holds to the last bit, as pickle writes equal content in several ways."""
    if path.name == "results.csv":  # of the sweep
        return pd.read_csv(path).drop(columns="train_seconds").to_csv()
    return str(describe(load_checked(path))) if path.name == "last.pt" else file_sha256(path)


class Attempt:
    """A fork that does a job.

    Args:
        step: flush or rename of a file (1, 2, ...) before which it kills itself and its children; 0 for none.
    """

    def __init__(self, job: Job, folder: Path, log: Path, step: int = 0) -> None:
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setsid()
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if step:
                self.die_at(step)
            job.run(folder)
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    @staticmethod
    def die_at(step: int) -> None:
        steps = itertools.count(1)

        def counted(function: Callable) -> Callable:
            def call(*args, **kwargs):
                if next(steps) == step:
                    os.killpg(0, signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        os.fsync, os.replace = counted(os.fsync), counted(os.replace)

    def kill(self, after: float, children: bool) -> None:
        """Kill it in so many seconds, unless it has ended by then."""
        end = time.monotonic() + after
        while time.monotonic() < end:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(0.005)
        (os.killpg if children else os.kill)(self.pid, signal.SIGKILL)

    def end(self) -> int:
        """Its exit code when it has ended; negative for a signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def jobs(work: Path) -> list[Job]:
    """The jobs, and what they need: a cohort, and weights that the first one makes."""
    cohort, first = work / "phantoms" / "cohort.csv", work / "alone" / "training"
    bundle_run = ["monai.bundle", "run"]

    def train(folder: Path, *objective: str, **options: int) -> list[str]:
        where = {"config_file": [*TRAIN, *objective], "cohort": cohort, "ckpt_dir": folder, "output_dir": folder}
        return bundle_run + overrides({**where, **TINY, **options})

    def train_cox(folder: Path) -> list[str]:
        return train(folder, "configs/objective/cox_memory.json", num_workers=1, patience=2)

    def prepare(folder: Path) -> list[str]:
        where = overrides({"cohort": cohort, "cache_dir": folder, "jobs": 2})
        return ["scripts.preprocess", *where, "--config_file", *TRAIN]

    def infer(folder: Path, **options: object) -> list[str]:
        where = {"cohort": cohort, "ckpt": first / "model.pt", "output_dir": folder}
        return bundle_run + overrides({"config_file": "configs/inference.json", **where, **options})

    def swept(folder: Path) -> list[str]:
        what = {"phantoms": 2, "size": 16, "variants": "epochs_10", "seeds": 0, "train_scans": 20, "test_scans": 4}
        return ["scripts.research.sweep", *overrides({"work": folder / "work", "results": folder / "results.csv", **what})]

    weights = ("model.pt", "settings.json", "history.csv", "last.pt")
    predictions = ("predictions.csv", "survival_curves.csv", "*.html", "reports/*", "maps/*", "done/*")
    return [
        Job("training", train, weights),
        Job("training, Cox with memory, a loading process, early stopping", train_cox, weights),
        Job("preprocessing, two processes", prepare, ("*.pt",)),
        Job("inference", infer, predictions),
        Job("inference, two processes", lambda folder: infer(folder, engine="processes", jobs=2), predictions),
        Job("sweep", swept, ("results.csv",)),
    ]


def kill_and_compare(job: Job, kills: int, alone: dict[str, str], seconds: float, work: Path, rng: random.Random) -> int:
    """How many of so many kills passed."""
    done = passed = 0
    (work / "killed" / job.name).mkdir(parents=True)
    while done < kills:
        folder, log, here = work / "killed" / job.name / str(done), work / "killed" / f"{job.name} {done}.txt", 0
        while True:
            step = rng.choice((0, rng.randint(1, 12))) if here < min(KILLS_A_RUN, kills - done) else 0
            attempt = Attempt(job, folder, log, step)
            if here < min(KILLS_A_RUN, kills - done) and not step:
                attempt.kill(rng.uniform(0, seconds), children=rng.random() < 0.5)
            code = attempt.end()
            if code == 0:
                break
            if code != -signal.SIGKILL:
                raise SystemExit(f"error: {job.name} ended with {code}:\n{log.read_text()[-3000:]}")
            here += 1
        found = job.found(folder)
        print(f"{job.name}: {here} kills", file=sys.stderr, flush=True)
        wrong = sorted(name for name in alone.keys() | found.keys() if alone.get(name) != found.get(name))
        if wrong:
            print(f"{job.name}: {', '.join(wrong)} differ after {here} kills in {folder}", flush=True)
        done += here
        passed += 0 if wrong else here
        if not wrong:
            shutil.rmtree(folder)
    return passed


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(prog="python -m scripts.research.kill_test", description=__doc__)
    p.add_argument("--kills", type=int, default=6, help="of each job but the sweep (default 6)")
    p.add_argument("--sweep_kills", type=int, default=3, help="of the sweep, which takes longest (default 3)")
    p.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    p.add_argument("--work", type=Path, help="folder to work in (default: a temporary one)")
    args = p.parse_args(argv)
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        make_phantoms.main(["--phantom", "spheres", "--num", "10", "--size", "16", "--out", str(work / "phantoms")])
        passed = total = 0
        print("| job | kills | same as uninterrupted |\n|---|---|---|", flush=True)
        for job in jobs(work):
            kills = args.sweep_kills if job.name == "sweep" else args.kills
            if not kills:
                continue
            folder, log, start = work / "alone" / job.name, work / f"{job.name}.txt", time.monotonic()
            if Attempt(job, folder, log).end() != 0:
                raise SystemExit(f"error: {job.name} failed without a kill, see {log}")
            seconds = time.monotonic() - start
            good = kill_and_compare(job, kills, job.found(folder), seconds, work, rng)
            print(f"| {job.name} | {kills} | {good} |", flush=True)
            passed, total = passed + good, total + kills
    print(f"{passed} of {total}")
    sys.exit(passed < total)


if __name__ == "__main__":
    main()
