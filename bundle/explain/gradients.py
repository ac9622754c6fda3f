# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Gradients of the target at the transformer's input or output, and what the CAM family makes of them.

A CAM's function takes tokens and gradients, (M, n) each, and gives (M,); more is worse for the patient.
"""

import torch
from captum.attr import IntegratedGradients, NoiseTunnel, Saliency
from torch import Tensor

from bundle.explain.scan import TransformerTokens

STEPS = (32, 64, 128, 256)  # of the path of integrated gradients: more where fewer leave an error of 1 % or more
SAMPLES = 16  # of SmoothGrad
NOISE = 0.15  # of SmoothGrad, as a share of the range of the tokens
TINY = 1e-12


def grad_cam(x: Tensor, g: Tensor) -> Tensor:
    """Selvaraju et al., Grad-CAM, ICCV 2017: channels weighted by their mean gradient."""
    return (x @ g.mean(0)).relu()


def grad_cam_pp(x: Tensor, g: Tensor) -> Tensor:
    """Chattopadhay et al., Grad-CAM++, WACV 2018, equations 10 and 19 with an exponential target."""
    bottom = 2 * g.square() + x.sum(0) * g**3
    alpha = torch.where(bottom.abs() > TINY, g.square() / torch.where(bottom.abs() > TINY, bottom, 1.0), 0.0)
    return (x @ (alpha * g.relu()).sum(0)).relu()


def xgrad_cam(x: Tensor, g: Tensor) -> Tensor:
    """Fu et al., Axiom-based Grad-CAM, BMVC 2020: gradients weighted by each token's share of its channel."""
    total = x.sum(0)
    total = torch.where(total.abs() > TINY, total, torch.inf)
    return (x @ (g * x).sum(0).div(total)).relu()


def layer_cam(x: Tensor, g: Tensor) -> Tensor:
    """Jiang et al., LayerCAM, TIP 2021: each token by its own positive gradients."""
    return (g.relu() * x).sum(1).relu()


CAMS = {"gradcam": grad_cam, "gradcam++": grad_cam_pp, "xgradcam": xgrad_cam, "layercam": layer_cam}


def gradient(scan: TransformerTokens, level: str) -> Tensor:
    """The target's gradient at a level, (M, dim)."""
    if ("gradient", level) not in scan.memo:
        x = scan.features(level).clone().requires_grad_()
        with torch.enable_grad():
            (found,) = torch.autograd.grad(scan.score(x[None], level).sum(), x)
        scan.memo["gradient", level] = found
    return scan.memo["gradient", level]


def cam(name: str):
    """The explainer of an entry of :data:`CAMS`."""
    return lambda scan, level: CAMS[name](scan.features(level), gradient(scan, level))


def difference(scan: TransformerTokens, level: str) -> Tensor:
    """By how much tokens differ from those of the filled scan, (M, dim)."""
    return scan.features(level) - scan.features(level, True)


def gradient_x_input(scan: TransformerTokens, level: str) -> Tensor:
    """Gradient x (input - filled scan's input), signed. Shrikumar et al., Not Just a Black Box, 2016.

    With the input alone it would be 0 at the transformer's output: the head's LayerNorm doesn't see a token's scale.
    """
    return (gradient(scan, level) * difference(scan, level)).sum(1)


def integrated_gradients(scan: TransformerTokens, level: str) -> Tensor:
    """Integrated gradients on the straight path from the filled scan's tokens; they sum to the target's difference.

    How far they are from it, as a share of it, is ``completeness_error``.

    Source: Sundararajan et al., Axiomatic Attribution for Deep Networks, ICML 2017.
    """
    x, other = scan.features(level)[None], scan.features(level, True)[None]
    with torch.no_grad():
        change = float(scan.score(x, level) - scan.score(other, level))
    method = IntegratedGradients(lambda batch: scan.score(batch, level))
    for steps in STEPS:
        with torch.enable_grad():
            found = method.attribute(x, other, n_steps=steps, internal_batch_size=scan.batch)[0].sum(1)
        scan.found["completeness_error"] = abs(float(found.sum()) - change) / max(abs(change), TINY)
        if scan.found["completeness_error"] < 0.01:
            break
    return found


def smoothgrad(scan: TransformerTokens, level: str) -> Tensor:
    """:func:`gradient_x_input` with the mean gradient of noisy copies of the tokens; the noise is the same in every run.

    Source: Smilkov et al., SmoothGrad, 2017.
    """
    x = scan.features(level)[None]
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        method = NoiseTunnel(Saliency(lambda batch: scan.score(batch, level)))
        noise = NOISE * float(x.max() - x.min())
        found = method.attribute(
            x.clone(), nt_samples=SAMPLES, nt_samples_batch_size=min(SAMPLES, scan.batch), stdevs=noise, abs=False
        )
    return (found[0] * difference(scan, level)).sum(1)
