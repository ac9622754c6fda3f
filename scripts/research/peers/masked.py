# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Survival Map's own codebooks with the masks as labels: the most that its network can show, had it been told where."""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bundle.networks.codebook_net import between_tokens
from bundle.networks.descriptors import level_and_spread
from bundle.run.codebooks import Tokens, fit_odds, words_of
from bundle.run.trained import TrainedModel
from scripts.research.peers import ours
from scripts.research.peers.cohort import Cohort, Predict, Scan

TITLE = "Survival Map, told the masks"
TOKENS, EPOCHS = 2000, 12


def tokens_of(scan: Scan) -> tuple[Tokens, Tensor]:
    """Tokens as the network takes them, and whether a lesion is there, (M,)."""
    tokens = Tokens.of(scan.image[None], scan.mask("lung_mask")[None])
    return tokens, scan.mask("gt_mask")[tokens.index.long().unbind(1)]


def fit(cohort: Cohort, seed: int) -> Predict:
    """Books of the training on outcomes, which saw none; hazards from masks. Heat is the probability of a lesion."""
    network = TrainedModel(ours.train(cohort, seed)).network
    torch.manual_seed(seed)
    words, lesions = [], []
    for scan in tqdm(cohort.train, desc="words", unit="scan", leave=False):
        tokens, lesion = tokens_of(scan)
        described = tokens.described.float()
        ill = lesion.nonzero()[:, 0]
        ill = ill[torch.randperm(len(ill))[: TOKENS // 4]]
        drawn = torch.cat([ill, torch.randint(len(lesion), (TOKENS - len(ill),))])
        with torch.no_grad():
            words.append(network.words_of(network.standardised(described[drawn], *level_and_spread(described))))
        lesions.append(lesion[drawn])
    size = network.centres.shape[1]
    evidence, bias = fit_odds(torch.cat(words), torch.cat(lesions).float(), size, EPOCHS, 0.01, torch.default_generator)
    network.hazard.data.copy_(evidence)

    @torch.no_grad()
    def predict(scan: Scan) -> tuple[float, np.ndarray]:
        tokens, lung = tokens_of(scan)[0], scan.mask("lung_mask").float()
        p = (len(evidence) * network.evidence(words_of(network, tokens)) + bias).sigmoid()
        heat = between_tokens(p, tokens.index.long() // 2, 0.5 * network.smoothing, lung).clamp_min(0) * lung
        return float(p.mean()), heat.numpy()

    return predict
