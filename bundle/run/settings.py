# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""`settings.json`, which travels beside the weights: all that training fixed and inference must not contradict."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS
from torch import nn

from bundle.errors import InputError, checked_numbers
from bundle.files import file_sha256
from bundle.run.config import flat, running_config
from bundle.survival import check_horizon
from bundle.transforms import check_preprocessing, lungmask_digests

FORMAT = 1
MONAI_TRACKING = DEFAULT_MLFLOW_SETTINGS["configs"]

# What of a training config may change when a run goes on: where things lie, how fast, what is only shown. All else is
# what the run is.
MAY_CHANGE = (
    *("_meta_", "imports", "initialize", "run", "finalize"),
    *("bundle_root", "dataset_dir", "cohort", "ckpt_dir", "output_dir", "cache_dir", "log_dir"),
    *("lungmask_weights", "pretrained"),
    *("device", "network", "num_workers", "not_first", "prepare_batch", "collate"),
    *("resume", "on_fault", "patience", "parts", "settings", "wandb_mode", "wandb_project", *MONAI_TRACKING),
    *(f"train#{name}" for name in ("dataset", "dataloader", "inferer", "trainer", "handlers", "epoch_handlers")),
    *(f"train#{name}" for name in ("history", "loss_of", "patience", "checkpoint", "finish", "progress")),
    *(f"validate#{name}" for name in ("dataset", "dataloader", "inferer", "evaluator", "handlers", "log")),
    "validate#additional_metrics",
)


def run_identity(parser: ConfigParser) -> dict:
    """All that shapes the weights, by its id in the config: values at the top, and below it expressions as written."""
    passing = tuple(f"{key}#" for key in MAY_CHANGE)
    leaves = {key: value for key, value in flat(parser.config) if not f"{key}#".startswith(passing)}
    for key in [key for key in leaves if key in parser.config]:
        value = parser.get_parsed_content(key)
        if isinstance(value, (bool, int, float, str)):
            leaves[key] = value
    return dict(sorted(leaves.items()))


def training_settings(
    network: nn.Module, objective: nn.Module, preprocessing: dict, horizon: int, clinical: dict, cohort: dict
) -> dict:
    """What a training run is, as plain JSON: a run goes on with one of equal settings.

    Args:
        network: has constructor `arguments`.
        objective: has constructor `arguments` and a `name`.
        preprocessing: from :func:`preprocessing_settings`.
        horizon: of the heat, months.
        clinical: how covariates become the clinical vector, from :func:`bundle.data.fit_clinical`.
        cohort: whose scans, from :func:`bundle.run.cohort_identity`.

    Raises:
        InputError: the horizon lies beyond the objective's last month.
    """
    check_horizon(horizon, objective.tmax)
    return pretraining_settings(network, objective, preprocessing, {"horizon": horizon, "clinical": clinical, **cohort})


def pretraining_settings(network: nn.Module, objective: nn.Module, preprocessing: dict, cohort: dict) -> dict:
    """What a training is that knows no outcomes; arguments as for :func:`training_settings`."""
    parser, _ = running_config()
    settings = {
        "format": FORMAT,
        "network": {"name": type(network).__name__, **network.arguments},
        "objective": {"name": objective.name, **objective.arguments},
        "preprocessing": preprocessing,
        "training": run_identity(parser) if parser else {},
        **cohort,
    }
    return json.loads(json.dumps(settings))  # tuples become lists, as they will be when read back


def preprocessing_settings(
    spacing: Sequence[float] | str,
    hu_window: Sequence[float],
    lung_mask: str,
    lung_mask_fill: bool,
    margin: float,
    lungmask_weights: str | Sequence[str] | None = None,
    trained: dict | None = None,
) -> dict:
    """How scans are prepared, as plain JSON for `settings.json`.

    Args:
        spacing, hu_window, lung_mask, margin: see :func:`~bundle.transforms.check_preprocessing`.
        lung_mask_fill: fill the mask up to the thorax.
        lungmask_weights: files of the weights of ``lungmask``.
        trained: settings of the weights in use; None in training. The method of lung masking may differ from theirs if
            both mask, because the network saw a mask from either.

    Raises:
        InputError: a value is malformed, or contradicts what the weights were trained with.
    """
    settings = check_preprocessing(spacing, hu_window, lung_mask, margin) | {
        "lung_mask_fill": lung_mask_fill,
        "lungmask_sha256": lungmask_digests(lungmask_weights),
    }
    if trained is None:
        return settings
    fixed = trained["preprocessing"]
    for key, value in settings.items():
        masks = key.startswith("lung_mask") and "none" not in (settings["lung_mask"], fixed["lung_mask"])
        if value != fixed[key] and not masks and key != "lungmask_sha256":
            raise InputError(
                f"--{key} {json.dumps(value)} contradicts {json.dumps(fixed[key])}, with which the weights were "
                "trained; leave it out, or train again with it."
            )
    return fixed | settings


def margin_voxels(preprocessing: dict) -> list[int]:
    """Voxels an axis around the lung that cropping keeps, from the ``margin`` (mm) and the ``spacing`` (mm, or "native").

    Example::

        >>> margin_voxels({"margin": 6.0, "spacing": [3.0, 3.0, 1.5]})
        [2, 2, 4]
    """
    spacing = [1.0] * 3 if preprocessing["spacing"] == "native" else preprocessing["spacing"]  # then the margin is 0
    return [round(preprocessing["margin"] / mm) for mm in spacing]


def share_of_window(hu: list[float] | None, hu_window: list[float]) -> list[float] | None:
    """Where the bounds `hu` of a narrower window lie in `hu_window`, from 0 to 1; None for none.

    Raises:
        InputError: it doesn't lie within.
    """
    if hu is None:
        return None
    low, high = hu_window
    expected = f"null, or two ascending HU within hu_window, {low:g} to {high:g}"
    bounds = checked_numbers("--narrow_hu_window", hu, 2, expected, lambda start, end: low <= start < end <= high)
    return [(bound - low) / (high - low) for bound in bounds]


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """The keys in which two settings differ, each as ``key: old -> new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for k in keys for line in differences(old.get(k), new.get(k), f"{key}.{k}" if key else k)]
    if old == new or (old is None and new in (False, [])):  # a switch that older settings don't know is off
        return []
    short = [text if len(text := json.dumps(value)) <= 60 else "(long)" for value in (old, new)]
    return [f"{key}: {short[0]} -> {short[1]}"]


def settings_file(ckpt: str | Path) -> Path:
    """Where the settings of a weights file are."""
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
    settings.get("preprocessing", {}).setdefault("lung_mask_fill", False)  # older settings don't know it
    return settings
