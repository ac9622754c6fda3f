# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The tissue around a voxel of the lung as numbers: levels, texture, shape. Nothing here is learnt."""

import torch
from torch import Tensor

STEP = 2  # voxels from one token to the next, an axis
DESCRIPTORS = (
    "level",
    *(f"{what}_{s}" for s in (1.0, 1.7, 3.0, 5.0) for what in ("mean", "deviation")),
    *(f"{what}_{s}" for what in ("fine", "middle", "coarse") for s in (1.7, 3.0)),
    *(f"{what}_{s}" for s in (1.0, 1.8) for what in ("curve0", "curve1", "curve2", "bend", "laplacian", "slope")),
    *("depth_5.0", "depth_3.0"),
)  # the number is the scale: the standard deviation of a Gaussian, in voxels


def gaussian(x: Tensor, sigma: float, order: list[int]) -> Tensor:
    """Gaussian filter of (D, H, W), or its derivative of an `order` 0, 1 or 2 along each axis; 0 beyond the border.

    Each axis is a product with a banded matrix: on CPUs several times faster than a convolution with one channel.
    """
    radius = int(3 * sigma + 0.5)
    for axis in range(3):
        place = torch.arange(x.shape[axis], dtype=x.dtype, device=x.device)
        t = place.unsqueeze(1) - place
        band = torch.exp(-0.5 * (t / sigma).square()) * (t.abs() <= radius)
        near = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
        band = band / torch.exp(-0.5 * (near / sigma).square()).sum()
        if order[axis] == 1:
            band = -t / sigma**2 * band
        elif order[axis] == 2:
            band = (t.square() / sigma**4 - 1 / sigma**2) * band
        x = torch.tensordot(band, x, dims=([1], [axis])).movedim(0, axis)
    return x


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian filter of (D, H, W)."""
    return gaussian(x, sigma, [0, 0, 0])


def at(volume: Tensor, index: Tensor) -> Tensor:
    """What a volume (D, H, W) holds at the voxels `index` (M, 3), (M,)."""
    return volume[index[:, 0], index[:, 1], index[:, 2]]


def eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues of symmetric matrices (M, 3, 3), ascending, (M, 3).

    ONNX has none. There, by Jacobi's rotations: Golub and Van Loan, Matrix Computations, 8.5.
    """
    if not torch.jit.is_scripting():
        if torch.compiler.is_exporting():
            return jacobi(matrix)
    return torch.linalg.eigvalsh(matrix)


def jacobi(matrix: Tensor) -> Tensor:
    """:func:`eigenvalues` by four rounds of rotations, each of which makes one number off the diagonal 0."""
    a = [[matrix[:, i, j] for j in range(3)] for i in range(3)]
    for p, q, r in 4 * [(0, 1, 2), (0, 2, 1), (1, 2, 0)]:
        off, between = a[p][q], a[q][q] - a[p][p]
        size = between.abs() + (between.square() + 4 * off.square()).sqrt()
        tangent = 2 * off * torch.where(between < 0, -1.0, 1.0) / size.clamp_min(1e-30)
        cosine = (tangent.square() + 1).rsqrt()
        sine = tangent * cosine
        a[p][p], a[q][q] = a[p][p] - tangent * off, a[q][q] + tangent * off
        first, second = a[p][r], a[q][r]
        a[p][r] = a[r][p] = cosine * first - sine * second
        a[q][r] = a[r][q] = sine * first + cosine * second
        a[p][q] = a[q][p] = torch.zeros_like(off)
    x, y, z = a[0][0], a[1][1], a[2][2]
    low, high = torch.minimum(torch.minimum(x, y), z), torch.maximum(torch.maximum(x, y), z)
    return torch.stack([low, torch.maximum(torch.minimum(x, y), torch.minimum(torch.maximum(x, y), z)), high], 1)


def curvature(filled: Tensor, lung: Tensor, share: Tensor, index: Tensor, s: float) -> list[Tensor]:
    """Eigenvalues of the Hessian at scale `s`, and logs of its norm, of its trace and of the gradient's length.

    `share`: the lung blurred by 2 voxels, over which norm and trace are averaged.
    """
    hessian: list[list[Tensor]] = []
    norm, trace, slope = torch.zeros_like(filled), torch.zeros_like(filled), torch.zeros_like(filled)
    for i in range(3):
        row: list[Tensor] = []
        for j in range(3):
            if j < i:
                row.append(hessian[j][i])
                continue
            order = [0, 0, 0]
            order[i] += 1
            order[j] += 1
            second = s * s * gaussian(filled, s, order)
            norm = norm + second.square() * (1.0 if i == j else 2.0)
            if i == j:
                trace = trace + second
            row.append(at(second, index))
        hessian.append(row)
        first = [0, 0, 0]
        first[i] = 1
        slope = slope + gaussian(filled, s, first).square()
    matrix = torch.stack([torch.stack(row, 1) for row in hessian], 1)
    found: list[Tensor] = []
    values = 5 * eigenvalues(matrix)
    for k in range(3):
        found.append(values[:, k])
    for energy in [norm.sqrt(), trace.abs()]:
        found.append((at(blur(energy * lung, 2.0) / share, index) + 0.005).log())
    found.append((s * at(slope.sqrt(), index) + 0.01).log())
    return found


def describe(image: Tensor, lung: Tensor, index: Tensor) -> Tensor:
    """The :data:`DESCRIPTORS` of the voxels `index` (M, 3) of one scan, (M, 29).

    Means are taken over the lung alone, by normalised convolution. What lies beyond the lung is taken for the tissue
    nearest to it. So neither ribs nor the heart shine into the lung.

    Args:
        image: (D, H, W), HU window scaled to [0, 1].
        lung: (D, H, W) in {0, 1}.
        index: voxels of the lung.

    Source of normalised convolution: Knutsson and Westin, CVPR 1993.
    """
    lung = lung.to(image.dtype)
    usual = (image * lung).sum() / lung.sum()  # what lies beyond the volume is taken for it, too
    image = (image - usual) * lung
    scales = [1.0, 1.7, 3.0, 5.0]
    shares = [blur(lung, s).clamp_min(0.02) for s in scales]
    means = [blur(image, scales[k]) / shares[k] for k in range(4)]
    filled = torch.where(lung > 0, image, torch.where(shares[1] > 0.021, means[1], means[3]))
    found = [at(image, index) + usual]
    for k in range(4):
        variance = blur(image.square(), scales[k]) / shares[k] - means[k].square()
        found.append(at(means[k], index) + usual)
        found.append((at(variance, index).clamp_min(1e-6).sqrt() + 0.02).log())
    level = filled
    for s in [0.7, 1.5, 3.0]:
        coarser = blur(filled, s)
        energy = (level - coarser).abs() * lung
        for k in [1, 2]:
            found.append((at(blur(energy, scales[k]) / shares[k], index) + 0.01).log())
        level = coarser
    share = blur(lung, 2.0).clamp_min(0.02)
    for s in [1.0, 1.8]:
        found += curvature(filled, lung, share, index, s)
    found += [at(shares[3], index), at(shares[2], index)]
    return torch.stack(found, 1)


def tokens_at(lung: Tensor) -> Tensor:
    """Every second voxel of a lung (D, H, W) an axis, (M, 3); every voxel where there would be none."""
    index = lung.nonzero()
    even = (index % 2 == 0).all(1)
    return index[even] if bool(even.any()) else index


def level_and_spread(described: Tensor) -> tuple[Tensor, Tensor]:
    """Median, and 1.48 times the median deviation from it, of each descriptor of a scan's tokens, (29,) each.

    Dose, kernel, calibration and inspiration shift or stretch these. Where a voxel lies, the last two, they don't: 0, 1.
    """
    median = described.median(0)[0]
    return but_for_place(median, 1.48 * (described - median).abs().median(0)[0] + 1e-3)


def but_for_place(level: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Level and spread (29,) with 0 and 1 for the last two descriptors: where a voxel lies is no matter of the scanner."""
    where = torch.arange(len(level), device=level.device) >= len(level) - 2
    return torch.where(where, 0.0, level), torch.where(where, 1.0, spread)
