# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""A small network on the same descriptors with the masks as labels: the most that local evidence can show."""

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bundle.metrics.survival import c_index
from scripts.research.peers.cohort import Cohort, Predict, Scan, scaler

TITLE = "ceiling: a finer classifier, told the masks"
TOKENS, EPOCHS, BATCH = 2000, 12, 4096
POWERS = (1, 2, 4, 8)


def train(x: Tensor, y: Tensor) -> nn.Module:
    """A classifier of tokens (M, F), lesion (M,) or not."""
    network = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.01)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        drawn = torch.randint(len(x), (BATCH,))
        loss = F.binary_cross_entropy_with_logits(network(x[drawn])[:, 0], y[drawn])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


def fit(cohort: Cohort, seed: int) -> Predict:
    """The power of the probability whose mean is the risk is chosen on training anatomies that were left out."""
    torch.manual_seed(seed)
    x, lesion = cohort.sample(TOKENS, seed, lesions=TOKENS // 4)
    scaled, y = scaler(x), lesion.float()

    @torch.no_grad()
    def probability(network: nn.Module, scan: Scan) -> Tensor:
        return network(scaled(scan.tokens()[0]))[:, 0].sigmoid()

    risk = torch.zeros(len(POWERS), len(x))
    for rest, own in cohort.folds():
        network = train(scaled(x[rest]).flatten(0, 1), y[rest].flatten())
        for i in own.tolist():
            p = probability(network, cohort.train[i])
            risk[:, i] = torch.stack([(p**power).mean() for power in POWERS])
    scores = [c_index(r, cohort.time, cohort.event) or 0.0 for r in risk]
    power = POWERS[int(np.argmax(scores))]
    network = train(scaled(x).flatten(0, 1), y.flatten())

    def predict(scan: Scan) -> tuple[float, np.ndarray]:
        heat = probability(network, scan) ** power
        return float(heat.mean()), scan.on_grid(heat, scan.tokens()[1])

    return predict
