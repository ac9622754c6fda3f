# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Datasets: training scans cached on disk and their order, and a stream of scans of which a bad one doesn't end the run."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from monai.data import PersistentDataset
from monai.transforms import RandomizableTrait
from monai.utils import convert_to_tensor
from torch.utils.data import Dataset, IterableDataset, Sampler

import bundle.transforms
from bundle.errors import InputError, input_error_of
from bundle.files import DamagedFile, load_checked, remove_leftovers, save_checked
from bundle.settings import file_sha256

__all__ = ["EventSampler", "ScanCache", "ScanStream", "code_digest", "content_digest", "describe", "describe_scan"]

logger = logging.getLogger(__name__)

CACHED = ("image", "lung", "lung_mask_source")
KEPT = ("patient_id", "time", "event", "clinical")  # of the record, which may change without a scan being read again
NOT_READ = {*KEPT, "patient", "gt_mask", "confounder_mask", "split", "fold", "covariates", "imputed"}
CODE = ("transforms/*.py", "data/dicom.py", "data/scan_file.py")  # of all that is cached
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
    package = Path(bundle.transforms.__file__).parents[1]
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


class EventSampler(Sampler[int]):
    """A random order in which those who died are spread evenly, so that every batch has the cohort's share of events.

    With batches of a few scans, the ups and downs of that share would be most of the gradient's noise: they move the
    locations of all patches alike, and nothing is learnt of where the danger is.

    Where fewer than `min_event_share` died, their scans come several times an epoch to make up that share, and some of the
    others wait for another epoch: with one death in ten, all is censored in most batches, and what is learnt is that
    nobody dies. An epoch has as many places as there are scans. What is learnt of how many die must then be mended
    afterwards, as severity and Cox's baseline hazard do, which are fitted to all scans once each.

    Args:
        dataset: whose records have `event`.
        min_event_share: smallest share of an epoch that died, in [0, 1).
    """

    def __init__(self, dataset: ScanCache, min_event_share: float) -> None:
        if not 0 <= min_event_share < 1:
            raise InputError(f"min_event_share must be in [0, 1), got {min_event_share}.")
        self.dataset = dataset
        self.min_event_share = min_event_share

    def __len__(self) -> int:
        return len(self.dataset.data)

    def __iter__(self) -> Iterator[int]:
        event = torch.tensor([int(record["event"]) for record in self.dataset.data])
        deaths = int(event.sum())
        if deaths > 0:
            deaths = max(deaths, math.ceil(self.min_event_share * len(event)))
        order: list[tuple[float, int]] = []
        for value, places in ((0, len(event) - deaths), (1, deaths)):
            (rows,) = torch.nonzero(event == value, as_tuple=True)
            drawn: list[int] = []
            while len(drawn) < places:
                # The inverse of a permutation is as random; by it a seed's order stays what it was before shares were made up.
                drawn += rows[torch.randperm(len(rows)).argsort()].tolist()
            order += [((i + 0.5) / places, row) for i, row in enumerate(drawn[:places])]
        return iter([row for _, row in sorted(order)])


def _sentence(patient: str, error: Exception) -> str:
    """What is wrong with a scan that couldn't be read or preprocessed."""
    return str(input_error_of(error) or unforeseen(patient, error, "reading or preprocessing"))


def unforeseen(patient: str, error: BaseException, doing: str) -> str:
    """One sentence on an error that no check foresaw: the first, as MONAI's around it say no more than where."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"patient {patient}: {type(error).__name__} while {doing}: {' '.join(str(error).split())}"


class ScanStream(IterableDataset):
    """Scans one after the other; a bad one is noted in `faults`, (patient_id, sentence), and the next one comes.

    Patients in `done` are passed over. A thread reads and preprocesses the next scan while the last one is in use: reading a
    CT takes as long as computing its map, and most of it is done in libraries that leave Python to others meanwhile.

    Args:
        data: records of the cohort; one with a key ``fault`` is bad from the start.
        transform: preprocessing of a record.
        ahead: scans to read ahead; each is one more in memory.
    """

    def __init__(self, data: Sequence[dict], transform: Callable, ahead: int = 1) -> None:
        self.data = list(data)
        self.transform = transform
        self.ahead = ahead
        self.faults: list[tuple[str, str]] = []
        self.done: set[str] = set()

    def __iter__(self) -> Iterator[dict]:
        todo = [record for record in self.data if record["patient_id"] not in self.done]
        for record, (item, fault) in zip(todo, self._prepared(todo)):
            if fault:
                self.faults.append((record["patient_id"], fault))
            else:
                yield item

    def _prepared(self, todo: list[dict]) -> Iterator[tuple[dict | None, str]]:
        if self.ahead == 0:
            yield from map(self.prepare, todo)
            return
        with ThreadPoolExecutor(1) as reader:
            read: deque[Future] = deque()
            for record in todo:
                read.append(reader.submit(self.prepare, record))
                if len(read) > self.ahead:
                    yield read.popleft().result()
            yield from (item.result() for item in read)

    def prepare(self, record: dict) -> tuple[dict | None, str]:
        """What the transform makes of a record and "", or None and one sentence on what is wrong with it."""
        if record.get("fault"):
            return None, record["fault"]
        try:
            return self.transform(record), ""
        except Exception as e:  # one scan's failure, of whatever kind, must not end the run
            sentence = _sentence(record["patient_id"], e)
            logger.warning(sentence)
            return None, sentence

    def note(self, patient_id: str, fault: str) -> None:
        """A scan that failed after it was read."""
        logger.warning(fault)
        self.faults.append((patient_id, fault))

    def require_all(self, on_fault: str = "fail") -> None:
        """After a run: raise if a scan failed, unless ``on_fault`` is ``skip``.

        Raises:
            InputError: naming how many scans failed, and the first of them.
        """
        if self.faults and on_fault != "skip":
            raise InputError(
                f"{len(self.faults)} of {len(self.data)} scans failed, the others are done; the first: "
                f"{self.faults[0][1]}"
            )
