# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The network: a CT becomes a survival map, one time and one weight for every patch of the lung."""

from collections.abc import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from bundle.errors import InputError
from bundle.networks.attention import Block, Tokens, tokens_of
from bundle.networks.heads import HEADS
from bundle.networks.patches import PatchEmbed, Position, mean_of_scans, on_grid, share_of_lung, to_grid


class SurvivalMapNet(nn.Module):
    """CT -> survival map: for every patch of the lung a location in months and a weight.

    What a patch says comes from its neighbourhood, `window` patches a side; what is further away only modulates it.

    Args:
        patch_size: patch side in voxels.
        overlap: share of its side that a patch has in common with the next one, in [0, 1).
        narrow_window: bounds of a second, narrower window, as shares of the HU window; None for none.
        texture: describe patches by their histogram and the correlation of neighbouring voxels as well.
        dim: length of a token, a multiple of 16 (or less): one attention head for every 16 numbers.
        depth: number of transformer blocks.
        window: attention window side in patches; 0 for global attention.
        clinical_dim: length of the clinical vector, 0 for none. It enters FiLM, and a linear function of it, 0 at
            first, moves all locations of a scan alike, beyond `loc_range` too.
        film_context: let the mean of a scan's tokens enter FiLM as well.
        center_tokens: let the head see how tokens differ from the mean of their scan only.
        head: ``"lse"``, ``"softmin"``, ``"attention"``, ``"hazard"`` or ``"mean"``; see :mod:`bundle.networks.heads`.
        head_layers: hidden layers of the head, 1 or 2.
        loc_range: months between which a patch's location lies. An untrained network says half of the upper bound. The
            heads ``lse``, ``softmin`` and ``attention`` learn the lower bound, starting there.
        beta: steepness of the softmin per month.
        learn_beta: learn beta, starting there.
        extra: further numbers a patch that an objective asks for, bounded by 3, 0 in an untrained network.

    Raises:
        InputError: an argument is out of range.

    Example::

        >>> SurvivalMapNet(patch_size=4)(torch.rand(2, 1, 32, 32, 32)).shape
        torch.Size([2, 2, 8, 8, 8])
    """

    def __init__(
        self,
        patch_size: int = 4,
        overlap: float = 0.0,
        narrow_window: Sequence[float] | None = (1 / 12, 1 / 4),
        texture: bool = True,
        dim: int = 64,
        depth: int = 2,
        window: int = 2,
        clinical_dim: int = 0,
        film_context: bool = False,
        center_tokens: bool = False,
        head: str = "lse",
        head_layers: int = 1,
        loc_range: Sequence[float] = (-5.0, 120.0),
        beta: float = 1 / 15,
        learn_beta: bool = False,
        extra: int = 0,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        for name in ("loc_range", "narrow_window"):  # as JSON has it
            arguments[name] = None if arguments[name] is None else [float(bound) for bound in arguments[name]]
        self.arguments = arguments
        if not 0 <= overlap < 1:
            raise InputError(f"overlap must be in [0, 1), got {overlap}.")
        if min(depth, clinical_dim, extra) < 0:
            raise InputError(f"depth, clinical_dim and extra can't be negative: {depth}, {clinical_dim}, {extra}.")
        if head not in HEADS:
            raise InputError(f'head must be one of {", ".join(HEADS)}, got "{head}".')
        self.stride = max(1, round(patch_size * (1 - overlap)))
        self.window = window
        self.clinical_dim = clinical_dim
        self.film_context = film_context
        self.center_tokens = center_tokens
        self.embed = PatchEmbed(patch_size, self.stride, dim, narrow_window, texture)
        self.position = Position(dim)
        context_dim = clinical_dim + (dim if film_context else 0)
        self.blocks = nn.ModuleList([Block(dim, window, context_dim) for _ in range(depth)])
        self.head = HEADS[head](dim, head_layers, loc_range, beta, learn_beta)
        self.clinical_months = nn.Linear(clinical_dim, 1, bias=False) if clinical_dim > 0 else None
        if self.clinical_months is not None:
            nn.init.zeros_(self.clinical_months.weight)
        self.to_extra = nn.Linear(dim, extra, bias=False) if extra > 0 else None
        if self.to_extra is not None:
            nn.init.zeros_(self.to_extra.weight)

    def forward(self, image: Tensor, lung: Tensor | None = None, clinical: Tensor | None = None) -> Tensor:
        """The survival map of each scan, (B, 2 + extra, d, h, w): location in months, extra numbers, weight.

        d = ceil(D / stride) and so on. Weights sum to 1 over a scan; outside the lung all channels are 0.

        Args:
            image: (B, 1, D, H, W), HU window scaled to [0, 1].
            lung: (B, 1, D, H, W) in {0, 1}; None for no mask.
            clinical: (B, clinical_dim); None for no covariates.

        Raises:
            ValueError: an input has another shape, or a scan has no lung.
        """
        x, tokens, share, known, context = self.embedded(image, lung, clinical)
        for block in self.blocks:
            x = block(x, tokens, context)
        return self.read(x, tokens, share, known)

    def embedded(
        self, image: Tensor, lung: Tensor | None, clinical: Tensor | None
    ) -> tuple[Tensor, Tokens, Tensor, Tensor, Tensor]:
        """What enters the transformer: tokens (M, dim), where they lie, shares of lung, covariates, context of FiLM."""
        image, lung = to_grid(image, lung, self.stride)
        known = self.covariates(clinical, image)
        share = share_of_lung(image, lung, self.stride)
        tokens = tokens_of(share, self.window)
        x = self.embed(image, lung, tokens.index) + self.position(tokens.index, tokens.counts)
        context = known
        if self.film_context:
            context = torch.cat([known, mean_of_scans(x, tokens.counts)], 1)
        return x, tokens, share, known, context

    def read(self, x: Tensor, tokens: Tokens, share: Tensor, known: Tensor) -> Tensor:
        """The survival map that the transformer's output (M, dim) makes; arguments as :meth:`embedded` gives them."""
        if self.center_tokens:
            x = x - mean_of_scans(x, tokens.counts)[tokens.index[:, 0]]
        location, weight = self.head(x, tokens.index, share)
        if self.clinical_months is not None:
            location = location + self.head.unit * self.clinical_months(known)[:, :, None, None]
        channels = [(location * (share > 0)).unsqueeze(1), weight.unsqueeze(1)]
        if self.to_extra is not None:
            extra = on_grid(3 * torch.tanh(self.to_extra(x)), tokens.index, list(share.shape))
            channels.insert(1, extra.permute(0, 4, 1, 2, 3))
        return torch.cat(channels, 1)

    def covariates(self, clinical: Tensor | None, image: Tensor) -> Tensor:
        """The clinical vector of each scan, scaled down, (B, clinical_dim)."""
        given = 0 if clinical is None else clinical.shape[1]
        if given != self.clinical_dim:
            raise ValueError(f"clinical must be a vector of length {self.clinical_dim} a scan, got {given}.")
        if clinical is None:
            return torch.zeros(image.shape[0], 0, dtype=image.dtype, device=image.device)
        return 0.1 * clinical.to(image.dtype)  # at full scale, a dozen soon tell who is who in a small cohort

    def danger(self, survival_map: Tensor, share: Tensor, clinical: Tensor | None = None) -> Tensor:
        """How dangerous each patch is by itself, from 0 to 1, (B, d, h, w), read off a map of this network.

        `share`: of lung in each patch, (B, d, h, w), 0 outside the map.
        """
        location = survival_map[:, 0]
        if self.clinical_months is not None:
            known = self.covariates(clinical, survival_map)
            location = location - self.head.unit * self.clinical_months(known)[:, :, None, None]
        flat = location.flatten(1), survival_map[:, -1].flatten(1), share.flatten(1)
        return self.head.danger(*flat).view_as(share)
