# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""`settings.json`, which travels beside the weights: all that training fixed and inference must not contradict."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from bundle.data.cohort import patient_digest, patient_of
from bundle.errors import InputError
from bundle.files import file_sha256

__all__ = [
    "differences",
    "load_weights",
    "read_settings",
    "reconcile",
    "settings_file",
    "training_settings",
]

FORMAT = 1


def training_settings(
    *,
    network: dict,
    objective: dict,
    preprocessing: dict,
    training: dict,
    horizon: int,
    clinical: dict,
    cohort: dict[str, list[dict]],
) -> dict:
    """What a training run is, as plain JSON: the second of two runs goes on with the first if these are equal.

    Of the cohort that is who is in it and what became of them; an image or a mask that has been replaced since isn't noticed.

    Args:
        network: constructor arguments and `name` of the class, for :func:`bundle.networks.network_from`.
        objective: constructor arguments and `name`, for :func:`bundle.survival.objective_from`.
        preprocessing: spacing (mm), hu_window (HU), lung_mask (method), lung_mask_fill, lungmask_sha256 (of each file
            of its weights), margin (mm).
        training: seed, max_epochs, batch_size and what else shapes the weights.
        horizon: of the heat, months.
        clinical: how covariates become the clinical vector, from :func:`bundle.data.fit_clinical`.
        cohort: records by part, from :func:`bundle.data.split_cohort`.
    """
    outcomes = [
        [part, r["patient_id"], r["time"], r["event"], *r.get("covariates", {}).values()]
        for part in ("train", "val")
        for r in cohort[part]
    ]
    seen = sorted({patient_digest(patient_of(r)) for part in ("train", "val") for r in cohort[part]})
    settings = {
        "format": FORMAT,
        "network": network,
        "objective": objective,
        "preprocessing": preprocessing,
        "horizon": horizon,
        "clinical": clinical,
        "training": {**training, "cohort_sha256": hashlib.sha256(json.dumps(outcomes).encode()).hexdigest()},
        "trained_on": seen,
    }
    return json.loads(json.dumps(settings))  # tuples become lists, as they will be when read back


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """The keys in which two settings differ, each as ``key: old -> new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for k in sorted(old.keys() | new.keys()):
            found += differences(old.get(k), new.get(k), f"{key}.{k}" if key else k)
        return found
    if old == new or (old is None and new in (False, [])):  # a switch that older settings don't know is off
        return []
    short = [text if len(text := json.dumps(value)) <= 60 else "(long)" for value in (old, new)]
    return [f"{key}: {short[0]} -> {short[1]}"]


def settings_file(ckpt: str | Path) -> Path:
    """Where the settings of a weights file are: `settings.json` in the same folder."""
    return Path(ckpt).parent / "settings.json"


def read_settings(ckpt: str | Path) -> dict:
    """Read and check the settings beside the weights file `ckpt`.

    Raises:
        InputError: weights or settings are missing or unreadable, or the settings belong to other weights.
    """
    if not isinstance(ckpt, (str, Path)) or Path(ckpt).is_dir():
        raise InputError(f"--ckpt {ckpt} is no weights file; for several, stack configs/ensemble.json on this config.")
    path = settings_file(ckpt)
    if not Path(ckpt).is_file():
        raise InputError(f"there is no weights file {ckpt}; expected the model.pt that training leaves in --ckpt_dir.")
    if not path.is_file():
        raise InputError(f"{ckpt} has no settings.json beside it; training writes both, keep them together.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        sha256, version = settings["weights_sha256"], settings["format"]
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path} is not a settings file of this bundle: {e}.") from e
    if version != FORMAT:
        raise InputError(f"{path} has format {version}; this version reads format {FORMAT}.")
    if sha256 != file_sha256(ckpt):
        raise InputError(f"{path} belongs to other weights than {ckpt}: their SHA-256 differ.")
    return settings


def load_weights(network: torch.nn.Module, ckpt: str | Path) -> torch.nn.Module:
    """Load a plain state dict into `network` and return it; nothing but tensors is unpickled.

    Raises:
        InputError: the file holds no state dict, or that of another architecture.
    """
    try:
        state = torch.load(ckpt, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds for a file that is no checkpoint
        raise InputError(f"{ckpt} can't be read as weights: {str(e).splitlines()[0]}") from e
    try:
        network.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as e:
        raise InputError(f"{ckpt} holds weights of another architecture than settings.json says.") from e
    return network


def reconcile(settings: dict, ckpt: str | Path, **overrides: Any) -> dict:
    """The preprocessing that training fixed, after checking that no override contradicts it.

    Args:
        settings: from :func:`read_settings`.
        ckpt: the weights file, for the message.
        overrides: spacing, hu_window, margin, lung_mask or lung_mask_fill given for this run; None for as in training.
            The method of lung masking may change among those that mask, because the network saw a mask from either.

    Raises:
        InputError: an override contradicts the settings.
    """
    fixed = {"lung_mask_fill": False} | settings["preprocessing"]
    for key, value in overrides.items():
        if value is None:
            continue
        value = json.loads(json.dumps(value))
        masks = key.startswith("lung_mask") and "none" not in (value, fixed["lung_mask"])
        same = value == fixed[key] or masks
        if not same:
            raise InputError(
                f"--{key} {json.dumps(value)} contradicts {json.dumps(fixed[key])}, with which {ckpt} was trained; "
                "leave it out, or train anew."
            )
        fixed[key] = value
    return fixed
