# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Multiple instance learners of others, small, written from their papers: features of a bag's tiles -> logits of its class.

Input is (B, N, F). Each keeps `attention`, (B, N), of its last call; `patch_logits`, (B, N, classes), where it has them.
"""

import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

DIM = 64


def mlp(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class AttnMIL(nn.Module):
    """A weighted mean of tiles, weights ``softmax(w · tanh(V h))``. Ilse et al., ICML 2018, equations 7 and 8."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(mlp(features, DIM), nn.ReLU())
        self.score = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh(), nn.Linear(DIM, 1))
        self.classify = mlp(DIM, DIM, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        self.attention = self.score(h)[..., 0].softmax(1)
        return self.classify((self.attention[..., None] * h).sum(1))


class TransMIL(nn.Module):
    """A class token and tiles through two transformer layers, with convolutions over the tiles laid as a square between.

    Shao et al., NeurIPS 2021. Attention is exact, where theirs is approximate for thousands of tiles. The map is the
    class token's attention through both layers (rollout: Abnar & Zuidema, ACL 2020).
    """

    def __init__(self, features: int, classes: int, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Sequential(mlp(features, DIM), nn.ReLU())
        self.token = nn.Parameter(torch.randn(1, 1, DIM))
        self.norms = nn.ModuleList([nn.LayerNorm(DIM) for _ in range(3)])
        self.attend = nn.ModuleList([nn.MultiheadAttention(DIM, heads, batch_first=True) for _ in range(2)])
        self.place = nn.ModuleList([nn.Conv2d(DIM, DIM, side, padding=side // 2, groups=DIM) for side in (3, 5, 7)])
        self.classify = nn.Linear(DIM, classes)

    def layer(self, x: Tensor, k: int) -> Tensor:
        y = self.norms[k](x)
        y, attention = self.attend[k](y, y, y)
        rolled = 0.5 * (attention + torch.eye(x.shape[1]))
        self.rollout = rolled if k == 0 else rolled @ self.rollout
        return x + y

    def forward(self, x: Tensor) -> Tensor:
        tiles = x.shape[1]
        side = math.ceil(math.sqrt(tiles))
        h = self.embed(x)
        h = torch.cat([h, h[:, : side**2 - tiles]], 1)  # the first tiles again, to fill the square
        h = self.layer(torch.cat([self.token.expand(len(h), -1, -1), h], 1), 0)
        square = h[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        square = square + sum(place(square) for place in self.place)
        h = self.layer(torch.cat([h[:, :1], square.flatten(2).transpose(1, 2)], 1), 1)
        self.attention = self.rollout[:, 0, 1 : tiles + 1]
        return self.classify(self.norms[2](h[:, 0]))


class AdditiveMIL(nn.Module):
    """The sum of what each tile says, an MLP of the tile times its attention. Javed et al., NeurIPS 2022, equation 4."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.score = mlp(features, DIM, DIM, 1)
        self.classify = mlp(features, DIM, DIM, classes)

    def forward(self, x: Tensor) -> Tensor:
        self.attention = self.score(x)[..., 0].softmax(1)
        self.patch_logits = self.classify(self.attention[..., None] * x)
        return self.patch_logits.sum(1)


PEERS: dict[str, type[nn.Module]] = {"AttnMIL": AttnMIL, "TransMIL": TransMIL, "AdditiveMIL": AdditiveMIL}
Bags = tuple[Tensor, Tensor]  # features (bags, tiles, F), class (bags,)


def fitted(name: str, train: Bags, val: Bags, classes: int, seed: int, epochs: int = 100, patience: int = 10) -> nn.Module:
    """A peer at its best cross-entropy on `val`: Adam, 1e-3, bags of 16 at a time, stopped after `patience` epochs."""
    torch.manual_seed(seed)
    model = PEERS[name](train[0].shape[2], classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    best, state, waited = math.inf, model.state_dict(), 0
    for _ in range(epochs):
        model.train()
        for part in torch.randperm(len(train[0])).split(16):
            optimizer.zero_grad()
            F.cross_entropy(model(train[0][part]), train[1][part]).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            loss = float(F.cross_entropy(model(val[0]), val[1]))
        waited += 1
        if loss < best:
            best, state, waited = loss, copy.deepcopy(model.state_dict()), 0
        if waited == patience:
            break
    model.load_state_dict(state)
    return model


@torch.no_grad()
def explained(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Probabilities of classes, (B, classes), and scores of tiles by name, (B, N, classes).

    `alone`: the probability of a class if the tile were all there is.
    """
    classes = model(x).softmax(1)
    scores = {"attention": model.attention[..., None].expand(-1, -1, classes.shape[1])}
    if hasattr(model, "patch_logits"):
        scores["patch scores"] = model.patch_logits
    scores["tile alone"] = model(x.flatten(0, 1)[:, None]).softmax(1).unflatten(0, x.shape[:2])
    return classes, scores
