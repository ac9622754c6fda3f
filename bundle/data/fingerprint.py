# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What a cached file or a finished map depends on, as plain JSON and SHA-256: scans, transforms and code."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch

from bundle.files import file_sha256
from bundle.reading.slices import files_in

# Keys of a record that no transform reads: they may change without the scan being preprocessed again.
_NOT_READ = {"patient_id", "time", "event", "clinical", "patient", "gt_mask", "confounder_mask", "split", "fold"}
_NOT_READ |= {"covariates", "imputed", "site", "simulated"}
_STAMP = attrgetter("st_size", "st_mtime_ns", "st_ctime_ns", "st_ino", "st_dev")
_DATA_FILE = re.compile(rb"^(?:ElementDataFile\s*=|data ?file:)\s*(.+?)\s*$", re.MULTILINE | re.IGNORECASE)


def content_digest(path: str) -> str:
    """SHA-256 of the content of a scan, a file or a folder, wherever it lies and whenever it was written.

    The data files that a detached header (.mhd, .nrrd) names count too. A file that has not been touched since this
    process last read it is not read again.
    """
    p = Path(path)
    files = [file for file in (map(Path, files_in(p)) if p.is_dir() else _parts(p)) if file.is_file()]
    digests = sorted(_file_digest(file, _STAMP(file.stat())) for file in files)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _parts(header: Path) -> list[Path]:
    """A file, and the data files that it names if it is a header."""
    if header.suffix.lower() not in (".mhd", ".nrrd"):
        return [header]
    with open(header, "rb") as file:
        found = _DATA_FILE.search(file.read(1 << 16))
    if not found or found[1].upper() == b"LOCAL":
        return [header]
    data = header.parent / os.fsdecode(found[1])
    return [header, data] if data.is_file() else list(header.parent.iterdir())  # a list or a pattern of files


@cache
def _file_digest(path: Path, stamp: tuple[int, ...]) -> str:
    return file_sha256(path)


def describe(thing: Any) -> Any:
    """Everything that shapes what a transform does, as plain JSON: its class and attributes, and those of what it holds.

    A string that is the name of a file (weights of a network) becomes the SHA-256 of its content.
    """
    if thing is None or isinstance(thing, (bool, int, float)):
        return thing
    if isinstance(thing, str):
        return f"sha256:{content_digest(thing)}" if os.path.isfile(thing) else str(thing)
    if isinstance(thing, Mapping):
        return {str(key): describe(value) for key, value in thing.items()}
    if isinstance(thing, (set, frozenset)):
        return describe(sorted(thing))
    if isinstance(thing, (list, tuple)):
        return [describe(value) for value in thing]
    if isinstance(thing, (torch.Tensor, np.ndarray, np.generic)):
        return thing.tolist()
    if callable(thing) and hasattr(thing, "__qualname__"):  # a function or a class
        return f"{thing.__module__}.{thing.__qualname__}"
    name = f"{type(thing).__module__}.{type(thing).__qualname__}"
    return {"class": name, **{key: describe(value) for key, value in sorted(getattr(thing, "__dict__", {}).items())}}


def describe_scan(record: dict) -> dict:
    """What transforms may read of a record, as plain JSON: image and lung mask by content, all else by value."""
    scan = {key: describe(value) for key, value in record.items() if key not in _NOT_READ}
    return scan | {key: content_digest(record[key]) for key in ("image", "lung_mask") if record.get(key)}


def code_digest(*patterns: str) -> str:
    """SHA-256 of MONAI's version and of this package's files that match patterns, as `Path.glob` takes them."""
    package = Path(__file__).parents[1]
    digests = [file_sha256(file) for pattern in patterns for file in sorted(package.glob(pattern))]
    return hashlib.sha256(json.dumps([monai.__version__, digests]).encode()).hexdigest()
