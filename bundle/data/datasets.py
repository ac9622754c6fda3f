# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Datasets: training scans cached on disk and their order, and a stream of scans of which a bad one doesn't end the run."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from monai.data import PersistentDataset
from torch.utils.data import IterableDataset, Sampler

from bundle.errors import InputError, input_error_of

__all__ = ["EventSampler", "ScanCache", "ScanStream"]

logger = logging.getLogger(__name__)

FILES = ("image", "lung_mask")


def stamp(path: str) -> list:
    """What identifies the content of a file, or of a folder with slices in it, without reading it."""
    p = Path(path)
    files = sorted(f for f in p.rglob("*") if f.is_file()) if p.is_dir() else [p]
    return [[str(f.relative_to(p)), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


class ScanCache(PersistentDataset):
    """MONAI's `PersistentDataset`, whose key holds the files' stamps and the preprocessing settings.

    On disk rather than in memory, because a cohort of chest CTs does not fit there and a resumed run starts at once.

    Args:
        data: records of the cohort.
        transform: a MONAI `Compose`; what comes before its first random transform is cached.
        cache_dir: folder of the cache; may be shared by runs.
        settings: of the preprocessing; another setting never reads a stale file.
        on_fault: ``"fail"`` raises on the first bad scan, ``"skip"`` leaves bad scans out, naming each in the log.
    """

    def __init__(
        self, data: Sequence[dict], transform: Callable, cache_dir: str, settings: dict, on_fault: str = "fail"
    ) -> None:
        def key(record: dict) -> bytes:
            files = {name: [record[name], stamp(record[name])] for name in FILES if record.get(name)}
            content = json.dumps([files, settings, record["time"], record["event"], record.get("clinical")])
            return hashlib.sha256(content.encode()).hexdigest().encode()

        super().__init__(data=list(data), transform=transform, cache_dir=cache_dir, hash_func=key)
        self.on_fault = on_fault

    def fill(self, progress: Callable[[Sequence], Iterator] = iter) -> None:
        """Preprocess every scan that is not in the cache yet, so that a bad one shows before training starts.

        Raises:
            InputError: the faults of all bad scans, unless they are skipped.
        """
        good, faults = [], []
        for record in progress(self.data):
            try:
                self._cachecheck(record)
                good.append(record)
            except Exception as e:
                fault = input_error_of(e)
                if fault is None:
                    raise
                faults.append(str(fault))
        if faults and self.on_fault != "skip":
            raise InputError("; ".join(faults) + " (--on_fault skip trains without such scans).")
        for fault in faults:
            logger.warning(f"left out: {fault}")
        self.data = good


class EventSampler(Sampler[int]):
    """A random order in which those who died are spread evenly, so that every batch has the cohort's share of events.

    With batches of a few scans, the ups and downs of that share would be most of the gradient's noise: they move the
    locations of all patches alike, and nothing is learnt of where the danger is.

    Args:
        dataset: whose records have `event`.
    """

    def __init__(self, dataset: ScanCache) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset.data)

    def __iter__(self) -> Iterator[int]:
        event = torch.tensor([int(record["event"]) for record in self.dataset.data])
        place = torch.zeros(len(event))
        for value in (0, 1):
            (rows,) = torch.nonzero(event == value, as_tuple=True)
            place[rows] = (torch.randperm(len(rows)) + 0.5) / max(1, len(rows))
        return iter(place.argsort(stable=True).tolist())


def _unforeseen(patient: str, error: BaseException) -> str:
    """One sentence on an error that no check foresaw: the first, as MONAI's around it say no more than where."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"patient {patient}: {type(error).__name__} while reading or preprocessing: {' '.join(str(error).split())}"


class ScanStream(IterableDataset):
    """Scans one after the other; a bad one is noted in `faults`, (patient_id, sentence), and the next one comes.

    Args:
        data: records of the cohort; one with a key ``fault`` is bad from the start.
        transform: preprocessing of a record.
    """

    def __init__(self, data: Sequence[dict], transform: Callable) -> None:
        self.data = list(data)
        self.transform = transform
        self.faults: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[dict]:
        for record in self.data:
            if record.get("fault"):
                self.faults.append((record["patient_id"], record["fault"]))
                continue
            try:
                item = self.transform(record)
            except Exception as e:  # one scan's failure, of whatever kind, must not end the run
                fault = input_error_of(e)
                sentence = str(fault) if fault else _unforeseen(record["patient_id"], e)
                self.faults.append((record["patient_id"], sentence))
                logger.warning(sentence)
                continue
            yield item

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
