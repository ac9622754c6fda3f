# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Training scans, preprocessed once and kept on disk."""

import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import ignite.distributed as idist
import torch
from monai.data import Dataset, PersistentDataset
from monai.transforms import RandomizableTrait
from monai.utils import convert_to_tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from bundle.data.fingerprint import code_digest, describe, describe_scan
from bundle.errors import InputError, scan_fault
from bundle.files import DamagedFile, load_checked, remove_leftovers, save_checked

CODE = ("transforms/*.py", "reading/*.py", "grids.py")  # that makes what is cached
_CACHED = ("image", "lung", "lung_mask_source")
_KEPT = ("patient_id", "time", "event", "clinical")  # of the record, and never in a file
_LEVELS = 65535  # of a cached image, which lies in [0, 1]
_ALL_BAD = 20  # scans at fault, and no other yet, end the work

logger = logging.getLogger(__name__)


class ScanCache(PersistentDataset):
    """MONAI's `PersistentDataset`, with files named after the content of the scan and all that was done to it.

    A name is the SHA-256 of the content of the scan and its lung mask, of every transform before the first random one
    with its arguments, and of their code and MONAI's version: a changed scan or setting never reads a stale file.
    Times, events and covariates are not in a file. One with a wrong checksum is made again.

    Images are rounded to 16 bits of the HU window (0.01 HU of 1200 HU), the lung is a boolean: 3 bytes a voxel instead
    of 8. Training reads what the file holds, whether the file was there or had to be made.

    Args:
        data: records of the cohort.
        transform: a MONAI `Compose`. What comes before its first random transform is cached: `image` (1, D, H, W)
            scaled to [0, 1], `lung` (1, D, H, W) of 0 and 1, and `lung_mask_source`.
        cache_dir: folder, which several runs may share at the same time.
        on_fault: "fail" raises the faults of all bad scans, "skip" leaves bad scans out and names each in the log.
    """

    def __init__(self, data: Sequence[dict], transform: Callable, cache_dir: str, on_fault: str = "fail") -> None:
        super().__init__(data=list(data), transform=transform, cache_dir=str(cache_dir), hash_func=self.key)
        self.on_fault = on_fault
        fixed = itertools.takewhile(lambda t: not isinstance(t, RandomizableTrait), transform.flatten().transforms)
        self.recipe = [code_digest(*CODE), _LEVELS, [describe(t) for t in fixed]]

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
        try:
            cached = load_checked(path) if path.is_file() else None
        except DamagedFile as e:
            logger.warning(f"{e}; it is made again.")
            cached = None
        if cached is None:
            cached = self.preprocess(record)
            save_checked(cached, path)
        kept = {key: record[key] for key in _KEPT if key in record}
        return {**kept, **cached, "image": cached["image"].float() / _LEVELS, "lung": cached["lung"].float()}

    def preprocess(self, record: dict) -> dict:
        """What the cache holds of a record, made from its source."""
        item = self._pre_transform({k: v for k, v in record.items() if k != "cache_key"})
        item = convert_to_tensor({key: item[key] for key in _CACHED}, convert_numeric=False, track_meta=False)
        image, lung = item["image"], item["lung"]
        if not (0 <= image.min() and image.max() <= 1 and bool(((lung == 0) | (lung == 1)).all())):
            raise ValueError("what is cached must be an image scaled to [0, 1] and a lung of 0 and 1")
        return {**item, "image": (image * _LEVELS).round().to(torch.uint16), "lung": lung.bool()}

    def fill(self, jobs: int = 0, progress: Callable[[Iterable], Iterable] = iter) -> int:
        """Preprocess every scan that is not in the cache yet, and count them.

        Args:
            jobs: processes that share the work; 0 for this one alone.
            progress: wraps what is iterated over, such as `tqdm`.

        Raises:
            InputError: the faults of all bad scans, unless they are skipped; no scan is left.
        """
        made, faults = self.make(jobs, progress)
        tell_faults(faults, len(self.data) + len(faults), self.on_fault)
        return made

    def make(self, jobs: int, progress: Callable[[Iterable], Iterable]) -> tuple[int, list[str]]:
        """:meth:`fill`, but the faults of bad scans, which are left out, are told and not raised."""
        remove_leftovers(self.cache_dir)
        loader = DataLoader(Dataset(self.data, self._check), batch_size=None, num_workers=jobs)
        good, faults, made = [], [], 0
        for record, (key, new, fault) in zip(self.data, progress(loader)):
            made += new
            if key:
                good.append({**record, "cache_key": key})
                continue
            logger.warning(fault)  # at once, for who watches
            faults.append(fault)
            if len(faults) == _ALL_BAD and not good:  # before hours are spent on a mistake that is in every scan
                raise InputError(f"none of the first {_ALL_BAD} scans can be used; the first: {fault}")
        if not good:
            none = f"none of the {len(faults)} scans of a part of the cohort can be used"
            raise InputError(f"{none}: train and val need some each; the first: {faults[0]}")
        self.data = good
        return made, faults

    def _check(self, record: dict) -> tuple[str, bool, str]:
        """Key of a record, whether it was not in the cache, and what is wrong with it."""
        try:
            key = self.key(record).decode()
            new = not self.file({"cache_key": key}).is_file()
            self._cachecheck({**record, "cache_key": key})
        except Exception as e:  # of whatever kind: all bad scans are to be told at once
            return "", False, scan_fault(record["patient_id"], e)
        return key, new, ""


def tell_faults(faults: Sequence[str], count: int, on_fault: str) -> None:
    """Raise an :class:`InputError` that lists what is wrong with some of `count` scans; log it if they are skipped."""
    if not faults:
        return
    some = f"{len(faults)} of {count} scans can't be used"
    if on_fault == "skip":
        logger.warning(f"{some} and are left out.")
        return
    listed = "".join(f"\n  {fault}" for fault in faults)
    raise InputError(f"{some}:{listed}\nThe others are ready: the same command with --on_fault skip goes on with them.")


def fill_caches(*datasets: ScanCache, jobs: int = 0) -> None:
    """:meth:`ScanCache.fill` of all parts of a cohort with a progress bar; the faults of all are told together.

    Of the processes of a training the others wait for the first.
    """
    first = idist.get_rank() == 0
    if not first:
        idist.barrier()
    count, faults = sum(len(dataset.data) for dataset in datasets), []
    for dataset in datasets:
        faults += dataset.make(jobs, partial(tqdm, desc="preprocessing", unit="scan", disable=not first))[1]
    tell_faults(faults, count, datasets[0].on_fault)
    if first:
        idist.barrier()
