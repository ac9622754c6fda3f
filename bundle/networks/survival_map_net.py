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

from .heads import HEADS, attention_head, bounded, hazard_head, mean_head, softmin_head
from .severity import Severity

__all__ = ["SurvivalMapNet"]


def soft_histogram(values: Tensor, inside: Tensor, bins: int) -> Tensor:
    """Shares of the values (M, N) around each of `bins` (at least 2) levels evenly spaced from 0 to 1, (M, bins).

    A value between two levels counts in part for either, and beyond them for the last one. `inside` (M, N) in {0, 1} says
    which values count; where none does, all shares are 0.
    """
    place = values.clamp(0.0, 1.0) * (bins - 1)
    weight = inside / inside.sum(1, keepdim=True).clamp_min(1.0)
    # Level by level, not scattered: as fast, and the same to the bit on every device.
    return torch.stack([((1.0 - (place - level).abs()).clamp_min(0.0) * weight).sum(1) for level in range(bins)], 1)


def neighbours_correlation(centred: Tensor, inside: Tensor, variance: Tensor, side: int) -> Tensor:
    """How alike voxels next to each other are within a patch, (M, 1): 1 if smooth, 0 for white noise, below if they alternate.

    One less the mean squared difference of neighbours along all axes (the variogram at a distance of one voxel) over twice
    the variance. `centred`, `inside` (M, side**3), `variance` (M, 1); only pairs with both in `inside` count.
    """
    cube, mask = centred.view(-1, side, side, side), inside.view(-1, side, side, side)
    total, pairs = torch.zeros_like(variance), torch.zeros_like(variance)
    for axis in (1, 2, 3):
        both = mask.narrow(axis, 0, side - 1) * mask.narrow(axis, 1, side - 1)
        total = total + (torch.diff(cube, dim=axis).square() * both).sum((1, 2, 3)).unsqueeze(1)
        pairs = pairs + both.sum((1, 2, 3)).unsqueeze(1)
    return 1.0 - total / (2.0 * pairs.clamp_min(1.0) * variance.clamp_min(1e-9))


class PatchEmbed(nn.Module):
    """Overlapping 3-D patches of the lung become tokens; HU and texture both survive the embedding.

    Every patch is described by its voxels, the same voxels standardised within the patch, their mean and the log of
    their standard deviation, and with a `narrow_window` by its voxels once more, in that window: what is a few HU brighter
    than healthy lung hardly shows in a wide one. With `texture` two things enter as well that hold wherever in a patch its
    walls lie, which a linear layer on voxels would have to learn place by place: the histogram of its lung voxels, how much
    of it is wall and how much air, and how alike neighbours are. No normalisation comes before the first linear layer: it
    would blow up the noise of an empty patch until it looks like a lesion. Voxels outside the lung carry no evidence: they
    are replaced by the mean of the patch's lung voxels. Gathered voxels and a Linear do the work of a convolution, because
    a `Conv3d` with one input channel has a very slow backward on CPUs.

    Args:
        patch_size: patch side in voxels.
        stride: distance between patches in voxels, at most `patch_size`.
        dim: length of a token.
        narrow_window: two values of the image between which voxels run from -1 to 1 once more; from there they go back to
            0 over half its width, as what lies beyond is for the wide window to tell: held at 1, all that is bright would
            look alike, and lesions of two kinds would be learnt as one. None for no second window.
        texture: describe patches by their histogram and the correlation of neighbouring voxels as well.
    """

    def __init__(
        self,
        patch_size: int,
        stride: int,
        dim: int,
        narrow_window: Sequence[float] | None = None,
        texture: bool = False,
    ) -> None:
        super().__init__()
        self.narrow_window = None if narrow_window is None else (float(narrow_window[0]), float(narrow_window[1]))
        self.texture = texture
        self.bins = 13  # 100 HU from one to the next in the default window
        self.patch_size = patch_size
        self.stride = stride
        self.run = math.gcd(patch_size, stride)  # voxels in a row that no patch's border cuts
        # A standard deviation of 1/30 of the HU window (40 HU in the default window) has log 0.
        self.contrast = 30.0
        numbers = (2 if narrow_window is None else 3) * patch_size**3 + 2 + (self.bins + 1 if texture else 0)
        self.layers = nn.Sequential(nn.Linear(numbers, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def gather(self, volume: Tensor, index: Tensor, replicate: bool) -> Tensor:
        """Patches (M, patch_size**3) of `volume` (B, 1, D, H, W) at the grid cells `index` (M, 4) = (b, z, y, x)."""
        p, s = self.patch_size, self.stride
        before = (p - s) // 2
        after = p - s - before
        if p > s:
            pad = [before, after, before, after, before, after]
            volume = F.pad(volume, pad, mode="replicate") if replicate else F.pad(volume, pad)
        # Whole runs of voxels are copied, several times faster than indexing an unfolded volume voxel by voxel.
        depth, height, width = volume.shape[2], volume.shape[3], volume.shape[4] // self.run
        z, y, x = index[:, 1] * s, index[:, 2] * s, index[:, 3] * (s // self.run)
        first = ((index[:, 0] * depth + z) * height + y) * width + x
        step = torch.arange(p, device=volume.device)
        others = ((step[:, None, None] * height + step[:, None]) * width + step[: p // self.run]).flatten()
        runs = (first.unsqueeze(1) + others).flatten()
        return volume.reshape(-1, self.run).index_select(0, runs).view(index.shape[0], p * p * p)

    def forward(self, image: Tensor, lung: Tensor | None, index: Tensor) -> Tensor:
        if lung is None and self.patch_size > self.stride:
            lung = torch.ones_like(image)  # patches at the border reach beyond the scan, where there is no lung
        x = self.gather(image, index, True)
        inside = torch.ones_like(x) if lung is None else self.gather(lung, index, False)
        count = inside.sum(1, keepdim=True).clamp_min(1.0)
        mean = (x * inside).sum(1, keepdim=True) / count
        centred = (x - mean) * inside
        variance = centred.square().sum(1, keepdim=True) / count
        tiny = 1e-3 / self.contrast
        std = (variance + tiny * tiny).sqrt()  # the square root has a gradient in a constant patch, too
        level = 2.0 * mean - 1.0
        features = [
            torch.add(level, centred, alpha=2.0),
            centred * (0.3 / std),
            level,
            torch.log(self.contrast * std + 1e-2),
        ]
        if self.texture:
            features.append(2.0 * soft_histogram(x, inside, self.bins))
            features.append(2.0 * neighbours_correlation(centred, inside, variance, self.patch_size))
        if self.narrow_window is not None:
            low, high = self.narrow_window
            place = (mean + centred - low) * (2.0 / (high - low)) - 1.0
            within = place.clamp(-1.0, 1.0)
            features.append(within - (place.clamp(-2.0, 2.0) - within))
        return self.layers(torch.cat(features, 1))


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


def mean_of_scans(x: Tensor, counts: list[int]) -> Tensor:
    """Mean token of each scan, (B, dim), of tokens (M, dim) that lie scan by scan, `counts` of each."""
    return torch.stack([tokens.mean(0) for tokens in x.split(counts)])


def on_grid(values: Tensor, index: Tensor, shape: list[int]) -> Tensor:
    """What tokens say, (M, ...), in the cells `index` (M, 4) of a batch's grid of `shape` (B, d, h, w); 0 elsewhere."""
    grid = torch.zeros(shape + list(values.shape[1:]), dtype=values.dtype, device=values.device)
    grid[index[:, 0], index[:, 1], index[:, 2], index[:, 3]] = values
    return grid


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
