# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Is a map faithful to the network it explains? Numbers that need no lesion mask, the same for every explainer.

`values` are a map's values of the M tokens of a scan, hot where more is worse. `score` is the target, (k,), of scans of
which the tokens with 1 in masks (k, M) are kept and the others replaced, as :meth:`bundle.explain.scan.ScanTokens.kept`.
Targets are scaled so that the whole scan has 1 and the one without any of its lung 0; where these are equal, no number of
them has a meaning and each is None. Equal values come in random order, the same in every run.
"""

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

Score = Callable[[Tensor], Tensor]

SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)  # of the tokens
STEPS = 20  # of the curves


def hottest_first(values: Tensor, seed: int = 0) -> Tensor:
    """The rank of each token, (M,): 0 for the hottest."""
    mixed = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed)).to(values.device)
    order = mixed[values[mixed].argsort(descending=True, stable=True)]
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def faithfulness(score: Score, values: Tensor) -> dict[str, float | None]:
    """How the target follows a map, as tokens are replaced, or kept, from the hottest on.

    Returns:
        ``deletion``: area under the target with growing shares replaced; low is good. ``insertion``: the same with
        growing shares kept in an otherwise replaced scan; high is good. ``comprehensiveness``: what the target loses
        without the hottest tokens, the mean over :data:`SHARES`; high is good. ``sufficiency``: what it loses with these
        alone; low is good.

    Source: Petsiuk et al., RISE, BMVC 2018; DeYoung et al., ERASER, ACL 2020.

    Example::

        >>> danger = torch.tensor([3.0, 0.0, 1.0, 0.0])
        >>> found = faithfulness(lambda masks: masks @ danger, danger)
        >>> {name: round(value, 2) for name, value in found.items()}
        {'deletion': 0.19, 'insertion': 0.81, 'comprehensiveness': 0.8, 'sufficiency': 0.2}
    """
    names = ("deletion", "insertion", "comprehensiveness", "sufficiency")
    rank, num = hottest_first(values), len(values)
    steps = [round(num * step / STEPS) for step in range(STEPS + 1)]
    shares = [max(1, round(num * share)) for share in SHARES]
    hot = (rank < torch.tensor(steps + shares, device=values.device).unsqueeze(1)).to(values.dtype)
    target = score(torch.cat([hot, 1 - hot]))
    nothing, everything = target[0], target[STEPS]
    if float((everything - nothing).abs()) <= 1e-6 * float(everything.abs() + nothing.abs()):
        return dict.fromkeys(names)
    kept, replaced = ((target - nothing) / (everything - nothing)).chunk(2)
    at = torch.tensor(steps, device=values.device) / num
    area = [torch.trapezoid(curve[: STEPS + 1], at) for curve in (replaced, kept)]
    loss = [(1 - curve[STEPS + 1 :]).mean() for curve in (replaced, kept)]
    return dict(zip(names, map(float, area + loss)))


def agreement(a: Tensor, b: Tensor) -> float | None:
    """Spearman's rank correlation of two maps of one shape; None if one of them is constant."""
    a, b = a.flatten().cpu(), b.flatten().cpu()
    if bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return None
    return float(spearmanr(a, b).statistic)


Maps = dict[str, Tensor]  # of one scan, by the name of their method


def cascading_randomisation(
    network: nn.Module, see: Callable[[nn.Module], Maps], seed: int = 0, after: Sequence[str] | None = None
) -> dict[str, dict[str, float | None]]:
    """Agreement of maps with those of the network with random weights, from its last part on down to its first.

    A map that depends on what was learnt soon agrees no more. Weights are drawn from a normal distribution of the mean and
    spread that they had; single numbers stay. The network itself is left as it is.

    Args:
        network: of the maps, whose parts are its modules, and the blocks of a list of them.
        see: a network -> its maps.
        seed: of the weights.
        after: names of the parts after which maps are looked at; None for each part.

    Returns:
        by the name of the part that was randomised last, the agreement of each map.

    Source: Adebayo et al., Sanity Checks for Saliency Maps, NeurIPS 2018.
    """
    original, changed, found = see(network), copy.deepcopy(network), {}
    draw, parts = torch.Generator().manual_seed(seed), {}
    for name, weights in changed.named_parameters():
        if weights.numel() < 2:
            continue
        place = name.split(".")
        parts.setdefault(".".join(place[: 2 if place[1:] and place[1].isdigit() else 1]), []).append(weights)
    for part, weights in reversed(parts.items()):
        with torch.no_grad():
            for each in weights:
                each.copy_(each.mean() + each.std() * torch.randn(each.shape, generator=draw).to(each))
        if after is None or part in after:
            found[part] = agreements(original, see(changed))
    return found


def agreements(a: Maps, b: Maps) -> dict[str, float | None]:
    """:func:`agreement` of the maps of each method."""
    return {name: agreement(a[name], b[name]) for name in a}


def shift_agreement(
    see: Callable[[Tensor, Tensor], Maps], image: Tensor, lung: Tensor, voxels: Sequence[int] = (1, 2, 3)
) -> dict[str, float | None]:
    """Mean agreement, in the lung, of a scan's maps with those of the scan moved by some voxels along all axes.

    Args:
        see: image and lung (1, 1, D, H, W) -> maps (D, H, W).
        image, lung: of the scan.
        voxels: by which it is moved.
    """
    original, inside, found = see(image, lung), lung[0, 0] > 0, []
    for n in voxels:
        moved = see(F.pad(image, [n, 0] * 3, mode="replicate"), F.pad(lung, [n, 0] * 3))
        back = {name: values[n:, n:, n:][inside] for name, values in moved.items()}
        found.append(agreements({name: values[inside] for name, values in original.items()}, back))
    each = {name: [one[name] for one in found] for name in original}
    return {name: None if None in values else sum(values) / len(values) for name, values in each.items()}


def completeness_error(values: Tensor, change: float) -> float:
    """How far a map's sum is from the `change` of the target that it should add up to, as a share of that change."""
    return abs(float(values.sum()) - change) / max(abs(change), 1e-12)
