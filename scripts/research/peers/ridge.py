# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Ridge-Cox on a 12 x 4 histogram of local mean and deviation; a place's heat is its cell's coefficient.

Bins, even or by quantiles, and penalty are chosen on training anatomies that the fit leaves out.
"""

import numpy as np
import torch
from torch import Tensor

from bundle.survival.cox import minimise, partial_log_likelihood
from scripts.research.peers.cohort import Cohort, Predict, Scan
from scripts.research.peers.descriptors import NAMES

TITLE = "ridge-Cox, 12 × 4 histogram"
PAIR = [NAMES.index("mean_1.0"), NAMES.index("deviation_1.7")]
BINS = (12, 4)
PENALTIES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SMOOTH = 1.8  # voxels


def inner_edges(x: Tensor, even: bool) -> list[Tensor]:
    """Where the bins of mean and deviation meet, from tokens (M, 2): of one width, or of as many tokens each."""
    edges = []
    for values, number in zip(x.unbind(1), BINS):
        part = torch.linspace(0, 1, number + 1)[1:-1]
        low, high = values.quantile(torch.tensor([0.01, 0.99]))
        edges.append(low + part * (high - low) if even else values.quantile(part))
    return edges


def cells(x: Tensor, edges: list[Tensor]) -> Tensor:
    """The cell (M,) of each token (M, 2)."""
    mean, deviation = (torch.bucketize(values.contiguous(), edge) for values, edge in zip(x.unbind(1), edges))
    return mean * BINS[1] + deviation


def ridge_cox(x: Tensor, time: Tensor, event: Tensor, penalty: float) -> Tensor:
    """Coefficients (K,) at the least of -partial likelihood / N + penalty |b|^2 / 2."""

    def loss(b: Tensor) -> Tensor:
        return 0.5 * penalty * b.square().sum() - partial_log_likelihood(x @ b, time, event) / len(x)

    return minimise(loss, x.new_zeros(x.shape[1]))


def left_out(x: Tensor, cohort: Cohort, penalty: float) -> float:
    """Partial likelihood of training anatomies that were left out of the fit, summed over folds."""
    total = 0.0
    for rest, own in cohort.folds():
        b = ridge_cox(x[rest], cohort.time[rest], cohort.event[rest], penalty)
        total += float(partial_log_likelihood(x[own] @ b, cohort.time[own], cohort.event[own]))
    return total


def fit(cohort: Cohort, seed: int) -> Predict:
    scans = [scan.tokens()[0][:, PAIR] for scan in cohort.train]
    sample, number, best = torch.cat([x[::100] for x in scans]), BINS[0] * BINS[1], None
    for even in (True, False):
        edges = inner_edges(sample, even)
        share = torch.stack([torch.bincount(cells(x, edges), minlength=number) / len(x) for x in scans]).double()
        x = (share + 1e-4).sqrt()
        spread = (x.var(0) + (0.3 * x.std(0).median()) ** 2).sqrt()
        x = (x - x.mean(0)) / spread
        for penalty in PENALTIES:
            value = left_out(x, cohort, penalty)
            if best is None or value > best[0]:
                best = value, edges, x, penalty
    _, edges, x, penalty = best
    slope = ridge_cox(x, cohort.time, cohort.event, penalty).float()

    def predict(scan: Scan) -> tuple[float, np.ndarray]:
        x, place, _ = scan.tokens()
        evidence = slope[cells(x[:, PAIR], edges)]
        return float(evidence.mean()), np.maximum(scan.on_grid(evidence, place, SMOOTH), 0)

    return predict
