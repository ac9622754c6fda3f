# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Patches of the lung become tokens, and what tokens say is laid on the grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def soft_histogram(values: Tensor, inside: Tensor, bins: int) -> Tensor:
    """Shares of the values (M, N) around each of `bins` (at least 2) levels evenly spaced from 0 to 1, (M, bins).

    A value between two levels counts in part for either, and beyond them for the last one. `inside` (M, N) in {0, 1} says
    which values count; where none does, all shares are 0.
    """
    place = values.clamp(0.0, 1.0) * (bins - 1)
    weight = inside / inside.sum(1, keepdim=True).clamp_min(1.0)
    # Level by level, not scattered: as fast, and the same to the bit on every device.
    return torch.stack([((1.0 - (place - level).abs()).clamp_min(0.0) * weight).sum(1) for level in range(bins)], 1)


def neighbours_correlation(centred: Tensor, inside: Tensor, variance: Tensor, side: int) -> Tensor:
    """How alike voxels next to each other are within a patch, (M, 1): 1 if smooth, 0 for white noise, below if they alternate.

    One less the mean squared difference of neighbours along all axes (the variogram at a distance of one voxel) over twice
    the variance. `centred`, `inside` (M, side**3), `variance` (M, 1); only pairs with both in `inside` count.
    """
    cube, mask = centred.view(-1, side, side, side), inside.view(-1, side, side, side)
    total, pairs = torch.zeros_like(variance), torch.zeros_like(variance)
    for axis in (1, 2, 3):
        both = mask.narrow(axis, 0, side - 1) * mask.narrow(axis, 1, side - 1)
        total = total + (torch.diff(cube, dim=axis).square() * both).sum((1, 2, 3)).unsqueeze(1)
        pairs = pairs + both.sum((1, 2, 3)).unsqueeze(1)
    return 1.0 - total / (2.0 * pairs.clamp_min(1.0) * variance.clamp_min(1e-9))


class PatchEmbed(nn.Module):
    """Overlapping 3-D patches of the lung become tokens; HU and texture both survive the embedding.

    Every patch is described by its voxels, the same voxels standardised within the patch, their mean and the log of
    their standard deviation, and with a `narrow_window` by its voxels once more, in that window: what is a few HU brighter
    than healthy lung hardly shows in a wide one. With `texture` two things enter as well that hold wherever in a patch its
    walls lie, which a linear layer on voxels would have to learn place by place: the histogram of its lung voxels, how much
    of it is wall and how much air, and how alike neighbours are. No normalisation comes before the first linear layer: it
    would blow up the noise of an empty patch until it looks like a lesion. Voxels outside the lung carry no evidence: they
    are replaced by the mean of the patch's lung voxels. Gathered voxels and a Linear do the work of a convolution, because
    a `Conv3d` with one input channel has a very slow backward on CPUs.

    Args:
        patch_size: patch side in voxels.
        stride: distance between patches in voxels, at most `patch_size`.
        dim: length of a token.
        narrow_window: two values of the image between which voxels run from -1 to 1 once more; from there they go back to
            0 over half its width, as what lies beyond is for the wide window to tell: held at 1, all that is bright would
            look alike, and lesions of two kinds would be learnt as one. None for no second window.
        texture: describe patches by their histogram and the correlation of neighbouring voxels as well.
    """

    def __init__(
        self,
        patch_size: int,
        stride: int,
        dim: int,
        narrow_window: Sequence[float] | None = None,
        texture: bool = False,
    ) -> None:
        super().__init__()
        self.narrow_window = None if narrow_window is None else (float(narrow_window[0]), float(narrow_window[1]))
        self.texture = texture
        self.bins = 13  # 100 HU from one to the next in the default window
        self.patch_size = patch_size
        self.stride = stride
        self.run = math.gcd(patch_size, stride)  # voxels in a row that no patch's border cuts
        # A standard deviation of 1/30 of the HU window (40 HU in the default window) has log 0.
        self.contrast = 30.0
        numbers = (2 if narrow_window is None else 3) * patch_size**3 + 2 + (self.bins + 1 if texture else 0)
        self.layers = nn.Sequential(nn.Linear(numbers, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def gather(self, volume: Tensor, index: Tensor, replicate: bool) -> Tensor:
        """Patches (M, patch_size**3) of `volume` (B, 1, D, H, W) at the grid cells `index` (M, 4) = (b, z, y, x)."""
        p, s = self.patch_size, self.stride
        before = (p - s) // 2
        after = p - s - before
        if p > s:
            pad = [before, after, before, after, before, after]
            volume = F.pad(volume, pad, mode="replicate") if replicate else F.pad(volume, pad)
        # Whole runs of voxels are copied, several times faster than indexing an unfolded volume voxel by voxel.
        depth, height, width = volume.shape[2], volume.shape[3], volume.shape[4] // self.run
        z, y, x = index[:, 1] * s, index[:, 2] * s, index[:, 3] * (s // self.run)
        first = ((index[:, 0] * depth + z) * height + y) * width + x
        step = torch.arange(p, device=volume.device)
        others = ((step[:, None, None] * height + step[:, None]) * width + step[: p // self.run]).flatten()
        runs = (first.unsqueeze(1) + others).flatten()
        return volume.reshape(-1, self.run).index_select(0, runs).view(index.shape[0], p * p * p)

    def forward(self, image: Tensor, lung: Tensor | None, index: Tensor) -> Tensor:
        if lung is None and self.patch_size > self.stride:
            lung = torch.ones_like(image)  # patches at the border reach beyond the scan, where there is no lung
        x = self.gather(image, index, True)
        inside = torch.ones_like(x) if lung is None else self.gather(lung, index, False)
        count = inside.sum(1, keepdim=True).clamp_min(1.0)
        mean = (x * inside).sum(1, keepdim=True) / count
        centred = (x - mean) * inside
        variance = centred.square().sum(1, keepdim=True) / count
        tiny = 1e-3 / self.contrast
        std = (variance + tiny * tiny).sqrt()  # the square root has a gradient in a constant patch, too
        level = 2.0 * mean - 1.0
        features = [
            torch.add(level, centred, alpha=2.0),
            centred * (0.3 / std),
            level,
            torch.log(self.contrast * std + 1e-2),
        ]
        if self.texture:
            features.append(2.0 * soft_histogram(x, inside, self.bins))
            features.append(2.0 * neighbours_correlation(centred, inside, variance, self.patch_size))
        if self.narrow_window is not None:
            low, high = self.narrow_window
            place = (mean + centred - low) * (2.0 / (high - low)) - 1.0
            within = place.clamp(-1.0, 1.0)
            features.append(within - (place.clamp(-2.0, 2.0) - within))
        return self.layers(torch.cat(features, 1))


def mean_of_scans(x: Tensor, counts: list[int]) -> Tensor:
    """Mean token of each scan, (B, dim), of tokens (M, dim) that lie scan by scan, `counts` of each."""
    return torch.stack([tokens.mean(0) for tokens in x.split(counts)])


def on_grid(values: Tensor, index: Tensor, shape: list[int]) -> Tensor:
    """What tokens say, (M, ...), in the cells `index` (M, 4) of a batch's grid of `shape` (B, d, h, w); 0 elsewhere."""
    grid = torch.zeros(shape + list(values.shape[1:]), dtype=values.dtype, device=values.device)
    grid[index[:, 0], index[:, 1], index[:, 2], index[:, 3]] = values
    return grid
