# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Learn patches and blocks from scans alone: hide some patches of the lung, and tell them from those around."""

from collections.abc import Sequence

import torch
import torch.nn as nn
from monai.networks.layers.vector_quantizer import EMAQuantizer
from torch import Tensor

from bundle.errors import InputError
from bundle.networks.attention import Block, tokens_of
from bundle.networks.patches import CONTRAST, PatchEmbed, Position, on_grid, share_of_lung, to_grid


class MaskedAutoencoder(nn.Module):
    """CT -> what it looks like where patches of the lung were hidden, told from the patches that were not.

    Patches, position and blocks are those of :class:`~bundle.networks.SurvivalMapNet` and have their names: weights can
    go from one to the other. Patches that overlap would show what is hidden, so there are none.

    Args:
        patch_size, narrow_window, texture, dim, depth, window: as for :class:`~bundle.networks.SurvivalMapNet`.
        mask_share: of a scan's patches that are hidden.
        vector_quantisation: a patch that isn't hidden is seen as the nearest of a few codes only, which follow the
            patches by moving averages. So each patch gets a word, learnt by what it says of those around.
        codes: how many there are.

    Raises:
        InputError: an argument is out of range.

    Source: Xie et al., SimMIM, CVPR 2022; van den Oord et al., Neural discrete representation learning, NeurIPS 2017.

    Example::

        >>> MaskedAutoencoder(patch_size=4)(torch.rand(2, 1, 31, 32, 32)).shape
        torch.Size([2, 4, 31, 32, 32])
    """

    def __init__(
        self,
        patch_size: int = 4,
        narrow_window: Sequence[float] | None = (1 / 12, 1 / 4),
        texture: bool = True,
        dim: int = 64,
        depth: int = 2,
        window: int = 2,
        mask_share: float = 0.5,
        vector_quantisation: bool = False,
        codes: int = 256,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        arguments["narrow_window"] = None if narrow_window is None else [float(bound) for bound in narrow_window]
        self.arguments = arguments
        if not 0 < mask_share < 1:
            raise InputError(f"mask_share must be above 0 and below 1, got {mask_share}.")
        if codes < 2 or depth < 0:
            raise InputError(f"codes must be at least 2 and depth not negative, got {codes} and {depth}.")
        self.stride = patch_size
        self.window = window
        self.mask_share = mask_share
        self.embed = PatchEmbed(patch_size, patch_size, dim, narrow_window, texture)
        self.position = Position(dim)
        self.blocks = nn.ModuleList([Block(dim, window, 0) for _ in range(depth)])
        self.hidden = nn.Parameter(torch.zeros(dim))
        self.to_voxels = nn.Linear(dim, patch_size**3)
        nn.init.zeros_(self.to_voxels.weight)  # an untrained network tells the mean of what was seen
        nn.init.zeros_(self.to_voxels.bias)
        self.quantizer = EMAQuantizer(2, codes, dim) if vector_quantisation else None

    def forward(self, image: Tensor, lung: Tensor | None = None, clinical: Tensor | None = None) -> Tensor:
        """What was told, whether it was hidden, code, and cost of the codes, of each voxel, (B, 4, D, H, W).

        The first is on the scale of the image; the code is -1 where there is none; the cost is the same everywhere.
        Outside the lung's patches nothing is hidden. Out of training, the same patches are hidden each time.

        Args:
            image: (B, 1, D, H, W), HU window scaled to [0, 1].
            lung: (B, 1, D, H, W) in {0, 1}; None for no mask.
            clinical: is not looked at.
        """
        depth, height, width = image.shape[2:]
        image, lung = to_grid(image, lung, self.stride)
        share = share_of_lung(image, lung, self.stride)
        tokens = tokens_of(share, self.window)
        x = self.embed(image, lung, tokens.index)
        code, cost = -torch.ones(len(x), dtype=x.dtype, device=x.device), x.new_zeros(())
        if self.quantizer is not None:
            x, cost, code = self.quantised(x)
        generator = None if self.training else torch.Generator().manual_seed(0)
        masked = (torch.rand(len(x), generator=generator) < self.mask_share).to(x.device)
        x = torch.where(masked.unsqueeze(1), self.hidden, x) + self.position(tokens.index, tokens.counts)
        context = x.new_zeros(len(image), 0)
        for block in self.blocks:
            x = block(x, tokens, context)
        ones = x.new_ones(1, self.stride**3)
        shape = list(share.shape)
        told = self.volume(on_grid(self.to_voxels(x), tokens.index, shape))
        masked = self.volume(on_grid(masked.to(x.dtype).unsqueeze(1) * ones, tokens.index, shape))
        code = self.volume(on_grid((code + 1).unsqueeze(1) * ones, tokens.index, shape)) - 1
        inside = self.volume(on_grid(ones.expand(len(x), -1), tokens.index, shape))
        if lung is not None:
            inside, masked = inside * lung[:, 0], masked * lung[:, 0]
        seen = inside - masked
        usual = (image[:, 0] * seen).sum((1, 2, 3)) / seen.sum((1, 2, 3)).clamp_min(1.0)
        told = told + usual.view(-1, 1, 1, 1)
        found = torch.stack([told, masked, code, cost.expand_as(told)], 1)
        return found[:, :, :depth, :height, :width]

    def quantised(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The code that each token (M, dim) is nearest to, with the token's gradient; their cost; their numbers (M,)."""
        if self.training and not bool(self.quantizer.ema_cluster_size.any()):
            drawn = x.detach()[torch.randint(len(x), (self.quantizer.num_embeddings,))]  # a code far off is never used
            self.quantizer.embedding.weight.data.copy_(drawn)
            self.quantizer.ema_w.copy_(drawn)
            self.quantizer.ema_cluster_size.fill_(1.0)
        nearest, cost, code = self.quantizer(x.T[None, :, :, None])
        return nearest[0, :, :, 0].T, cost, code.flatten().to(x.dtype)

    def volume(self, cells: Tensor) -> Tensor:
        """Voxels of cells, (B, d, h, w, stride**3), as a volume (B, D, H, W)."""
        s = self.stride
        b, d, h, w, _ = cells.shape
        return cells.view(b, d, h, w, s, s, s).permute(0, 1, 4, 2, 5, 3, 6).reshape(b, d * s, h * s, w * s)


class ReconstructionLoss(nn.Module):
    """Mean squared error of the hidden voxels of the lung, in squares of 1/30 of the HU window, plus the codes' cost.

    It takes the place of an objective, of which `arguments` and `name` go into `settings.json`.
    """

    name = "reconstruction"

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict = {}

    def forward(self, found: Tensor, image: Tensor) -> Tensor:
        """The loss of what :class:`MaskedAutoencoder` found, (B, 4, D, H, W), of an image (B, 1, D, H, W)."""
        told, masked = found[:, 0], found[:, 1]
        error = (CONTRAST * (told - image[:, 0])).square()
        return (error * masked).sum() / masked.sum().clamp_min(1.0) + found[0, 3, 0, 0, 0]
