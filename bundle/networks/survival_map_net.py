# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The network: a CT becomes a survival map, one time and one weight for every patch of the lung."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bundle.networks.attention import Block, group_in_windows
from bundle.networks.heads import HEADS, attention_head, bounded, hazard_head, mean_head, softmin_head
from bundle.networks.patches import PatchEmbed, mean_of_scans, on_grid
from bundle.survival.severity import Severity

__all__ = ["SurvivalMapNet"]


class SurvivalMapNet(nn.Module):
    """CT -> survival map: for every patch of the lung a location in months and a weight.

    The location of a patient is the weighted sum of the map's locations, whatever the head (:mod:`bundle.networks.heads`):

    - ``lse`` (default): log-mean-exp softmin of the patches' locations, competing hazards that add up in log space.
    - ``softmin``: softmin-weighted mean of the patches' locations, or the mixture of their distributions.
    - ``attention``: mean of the patches' locations, weighed by an MLP of its own.
    - ``hazard``: hazards that add up; weights are exact shares.
    - ``mean``: average pooling, the usual head without a map; weights are its Grad-CAM.

    With `severity` all locations of a scan are moved together once training is over, see :class:`Severity`.

    What a patch may say comes from a bounded neighbourhood (`window` patches a side); anything from further away only
    modulates it through FiLM. Global attention (``window=0``) is there to compare with.

    Args:
        patch_size: patch side in voxels.
        overlap: share of its side that a patch has in common with the next one, in [0, 1).
        narrow_window: bounds of a second, narrower window in which patches are seen as well, as shares of the HU window;
            None for one window.
        texture: describe patches by their histogram and the correlation of neighbouring voxels as well.
        dim: length of a token.
        depth: number of transformer blocks.
        num_heads: number of attention heads.
        window: attention window side in patches; 0 for global attention.
        mlp_ratio: hidden width of the blocks' MLP over `dim`.
        clinical_dim: length of the clinical vector that enters FiLM; 0 for none.
        clinical_head: let a linear function of the clinical vector, 0 at first, move the patient's location as well:
            all patches alike, so that weights stay. `loc_range` doesn't bound it: it bounds what one patch may say.
        film_context: let the mean of a scan's tokens enter FiLM as well.
        center_tokens: let the head see how tokens differ from the mean of their scan only.
        head: ``"lse"``, ``"softmin"``, ``"attention"``, ``"hazard"`` or ``"mean"``.
        head_layers: hidden layers of the head, 1 or 2.
        loc_bias: location in months that an untrained network gives every patch; learnt.
        loc_scale: months per unit of the head's output.
        loc_range: months between which locations are squashed by a sigmoid of slope 1 in the middle, None for no bounds.
            At the lower bound all patches of a lesion weigh the same, so that the map covers it whole. The heads ``lse``,
            ``softmin`` and ``attention`` learn it from there: where it is too high for lesions to explain the deaths,
            what isn't diseased has to.
        severity: correct the patient's location by how much disease the map shows; needs a `loc_range`.
        beta: steepness of the softmin per month.
        learn_beta: learn beta, starting there.
        min_lung: smallest share of lung in a patch that makes it a token.
        extra: further numbers a patch that an objective asks for, bounded by 3, 0 in an untrained network.

    Raises:
        ValueError: an argument is out of range; in `forward`, an input has another shape, or a scan has no lung.

    Shape:
        image (B, 1, D, H, W), HU window scaled to [0, 1]; lung (B, 1, D, H, W) in {0, 1}, None for no mask; clinical
        (B, clinical_dim). Output (B, 2 + extra, d, h, w): location in months, extra numbers, weight; d = ceil(D /
        stride) and so on. Weights sum to 1 over a scan; outside the lung all channels are 0.

    Example::

        >>> net = SurvivalMapNet(patch_size=4)
        >>> survival_map = net(torch.rand(2, 1, 32, 32, 32))
        >>> survival_map.shape, survival_map[:, 1].sum((1, 2, 3))
        (torch.Size([2, 2, 8, 8, 8]), tensor([1., 1.]))
    """

    def __init__(
        self,
        patch_size: int = 4,
        overlap: float = 0.0,
        narrow_window: Sequence[float] | None = None,
        texture: bool = True,
        dim: int = 64,
        depth: int = 2,
        num_heads: int = 4,
        window: int = 2,
        mlp_ratio: float = 2.0,
        clinical_dim: int = 0,
        clinical_head: bool = False,
        film_context: bool = False,
        center_tokens: bool = False,
        head: str = "lse",
        head_layers: int = 1,
        loc_bias: float = 60.0,
        loc_scale: float = 30.0,
        loc_range: Sequence[float] | None = (-5.0, 120.0),
        severity: bool = True,
        beta: float = 1 / 15,
        learn_beta: bool = True,
        min_lung: float = 0.25,
        extra: int = 0,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        for name in ("loc_range", "narrow_window"):  # as JSON has it
            arguments[name] = None if arguments[name] is None else [float(bound) for bound in arguments[name]]
        self.arguments = arguments
        if patch_size < 1:
            raise ValueError(f"patch_size must be at least 1 voxel, got {patch_size}.")
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap must be in [0, 1), got {overlap}.")
        if narrow_window is not None and not (len(narrow_window) == 2 and 0 <= narrow_window[0] < narrow_window[1] <= 1):
            raise ValueError(f"narrow_window must be two ascending shares of the HU window, in [0, 1], got {narrow_window}.")
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim ({dim}) must be a multiple of num_heads ({num_heads}).")
        if min(depth, window, clinical_dim, extra) < 0:
            given = f"{depth}, {window}, {clinical_dim}, {extra}"
            raise ValueError(f"depth, window, clinical_dim and extra can't be negative: {given}.")
        if head not in HEADS:
            raise ValueError(f'head must be one of {", ".join(HEADS)}, got "{head}".')
        if head_layers not in (1, 2):
            raise ValueError(f"head_layers must be 1 or 2, got {head_layers}.")
        if loc_range is not None and not (len(loc_range) == 2 and loc_range[0] < loc_bias < loc_range[1]):
            raise ValueError(f"loc_range must be two numbers with loc_bias ({loc_bias}) between them, got {loc_range}.")
        if loc_range is None and (severity or head == "hazard"):
            raise ValueError("severity and the head hazard need a loc_range.")
        if beta <= 0:
            raise ValueError(f"beta must be positive (per month), got {beta}.")
        if not 0 < min_lung <= 1:
            raise ValueError(f"min_lung must be in (0, 1], got {min_lung}.")
        self.patch_size = patch_size
        self.stride = max(1, round(patch_size * (1 - overlap)))
        self.window = window
        self.clinical_dim = clinical_dim
        self.film_context = film_context
        self.center_tokens = center_tokens
        self.head = head
        self.loc_scale = loc_scale
        self.loc_range = None if loc_range is None else (float(loc_range[0]), float(loc_range[1]))
        self.min_lung = min_lung
        self.extra = extra
        self.embed = PatchEmbed(patch_size, self.stride, dim, narrow_window, texture)
        # No finer ones, by which a small cohort's lesions could be learnt by heart.
        self.frequencies = [math.pi / 2, math.pi]
        self.position = nn.Linear(3 + 6 * len(self.frequencies), dim)
        context_dim = clinical_dim + (dim if film_context else 0)
        self.blocks = nn.ModuleList([Block(dim, num_heads, window, mlp_ratio, context_dim) for _ in range(depth)])
        self.to_location = self.one_number(dim, head_layers)
        self.to_score = self.one_number(dim, head_layers) if head == "attention" else None
        self.severity = None if not severity or self.loc_range is None else Severity(*self.loc_range)
        self.loc_bias = nn.Parameter(torch.tensor(float(loc_bias)))
        # In units that let it move by some tens of months in a training.
        low = 0.0 if self.loc_range is None else self.loc_range[0] / loc_scale
        learns = self.loc_range is not None and head not in ("hazard", "mean")
        self.lower = nn.Parameter(torch.tensor(low), requires_grad=learns)
        # An untrained patch adds 5 % of the largest hazard, exp(3) / loc_range[1]: then patients start at about 60 months.
        self.log_rate = nn.Parameter(torch.tensor(3.0), requires_grad=head == "hazard")
        learns = learn_beta and head in ("lse", "softmin")
        self.log_beta = nn.Parameter(torch.tensor(math.log(beta)), requires_grad=learns)
        self.clinical_months: nn.Linear | None = None
        if clinical_head and clinical_dim > 0:
            self.clinical_months = nn.Linear(clinical_dim, 1, bias=False)
            nn.init.zeros_(self.clinical_months.weight)
        # A schedule multiplies beta with this factor; part of the state, because the map depends on it.
        self.register_buffer("beta_factor", torch.tensor(1.0))
        self.to_extra = nn.Linear(dim, extra, bias=False) if extra > 0 else None
        if self.to_extra is not None:
            nn.init.zeros_(self.to_extra.weight)

    @staticmethod
    def one_number(dim: int, hidden_layers: int) -> nn.Sequential:
        """MLP from a token to one number, near 0 in an untrained network."""
        layers: list[nn.Module] = [nn.LayerNorm(dim)]
        for _ in range(hidden_layers):
            layers += [nn.Linear(dim, dim, bias=False), nn.GELU()]
        last = nn.Linear(dim, 1, bias=False)
        nn.init.normal_(last.weight, std=0.01)
        return nn.Sequential(*layers, last)

    def set_beta_factor(self, factor: float) -> None:
        """Multiply beta by `factor`: below 1 the softmin is nearer to the mean, so that every patch learns."""
        self.beta_factor.fill_(factor)

    def locate(self, index: Tensor, counts: list[int]) -> Tensor:
        """Fourier features of the patch centres (M, 15), from -1 to 1 over the box around the tokens of each scan.

        So they hold for any grid, and padding a scan to the size of others in its batch doesn't move its patches.
        """
        boxes: list[Tensor] = []
        for cell in index[:, 1:].split(counts):
            first = cell.amin(0)
            boxes.append((2 * (cell - first) + 1) / (cell.amax(0) - first + 1) - 1)
        centre = torch.cat(boxes)
        features = [centre]
        for frequency in self.frequencies:
            features += [torch.sin(frequency * centre), torch.cos(frequency * centre)]
        return torch.cat(features, 1)

    def forward(self, image: Tensor, lung: Tensor | None = None, clinical: Tensor | None = None) -> Tensor:
        if image.dim() != 5 or image.shape[1] != 1:
            raise ValueError(f"image must be (B, 1, D, H, W), got {list(image.shape)}.")
        if lung is not None and lung.shape != image.shape:
            raise ValueError(f"lung must have the shape of the image, {list(image.shape)}, got {list(lung.shape)}.")
        clinical_dim = 0 if clinical is None else clinical.shape[1]
        if clinical_dim != self.clinical_dim:
            raise ValueError(f"clinical must be a vector of length {self.clinical_dim} a scan, got {clinical_dim}.")
        if not torch.jit.is_scripting():
            # MONAI's MetaTensor would drag its metadata through every operation.
            image = image.as_subclass(Tensor)
            lung = lung if lung is None else lung.as_subclass(Tensor)
        s = self.stride
        pad = [0, -image.shape[4] % s, 0, -image.shape[3] % s, 0, -image.shape[2] % s]
        if max(pad) > 0:
            image = F.pad(image, pad, mode="replicate")
        if lung is not None:
            lung = F.pad(lung, pad)
            lung = None if bool(lung.amin() > 0) else lung.to(image.dtype)
        scans = image.shape[0]
        grid = [image.shape[2] // s, image.shape[3] // s, image.shape[4] // s]
        if lung is None:
            share = torch.ones([scans] + grid, dtype=image.dtype, device=image.device)
            keep = share > 0
        else:
            share = F.avg_pool3d(lung, s)[:, 0]
            # A lung thinner than a patch still gets its best patches.
            keep = share >= share.flatten(1).amax(1).clamp(1e-6, self.min_lung).view(-1, 1, 1, 1)
        index = keep.nonzero()
        counts: list[int] = keep.flatten(1).sum(1).tolist()
        if min(counts) == 0:
            raise ValueError(f"scan {counts.index(0)} of the batch has no lung voxel.")
        slots = index[:, 0]
        mask: Tensor | None = None
        if self.window > 0:
            index, slots, mask = group_in_windows(index, self.window)
        scan = index[:, 0]

        x = self.embed(image, lung, index)
        # Scaled down, position is learnt late, when the patch itself has said what it can: lesions of a small cohort
        # cluster, and a network that learns where they were misses the one that lies elsewhere.
        x = x + self.position(0.1 * self.locate(index, counts).to(x.dtype))
        context = torch.zeros(scans, 0, dtype=x.dtype, device=x.device)
        if clinical is not None:
            # Scaled down as position is: who is who in a small cohort is soon learnt from a dozen covariates.
            clinical = 0.1 * clinical.to(x.dtype)
            context = clinical
        if self.film_context:
            context = torch.cat([context, mean_of_scans(x, counts)], 1)
        for block in self.blocks:
            x = block(x, slots, mask, counts, context, scan)
        if self.center_tokens:
            x = x - mean_of_scans(x, counts)[scan]

        cells = list(keep.shape)
        tokens = on_grid(self.loc_scale * self.to_location(x)[:, 0] + self.loc_bias, index, cells).flatten(1)
        flat = (share * keep).to(x.dtype).flatten(1)
        bounds, low = self.loc_range, self.loc_scale * self.lower
        location = tokens if bounds is None else bounded(tokens, low, bounds[1])
        danger = torch.zeros_like(location)
        if bounds is not None:
            danger = (bounds[1] - location) / (bounds[1] - low)
        if self.head == "hazard":
            danger = torch.sigmoid((self.loc_bias - tokens) / self.loc_scale - 3)
            location, log_weight = hazard_head(danger, flat, self.log_rate, 0.0 if bounds is None else bounds[1])
        elif self.head == "mean":
            location, log_weight = mean_head(tokens, flat, self.loc_bias)
        elif self.to_score is not None:
            score = on_grid(self.to_score(x)[:, 0], index, cells).flatten(1)
            location, log_weight = attention_head(location, score, flat)
        else:
            beta = self.log_beta.exp() * self.beta_factor
            location, log_weight = softmin_head(location, flat, beta, self.head == "lse")
        if self.clinical_months is not None and clinical is not None:
            location = location + self.loc_scale * self.clinical_months(clinical)
        if self.severity is not None and not self.training:
            # Detached: gradients of the patient's location say what the map reads off the image, as in training.
            parts = [part.detach().view(keep.shape) for part in (danger, location, log_weight)]
            numbers = self.severity.numbers(parts[0], flat.view(keep.shape), parts[1], parts[2])
            location = location + self.severity(numbers).unsqueeze(1)
        inside = flat > 0
        channels = [location * inside]
        if self.to_extra is not None:
            channels += on_grid(3 * torch.tanh(self.to_extra(x)), index, cells).flatten(1, 3).unbind(2)
        channels.append(log_weight.exp() * inside)
        return torch.stack(channels, 1).view([scans, 2 + self.extra] + grid)
