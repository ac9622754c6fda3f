# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Attention-based multiple instance learning (Ilse, Tomczak & Welling, ICML 2018), gated, with Cox's loss, on tokens.

One network for each group of training anatomies that is left out; the group chooses the step to stop at, and the networks
are averaged. A token's heat is its attention times what its embedding adds to the log hazard.
"""

import copy

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from scripts.research.peers.cohort import Cohort, Predict, Scan, scaler

TITLE = "attention MIL"
TOKENS, STEPS, CHECK = 512, 100, 10


class AttentionMIL(nn.Module):
    """Attention and score of each token, (N, M) each, of bags (N, M, F) of standardised descriptors."""

    def __init__(self, features: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Dropout(0.25))
        self.tanh, self.gate = nn.Linear(width, width // 2), nn.Linear(width, width // 2)
        self.attention, self.score = nn.Linear(width // 2, 1), nn.Linear(width, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embed(x)
        attention = self.attention(self.tanh(h).tanh() * self.gate(h).sigmoid())[..., 0].softmax(-1)
        return attention, self.score(h)[..., 0]

    def risk(self, x: Tensor) -> Tensor:
        """Log hazard (N,)."""
        attention, score = self(x)
        return (attention * score).sum(-1)


def train(x: Tensor, cohort: Cohort, rest: Tensor, own: Tensor, g: torch.Generator) -> AttentionMIL:
    """Fit to scans `rest`, a fresh draw of tokens a step; the step at which `own` are most likely is kept."""
    network = AttentionMIL(x.shape[2])
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    best, kept = -torch.inf, network
    for step in range(STEPS):
        drawn = torch.randint(x.shape[1], (TOKENS,), generator=g)
        risk = network.train().risk(x[rest][:, drawn])
        loss = -cohort.log_likelihood(risk, rest) / len(rest)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % CHECK == CHECK - 1:
            with torch.no_grad():
                value = cohort.log_likelihood(network.eval().risk(x[own]), own)
            if value > best:
                best, kept = value, copy.deepcopy(network)
    return kept


def fit(cohort: Cohort, seed: int) -> Predict:
    torch.manual_seed(seed)
    x, _ = cohort.sample(4 * TOKENS, seed)
    scaled = scaler(x)
    x = scaled(x)
    g = torch.Generator().manual_seed(seed)
    networks = [train(x, cohort, rest, own, g) for rest, own in cohort.folds()]
    with torch.no_grad():
        usual = [network.risk(x).mean() for network in networks]

    @torch.no_grad()
    def predict(scan: Scan) -> tuple[float, np.ndarray]:
        x, place, _ = scan.tokens()
        x, risk, heat = scaled(x)[None], 0.0, 0.0
        for network, centre in zip(networks, usual):
            attention, score = network(x)
            risk = risk + float((attention * score).sum() - centre)
            heat = heat + attention[0] * (score[0] - centre).clamp_min(0)
        return risk, scan.on_grid(heat, place)

    return predict
