# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights in use, with all that must be done as in their training: one model, or several as one."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from bundle.data import clinical_names
from bundle.data.clinical import clinical_kinds
from bundle.errors import InputError
from bundle.maps import Familiarity
from bundle.networks import MaskedAutoencoder, network_from
from bundle.run.settings import differences, read_settings
from bundle.survival import Objective, objective_from, severity_from
from bundle.survival.calibration import LEVELS

logger = logging.getLogger(__name__)


class TrainedModel:
    """The network of a weights file, its objective, its severity, and its settings.

    Args:
        ckpt: weights file, with its `settings.json` in the same folder.
        device: to compute on.

    Raises:
        InputError: weights or settings are missing, damaged, or don't belong together.
    """

    def __init__(self, ckpt: str, device: torch.device | str = "cpu") -> None:
        self.settings = read_settings(ckpt)
        if self.settings["network"].get("name") == MaskedAutoencoder.__name__:
            raise InputError(f"{ckpt} has seen no outcome and predicts nothing: fine-tune it (configs/finetune.json).")
        self.network: nn.Module = load_weights(network_from(self.settings["network"]), ckpt).to(device)
        self.objective: Objective = objective_from(self.settings["objective"]).to(device)
        self.severity = severity_from(self.settings.get("severity"))
        self.preprocessing: dict = self.settings["preprocessing"]
        self.familiarity = [Familiarity(**found) if (found := self.settings.get("familiarity")) else None]
        self.cohort = self.settings.get("outcomes", {}).get("pmf")  # of the training cohort; None from older weights
        self.stride: int = self.network.stride  # voxels from one patch to the next
        self.usual_shifts = math.gcd(4, self.stride)  # origins of the patch grid an axis: the stride has room for them


def load_weights(network: nn.Module, ckpt: str | Path) -> nn.Module:
    """The network with the state dict of a weights file, of which nothing but tensors is unpickled."""
    try:
        state = torch.load(ckpt, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds for a file that is no checkpoint
        raise InputError(f"{ckpt} can't be read as weights: {str(e).splitlines()[0]}") from e
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as e:
        raise InputError(f"{ckpt} holds weights of another architecture than settings.json says.") from e
    return network


class Ensemble:
    """Several trained models as one.

    Args:
        ckpt: a weights file, a folder or a list of them. A folder stands for its `model.pt`, or for those of its
            subfolders (the folds of a cross-validation).
        device: to compute on.

    Raises:
        InputError: a folder has no weights, or members differ in what must be equal: preprocessing, horizon, tmax, the
            grid of their maps, or the kind of a clinical column.
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
        # A severity, or None, for each network.
        self.severity = {network: member.severity for network, member in zip(self.networks, members, strict=True)}
        first = members[0]
        self.network, self.preprocessing = first.network, first.preprocessing
        self.familiarity = [member.familiarity[0] for member in members]
        self.cohort = self.settings["outcomes"]["pmf"]
        coarsest = max(members, key=lambda member: member.stride)
        self.stride, self.usual_shifts = coarsest.stride, coarsest.usual_shifts


def member_files(ckpt: str | Sequence[str]) -> list[str]:
    """The weights files of an ensemble; see :class:`Ensemble`."""
    files: list[str] = []
    for name in [ckpt] if isinstance(ckpt, (str, Path)) else ckpt:
        path = Path(name)
        if path.is_dir():
            found = [path / "model.pt"] if (path / "model.pt").is_file() else list(path.glob("*/model.pt"))
            if not found:
                raise InputError(f"the folder {path} has no model.pt, nor has one of its subfolders.")
            files += sorted(map(str, found), key=lambda file: (len(file), file))  # fold_2 before fold_10
        else:
            files.append(str(path))
    if not files:
        raise InputError("--ckpt names no weights (expected files or folders).")
    logger.info(f"an ensemble of {len(files)}: {', '.join(files)}")
    return files


def joint_settings(files: Sequence[str], members: Sequence[dict]) -> dict:
    """Those of the first member, with all members' encodings and trained-on patients; `files` are for the messages."""

    def shared(settings: dict) -> dict:
        own = {"horizon": settings["horizon"], "tmax": settings["objective"]["tmax"]}
        stride = network_from(settings["network"]).stride
        return {**settings["preprocessing"], **own, **({"stride": stride} if stride > 1 else {})}

    gridded = next((settings for settings in members if "stride" in shared(settings)), members[0])
    for file, settings in zip(files, members, strict=True):
        if differ := differences(shared(gridded), {**shared(gridded), **shared(settings)}):
            reason = f"{'; '.join(differ)} (expected to be equal)"
            raise InputError(f"{files[0]} and {file} can't be one ensemble: {reason}.")
    encodings = [settings["clinical"] for settings in members]
    clinical_kinds(encodings)
    seen = sorted({digest for settings in members for digest in settings["trained_on"]})
    weights = [settings["weights_sha256"] for settings in members]
    verdicts = [settings["learnt"] for settings in members if settings.get("learnt")]
    known = [settings.get("outcomes", {}) for settings in members]
    last, cohorts = ([one.get(key) for one in known] for key in ("last_death", "pmf"))
    low, high, low_if_open = zip(*(one.get("interval_levels", LEVELS) for one in known))
    return {
        **members[0],
        "clinical": encodings,
        "trained_on": seen,
        "weights_sha256": weights,
        "learnt": worst_of(verdicts),
        "outcomes": {
            "last_death": None if None in last else max(last),
            "pmf": None if None in cohorts else torch.tensor(cohorts).mean(0).tolist(),
            "interval_levels": [min(low), max(high), min(low_if_open)],
        },
    }


def worst_of(verdicts: Sequence[dict]) -> dict | None:
    """The verdict of an ensemble: that of a member of simulated patients, if there is one; with the highest p-value."""
    return max(verdicts, key=lambda found: (found.get("simulated", False), found["p_value"]), default=None)


class Member(nn.Module):
    """A network that takes its own part of the ensemble's clinical vector, from `start` to `end`, or none."""

    def __init__(self, network: nn.Module, start: int, end: int) -> None:
        super().__init__()
        self.network = network
        self.stride = network.stride
        self.start = start
        self.end = end

    def own(self, clinical: Tensor | None) -> Tensor | None:
        return clinical[:, self.start : self.end] if self.end > self.start and clinical is not None else None

    def forward(self, image: Tensor, lung: Tensor | None = None, clinical: Tensor | None = None) -> Tensor:
        return self.network(image, lung, self.own(clinical))

    def danger(self, survival_map: Tensor, share: Tensor, clinical: Tensor | None = None) -> Tensor:
        """See :meth:`bundle.networks.SurvivalMapNet.danger`."""
        return self.network.danger(survival_map, share, self.own(clinical))
