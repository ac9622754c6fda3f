# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The scans that a run could not predict or score, as its files say it."""

from __future__ import annotations

import os

import ignite.distributed as idist

from bundle.data.cohort import MASK_COLUMNS
from bundle.data.stream import ScanStream
from bundle.errors import InputError

__all__ = ["failed_scans"]


def failed_scans(stream: ScanStream) -> list[dict]:
    """One row a failed scan of all processes, sorted by `patient_id`, with `time`, `event`, `status` and `message`.

    Every process must call this. Each stream then knows the faults of all, so that all processes end alike. A message
    names no folder: folders can be named after patients, and those of this machine help nobody.

    Raises:
        InputError: all scans of a process failed, but not all of another's, which would wait for its scores for ever.
    """
    records = {record["patient_id"]: record for record in stream.data}
    own = [_row(records[patient_id], fault) for patient_id, fault in stream.faults]
    shares = idist.all_gather([own, len(records)]) if idist.get_world_size() > 1 else [[own, len(records)]]
    empty = [len(rows) == scans for rows, scans in shares]
    rows = {row["patient_id"]: row for part, _ in shares for row in part}
    if any(empty) and not all(empty):
        message = next(iter(rows.values()))["message"]
        raise InputError(f"all scans of one of {len(shares)} processes failed, use fewer; the first fault: {message}")
    here = dict(stream.faults)
    stream.faults += [(name, row["message"]) for name, row in rows.items() if name not in here]
    return [rows[name] for name in sorted(rows)]


def _row(record: dict, fault: str) -> dict:
    for path in (record.get(key) for key in ("image", *MASK_COLUMNS)):
        fault = fault.replace(path, os.path.basename(path)) if path else fault
    known = {name: record.get(name) for name in ("patient_id", "time", "event")}
    return {**known, "status": "failed", "message": fault}
