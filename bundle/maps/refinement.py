# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Refinement: what cells of a map look like tells which of them a hot patch is hot for."""

import math

import torch
import torch.nn.functional as F
from monai.networks.layers import GaussianFilter
from torch import Tensor

BINS = 24  # an axis of a histogram of two numbers; 64 of one
SAYS_ENOUGH = 0.5  # nats between a map and an even one, from which on looks count in full


def refined(weight: Tensor, even: Tensor, inside: Tensor, image: Tensor, lung: Tensor | None, cell: int) -> Tensor:
    """Weights (B, d, h, w) times :func:`appearance_ratio`; they sum to 1 over a scan.

    A wall one voxel thick makes every patch around it hot, and the air beside it looks like air elsewhere. Of a lesion
    that the network is sure of in some places only, the rest looks like these. So the scan itself is asked how its hot
    places differ, in brightness and in texture, from those of a map which is even.

    Args:
        weight, even: of the cells, 0 outside, and of a map that knows nothing.
        inside: which cells are in the map.
        image: (B, 1, D, H, W), HU window scaled to [0, 1].
        lung: (B, 1, D, H, W) in {0, 1}; None for no mask.
        cell: side of a cell in voxels.
    """
    sizes = zip(image.shape[:1:-1], weight.shape[:0:-1], strict=True)
    pad = [n for voxels, cells in sizes for n in (0, cells * cell - voxels)]
    lung = F.pad(torch.ones_like(image) if lung is None else lung.to(image.dtype), pad)
    amount = F.avg_pool3d(lung, cell)[:, 0]
    brightness = F.avg_pool3d(F.pad(image, pad) * lung, cell)[:, 0] / amount.clamp_min(1e-6)
    weight = weight * appearance_ratio(brightness, inside & (amount > 0), weight, even)
    return weight / weight.sum((1, 2, 3), keepdim=True)


def appearance_ratio(brightness: Tensor, inside: Tensor, weight: Tensor, even: Tensor) -> Tensor:
    """By how much the looks of each cell, (B, d, h, w), speak for it; 1 outside. Arguments as for :func:`refined`.

    The product of two :func:`likelihood_ratio`. The first is of the cell's brightness, squared, and between 0.6 and 3,
    so that a few rare voxels don't outshine a lesion of mixed brightness. The second is of mean and standard deviation
    in the 3 x 3 x 3 cells around it, its root, as neighbours share most of these cells, and between 0.1 and 10.

    Looks don't overrule what the network says. What it finds safer than the median cell gains no more by them than the
    median cell does; otherwise a structure that protects, but is as bright as a lesion, would be shown as danger. And
    the less a map says, the less looks add to it, so that noise isn't sharpened: the ratio has the power of the
    Kullback-Leibler divergence between the map and an even one, over :data:`SAYS_ENOUGH`, at most 1.
    """
    there = inside.to(brightness.dtype)
    parts = torch.stack([there, brightness * there, brightness.square() * there], 1)
    count, mean, square = F.avg_pool3d(parts, 3, 1, 1).unbind(1)
    mean, square = mean / count.clamp_min(1e-6), square / count.clamp_min(1e-6)
    spread = (square - mean.square()).clamp_min(0).sqrt()
    ratio = torch.ones_like(weight)
    for i, lung in enumerate(inside):
        w, e = (part[i][lung] / part[i][lung].sum() for part in (weight, even))
        own = likelihood_ratio(bin_of(brightness[i][lung], 64), (64,), w, e, 1.5)
        # 0.003 is 4 HU in the default window: below that one spread is like another
        around = bin_of(mean[i][lung], BINS) * BINS + bin_of((spread[i][lung] + 0.003).log(), BINS)
        around = likelihood_ratio(around, (BINS, BINS), w, e, 1.0)
        looks = own.clamp(0.6, 3).square() * around.clamp(0.1, 10).sqrt()
        said = w / e
        looks = torch.where(said < said.median(), looks.minimum(looks.median()), looks)
        divergence = F.kl_div(e.log(), w, reduction="sum")
        ratio[i][lung] = looks.pow((divergence / SAYS_ENOUGH).clamp(0, 1))
    return ratio


def bin_of(values: Tensor, bins: int) -> Tensor:
    """Which of so many equal bins from the 0.1st to the 99.9th percentile each of the values (n,) is in."""
    ordered = values.sort()[0]
    low, high = ordered[int(0.001 * (len(ordered) - 1))], ordered[int(0.999 * (len(ordered) - 1))]
    return ((values - low) / (high - low).clamp_min(1e-6) * bins).long().clamp(0, bins - 1)


def likelihood_ratio(where: Tensor, shape: tuple[int, ...], weight: Tensor, even: Tensor, sigma: float) -> Tensor:
    """How much more common a cell's looks are where the weight lies than in an even map, (n,): a naive Bayes factor.

    `where` is the place of each cell in the flattened histogram of `shape`, smoothed by a Gaussian of `sigma` bins.
    Even weights are smaller at the lung's border; else a map that knows nothing would seem to find what lies inside.
    """
    share = torch.stack([torch.bincount(where, w.double(), math.prod(shape)) for w in (weight, even)])
    share = (share / share.sum(1, keepdim=True)).float().view(1, 2, *shape)
    share = GaussianFilter(len(shape), sigma, truncated=4.0)(share)[0].flatten(1) + 1e-6
    return (share[0] / share[1])[where]
