# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What becomes of the target where lung is replaced, or where all else is. No gradient is needed.

Tokens are replaced by those of the filled scan. For patches that don't overlap this is what replacing voxels gives.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bundle.explain.scan import ScanTokens

MOST = 512  # blocks of a scan
MASKS = 256  # of RISE
COARSE = 16  # voxels of a cell of RISE's masks


def blocks(scan: ScanTokens) -> Tensor:
    """The block that each token is in, (M,): cubes of the smallest side, in whole windows, of which at most `MOST` are."""
    step = side = max(1, getattr(scan.network, "window", 1))
    while True:
        found = torch.unique(torch.div(scan.index, side, rounding_mode="floor"), dim=0, return_inverse=True)[1]
        if int(found.max()) < MOST:
            return found
        side += step


def by_block(scan: ScanTokens, alone: bool) -> Tensor:
    """By how much the target differs with one block replaced, or with one block kept alone, (M,); memory is bounded."""
    of, reference = blocks(scan), scan.kept(torch.full((1, len(scan.index)), float(not alone)).to(scan.image))
    changes = []
    for part in torch.arange(int(of.max()) + 1, device=of.device).split(scan.batch):
        block = (of == part.unsqueeze(1)).to(scan.image)
        changes.append(scan.kept(block) - reference if alone else reference - scan.kept(1 - block))
    return torch.cat(changes)[of]


def occlusion(scan: ScanTokens, level: str = "") -> Tensor:
    """Necessity: by how much the target falls where a block is replaced. Zeiler and Fergus, ECCV 2014."""
    return by_block(scan, alone=False)


def keep_only(scan: ScanTokens, level: str = "") -> Tensor:
    """Sufficiency: by how much the target rises from a filled scan's where a block alone is kept."""
    return by_block(scan, alone=True)


def rise(scan: ScanTokens, level: str = "") -> Tensor:
    """The mean target over random smooth masks that keep a token, less that over all masks.

    The masks are the same in every run.

    Source: Petsiuk et al., RISE, BMVC 2018.
    """
    side = max(1, COARSE // scan.cell)
    size = [-(-n // side) + 1 for n in scan.shape]
    draw = torch.Generator().manual_seed(0)
    total, count, sums = 0.0, 0.0, 0.0
    for start in range(0, MASKS, scan.batch):
        k = min(scan.batch, MASKS - start)
        coarse = (torch.rand((k, 1, *size), generator=draw) < 0.5).to(scan.image)
        fine = F.interpolate(coarse, [n * side for n in size], mode="trilinear")[:, 0]
        at = torch.randint(side, (k, 3), generator=draw).tolist()
        masks = torch.stack([scan.pick(mask[z:, y:, x:]) for mask, (z, y, x) in zip(fine, at)])
        scores = scan.kept(masks)
        total, count, sums = total + scores @ masks, count + masks.sum(0), sums + float(scores.sum())
    return total / count.clamp_min(1e-6) - sums / MASKS
