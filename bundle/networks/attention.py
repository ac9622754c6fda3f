# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Transformer blocks over the tokens of the lung."""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Attention(nn.Module):
    """Multi-head self-attention over the tokens that are there, within windows or within a whole scan.

    The output projection starts at zero, so that every token first learns what it can say by itself.

    Args:
        dim: length of a token.
        num_heads: number of heads.
        window: window side in tokens; 0 lets every token of a scan see every other one.
    """

    def __init__(self, dim: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.out.weight)

    def attend(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        """(groups, N, 3*dim) and the keys that exist, (groups, N) or None for all -> (groups, N, dim)."""
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

    def forward(self, x: Tensor, slots: Tensor, mask: Tensor | None, counts: list[int]) -> Tensor:
        """
        Args:
            x: the tokens of all scans, packed in the order of :func:`group_in_windows`, (M, dim).
            slots: place of each token in the windows, (M,).
            mask: which places of the windows hold a token, (windows, window**3), or None if all do.
            counts: number of tokens of each scan.
        """
        qkv = self.qkv(x)
        if self.window == 0:
            return self.out(torch.cat([self.attend(scan.unsqueeze(0), None)[0] for scan in qkv.split(counts)]))
        places = self.window * self.window * self.window
        if mask is None:
            return self.out(self.attend(qkv.view(-1, places, qkv.shape[1]), None).reshape(qkv.shape[0], -1))
        windows = torch.zeros(mask.numel(), qkv.shape[1], dtype=qkv.dtype, device=qkv.device)
        windows.index_copy_(0, slots, qkv)
        attended = self.attend(windows.view(-1, places, qkv.shape[1]), mask)
        return self.out(attended.reshape(mask.numel(), -1).index_select(0, slots))


def group_in_windows(index: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sort tokens by window, and find the place of each in a list of windows without the empty ones.

    Args:
        index: grid cell of each token, (M, 4) = (scan, z, y, x).
        window: window side in tokens.

    Returns:
        the sorted index, still scan by scan; the places, (M,), ascending; and the mask of places that hold a token,
        (windows, window**3), None if all do.
    """
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
        return index[order], slots, None
    mask = torch.zeros(idents.shape[0] * places, dtype=torch.bool, device=index.device)
    mask[slots] = True
    return index[order], slots, mask.view(-1, places)


class Block(nn.Module):
    """Pre-norm transformer block with FiLM at its end (Perez et al., AAAI 2018): x * (1 + tanh(scale)) + shift.

    Scale and shift come from one context vector a scan; they start at zero, which makes FiLM the identity.
    """

    def __init__(self, dim: int, num_heads: int, window: int, mlp_ratio: float, context_dim: int) -> None:
        super().__init__()
        # Tokens of smooth patches are small, and a norm that blew them up made the attention jump by the smallest step.
        self.norm1 = nn.LayerNorm(dim, eps=0.1)
        self.attention = Attention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.film = nn.Linear(context_dim, 2 * dim) if context_dim > 0 else None
        if self.film is not None:
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)

    def forward(
        self, x: Tensor, slots: Tensor, mask: Tensor | None, counts: list[int], context: Tensor, scan: Tensor
    ) -> Tensor:
        x = x + self.attention(self.norm1(x), slots, mask, counts)
        x = x + self.mlp(self.norm2(x))
        if self.film is not None:
            scale, shift = self.film(context).chunk(2, 1)
            x = x * (1.0 + torch.tanh(scale)).index_select(0, scan) + shift.index_select(0, scan)
        return x
