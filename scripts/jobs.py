# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What scripts that start many runs share: processes that end with their parent, several at a time; tables."""

import ast
import contextlib
import fcntl
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from bundle.errors import InputError

_running: set[subprocess.Popen] = set()


def overrides(options: dict[str, Any]) -> list[str]:
    """Words of a command line: ``{"seed": 1}`` is ``--seed 1``."""
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def options_of(words: Sequence[str]) -> dict[str, str]:
    """Config overrides of a command line, ``--key value`` or ``--key=value``.

    Raises:
        InputError: a word is none.
    """
    found: dict[str, str] = {}
    rest = list(words)
    while rest:
        key, given, value = rest.pop(0).partition("=")
        if not key.startswith("--") or len(key) == 2 or not (given or rest):
            raise InputError(f"{key} is no override (expected --key value, such as --max_epochs 50).")
        found[key[2:]] = value if given else rest.pop(0)
    return found


def run_module(*args: str, log: Path, threads: int, lock: int | None = None) -> None:
    """Run a module of this repository in a process of its own, `python -m args`.

    Args:
        log: file to which its output is appended.
        threads: how many it may use.
        lock: from :func:`locked`; the process holds it, too.

    Raises:
        RuntimeError: it failed; with its error message or, without one, the end of its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as file:
        start = file.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", *args],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            pass_fds=() if lock is None else (lock,),
        )
    _running.add(process)
    try:
        code = process.wait()
    finally:
        _running.discard(process)
    if code:
        with open(log, errors="replace") as file:
            file.seek(start)
            text = file.read()
        _, *errors = re.split(r"(?:^|[\r\n])error: ", text)
        raise RuntimeError(errors[-1].strip() if errors else f"{' '.join(args)} failed:\n{text[-2000:]}")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """Wait for the lock of a file, and hold it; its file descriptor is to be given to the processes that are started.

    They hold it then as well: if this process is killed and they are not, the next one waits until they are done, and
    never works beside them in one folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tqdm.write(f"waiting for a process that holds {path}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def threads_of(jobs: int) -> int:
    """Threads of each of so many jobs that share the cores."""
    return max(1, (os.cpu_count() or 1) // jobs)


def run_jobs(call: Callable[..., Any], todo: Iterable[tuple], jobs: int) -> Iterator[Any]:
    """Results of `call(*key)` for each key as they are done, or the exception of one; `jobs` at a time.

    Where the loop over them is left early, by an interrupt for one, what waits isn't started and what runs is ended.
    """
    pool = ThreadPoolExecutor(jobs)
    try:
        for future in as_completed([pool.submit(call, *key) for key in todo]):
            try:
                yield future.result()
            except Exception as e:  # one job's failure must not end the others
                yield e
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(_running):
            process.terminate()
        pool.shutdown()


def cpu_seconds() -> float:
    """Seconds of a core that this process has used, on all of them, and those that it started and that have ended."""
    return sum(os.times()[:4])


def version_of(*folders: str, but: str = "") -> str:
    """Short hash of the code and configs in folders of this repository by which numbers are made.

    The file `but`, which only writes them down, is none of them.
    """
    digest = hashlib.sha256()
    for file in sorted(file for folder in folders for kind in ("*.py", "*.json") for file in Path(folder).rglob(kind)):
        if str(file) != but:
            digest.update(str(file).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def literal(text: str) -> Any:
    """A value of a command line as `monai.bundle run` reads it."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def spread(values: pd.Series, digits: int = 2, of: str = "mean") -> str:
    """The mean, or the "sum", of the numbers that are there, with the least and the greatest where they differ.

    Example:
        >>> spread(pd.Series([0.5, 0.58, None])), spread(pd.Series([3, 3]), 0, "sum"), spread(pd.Series([None]))
        ('0.54 (0.50–0.58)', '6', '–')
    """
    values = values.astype(float).dropna()
    if values.empty:
        return "–"
    middle, low, high = (f"{getattr(values, name)():.{digits}f}" for name in (of, "min", "max"))
    return middle if low == high else f"{middle} ({low}–{high})"


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown, without its index.

    Example:
        >>> print(markdown(pd.DataFrame({"phantom": ["chest"], "AP": [0.99]})), end="")
        | phantom | AP |
        |---|---|
        | chest | 0.99 |
    """
    lines = [table.columns, *table.itertuples(index=False)]
    first, *rest = ("| " + " | ".join(map(str, cells)) + " |" for cells in lines)
    return "\n".join([first, "|" + "---|" * table.shape[1], *rest]) + "\n"
