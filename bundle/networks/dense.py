# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The networks as graphs whose shapes depend on no voxel, for ONNX: cells outside the lung are computed, and masked.

`torch.export` follows neither lists of tokens nor branches on what a scan holds. The maps are the same but for rounding.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bundle.errors import InputError
from bundle.networks.attention import Tokens
from bundle.networks.codebook_net import CodebookNet, nearest, root_mean
from bundle.networks.descriptors import blur, but_for_place, describe
from bundle.networks.patches import share_of_lung
from bundle.networks.survival_map_net import SurvivalMapNet


def dense(network: nn.Module) -> nn.Module:
    """The network for a batch of one scan: (image, lung) or (image, lung, clinical) -> survival map.

    Raises:
        InputError: there is no such form of this network.
    """
    if isinstance(network, CodebookNet):
        return DenseCodebooks(network)
    plain = isinstance(network, SurvivalMapNet) and network.window > 0
    if not plain or network.film_context or network.center_tokens:
        expected = "CodebookNet, or SurvivalMapNet with a window, without film_context and center_tokens"
        raise InputError(f"{type(network).__name__} has no form for ONNX as it is (expected {expected}).")
    return DenseSurvivalMap(network)


def cells_of(shape: list[int], device: torch.device) -> Tensor:
    """All cells of a grid, in order, (M, 3)."""
    axes = [torch.arange(n, device=device) for n in shape]
    return torch.stack(torch.meshgrid(axes, indexing="ij"), -1).reshape(-1, 3)


class DenseSurvivalMap(nn.Module):
    """A :class:`SurvivalMapNet` whose tokens are all cells, window by window."""

    def __init__(self, network: SurvivalMapNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, lung: Tensor, clinical: Tensor | None = None) -> Tensor:
        net, stride, side = self.network, self.network.stride, self.network.window
        size = [(n + stride - 1) // stride for n in image.shape[2:]]  # ONNX divides towards 0: nothing may be negative
        whole = stride * side
        pad = [extra for n in reversed(image.shape[2:]) for extra in (0, (whole - n % whole) % whole)]
        image, lung = F.pad(image, pad, mode="replicate"), F.pad(lung.to(image.dtype), pad)
        known = net.covariates(clinical, image)
        share = share_of_lung(image, lung, stride)
        grid = list(share.shape[1:])
        split = [n for cells in grid for n in (cells // side, side)]
        cells = cells_of(grid, image.device).view([*split, 3]).permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, 3)
        keep = (share > 0).view(split).permute(0, 2, 4, 1, 3, 5).reshape(-1, side**3)
        seen = keep.reshape(-1, 1)
        first = torch.where(seen, cells, 1 << 30).amin(0)
        last = torch.where(seen, cells, -1).amax(0)
        index = torch.cat([torch.zeros_like(cells[:, :1]), cells], 1)
        x = net.embed(image, lung, index) + net.position.encode((2 * (cells - first) + 1) / (last - first + 1) - 1)
        mask = keep | ~keep.any(1, keepdim=True)  # a softmax over no key at all is no number
        for block in net.blocks:
            qkv = block.attention.qkv(block.norm1(x)).view(-1, side**3, 3 * x.shape[1])
            x = x + block.attention.out(block.attention.attend(qkv, mask).reshape(x.shape))
            x = x + block.mlp(block.norm2(x))
            if block.film is not None:
                scale, shift = block.film(known).chunk(2, 1)
                x = x * (1.0 + torch.tanh(scale)) + shift
        found = net.read(x, Tokens(index, [x.shape[0]], cells[:, 0], mask), share, known) * (share > 0).unsqueeze(1)
        return found[:, :, : size[0], : size[1], : size[2]]


class DenseCodebooks(nn.Module):
    """A :class:`CodebookNet` whose tokens are all even voxels; a lung needs one of them at least."""

    def __init__(self, network: CodebookNet) -> None:
        super().__init__()
        self.network = network
        self.taught = bool(network.student_scale > 0)

    def forward(self, image: Tensor, lung: Tensor, clinical: Tensor | None = None) -> Tensor:
        net, image, lung = self.network, image[0, 0], lung[0, 0].to(image.dtype)
        grid = [(n + 1) // 2 for n in image.shape]
        cells = cells_of(grid, image.device)
        keep = lung[::2, ::2, ::2] > 0
        inside = keep.reshape(-1)
        described = describe(image, lung, 2 * cells)
        x = net.standardised(described, *level_and_spread(described, inside.unsqueeze(1)))
        total, odds = torch.zeros_like(x[:, 0]), net.student_bias.expand(len(x))
        for chosen, centres, hazard, student in zip(net.chosen, net.centres, net.hazard, net.student, strict=True):
            word = nearest(x[:, chosen], centres)
            total, odds = total + hazard[word], odds + student[word]
        evidence = (total / len(net.hazard)).view(grid) * keep
        sigma = 0.5 * net.smoothing
        near, count = blur(evidence, sigma), blur(keep.to(image.dtype), sigma)
        patient = net.months(root_mean(near / count.clamp_min(1e-6), keep))
        if self.taught:
            near = blur((net.student_scale * odds.sigmoid()).view(grid) * keep, sigma)
        for axis in range(3):  # to voxels: between two tokens, the mean of both; beyond the last, the last
            end = torch.where(inside, cells[:, axis], -1).amax(0)
            voxel = torch.arange(image.shape[axis], device=image.device)
            low, high = torch.minimum(voxel // 2, end), torch.minimum((voxel + 1) // 2, end)
            shape = [-1 if k == axis else 1 for k in range(3)]
            within = (voxel <= 2 * end + 1).to(image.dtype).view(shape)
            near = 0.5 * (near.index_select(axis, low) + near.index_select(axis, high)) * within
            count = 0.5 * (count.index_select(axis, low) + count.index_select(axis, high)) * within
        found = net.read((near / count.clamp_min(1e-6)).clamp_min(0), patient, lung)
        if clinical is not None:
            months = (clinical[0].to(image.dtype) * net.clinical_months).sum()
            found = torch.stack([found[0] + months * lung, found[1]])
        return found.unsqueeze(0)


def level_and_spread(described: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`bundle.networks.descriptors.level_and_spread` of the rows (M, 29) that are `inside` (M, 1)."""
    middle = ((inside.sum() - 1) // 2).view(1)

    def median(values: Tensor) -> Tensor:
        return torch.where(inside, values, torch.inf).sort(0)[0].index_select(0, middle)[0]

    level = median(described)
    return but_for_place(level, 1.48 * median((described - level).abs()) + 1e-3)
