# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A stream of scans in which a bad one doesn't end the run."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch.utils.data import IterableDataset

from bundle.errors import InputError, scan_fault

logger = logging.getLogger(__name__)


class ScanStream(IterableDataset):
    """Scans one after the other. A bad one is noted in `faults` as (patient_id, sentence), and the next one comes.

    Patients in `done` are passed over. A thread prepares the next scan while the last one is in use: reading a CT takes
    as long as predicting it.

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
            sentence = scan_fault(record["patient_id"], e)
            logger.warning(sentence)
            return None, sentence

    def note(self, patient_id: str, fault: str) -> None:
        """A scan that failed after it was read."""
        logger.warning(fault)
        self.faults.append((patient_id, fault))

    def require_all(self, on_fault: str = "fail") -> None:
        """After a run: raise an :class:`InputError` if a scan failed, unless ``on_fault`` is ``skip``."""
        if self.faults and on_fault != "skip":
            failed = f"{len(self.faults)} of {len(self.data)} scans failed"
            raise InputError(f"{failed}, the others are done; the first: {self.faults[0][1]}")
