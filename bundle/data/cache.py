# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Training scans, preprocessed once and kept on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import monai
import numpy as np
import torch
from monai.data import PersistentDataset
from monai.transforms import RandomizableTrait
from monai.utils import convert_to_tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from bundle.errors import InputError, input_error_of
from bundle.files import DamagedFile, file_sha256, load_checked, remove_leftovers, save_checked

__all__ = ["ScanCache", "code_digest", "content_digest", "describe", "describe_scan"]


logger = logging.getLogger(__name__)


CACHED = ("image", "lung", "lung_mask_source")


KEPT = ("patient_id", "time", "event", "clinical")  # of the record, which may change without a scan being read again


NOT_READ = {*KEPT, "patient", "gt_mask", "confounder_mask", "split", "fold", "covariates", "imputed"}


CODE = ("transforms/*.py", "reading/dicom.py", "reading/scan_file.py")  # of all that is cached


LEVELS = 65535  # of a cached image, which lies in [0, 1]


_DATA_FILE = re.compile(rb"^(?:ElementDataFile\s*=|data ?file:)\s*(.+?)\s*$", re.MULTILINE | re.IGNORECASE)


def content_digest(path: str) -> str:
    """SHA-256 of a scan's content, wherever it lies and whenever it was written: a file, or a folder with slices in it.

    What a detached header (.mhd, .nrrd) points to counts too. A file that has not been touched since it was last
    digested in this process is not read again.
    """
    p = Path(path)
    digests = [_file_digest(str(f), *_stamp(f)) for f in (sorted(p.rglob("*")) if p.is_dir() else _parts(p)) if f.is_file()]
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def _parts(header: Path) -> list[Path]:
    """A file, and the data files that it points to if it is a header."""
    if header.suffix.lower() not in (".mhd", ".nrrd"):
        return [header]
    with open(header, "rb") as f:
        found = _DATA_FILE.search(f.read(1 << 16))
    if not found or found[1].upper() == b"LOCAL":
        return [header]
    data = header.parent / os.fsdecode(found[1])
    return [header, data] if data.is_file() else sorted(header.parent.iterdir())  # a list or a pattern of files


def _stamp(path: Path) -> tuple[int, ...]:
    s = path.stat()
    return s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev


@lru_cache(maxsize=None)
def _file_digest(path: str, *stamp: int) -> str:
    return file_sha256(path)


def describe(thing: Any) -> Any:
    """All that shapes what a transform does, as plain JSON: its class and attributes, and those of what it holds.

    A file that it names (weights of a network) is described by its content.
    """
    if thing is None or isinstance(thing, (bool, int, float)):
        return thing
    if isinstance(thing, str):
        return f"sha256:{content_digest(thing)}" if os.path.isfile(thing) else str(thing)
    if isinstance(thing, Mapping):
        return {str(key): describe(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple, set, frozenset)):
        return [describe(value) for value in (sorted(thing) if isinstance(thing, (set, frozenset)) else thing)]
    if isinstance(thing, (torch.Tensor, np.ndarray, np.generic)):
        return thing.tolist()
    if callable(thing) and hasattr(thing, "__qualname__"):  # a function or a class
        return f"{thing.__module__}.{thing.__qualname__}"
    name = f"{type(thing).__module__}.{type(thing).__qualname__}"
    return {"class": name, **{key: describe(value) for key, value in sorted(getattr(thing, "__dict__", {}).items())}}


def describe_scan(record: dict) -> dict:
    """What transforms may read of a record, as plain JSON: image and lung mask by their content, all else as it is."""
    scan = {key: describe(value) for key, value in record.items() if key not in NOT_READ}
    return scan | {key: content_digest(record[key]) for key in ("image", "lung_mask") if record.get(key)}


def code_digest(*patterns: str) -> str:
    """SHA-256 of this package's files of these patterns, and of MONAI's version."""
    package = Path(__file__).parents[1]
    digests = [file_sha256(f) for pattern in patterns for f in sorted(package.glob(pattern))]
    return hashlib.sha256(json.dumps([monai.__version__, digests]).encode()).hexdigest()


class ScanCache(PersistentDataset):
    """MONAI's `PersistentDataset`, whose files are named after the content of the scan and all that was done to it.

    A name is the SHA-256 of the scan's and its masks' content, of every transform before the first random one with its
    arguments, and of their code and MONAI's version. So a copied or touched scan is found, and a changed scan or a changed
    setting never reads a stale file. Times, events and covariates are not in a file.

    Images are rounded to 16 bits between 0 and 1 of the HU window, an error of at most 1/131070 of it (0.01 HU of
    1200), and the lung is a boolean: 3 bytes a voxel instead of 8. What training reads is what the file holds, whether
    the file was there or not. A file with a wrong checksum is made anew.

    On disk rather than in memory, because a cohort of chest CTs does not fit there and a resumed run starts at once.

    Args:
        data: records of the cohort.
        transform: a MONAI `Compose`; what comes before its first random transform is cached: `image` scaled to [0, 1],
            `lung` and `lung_mask_source`.
        cache_dir: folder of the cache; may be shared by runs, also at the same time.
        on_fault: ``"fail"`` raises on the first bad scan, ``"skip"`` leaves bad scans out, naming each in the log.
    """

    def __init__(self, data: Sequence[dict], transform: Callable, cache_dir: str, on_fault: str = "fail") -> None:
        super().__init__(data=list(data), transform=transform, cache_dir=cache_dir, hash_func=self.key)
        self.on_fault = on_fault
        fixed = itertools.takewhile(lambda t: not isinstance(t, RandomizableTrait), transform.flatten().transforms)
        self.recipe = [code_digest(*CODE), LEVELS, [describe(t) for t in fixed]]

    def key(self, record: dict) -> bytes:
        """Name of the file in which a record is cached."""
        if "cache_key" in record:
            return record["cache_key"].encode()
        content = json.dumps([describe_scan(record), self.recipe], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest().encode()

    def file(self, record: dict) -> Path:
        """Where a record is cached."""
        return self.cache_dir / f"{self.key(record).decode()}.pt"

    def _cachecheck(self, item_transformed: dict) -> dict:
        record, path = item_transformed, self.file(item_transformed)
        cached = None
        if path.is_file():
            try:
                cached = load_checked(path)
            except DamagedFile as e:
                logger.warning(f"{e}; it is made anew.")
        if cached is None:
            cached = self.preprocess(record)
            save_checked(cached, path)
        image = cached["image"].float() / LEVELS
        kept = {key: record[key] for key in KEPT if key in record}
        return {**kept, **cached, "image": image, "lung": cached["lung"].float()}

    def preprocess(self, record: dict) -> dict:
        """What the cache holds of a record, made from its source."""
        item = self._pre_transform({k: v for k, v in record.items() if k != "cache_key"})
        item = convert_to_tensor({key: item[key] for key in CACHED}, convert_numeric=False, track_meta=False)
        image, lung = item["image"], item["lung"]
        if not (0 <= image.min() and image.max() <= 1 and bool(((lung == 0) | (lung == 1)).all())):
            raise ValueError("what is cached must be an image scaled to [0, 1] and a lung of 0 and 1")
        return {**item, "image": (image * LEVELS).round().to(torch.uint16), "lung": lung.bool()}

    def fill(self, jobs: int = 0, progress: Callable[[Iterable], Iterable] = iter) -> int:
        """Preprocess every scan that is not in the cache yet, so that a bad one shows before training starts.

        Args:
            jobs: processes that share the work; 0 for this one alone.
            progress: wraps what is iterated over, such as `tqdm`.

        Returns:
            how many scans were not in the cache.

        Raises:
            InputError: the faults of all bad scans, unless they are skipped; none is left.
        """
        remove_leftovers(self.cache_dir)
        loader = torch.utils.data.DataLoader(_Filling(self), batch_size=None, num_workers=jobs)
        good, faults, made = [], [], 0
        for record, (key, new, fault) in zip(self.data, progress(loader)):
            if fault:
                faults.append(fault)
            else:
                good.append({**record, "cache_key": key})
                made += new
        if faults and self.on_fault != "skip":
            raise InputError("; ".join(faults) + " (--on_fault skip trains without such scans).")
        for fault in faults:
            logger.warning(f"left out: {fault}")
        if not good:
            raise InputError(
                f"none of the {len(faults)} scans of a part of the cohort can be used: train and val need some each."
            )
        self.data = good
        return made


class _Filling(Dataset):
    """The work of :meth:`ScanCache.fill`: for each scan its key, whether it was missing, and what is wrong with it."""

    def __init__(self, cache: ScanCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache.data)

    def __getitem__(self, index: int) -> tuple[str, bool, str]:
        record = self.cache.data[index]
        try:
            key = self.cache.key(record).decode()
            new = not self.cache.file({"cache_key": key}).is_file()
            self.cache._cachecheck({**record, "cache_key": key})
        except Exception as e:
            return "", False, _sentence(record["patient_id"], e)
        return key, new, ""


def _sentence(patient: str, error: Exception) -> str:
    """What is wrong with a scan that couldn't be read or preprocessed."""
    return str(input_error_of(error) or unforeseen(patient, error, "reading or preprocessing"))


def unforeseen(patient: str, error: BaseException, doing: str) -> str:
    """One sentence on an error that no check foresaw: the first, as MONAI's around it say no more than where."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"patient {patient}: {type(error).__name__} while {doing}: {' '.join(str(error).split())}"


def fill_caches(*datasets: ScanCache, jobs: int = 0) -> None:
    """Preprocess all scans that are not in the cache yet, with a progress bar; a bad scan shows before training.

    Of several processes of a training the first one does, and the others find the cache filled.

    Args:
        jobs: processes that share the work; 0 for this one alone.
    """
    first = idist.get_rank() == 0
    if not first:
        idist.barrier()
    for dataset in datasets:
        dataset.fill(jobs, partial(tqdm, desc="preprocessing", unit="scan", disable=not first))
    if first:
        idist.barrier()
