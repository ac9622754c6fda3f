# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""How much a scan is like the scans of the training: its lung's descriptors, against theirs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.transforms import Transform
from torch import Tensor

from bundle.networks.descriptors import DESCRIPTORS, describe, level_and_spread, tokens_at

TAILS = (0.01, 0.99)
UNLIKE = 0.02  # a scan whose familiarity is below is said to be unlike the training


def look(described: Tensor) -> Tensor:
    """How a scan's lung looks, (108,), from its tokens' descriptors (M, 29): their level, log spread, and both tails."""
    described = described.float()
    level, spread = level_and_spread(described)
    tails = torch.quantile((described - level) / spread, torch.tensor(TAILS), 0)
    parts = [level, spread.log(), *tails]
    return torch.cat([part[:-2] for part in parts])  # where voxels lie says nothing of the scanner or the tissue


@dataclass(frozen=True)
class Familiarity:
    """The look of the training scans, by which others are judged.

    Args:
        mean: of each number of :func:`look`.
        spread: its standard deviation.
        distances: of training scans from the others, each left out with those of its site, ascending.
    """

    mean: list[float]
    spread: list[float]
    distances: list[float]

    def distance(self, seen: Tensor) -> float:
        """Root mean square of a look's z-scores, each at most 20."""
        return distance(seen, torch.tensor(self.mean), torch.tensor(self.spread))

    def quantile(self, seen: Tensor) -> float:
        """Share of the training scans that are as far or further from the others; 0 for a scan further than all."""
        far = self.distance(seen)
        return sum(d >= far for d in self.distances) / len(self.distances)

    def strangeness(self, seen: Tensor) -> float:
        """0 within the range of the training scans, 1 from twice the distance of the farthest."""
        return min(1.0, max(0.0, self.distance(seen) / max(self.distances[-1], 1e-6) - 1.0))

    def strangest(self, seen: Tensor) -> str:
        """The descriptor that is most unlike the training, and how."""
        z = (seen - torch.tensor(self.mean)) / torch.tensor(self.spread)
        at = int(z.abs().argmax())
        names = DESCRIPTORS[:-2]
        part = ("level", "spread", "low tail", "high tail")[at // len(names)]
        return f"the {part} of {names[at % len(names)]} is {float(z[at].abs()):.0f} standard deviations off"


def distance(seen: Tensor, mean: Tensor, spread: Tensor) -> float:
    return float(((seen - mean) / spread).abs().clamp_max(20).square().mean().sqrt())


def fit_familiarity(looks: Tensor, folds: Sequence[int]) -> Familiarity:
    """From the looks (N, 108) of the training scans, and the fold of each, in which it is left out with others."""
    fold = torch.tensor(folds)
    distances = []
    for i, seen in enumerate(looks):
        others = looks[fold != fold[i]]
        others = others if len(others) > 1 else looks
        distances.append(distance(seen, *floored(others.mean(0), others.std(0))))
    return rounded(*floored(looks.mean(0), looks.std(0)), distances)


def floored(mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of looks, with a floor for a number that hardly varies."""
    return mean, (spread.nan_to_num(0).square() + (0.02 + 0.01 * mean.abs()).square()).sqrt()


def rounded(mean: Tensor, spread: Tensor, distances: Sequence[float]) -> Familiarity:
    return Familiarity(*[[round(float(x), 5) for x in part] for part in (mean, spread, sorted(distances))])


class Familiarityd(Transform):
    """Adds ``familiarity`` (0 to 1) and ``strangeness`` (0 to 1), means over the models, and a note for a strange scan.

    Args:
        models: familiarity of each model in use; None for one that has none. Without any nothing is added.
    """

    def __init__(self, models: Sequence[Familiarity | None]) -> None:
        self.models = [model for model in models if model is not None]

    def __call__(self, data: Mapping[str, Any]) -> dict:
        out = dict(data)
        if not self.models:
            return out
        image, lung = (torch.as_tensor(data[key]).as_subclass(Tensor)[0].float() for key in ("image", "lung"))
        seen = look(describe(image, lung, tokens_at(lung)))
        out["familiarity"] = sum(model.quantile(seen) for model in self.models) / len(self.models)
        out["strangeness"] = sum(model.strangeness(seen) for model in self.models) / len(self.models)
        if out["familiarity"] < UNLIKE:
            widened = f", its distribution is {out['strangeness']:.0%} the cohort's own" if out["strangeness"] > 0 else ""
            note = f"unlike the training scans ({self.models[0].strangest(seen)}{widened})"
            out["notes"] = "; ".join(filter(None, [data.get("notes"), note]))
        return out
