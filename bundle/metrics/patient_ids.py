# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Patient ids as tensors, so that they travel through a metric's buffers, and between processes, with their scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bundle.errors import InputError

__all__ = ["decode_ids", "encode_ids", "unique_scans"]

ID_BYTES = 256


def encode_ids(patient_id: Sequence[str] | None, count: int) -> Tensor:
    """UTF-8 bytes of each id, padded with zeros: (count, 256), uint8; all zeros for no ids (None).

    Raises:
        InputError: not one id a scan, an empty id, or one too long to be part of a file name.
    """
    codes = torch.zeros(count, ID_BYTES, dtype=torch.uint8)
    if patient_id is None:
        return codes
    if len(patient_id) != count:
        raise InputError(f"{len(patient_id)} patient ids were given for {count} scans; expected one a scan.")
    for code, name in zip(codes, patient_id):
        text = str(name).encode()
        if not 0 < len(text) < ID_BYTES:
            raise InputError(f"patient_id {str(name)[:40]!r} has {len(text)} bytes; expected 1 to {ID_BYTES - 1}.")
        code[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    return codes


def decode_ids(codes: Tensor) -> list[str | None]:
    """The ids behind :func:`encode_ids`; None for a scan without one."""
    return [bytes(code).rstrip(b"\0").decode() or None for code in codes.cpu().numpy()]


def unique_scans(codes: Tensor) -> np.ndarray:
    """Indices of the scans to score, sorted by patient id, each patient once; all as they came if an id is missing.

    A distributed sampler may repeat scans to give every process the same number. The fixed order makes results, and the
    bootstrap's draws, the same for any order of the scans and any number of processes.
    """
    table = codes.cpu().numpy()
    if not table.any(1).all():
        return np.arange(len(table))
    return np.unique(table, axis=0, return_index=True)[1]
