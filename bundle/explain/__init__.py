# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Ways of looking at what a network does with a scan, behind one interface.

An explainer is a function (scan, level) -> a value for each token, (M,) or (M, C), and an entry of :data:`EXPLAINERS`.
Maps are hot where more is worse for the patient, unless an entry says otherwise.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bundle.errors import InputError
from bundle.explain import features, gradients, perturbation, polycam
from bundle.explain.cubelets import cubelets
from bundle.explain.scan import KINDS, ScanTokens, Target, earliness
from bundle.networks import CodebookNet, SurvivalMapNet

Levels = Callable[[nn.Module], tuple[str, ...]]


def once(network: nn.Module) -> tuple[str, ...]:
    return ("",)


def every_level(network: nn.Module) -> tuple[str, ...]:
    return KINDS[type(network)].levels(network)


def ends(network: nn.Module) -> tuple[str, ...]:
    return ("input", "output")


def blocks(network: nn.Module) -> tuple[str, ...]:
    return tuple(f"block{number}" for number in range(1, len(network.blocks) + 1))


BOTH = (SurvivalMapNet, CodebookNet)


class Explainer(NamedTuple):
    """An entry of :data:`EXPLAINERS`: the function, the networks it applies to, the places in them where it looks."""

    of: Callable[..., Any]
    networks: tuple[type[nn.Module], ...] = (SurvivalMapNet,)
    levels: Levels = once
    hot: int = 1  # -1: hot where it is better for the patient; 0: neither, so that it isn't scored


EXPLAINERS = {
    "heat": Explainer(features.heat, BOTH),
    "location": Explainer(features.location, BOTH, hot=-1),
    "weight": Explainer(features.weight, BOTH),
    "evidence": Explainer(features.evidence, (CodebookNet,)),
    "norm": Explainer(features.norm, BOTH, every_level),
    "pca": Explainer(features.pca, BOTH, every_level, hot=0),
    "change": Explainer(features.change, levels=blocks),
    "rollout": Explainer(features.rollout),
    **{name: Explainer(gradients.cam(name), levels=ends) for name in gradients.CAMS},
    "gradient_x_input": Explainer(gradients.gradient_x_input, levels=ends),
    "integrated_gradients": Explainer(gradients.integrated_gradients, levels=ends),
    "smoothgrad": Explainer(gradients.smoothgrad, levels=ends),
    **{f"pcam{sign}": Explainer(polycam.poly_cam(sign)) for sign in ("+", "-", "+-")},
    "occlusion": Explainer(perturbation.occlusion, BOTH),
    "keep_only": Explainer(perturbation.keep_only, BOTH),
    "rise": Explainer(perturbation.rise, BOTH),
    "heat_minus_gradient": Explainer(features.heat_minus_gradient, hot=0),
    "cubelets": Explainer(cubelets, BOTH, hot=0),
}


def applicable(network: nn.Module) -> dict[str, tuple[Explainer, str]]:
    """All that can be asked of a network: explainer and level by name, such as ``gradcam_input``."""
    fit = {name: found for name, found in EXPLAINERS.items() if type(network) in found.networks}
    pairs = [(name, found, level) for name, found in fit.items() for level in found.levels(network)]
    return {"_".join(filter(None, [name, level])): (found, level) for name, found, level in pairs}


def chosen(names: str | Sequence[str] | None, network: nn.Module) -> dict[str, tuple[Explainer, str]]:
    """The explainers that `--explain` names: with or without their level, or ``all`` that apply; see :func:`applicable`.

    Raises:
        InputError: there is none of a name, or it doesn't apply to this network.
    """
    there, found = applicable(network), {}
    kind = type(network).__name__
    if names is None:
        return {}
    parts = map(str, names) if isinstance(names, (list, tuple)) else str(names).split(",")
    for name in (part.strip() for part in parts):
        fits = {full: entry for full, entry in there.items() if name in ("all", full) or entry[0] is EXPLAINERS.get(name)}
        if not fits and any(name == base or name.startswith(f"{base}_") for base in EXPLAINERS):
            raise InputError(f"--explain {name} doesn't apply to these weights of a {kind} (expected {listed(there)}).")
        if not fits:
            match = difflib.get_close_matches(name, [*EXPLAINERS, *there], n=1)
            meant = f"; did you mean {match[0]}?" if match else ""
            raise InputError(f"--explain {name} is no explainer (expected all, or some of {listed(there)}{meant}).")
        found |= fits
    return found


def listed(there: Mapping[str, Any]) -> str:
    return ", ".join(there) or "none: it doesn't look at the scan"


def tokens_of_scan(network: nn.Module, *args: Any, **kwargs: Any) -> ScanTokens:
    """A scan as explainers of this network see it; arguments as of :class:`~bundle.explain.scan.ScanTokens`."""
    return KINDS[type(network)](network, *args, **kwargs)


def explain(network: nn.Module, batch: Mapping[str, Any], method: str, target: Target = earliness, **kwargs: Any) -> Tensor:
    """A map of each scan of a batch on the network's token grid, (B, C, d, h, w).

    Args:
        network: in evaluation mode.
        batch: ``image`` (B, 1, D, H, W), HU window scaled to [0, 1]; ``lung`` likewise in {0, 1} and ``clinical``
            (B, clinical_dim), where there are any.
        method: name of an explainer, with its level.
        target: of what the map is; by default how early the patient's location is, in months.
        kwargs: `fill`, `usual`, `death`, as of :class:`~bundle.explain.scan.ScanTokens`.

    Raises:
        InputError: the method is unknown, doesn't apply to the network, or makes no map.

    Example::

        >>> network = SurvivalMapNet(patch_size=4, dim=16).eval()
        >>> explain(network, {"image": torch.rand(2, 1, 16, 16, 16)}, "gradcam_output").shape
        torch.Size([2, 1, 4, 4, 4])
    """
    explainer, level = next(iter(chosen(method, network).values()))
    if explainer.of is cubelets:
        raise InputError(f"{method} is a picture, not a map.")
    maps = []
    for b in range(len(batch["image"])):
        given = {key: batch[key][b : b + 1] for key in ("lung", "clinical") if batch.get(key) is not None}
        scan = tokens_of_scan(network, batch["image"][b : b + 1], target=target, **given, **kwargs)
        with torch.no_grad():
            maps.append(scan.lay(explainer.of(scan, level)))
    return torch.stack(maps)
