# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Poly-CAM in 3-D: the detail of early layers, placed by what late layers find important.

All blocks of the transformer have one grid, on which the method would be the identity. So late layers are seen coarsely:
each layer from the last to the first has patches of half the size of the one after it.

Source: Englebert et al., Poly-CAM, arXiv 2204.13359.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bundle.explain.scan import TransformerTokens


def coarser(grid: Tensor, inside: Tensor, times: int) -> Tensor:
    """Means over the tokens in cubes of `times` cells, brought back to the grid (C, d, h, w) linearly; 0 outside."""
    if times == 1:
        return grid
    pads = [n for size in reversed(grid.shape[1:]) for n in (0, -size % times)]
    sums = F.avg_pool3d(F.pad(torch.cat([grid * inside, inside])[None], pads), times)
    means = sums[:, :-1] / sums[:, -1:].clamp_min(1e-6)
    size = [n + pad for n, pad in zip(grid.shape[1:], pads[::-2])]
    fine = F.interpolate(means, size, mode="trilinear")[0]
    return fine[:, : grid.shape[1], : grid.shape[2], : grid.shape[3]] * inside


def layer(scan: TransformerTokens, level: str, times: int) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's channels as masks `times` coarser, (C, M), and how each changes the target, (C,).

    The changes are what a mask brings into the filled scan, and what is lost where the mask is replaced in the scan.
    """
    if ("layer", level) not in scan.memo:
        channels = scan.pick(coarser(scan.lay(scan.features(level)), everywhere(scan), times))
        low, high = channels.amin(1, keepdim=True), channels.amax(1, keepdim=True)
        masks = (channels - low) / (high - low).clamp_min(1e-9)
        nothing, everything = scan.kept(torch.stack([0 * masks[0], 0 * masks[0] + 1]))
        scan.memo["layer", level] = masks, scan.kept(masks) - nothing, everything - scan.kept(1 - masks)
    return scan.memo["layer", level]


def everywhere(scan: TransformerTokens) -> Tensor:
    """Which cells hold a token, (1, d, h, w)."""
    return scan.lay(torch.ones(len(scan.index)).to(scan.image))


def poly_cam(sign: str):
    """The explainer PCAM``+`` (by what masks bring), PCAM``-`` (by what is lost without them) or PCAM``+-`` (by both)."""

    def explainer(scan: TransformerTokens, level: str = "") -> Tensor:
        depth, inside, found, last = len(scan.network.blocks), everywhere(scan), None, 1
        layers = [("output", 4), *([(f"block{depth // 2}", 2)] if depth > 1 else []), ("input", 1)]
        for place, times in layers:
            masks, brought, lost = layer(scan, place, times)
            weights = ("+" in sign) * brought + ("-" in sign) * lost
            here = scan.lay((weights @ masks).relu())
            if found is None:
                found = here
            else:  # what is finer than the layer after it, by how much it differs from its own mean over those patches
                found = found * here / coarser(here, inside, last).clamp_min(1e-9)
            last = times
        return scan.pick(found)[0]

    return explainer
