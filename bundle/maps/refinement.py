# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A finer survival map from the voxels' own share in each patch."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from monai.networks.layers import GaussianFilter
from torch import Tensor

BINS = 24  # an axis of a histogram of two numbers; 64 of one


SAYS_ENOUGH = 0.5  # nats between a map and an even one, from which on looks count in full


def bin_of(values: Tensor, bins: int) -> Tensor:
    """Which of so many equal bins from the 0.1st to the 99.9th percentile each of the values (n,) is in."""
    ordered = values.sort()[0]
    low, high = ordered[int(0.001 * (len(ordered) - 1))], ordered[int(0.999 * (len(ordered) - 1))]
    return ((values - low) / (high - low).clamp_min(1e-6) * bins).long().clamp(0, bins - 1)


def likelihood_ratio(where: Tensor, shape: tuple[int, ...], weight: Tensor, even: Tensor, sigma: float) -> Tensor:
    """How much more common what a cell looks like is where the weight lies than where it would lie if all patches weighed
    the same, (n,): the ratio of two histograms, one weighted by `weight` and one by `even`, both smoothed.

    Args:
        where: place of each cell in the flattened histogram, (n,).
        shape: of the histogram.
        weight: not negative, (n,).
        even: the weights of a map that knows nothing, (n,). They are smaller at the lung's border; next to equal ones,
            such a map would seem to have found whatever only lies further in.
        sigma: of the Gaussian that smooths the histograms, in bins.
    """
    share = torch.stack([torch.bincount(where, w.double(), int(np.prod(shape))) for w in (weight, even)])
    share = (share / share.sum(1, keepdim=True)).float().view(1, 2, *shape)
    share = GaussianFilter(len(shape), sigma, truncated=4.0)(share)[0].flatten(1) + 1e-6
    return (share[0] / share[1])[where]


def appearance_ratio(brightness: Tensor, inside: Tensor, weight: Tensor, even: Tensor) -> Tensor:
    """By how much the looks of each cell speak for it, (B, d, h, w); 1 outside.

    The product of two :func:`likelihood_ratio`, of the cell's brightness (between 0.6 and 3, lest a few rare voxels outshine a
    lesion of mixed brightness; squared), and of mean and standard deviation in the 3 x 3 x 3 cells around it (between 0.1
    and 10; its root, as neighbours share most of these cells). Looks don't overrule what the network says: what it
    finds safer than the median cell gains no more by them than the median cell does. Otherwise a structure that protects,
    but is as bright as a lesion, would be shown as danger. And the less a map says the less looks add to it: the ratio has the
    power of the Kullback-Leibler divergence between the map and an even one, over :data:`SAYS_ENOUGH`, at most 1. Otherwise
    a map of noise, which some brightness happens to have a little more of, would come out as a sharp one.

    Args:
        brightness: of the cells, (B, d, h, w), HU window scaled to [0, 1].
        inside: which cells are lung, (B, d, h, w).
        weight: not negative, 0 outside, (B, d, h, w).
        even: the weights of a map that knows nothing, (B, d, h, w).
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
