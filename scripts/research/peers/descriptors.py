# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What lies around a place in the lung, in 41 numbers, at every second voxel: what all peers but the CNN are given."""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

STEP = 2  # voxels between tokens
SCALES = (1.0, 1.7, 3.0, 5.0)  # voxels
LEVELS = np.linspace(0, 1, 13)[:12]
NAMES = (
    ["value"]
    + [f"{what}_{s}" for s in SCALES for what in ("mean", "deviation")]
    + [f"{what}_{s}" for what in ("high", "band", "low") for s in (1.7, 3.0)]
    + [f"{what}_{s}" for s in (1.0, 1.8) for what in ("curve0", "curve1", "curve2", "bend", "laplacian", "slope")]
    + [f"level_{level:.2f}" for level in LEVELS]
    + ["lung_5.0", "lung_3.0"]
)
SEEN = NAMES.index("level_0.00")  # those before have the scan's own median and spread taken out


@lru_cache(maxsize=512)
def band(size: int, sigma: float, order: int, step: int) -> Tensor:
    """A Gaussian, or a derivative of it of order 1 or 2, as a matrix (ceil(size / step), size)."""
    radius = int(3 * sigma + 0.5)
    t = torch.arange(0, size, step)[:, None] - torch.arange(size)[None].float()
    g = torch.exp(-0.5 * (t / sigma) ** 2) * (t.abs() <= radius)
    g = g / torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2).sum()
    return (g, -t / sigma**2 * g, (t**2 / sigma**4 - 1 / sigma**2) * g)[order]


def blur(x: Tensor, sigma: float, step: int = 1, order: tuple[int, int, int] = (0, 0, 0)) -> Tensor:
    """Gaussian filter or derivative of (D, H, W), zeros beyond the border, at every `step`-th voxel.

    A product with a banded matrix an axis: on CPUs it is faster than a convolution, and what isn't asked for costs nothing.
    """
    for k in order:  # each product brings the next axis to the front
        x = torch.tensordot(x, band(x.shape[0], sigma, k, step), dims=([0], [1]))
    return x


def describe(image: Tensor, lung: Tensor) -> tuple[Tensor, Tensor]:
    """Descriptors (M, 41) and places (M, 3) of a scan's tokens, the lung's voxels on even places.

    Every mean is over lung alone (normalised convolution); what lies beyond is taken for its nearest tissue.

    Args:
        image: (D, H, W), 0 to 1 for -1000 to 200 HU, 3 mm a voxel.
        lung: (D, H, W), bool.
    """
    x, m, at = image, lung.float(), (slice(None, None, STEP),) * 3
    share = {s: blur(m, s).clamp_min(0.02) for s in (1.7, 5.0)}
    mean = {s: blur(x * m, s) / share[s] for s in share}
    filled = torch.where(lung, x, torch.where(share[1.7] > 0.021, mean[1.7], mean[5.0]))
    share = {s: blur(m, s, STEP).clamp_min(0.02) for s in (1.0, 1.5, 1.7, 3.0, 5.0)}
    local = {s: blur(x * m, s, STEP) / share[s] for s in SCALES}
    out = [x[at]]
    for s in SCALES:
        variance = blur(x * x * m, s, STEP) / share[s] - local[s].square()
        out += [local[s], (variance.clamp_min(1e-6).sqrt() + 0.02).log()]
    levels = [filled] + [blur(filled, s) for s in (0.7, 1.5, 3.0)]
    for fine, coarse in zip(levels, levels[1:]):
        energy = (fine - coarse).abs() * m
        out += [(blur(energy, s, STEP) / share[s] + 0.01).log() for s in (1.7, 3.0)]
    tokens = lung[at]
    out = [v[tokens] for v in out]
    for s in (1.0, 1.8):
        out += curvature(filled, s, tokens)
    out += [(blur(F.relu(1 - (x - level).abs() * 12) * m, 1.5, STEP) / share[1.5])[tokens] for level in LEVELS]
    out += [share[5.0][tokens], share[3.0][tokens]]
    return torch.stack(out, 1), STEP * tokens.nonzero()


def curvature(image: Tensor, s: float, tokens: Tensor) -> list[Tensor]:
    """Of a scale: the Hessian's eigenvalues, and the logarithms of its norm and trace around a token, and of the slope."""
    second = {}
    for i in range(3):
        for j in range(i, 3):
            second[i, j] = s * s * blur(image, s, STEP, tuple((i == k) + (j == k) for k in range(3)))
    rows = [torch.stack([second[min(i, j), max(i, j)][tokens] for j in range(3)], 1) for i in range(3)]
    eigenvalues = 5 * torch.linalg.eigvalsh(torch.stack(rows, 1))
    norm = sum((1 if i == j else 2) * v.square() for (i, j), v in second.items()).sqrt()
    trace = (second[0, 0] + second[1, 1] + second[2, 2]).abs()
    slope = sum(blur(image, s, STEP, tuple(int(i == k) for k in range(3))).square() for i in range(3)).sqrt()
    inside = blur(tokens.float(), 2.0 / STEP).clamp_min(0.02)
    around = [(blur(v * tokens, 2.0 / STEP) / inside + 0.005).log() for v in (norm, trace)]
    return [*eigenvalues.unbind(1), *(v[tokens] for v in around), (slope * s + 0.01).log()[tokens]]


def centre(tokens: Tensor) -> Tensor:
    """Descriptors less the scan's median, over 1.48 times the median deviation from it: dose and calibration go with it."""
    seen = tokens[:, :SEEN]
    median = seen.median(0).values
    spread = 1.48 * (seen - median).abs().median(0).values + 1e-3
    return torch.cat([(seen - median) / spread, tokens[:, SEEN:]], 1)


def to_voxels(value: Tensor, place: Tensor, lung: Tensor, smooth: float = 0.0) -> np.ndarray:
    """Values (M,) of tokens on the scan's grid (D, H, W), 0 beyond the lung: a Gaussian of `smooth` voxels, then linear."""
    grid = torch.zeros(2, *(-(-n // STEP) for n in lung.shape))
    i, j, k = (place // STEP).unbind(1)
    grid[0, i, j, k], grid[1, i, j, k] = value.float(), 1.0
    if smooth:
        grid = torch.stack([blur(v, smooth / STEP) for v in grid])
    fine = F.interpolate(grid[None], size=[STEP * (n - 1) + 1 for n in grid.shape[1:]], mode="trilinear", align_corners=True)
    pad = [p for n, have in zip(lung.shape[::-1], fine.shape[:1:-1]) for p in (0, n - have)]
    weighted, weight = F.pad(fine, pad, mode="replicate")[0]
    return (weighted / weight.clamp_min(1e-3) * lung).numpy()
