# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Training by the shipped configs, of volumes made from pictures, and what the network then says of others."""

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from bundle.maps import GridShiftInferer
from bundle.run.settings import read_settings
from bundle.run.trained import TrainedModel
from scripts.jobs import overrides, run_module

LOW, HIGH = -1000.0, 200.0  # HU of the darkest and the brightest pixel: the bounds of the shipped HU window
THICK = 4  # slices of a picture laid as a volume, all the same


def volumes(pictures: np.ndarray) -> torch.Tensor:
    """Pictures (B, H, W) from 0 to 1 as the network sees them, (B, 1, H, W, slices)."""
    return torch.from_numpy(pictures).float()[:, None, ..., None].repeat(1, 1, 1, 1, THICK)


def write_picture(path: Path, picture: np.ndarray) -> None:
    """A picture (H, W) from 0 to 1 as a volume of 3 mm voxels: the shipped spacing, so that nothing is resampled."""
    volume = np.repeat((LOW + (HIGH - LOW) * picture)[..., None], THICK, 2).round().astype(np.int16)
    nib.save(nib.Nifti1Image(volume, np.diag([3.0, 3.0, 3.0, 1.0])), path)


def train(folder: Path, cohort: Path, configs: list[str], options: dict, seed: int, threads: int) -> Path:
    """Weights trained by `configs` stacked on configs/train.json; a finished training isn't run again."""
    done = folder / "trained"
    if not done.is_file():
        where = {"cohort": cohort, "ckpt_dir": folder, "output_dir": folder, "cache_dir": folder / "cache", "seed": seed}
        words = overrides({"config_file": ["configs/train.json", *configs], **where, **options})
        run_module("monai.bundle", "run", *words, log=folder / "log.txt", threads=threads)
        shutil.rmtree(folder / "cache", ignore_errors=True)
        done.touch()
    return folder / "model.pt"


def kept(ckpt: Path) -> str:
    """Which of the recipe's two networks the training kept."""
    return read_settings(ckpt)["network"]["name"]


@torch.no_grad()
def predicted(
    ckpt: Path, pictures: np.ndarray, clinical: torch.Tensor | None = None, shifts: int | None = None
) -> torch.Tensor:
    """P(T = 1..tmax months) of each picture's patient, (B, tmax), by at most 8 of the origins of the patch grid.

    They are those from which severity is told; the others would sharpen a map, which isn't looked at here. `shifts`:
    origins an axis, None for the usual.
    """
    model, found = TrainedModel(str(ckpt)), []
    network = model.network.eval()
    origins = {"few_origins": True, "severity": model.severity}
    inferer = GridShiftInferer(shifts or model.usual_shifts, model.stride, refine=False, **origins)
    for part in torch.arange(len(pictures)).split(64):
        image = volumes(pictures[part])
        known = {} if clinical is None else {"clinical": clinical[part]}
        found.append(model.objective.pmf(inferer(image, network, lung=torch.ones_like(image), **known)))
    return torch.cat(found)
