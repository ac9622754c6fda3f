# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Codebooks of local texture and a marginal survival test a word: the kinds of tissue that go with death one by one.

Each word's share of the lung is correlated, within anatomies, with the martingale residual (Therneau, Grambsch & Fleming,
Biometrika 1990) of the model without covariates; a token's evidence is the mean z of its words.
"""

import numpy as np
import torch
from torch import Tensor

from bundle.metrics.verdict import martingale_residuals
from bundle.networks.codebook_net import nearest
from scripts.research.peers.cohort import Cohort, Predict, Scan, scaler

TITLE = "codebooks, each word tested alone"
BOOKS, WORDS, FEW = 20, 100, 6  # codebooks, words of each, descriptors that each looks at
SMOOTH, POWER = 1.8, 3  # voxels; of the evidence that is heat


def k_means(x: Tensor, number: int, g: torch.Generator, rounds: int = 12) -> Tensor:
    """Centres (number, F) of (M, F); one that lost all its points stays where it is."""
    centres = x[torch.randperm(len(x), generator=g)[:number]].clone()
    for _ in range(rounds):
        word = nearest(x, centres)
        count = torch.bincount(word, minlength=number)[:, None]
        total = torch.zeros_like(centres).index_add_(0, word, x)
        centres = torch.where(count > 0, total / count.clamp_min(1), centres)
    return centres


def z_of_words(shares: Tensor, residual: Tensor, stratum: Tensor) -> Tensor:
    """sqrt(N) times the correlation of the root of each word's share (N, words) with the residual (N,), (words,).

    Both are less the mean of their stratum (N,).

    A word that hardly varies has its deviation floored, so that its z is below its due.
    """
    x, residual = (shares + 1e-4).sqrt(), residual.clone()
    for k in stratum.unique():
        x[stratum == k] -= x[stratum == k].mean(0)
        residual[stratum == k] -= residual[stratum == k].mean()
    spread = (x.var(0) + (0.3 * x.std(0).median()) ** 2).sqrt()
    r = (residual / residual.std()).to(x.dtype)
    return (x * r[:, None]).mean(0) / spread * len(x) ** 0.5


def fit(cohort: Cohort, seed: int) -> Predict:
    g = torch.Generator().manual_seed(seed)
    x, _ = cohort.sample(6000, seed)
    scaled = scaler(x)
    x = scaled(x)
    residual, books = torch.zeros_like(cohort.time), []
    for k in cohort.stratum.unique():
        own = cohort.stratum == k
        residual[own] = martingale_residuals(cohort.time[own], cohort.event[own])
    for _ in range(BOOKS):
        chosen = torch.randperm(x.shape[2], generator=g)[:FEW]
        own = x[:, torch.randperm(x.shape[1], generator=g)[: max(150, 18000 // len(x))]][..., chosen]
        centres = k_means(own.reshape(-1, len(chosen)), WORDS, g)
        counts = torch.stack([torch.bincount(nearest(scan[:, chosen], centres), minlength=WORDS) for scan in x])
        books.append((chosen, centres, z_of_words(counts / x.shape[1], residual, cohort.stratum)))

    def predict(scan: Scan) -> tuple[float, np.ndarray]:
        x, place, _ = scan.tokens()
        x = scaled(x)
        evidence = torch.stack([z[nearest(x[:, chosen], centres)] for chosen, centres, z in books]).mean(0)
        heat = np.maximum(scan.on_grid(evidence, place, SMOOTH), 0) ** POWER
        return float(heat.sum() / scan.mask("lung_mask").sum()), heat

    return predict
