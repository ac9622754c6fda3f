# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Patches of the lung become tokens, and what tokens say is laid on the grid."""

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bundle.errors import InputError

HISTOGRAM_BINS = 13  # 100 HU from one to the next in the default window
CONTRAST = 30.0  # a standard deviation of 1/30 of the HU window (40 HU in the default window) has log 0
FREQUENCIES = (math.pi / 2, math.pi)  # no finer ones, by which a small cohort's lesions could be learnt by heart


def to_grid(image: Tensor, lung: Tensor | None, stride: int) -> tuple[Tensor, Tensor | None]:
    """Check image (B, 1, D, H, W) and lung, None for no mask; pad them at the end to whole cells of `stride` voxels.

    The lung becomes None where all of the padded volume is lung. An input of another shape is a ValueError.
    """
    if image.dim() != 5 or image.shape[1] != 1:
        raise ValueError(f"image must be (B, 1, D, H, W), got {list(image.shape)}.")
    if lung is not None and lung.shape != image.shape:
        raise ValueError(f"lung must have the shape of the image, {list(image.shape)}, got {list(lung.shape)}.")
    if not torch.jit.is_scripting():
        # MONAI's MetaTensor would drag its metadata through every operation.
        image = image.as_subclass(Tensor)
        lung = lung if lung is None else lung.as_subclass(Tensor)
    pad = [0, -image.shape[4] % stride, 0, -image.shape[3] % stride, 0, -image.shape[2] % stride]
    if max(pad) > 0:
        image = F.pad(image, pad, mode="replicate")
    if lung is not None:
        lung = F.pad(lung, pad)
        lung = None if bool(lung.amin() > 0) else lung.to(image.dtype)
    return image, lung


def share_of_lung(image: Tensor, lung: Tensor | None, stride: int, least: float = 0.25) -> Tensor:
    """Share of lung in each cell of the grid, (B, d, h, w); less than `least` is none.

    A lung thinner than a cell keeps the cells that have most of it. Image and lung as :func:`to_grid` gives them.
    """
    if lung is None:
        grid = [image.shape[2] // stride, image.shape[3] // stride, image.shape[4] // stride]
        return torch.ones([image.shape[0]] + grid, dtype=image.dtype, device=image.device)
    share = F.avg_pool3d(lung, stride)[:, 0]
    return share * (share >= share.flatten(1).amax(1).clamp(1e-6, least).view(-1, 1, 1, 1))


def mean_of_scans(x: Tensor, counts: list[int]) -> Tensor:
    """Mean token of each scan, (B, dim), of tokens (M, dim) that lie scan by scan, `counts` of each."""
    return torch.stack([tokens.mean(0) for tokens in x.split(counts)])


def on_grid(values: Tensor, index: Tensor, shape: list[int]) -> Tensor:
    """What tokens say, (M, ...), in the cells `index` (M, 4) of a batch's grid of `shape` (B, d, h, w); 0 elsewhere."""
    grid = torch.zeros(shape + list(values.shape[1:]), dtype=values.dtype, device=values.device)
    grid[index[:, 0], index[:, 1], index[:, 2], index[:, 3]] = values
    return grid


def soft_histogram(values: Tensor, inside: Tensor, bins: int) -> Tensor:
    """Shares of the values (M, N) around each of `bins` levels evenly spaced from 0 to 1, (M, bins).

    A value between two levels counts in part for either; those not `inside` (M, N) count for none.
    """
    place = values.clamp(0.0, 1.0) * (bins - 1)
    weight = inside / inside.sum(1, keepdim=True).clamp_min(1.0)
    # Level by level, not scattered: as fast, and the same to the bit on every device.
    return torch.stack([((1.0 - (place - level).abs()).clamp_min(0.0) * weight).sum(1) for level in range(bins)], 1)


def neighbours_correlation(centred: Tensor, inside: Tensor, variance: Tensor, side: int) -> Tensor:
    """How alike neighbouring voxels are in each patch, (M, 1): 1 if smooth, 0 for white noise, below if they alternate.

    One less the mean squared difference of neighbours (the variogram at one voxel) over twice the variance (M, 1).
    Voxels less their mean, and which are `inside`, are (M, side**3); a pair counts if both are.
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

    A patch is described by its voxels, the same voxels standardised within the patch, their mean and the log of their
    standard deviation. A normalisation before the first linear layer would blow up the noise of an empty patch until it
    looks like a lesion. Voxels outside the lung are replaced by the mean of the patch's lung voxels. Gathered voxels
    and a Linear do the work of a `Conv3d`, whose backward is very slow on CPUs with one input channel.

    In the narrow window voxels enter once more, running from -1 to 1, for what is a few HU brighter than healthy lung.
    Beyond it they go back to 0 over half the window's width: held at 1, all that is bright would look alike. Texture is
    what holds wherever in the patch its walls lie. Arguments as for :class:`~bundle.networks.SurvivalMapNet`.
    """

    def __init__(
        self, patch_size: int, stride: int, dim: int, narrow_window: Sequence[float] | None = None, texture: bool = True
    ) -> None:
        super().__init__()
        if patch_size < 1:
            raise InputError(f"patch_size must be at least 1 voxel, got {patch_size}.")
        if narrow_window is not None and not (len(narrow_window) == 2 and 0 <= narrow_window[0] < narrow_window[1] <= 1):
            raise InputError(f"narrow_window must be two ascending shares of the HU window, in [0, 1], got {narrow_window}.")
        self.patch_size = patch_size
        self.stride = stride
        self.narrow_window = None if narrow_window is None else (float(narrow_window[0]), float(narrow_window[1]))
        self.texture = texture
        self.bins = HISTOGRAM_BINS
        self.contrast = CONTRAST
        self.run = math.gcd(patch_size, stride)  # voxels in a row that no patch's border cuts
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
        """Tokens (M, dim) at the grid cells `index`; image and lung as :func:`to_grid` gives them."""
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
        log_std = torch.log(self.contrast * std + 1e-2)
        features = [torch.add(level, centred, alpha=2.0), centred * (0.3 / std), level, log_std]
        if self.texture:
            features.append(2.0 * soft_histogram(x, inside, self.bins))
            features.append(2.0 * neighbours_correlation(centred, inside, variance, self.patch_size))
        if self.narrow_window is not None:
            low, high = self.narrow_window
            place = (mean + centred - low) * (2.0 / (high - low)) - 1.0
            within = place.clamp(-1.0, 1.0)
            features.append(within - (place.clamp(-2.0, 2.0) - within))
        return self.layers(torch.cat(features, 1))


class Position(nn.Linear):
    """Where a patch lies, from Fourier features of low frequency, scaled down so that it is learnt late.

    Lesions of a small cohort cluster, and a network that learns where they were misses the one that lies elsewhere.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(3 + 6 * len(FREQUENCIES), dim)
        self.frequencies = FREQUENCIES

    def forward(self, index: Tensor, counts: list[int]) -> Tensor:
        """Grid cells (M, 4) scan by scan, `counts` of each -> (M, dim); -1 to 1 over the box around a scan's tokens."""
        boxes: list[Tensor] = []
        for cell in index[:, 1:].split(counts):
            first = cell.amin(0)
            boxes.append((2 * (cell - first) + 1) / (cell.amax(0) - first + 1) - 1)
        return self.encode(torch.cat(boxes))

    def encode(self, centre: Tensor) -> Tensor:
        """Places (M, 3), -1 to 1 over the box -> (M, dim)."""
        features = [centre]
        for frequency in self.frequencies:
            features += [torch.sin(frequency * centre), torch.cos(frequency * centre)]
        return F.linear(0.1 * torch.cat(features, 1).to(self.weight.dtype), self.weight, self.bias)
