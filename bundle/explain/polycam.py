# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Poly-CAM in 3-D: the detail of early layers, placed by what late layers find important.

From the last layer to the first, the map so far, brought to the layer's grid, is multiplied by the layer's own map: its
channels, each weighted by what it does to the target when it masks the scan. The layer's map is first divided by itself as
seen on the coarser grid (LNorm), so that it adds detail only. Weights and sums below 0 are 0.

What differs from the source, which is about convolutional networks:

- All blocks of the transformer have one grid, on which LNorm leaves nothing of a layer. So late layers are seen coarsely:
  patches of the last are four times, those of the middle block twice as large.
- Tokens are signed, so each channel is shifted and scaled to lie between 0 and 1, by its least and greatest value (there:
  percentiles, and for the masks alone).
- A masked scan is mixed with the filled one (there: with black), and PCAM+ counts from the filled scan's target, which is
  not 0 as the softmax of a black image nearly is.
- Coarser is the mean over the tokens of a cube (there: linear interpolation, which is the same for half the size).
- The map isn't scaled to the range from 0 to 1.

Source: Englebert, Cornu and De Vleeschouwer, Poly-CAM, ICPR 2022, arXiv 2204.13359.
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
            weights = (("+" in sign) * brought + ("-" in sign) * lost).relu()
            here = scan.lay((weights @ masks).relu())
            if found is None:
                found = here
            else:  # what is finer than the layer after it, by how much it differs from its own mean over those patches
                found = found * here / coarser(here, inside, last).clamp_min(1e-9)
            last = times
        return scan.pick(found)[0]

    return explainer
