# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The scans that a run could not predict or score, as its files say it."""

import os

import ignite.distributed as idist

from bundle.data.cohort import MASK_COLUMNS
from bundle.data.stream import ScanStream


def failed_scans(stream: ScanStream) -> list[dict]:
    """One row a failed scan of all processes, sorted by `patient_id`, with `time`, `event`, `status` and `message`.

    Every process must call this. Each stream then knows the faults of all, so that all processes end alike. A message
    names no folder: folders can be named after patients, and those of this machine help nobody.
    """
    records = {record["patient_id"]: record for record in stream.data}
    own = {patient_id: _row(records[patient_id], fault) for patient_id, fault in stream.faults}
    shares = idist.all_gather(own) if idist.get_world_size() > 1 else [own]
    rows = {patient_id: row for share in shares for patient_id, row in share.items()}
    stream.faults += [(patient_id, row["message"]) for patient_id, row in rows.items() if patient_id not in own]
    return [rows[patient_id] for patient_id in sorted(rows)]


def noted_scans(stream: ScanStream) -> dict[str, str]:
    """What is to be said of a scan before it is read, by `patient_id`, of all processes. Every process must call this."""
    own = {record["patient_id"]: record["note"] for record in stream.data if "note" in record}
    shares = idist.all_gather(own) if idist.get_world_size() > 1 else [own]
    return {patient_id: note for share in shares for patient_id, note in share.items()}


def _row(record: dict, fault: str) -> dict:
    for path in (record.get(key) for key in ("image", *MASK_COLUMNS)):
        fault = fault.replace(path, os.path.basename(path)) if path else fault
    known = {name: record.get(name) for name in ("patient_id", "time", "event")}
    return {**known, "status": "failed", "message": fault}
