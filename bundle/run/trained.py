# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights in use, with all that must be done as in their training: one model, or several as one."""

from __future__ import annotations

import logging
import math
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
from bundle.survival import Objective, objective_from, severity_from

__all__ = ["Ensemble", "TrainedModel"]

logger = logging.getLogger(__name__)


class TrainedModel:
    """The network of a weights file, its objective, and the settings beside it.

    Args:
        ckpt: weights file, with its `settings.json` in the same folder.
        device: to compute on.

    Attributes:
        settings: from :func:`~bundle.run.read_settings`.
        network, objective: as trained, on the device.
        severity: of the weights; None for none.

    Raises:
        InputError: weights or settings are missing, damaged, or don't belong together.
    """

    def __init__(self, ckpt: str, device: torch.device | str = "cpu") -> None:
        self.settings = read_settings(ckpt)
        self.network: nn.Module = load_weights(network_from(self.settings["network"]), ckpt).to(device)
        self.objective: Objective = objective_from(self.settings["objective"]).to(device)
        self.severity = severity_from(self.settings.get("severity"))

    @property
    def preprocessing(self) -> dict:
        """How its training scans were prepared."""
        return {"lung_mask_fill": False} | self.settings["preprocessing"]

    @property
    def stride(self) -> int:
        """Voxels from one patch to the next."""
        return self.network.stride

    @property
    def usual_shifts(self) -> int:
        """Origins of the patch grid an axis: as many as the stride has room for, at most 4."""
        return math.gcd(4, self.stride)


class Ensemble:
    """Several trained models as one.

    Args:
        ckpt: a weights file, a folder or a list of them. A folder stands for its `model.pt`, or for those of its subfolders
            (the folds of a cross-validation).
        device: to compute on.

    Attributes:
        settings: those of the first member. `clinical` is the list of the members' encodings, and `trained_on` names the
            patients that any of them has seen.
        networks: a :class:`Member` each.
        objectives: one each.
        severity: of each network; None for none.
        network: the first of the networks.

    Raises:
        InputError: a folder has no weights, or members differ in what must be equal: preprocessing, horizon, tmax, the grid
            of their maps, or the kind of a clinical column.
    """

    def __init__(self, ckpt: str | Sequence[str], device: torch.device | str = "cpu") -> None:
        files = member_files(ckpt)
        members = [TrainedModel(file, device) for file in files]
        self.settings = joint_settings(files, [member.settings for member in members])
        self.objectives = [member.objective for member in members]
        self.networks, start = [], 0
        for member in members:
            end = start + len(clinical_names(member.settings["clinical"]))
            self.networks.append(Member(member.network, start, end))
            start = end
        self.severity = {network: member.severity for network, member in zip(self.networks, members, strict=True)}
        self.network = members[0].network

    preprocessing = TrainedModel.preprocessing
    stride = TrainedModel.stride
    usual_shifts = TrainedModel.usual_shifts


def member_files(ckpt: str | Sequence[str]) -> list[str]:
    """The weights files of an ensemble; see :class:`Ensemble`."""
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


def joint_settings(files: Sequence[str], members: Sequence[dict]) -> dict:
    """The settings of an ensemble, from its members' settings and, for the messages, their files."""

    def shared(settings: dict) -> dict:
        grid = {"stride": network_from(settings["network"]).stride}
        return {**settings["preprocessing"], "horizon": settings["horizon"], "tmax": settings["objective"]["tmax"], **grid}

    for file, settings in zip(files, members, strict=True):
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

    def own(self, clinical: Tensor | None) -> Tensor | None:
        return clinical[:, self.start : self.end] if self.end > self.start and clinical is not None else None

    def forward(self, image: Tensor, lung: Tensor | None = None, clinical: Tensor | None = None) -> Tensor:
        return self.network(image, lung, self.own(clinical))

    def danger(self, survival_map: Tensor, share: Tensor, clinical: Tensor | None = None) -> Tensor:
        """See :meth:`bundle.networks.SurvivalMapNet.danger`."""
        return self.network.danger(survival_map, share, self.own(clinical))
