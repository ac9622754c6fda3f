# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Cox regression on more covariates than patients."""

import torch
from torch import Tensor


def ridge_cox(
    x: Tensor,
    outcome: Tensor,
    penalty: float = 1.0,
    adjust: Tensor | None = None,
    strata: Tensor | None = None,
    toward: Tensor | None = None,
) -> Tensor:
    """Coefficients (D,) of covariates (N, D) that minimise  -log partial likelihood + penalty * D * |b|^2 / 2.

    By the representer theorem b = X'a / D, which leaves N unknowns, whatever D is.

    Args:
        x: covariates, standardised; D may be thousands.
        outcome: (time in months, event), (N, 2).
        penalty: weight of the prior; with 1 all D covariates together have the variance of one.
        adjust: covariates (N, K) to adjust for, each with the prior of all of `x`; their coefficients are not returned.
        strata: stratum of each patient (N,), a baseline hazard each: patients are compared within theirs alone.
        toward: coefficients (D,) of another cohort, whose scale doesn't matter. The ridge then pulls toward a multiple of
            them rather than toward 0: what they say of a patient is one more covariate, standardised, that has the prior
            of all of `x`, and its coefficient tells how much of them holds here.

    Source: Cox, J R Stat Soc B 34 (1972) 187; van Houwelingen et al., Stat Med 25 (2006) 3201.

    Example::

        >>> x = torch.tensor([[2.0], [1.0], [0.0], [-1.0]])
        >>> bool(ridge_cox(x, torch.tensor([[1.0, 1], [2, 1], [3, 1], [4, 1]])) > 0)  # a high x dies early
        True
    """
    kernel = (x @ x.T / x.shape[1]).double()
    if toward is not None:
        toward = toward / (x @ toward).std().clamp_min(1e-12)
        kernel = kernel + ((x @ toward)[:, None] * (x @ toward)).double()
    if adjust is not None:
        kernel = kernel + (adjust @ adjust.T).double()
    groups = [torch.arange(len(x))] if strata is None else [(strata == k).nonzero()[:, 0] for k in strata.unique()]
    a = torch.zeros(len(x), dtype=torch.float64, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([a], max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        risk = kernel @ a
        value = 0.5 * penalty * (a @ risk) - sum(breslow(risk[group], outcome[group]) for group in groups)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    a = a.detach().to(x.dtype)
    own = x.T @ a / x.shape[1]
    return own if toward is None else own + (x @ toward @ a) * toward


def breslow(risk: Tensor, outcome: Tensor) -> Tensor:
    """Cox's log partial likelihood with Breslow's ties, the sum over deaths, of log hazards (N,) and outcomes (N, 2)."""
    order = outcome[:, 0].argsort(descending=True, stable=True)
    time, died = outcome[order, 0], outcome[order, 1].to(risk.dtype)
    last = torch.searchsorted(-time.contiguous(), -time, right=True) - 1  # of those tied with each: all are at risk
    return ((risk[order] - risk[order].logcumsumexp(0)[last]) * died).sum()
