# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""All maps of a scan, and the numbers of each, the same for all."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bundle.explain import applicable, tokens_of_scan
from bundle.explain.cubelets import cubelets
from bundle.explain.scan import ScanTokens
from bundle.maps import GridShiftInferer
from bundle.maps.heat import spread
from bundle.metrics.faithfulness import (
    agreements,
    cascading_randomisation,
    completeness_error,
    faithfulness,
    shift_agreement,
)
from bundle.metrics.localisation import average_precision, pointing_game
from bundle.networks import CodebookNet, SurvivalMapNet
from bundle.run import TrainedModel

TRUTH, NOISE = "the mask itself", "noise"  # what any map is compared to: the best that tokens can show, and the worst
COMPLETE = ("gradient_x_input", "integrated_gradients", "smoothgrad")  # whose maps are to sum to the target's difference
LAST = {SurvivalMapNet: "embed", CodebookNet: "hazard"}  # the part of the network after which all weights are random
TINY = 1e-6


@dataclass(frozen=True)
class Scan:
    """A test scan: HU window scaled to [0, 1] and lung, (1, 1, D, H, W), and what kills, (D, H, W)."""

    image: Tensor
    lung: Tensor
    lesion: np.ndarray


def diseased(table: Path, num: int, hu_window: tuple[float, float]) -> list[Scan]:
    """The first `num` scans of a cohort that have disease and, where it has splits, are in the split test."""
    cohort, found, (low, high) = pd.read_csv(table), [], hu_window
    for row in cohort[cohort.split == "test"].to_dict("records") if "split" in cohort else cohort.to_dict("records"):
        volumes = {key: np.asarray(nib.load(table.parent / row[key]).dataobj) for key in row if is_volume(key)}
        if len(found) < num and volumes["gt_mask"].any():
            image = ((torch.from_numpy(volumes["image"].astype(np.float32)) - low) / (high - low)).clamp(0, 1)
            lung = torch.from_numpy((volumes.get("lung_mask", np.ones_like(image)) > 0).astype(np.float32))
            found.append(Scan(image[None, None], lung[None, None], volumes["gt_mask"] > 0))
    return found


def is_volume(column: str) -> bool:
    return column in ("image", "lung_mask", "gt_mask")


class Look:
    """All maps of a scan by a network.

    Args:
        model: of the network's settings.
        network: the model's own, or one with other weights.
        image, lung: of the scan.
        clock: measure each method alone; else what several methods need is shared.

    Attributes:
        tokens: of the scan.
        values: by method, hot where it is worse, (M,) each. Those of the heat are means over the finished map's voxels.
        pictures: by method, (C, D, H, W), and of those that have no hot side as well.
        seconds, found: by method; what an explainer says beside its map.
    """

    def __init__(self, model: TrainedModel, network: nn.Module, image: Tensor, lung: Tensor, clock: bool = False) -> None:
        usual = model.familiarity[0].mean[0] if model.familiarity[0] else None
        self.lung, self.tokens = lung, tokens_of_scan(network, image, lung, usual=usual)
        self.values: dict[str, Tensor] = {}
        self.pictures: dict[str, Tensor] = {}
        self.seconds: dict[str, float] = {}
        self.found: dict[str, dict[str, float]] = {}
        for name, (explainer, level) in applicable(network).items():
            if explainer.of is cubelets:
                continue
            self.tokens.memo, self.tokens.found = {} if clock else self.tokens.memo, {}
            start = time.process_time()
            with torch.no_grad():
                if name == "heat":
                    inferer = GridShiftInferer(model.usual_shifts, network.stride, severity=model.severity)
                    finer = inferer(image, network, lung=lung)[0, -1:]
                    cell = round(image.shape[2] / finer.shape[1])
                    self.pictures[name] = spread(finer[None], cell, tuple(image.shape[2:]), lung)[0]
                    values = pooled(self.pictures[name], self.tokens)
                else:
                    values = explainer.of(self.tokens, level) * (explainer.hot or 1)
                    self.pictures[name] = self.lay(values)
            self.seconds[name], self.found[name] = time.process_time() - start, self.tokens.found
            if explainer.hot:
                self.values[name] = values

    def lay(self, values: Tensor) -> Tensor:
        """Values of tokens, (M,) or (M, C), on voxels, (C, D, H, W)."""
        return spread(self.tokens.lay(values)[None], self.tokens.cell, tuple(self.lung.shape[2:]), self.lung)[0]

    def heat(self, name: str) -> np.ndarray:
        """A map on voxels, (D, H, W), moved so that it is above 0 in the lung, and 0 outside."""
        values = (self.pictures[name] if name in self.pictures else self.lay(self.values[name]))[0]
        lung = self.lung[0, 0] > 0
        return torch.where(lung, values - values[lung].min() + TINY, 0.0).numpy()


def pooled(on_voxels: Tensor, tokens: ScanTokens) -> Tensor:
    """The mean of voxels (1, D, H, W) in the lung, in the cell of each token, (M,)."""
    total, inside = (F.avg_pool3d(x[None], tokens.cell, ceil_mode=True)[0, 0] for x in (on_voxels, tokens.lung[0]))
    return tokens.pick(total / inside.clamp_min(1e-9))


def measure(
    model: TrainedModel, shuffled: TrainedModel | None, scans: list[Scan]
) -> tuple[list[dict], dict[str, np.ndarray]]:
    """A row of numbers for each method, means over scans, and what is kept of the maps.

    Args:
        model: to explain.
        shuffled: the same, trained on outcomes that were dealt out at random. None leaves out what takes longest: other
            weights, and the first scan moved.
        scans: to measure on.

    Returns:
        the rows, and by `METHOD/SCAN` the values of tokens, by `picture/METHOD` the plane of the first scan with most of
        its lesion; `picture/image` and `picture/lesion` are of that plane.
    """
    lists: dict[str, dict[str, list]] = {}
    kept: dict[str, np.ndarray] = {}

    def add(name: str, **numbers: float | None) -> None:
        for key, value in numbers.items():
            lists.setdefault(name, {}).setdefault(key, []).append(np.nan if value is None else value)

    for number, scan in enumerate(scans):
        look = Look(model, model.network, scan.image, scan.lung, clock=number == 0)
        lesion = torch.from_numpy(scan.lesion.astype(np.float32))[None]
        noise = torch.rand(len(look.tokens.index), generator=torch.Generator().manual_seed(number))
        change = float(look.tokens.kept(torch.ones(1, len(noise))) - look.tokens.kept(torch.zeros(1, len(noise))))
        others = {TRUTH: pooled(lesion, look.tokens), NOISE: noise}
        look.values |= others
        for name, values in look.values.items():
            heat = look.heat(name)
            add(name, average_precision=average_precision(heat, scan.lesion), pointing_game=pointing_game(heat, scan.lesion))
            add(name, **faithfulness(look.tokens.kept, values))
            kept[f"{name}/{number}"] = values.numpy().astype(np.float32)
            if name.startswith(COMPLETE):
                add(name, completeness_error=completeness_error(values, change))
            if number == 0 and name not in others:
                add(name, seconds=look.seconds[name])
        if shuffled is not None and number == 0:
            check(model, shuffled, scan, {name: look.values[name] for name in look.pictures if name in look.values}, add)
        if number == 0:
            k = int(scan.lesion.sum((0, 1)).argmax())
            volumes = {"image": scan.image[0], "lesion": lesion, **look.pictures}
            kept |= {f"picture/{name}": volume[..., k].numpy().astype(np.float16) for name, volume in volumes.items()}
    rows = [{"method": name, **{key: mean(values) for key, values in found.items()}} for name, found in lists.items()]
    return rows, kept


def check(
    model: TrainedModel, shuffled: TrainedModel, scan: Scan, values: dict[str, Tensor], add: Callable[..., None]
) -> None:
    """Add what becomes of maps of a scan, by their `values` of tokens, with other weights, and where it is moved."""

    def see(network: nn.Module) -> dict[str, Tensor]:
        return values if network is model.network else Look(model, network, scan.image, scan.lung).values

    def moved(image: Tensor, lung: Tensor) -> dict[str, Tensor]:
        look = Look(model, model.network, image, lung)
        return {name: torch.from_numpy(look.heat(name)) for name in values}

    randomised = cascading_randomisation(model.network, see, after=("head", LAST[type(model.network)]))
    randomised["weights"] = randomised.pop(LAST[type(model.network)])
    randomised["labels"] = agreements(values, Look(shuffled, shuffled.network, scan.image, scan.lung).values)
    for part, found in randomised.items():
        for name, value in found.items():
            add(name, **{f"random_{part}": None if value is None else abs(value)})  # a map turned round agrees as much
    for name, value in shift_agreement(moved, scan.image, scan.lung).items():
        add(name, shift=value)


def mean(values: list[float]) -> float | None:
    """Over the scans that have a value."""
    there = [value for value in values if not np.isnan(value)]
    return float(np.mean(there)) if there else None
