# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Transformer blocks over the tokens of the lung."""

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bundle.errors import InputError

HEAD_DIM = 16  # numbers of a token that one attention head sees
MLP_RATIO = 2  # hidden width of a block's MLP over the length of a token


class Tokens(NamedTuple):
    """Where the M tokens of a batch lie."""

    index: Tensor  # grid cell of each token, (M, 4) = (scan, z, y, x), scan by scan and window by window
    counts: list[int]  # number of tokens of each scan
    slots: Tensor  # place of each token in the list of windows that hold any, (M,), ascending
    mask: Tensor | None  # which places of these windows hold a token, (windows, window**3); None if all do


def tokens_of(share: Tensor, window: int) -> Tokens:
    """The tokens of a batch: cells with a share of lung, (B, d, h, w), above 0; a ValueError for a scan without any."""
    keep = share > 0
    counts: list[int] = keep.flatten(1).sum(1).tolist()
    if min(counts) == 0:
        raise ValueError(f"scan {counts.index(0)} of the batch has no lung voxel.")
    index = keep.nonzero()
    if window == 0:
        return Tokens(index, counts, index[:, 0], None)
    cell = torch.div(index[:, 1:], window, rounding_mode="floor")
    extent = cell.amax(0) + 1
    ident = ((index[:, 0] * extent[0] + cell[:, 0]) * extent[1] + cell[:, 1]) * extent[2] + cell[:, 2]
    within = index[:, 1:] - cell * window
    place = (within[:, 0] * window + within[:, 1]) * window + within[:, 2]
    places = window * window * window
    order = (ident * places + place).argsort()
    idents, row = torch.unique_consecutive(ident[order], return_inverse=True)
    slots = row * places + place[order]
    if idents.shape[0] * places == slots.shape[0]:
        return Tokens(index[order], counts, slots, None)
    mask = torch.zeros(idents.shape[0] * places, dtype=torch.bool, device=index.device)
    mask[slots] = True
    return Tokens(index[order], counts, slots, mask.view(-1, places))


class Attention(nn.Module):
    """Multi-head self-attention within windows or within a whole scan, one head for every 16 numbers of a token.

    The output projection starts at zero, so that every token first learns what it can say by itself.

    Args:
        dim: length of a token, a multiple of 16 or less than that.
        window: window side in tokens; 0 lets every token of a scan see every other one.
    """

    def __init__(self, dim: int, window: int) -> None:
        super().__init__()
        self.num_heads = max(1, dim // HEAD_DIM)
        if dim < 1 or (dim > HEAD_DIM and dim % HEAD_DIM):
            raise InputError(f"dim must be a multiple of {HEAD_DIM}, the width of an attention head, got {dim}.")
        if window < 0:
            raise InputError(f"window can't be negative (patches a side, 0 for global attention), got {window}.")
        self.window = window
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.out.weight)

    def attend(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        """(groups, N, 3 * dim) and the keys that exist, (groups, N) or None for all -> (groups, N, dim)."""
        groups, tokens, width = qkv.shape
        q, k, v = qkv.view(groups, tokens, 3, self.num_heads, width // (3 * self.num_heads)).unbind(2)
        if 0 < self.window <= 3:
            # scaled_dot_product_attention takes twice as long on a CPU for thousands of groups of a few tokens.
            score = torch.einsum("gnhd,gmhd->gnmh", q, k) * q.shape[3] ** -0.5
            if mask is not None:
                score = score.masked_fill(~mask[:, None, :, None], -math.inf)
            x = torch.einsum("gnmh,gmhd->gnhd", score.softmax(2), v)
        else:
            if mask is not None:
                mask = mask[:, None, None, :]
            x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
            x = x.transpose(1, 2)
        return x.reshape(groups, tokens, width // 3)

    def forward(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Tokens of all scans, (M, dim), in the order of `tokens` -> what each has seen, (M, dim)."""
        qkv = self.qkv(x)
        if self.window == 0:
            return self.out(torch.cat([self.attend(scan.unsqueeze(0), None)[0] for scan in qkv.split(tokens.counts)]))
        mask, width, places = tokens.mask, qkv.shape[1], self.window * self.window * self.window
        if mask is None:
            return self.out(self.attend(qkv.view(-1, places, width), None).reshape(qkv.shape[0], -1))
        windows = torch.zeros(mask.numel(), width, dtype=qkv.dtype, device=qkv.device)
        windows.index_copy_(0, tokens.slots, qkv)
        attended = self.attend(windows.view(-1, places, width), mask)
        return self.out(attended.reshape(mask.numel(), -1).index_select(0, tokens.slots))


class Block(nn.Module):
    """Pre-norm transformer block with FiLM at its end: ``x * (1 + tanh(scale)) + shift``, at first the identity.

    Scale and shift come from a context vector of `context_dim` numbers a scan; 0 for no FiLM.

    Source: Perez et al., FiLM, AAAI 2018.
    """

    def __init__(self, dim: int, window: int, context_dim: int) -> None:
        super().__init__()
        # Tokens of smooth patches are small, and a norm that blew them up made the attention jump by the smallest step.
        self.norm1 = nn.LayerNorm(dim, eps=0.1)
        self.attention = Attention(dim, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, MLP_RATIO * dim), nn.GELU(), nn.Linear(MLP_RATIO * dim, dim))
        self.film = nn.Linear(context_dim, 2 * dim) if context_dim > 0 else None
        if self.film is not None:
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)

    def forward(self, x: Tensor, tokens: Tokens, context: Tensor) -> Tensor:
        """Tokens (M, dim) and a context vector a scan (B, context_dim) -> tokens (M, dim)."""
        x = x + self.attention(self.norm1(x), tokens)
        x = x + self.mlp(self.norm2(x))
        if self.film is not None:
            scan = tokens.index[:, 0]
            scale, shift = self.film(context).chunk(2, 1)
            x = x * (1.0 + torch.tanh(scale)).index_select(0, scan) + shift.index_select(0, scan)
        return x
