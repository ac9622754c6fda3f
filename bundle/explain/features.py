# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What the survival map itself says of each token, what is on the way to it, and where two ways of looking differ."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bundle.explain.gradients import cam
from bundle.explain.scan import CodebookTokens, ScanTokens, TransformerTokens

QUERIES = 128  # whose attention to all tokens of a scan is in memory at once


def channel(scan: ScanTokens, number: int) -> Tensor:
    """A channel of the map at the tokens; of a map of voxels, at the first of a token's cell."""
    grid = scan.survival_map[0, number]
    step = 1 if grid.shape == scan.shape else scan.cell
    return scan.pick(grid[::step, ::step, ::step])


def location(scan: ScanTokens, level: str = "") -> Tensor:
    """Months."""
    return channel(scan, 0)


def weight(scan: ScanTokens, level: str = "") -> Tensor:
    """Sums to 1."""
    found = channel(scan, -1)
    return found / found.sum()


def heat(scan: ScanTokens, level: str = "") -> Tensor:
    """Sums to P(death by the horizon)."""
    return scan.death * weight(scan)


def evidence(scan: CodebookTokens, level: str = "") -> Tensor:
    """Mean hazard of the words of each token."""
    return scan.evidence


def norm(scan: ScanTokens, level: str) -> Tensor:
    """Length of each token."""
    return scan.features(level).norm(dim=1)


def pca(scan: ScanTokens, level: str) -> Tensor:
    """The first three principal components of a scan's tokens as red, green and blue, (M, 3), each from 0 to 1.

    A component runs from its 1st to its 99th percentile, and has the sign that makes its largest loading positive.
    """
    x = scan.features(level)
    x = x - x.mean(0)
    axes = torch.linalg.eigh(x.T @ x)[1].flip(1)[:, :3]
    part = F.pad(x @ (axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()), [0, 3 - axes.shape[1]])
    ordered, last = part.sort(0)[0], len(part) - 1
    low, high = ordered[math.floor(0.01 * last)], ordered[math.ceil(0.99 * last)]
    return ((part - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)


def change(scan: TransformerTokens, level: str) -> Tensor:
    """By how much a block changes each token: the length of the difference."""
    after = scan.features("output" if level == f"block{len(scan.network.blocks)}" else level)
    return (after - before(scan, int(level.removeprefix("block")))).norm(dim=1)


def before(scan: TransformerTokens, block: int) -> Tensor:
    """What enters a block; the first is number 1."""
    return scan.features(f"block{block - 1}" if block > 1 else "input")


def rollout(scan: TransformerTokens, level: str = "") -> Tensor:
    """Attention roll-out: how much of each token at the transformer's input reaches the head's weights. Sums to 1.

    A block passes on half of a token as it is, and half of what it attends to, the mean over attention heads.

    Source: Abnar and Zuidema, Quantifying Attention Flow in Transformers, ACL 2020.
    """
    flow, window = weight(scan), scan.network.window
    for number, block in reversed(list(enumerate(scan.network.blocks, 1))):
        qkv, heads = block.attention.qkv(block.norm1(before(scan, number))), block.attention.num_heads
        if window == 0:
            seen = attended(qkv[None], flow[None], heads, None)[0]
        else:
            mask, slots = scan.tokens.mask, scan.tokens.slots
            places = len(slots) if mask is None else mask.numel()
            windows = [x.new_zeros(places, *x.shape[1:]).index_copy(0, slots, x) for x in (qkv, flow)]
            seen = attended(*(x.view(-1, window**3, *x.shape[1:]) for x in windows), heads, mask).flatten()[slots]
        flow = 0.5 * (flow + seen)
    return flow


def attended(qkv: Tensor, flow: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    """What flows on to each token as a key, (G, N), of what each has as a query, (G, N); qkv (G, N, 3 dim), mask (G, N)."""
    q, k, _ = qkv.unflatten(2, (3, heads, -1)).unbind(2)
    found = torch.zeros_like(flow)
    for part in torch.arange(q.shape[1], device=q.device).split(QUERIES):
        score = torch.einsum("gnhd,gmhd->ghnm", q[:, part], k) * q.shape[3] ** -0.5
        if mask is not None:
            score = score.masked_fill(~mask[:, None, None, :], -torch.inf)
        found += torch.einsum("gn,ghnm->gm", flow[:, part], score.softmax(3)) / heads
    return found


def heat_minus_gradient(scan: TransformerTokens, level: str = "") -> Tensor:
    """The weights less Layer-CAM at the transformer's output, both as shares of their sum."""
    other = cam("layercam")(scan, "output")
    return weight(scan) - other / other.sum().clamp_min(1e-12)
