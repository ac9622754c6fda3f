# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Several trained models as one, for `configs/ensemble.json`: which they are, whether they go together, their networks."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from bundle.data.clinical import clinical_kinds, clinical_names
from bundle.errors import InputError
from bundle.networks import network_from
from bundle.run.settings import differences, load_weights, read_settings

__all__ = ["Member", "joint_settings", "member_files", "member_networks", "member_settings"]

logger = logging.getLogger(__name__)


def member_files(ckpt: str | Sequence[str]) -> list[str]:
    """The weights files of an ensemble.

    Args:
        ckpt: a file, a folder or a list of them. A folder stands for its `model.pt`, or for those of its subfolders
            (the folds of a cross-validation).

    Raises:
        InputError: a folder has no weights, or none are named.
    """
    files: list[str] = []
    for name in [ckpt] if isinstance(ckpt, (str, Path)) else ckpt:
        path = Path(name)
        if path.is_dir():
            found = [path / "model.pt"] if (path / "model.pt").is_file() else list(path.glob("*/model.pt"))
            if not found:
                raise InputError(f"the folder {path} has no model.pt, nor has one of its subfolders.")
            files += map(str, sorted(found, key=fold_number))
        else:
            files.append(str(path))
    if not files:
        raise InputError("--ckpt names no weights (expected files or folders).")
    logger.info(f"an ensemble of {len(files)}: {', '.join(files)}")
    return files


def fold_number(file: Path) -> tuple[list[int], str]:
    """Sorts `fold_2` before `fold_10`."""
    return [int(digits) for digits in re.findall(r"\d+", file.parent.name)], file.parent.name


def member_settings(files: Sequence[str]) -> list[dict]:
    """The settings beside each weights file; see :func:`bundle.run.read_settings`."""
    return [read_settings(file) for file in files]


def joint_settings(files: Sequence[str], members: Sequence[dict]) -> dict:
    """The settings of the ensemble: those of the first member, which the others share as far as they must.

    `clinical` is the list of the members' encodings, and `trained_on` names the patients that any of them has seen.

    Args:
        files: weights of the members, for the messages.
        members: their settings.

    Raises:
        InputError: members differ in what must be equal: preprocessing, horizon, tmax, the grid of their maps, or the
            kind of a clinical column.
    """

    def shared(settings: dict) -> dict:
        grid = {"stride": network_from(settings["network"]).stride}
        return {**settings["preprocessing"], "horizon": settings["horizon"], "tmax": settings["objective"]["tmax"], **grid}

    for file, settings in zip(files, members):
        if differ := differences(shared(members[0]), shared(settings)):
            raise InputError(f"{files[0]} and {file} can't be one ensemble: {'; '.join(differ)} (expected to be equal).")
    encodings = [settings["clinical"] for settings in members]
    clinical_kinds(encodings)
    seen = sorted({digest for settings in members for digest in settings["trained_on"]})
    weights = [settings["weights_sha256"] for settings in members]
    return {**members[0], "clinical": encodings, "trained_on": seen, "weights_sha256": weights}


class Member(nn.Module):
    """A network that takes its own part of the clinical vector of the ensemble.

    Args:
        network: of one member.
        start, end: of its part of the vector; equal if it takes none.
    """

    def __init__(self, network: nn.Module, start: int, end: int) -> None:
        super().__init__()
        self.network = network
        self.start = start
        self.end = end

    def forward(self, image: Tensor, lung: Tensor | None = None, clinical: Tensor | None = None) -> Tensor:
        own = clinical[:, self.start : self.end] if self.end > self.start and clinical is not None else None
        return self.network(image, lung, own)


def member_networks(files: Sequence[str], members: Sequence[dict], device: torch.device) -> list[Member]:
    """The networks of an ensemble with their weights."""
    networks, start = [], 0
    for file, settings in zip(files, members):
        end = start + len(clinical_names(settings["clinical"]))
        network = load_weights(network_from(settings["network"]), file)
        networks.append(Member(network, start, end).to(device))
        start = end
    return networks
