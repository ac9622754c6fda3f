# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Bags of digits in which some tiles speak for a class and some against it: are they found?

Rules and measures: Hense et al., xMIL: Insightful explanations for multiple instance learning in histopathology, NeurIPS
2024 (code: MIT). A bag has 30 tiles. Each digit is in the bag with probability 1/2; tiles are drawn from those that are.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from bundle.files import write_text
from bundle.run.trained import TrainedModel
from scripts.research.benchmarks.peers import PEERS, explained, fitted
from scripts.research.benchmarks.runs import kept, train, volumes, write_picture

TILES, GRID, SIDE = 30, (5, 6), 8  # tiles of a bag, laid as rows and columns; pixels of a tile's side
BAGS = {"train": 2000, "val": 500, "test": 1000}  # as theirs
QUICK_BAGS = {"train": 400, "val": 100, "test": 200}
TEST_SHARE = 0.3  # of the digits, of which only test bags are made
DIED, ALIVE = 20.0, 80.0  # months at which bags of the class die, and others are last seen
Part = tuple[np.ndarray, np.ndarray]  # digits and tiles
Evidence = np.ndarray  # (classes, bags, tiles): 1 speaks for the class, -1 against it


def drawn(bags: int, rng: np.random.Generator) -> np.ndarray:
    """Digits (bags, 30): first which digits a bag may have, each with probability 1/2, then its tiles."""
    rows: list[np.ndarray] = []
    while len(rows) < bags:
        present = np.flatnonzero(rng.integers(0, 2, 10))
        if len(present):
            rows.append(rng.choice(present, TILES))
    return np.stack(rows)


def four_bags(digits: np.ndarray) -> tuple[np.ndarray, Evidence]:
    """Class 1: an 8 and no 9; 2: a 9 and no 8; 3: both; 0: neither. The 9s speak against class 1, and so on."""
    eight, nine = (digits == 8).astype(int), (digits == 9).astype(int)
    label = eight.any(1) + 2 * nine.any(1)
    return label, np.stack([-eight - nine, eight - nine, nine - eight, eight + nine])


def pos_neg(digits: np.ndarray) -> tuple[np.ndarray, Evidence]:
    """Class 1: more of 4, 6, 8 than of 5, 7, 9. The former speak for it, the latter against: they protect."""
    signed = np.isin(digits, [4, 6, 8]).astype(int) - np.isin(digits, [5, 7, 9])
    return (signed.sum(1) > 0).astype(int), np.stack([-signed, signed])


def adjacent_pairs(digits: np.ndarray) -> tuple[np.ndarray, Evidence]:
    """Class 1: two consecutive digits of 0 to 4 are both there. All tiles of such digits speak for it."""
    has = np.stack([(digits == d).any(1) for d in range(5)], 1)
    pair = has[:, 1:] & has[:, :-1]
    member = np.pad(pair, [(0, 0), (0, 1)]) | np.pad(pair, [(0, 0), (1, 0)])  # whether digit d is in a pair
    member = np.pad(member, [(0, 0), (0, 5)])
    evidence = np.take_along_axis(member, digits, 1).astype(int)
    return pair.any(1).astype(int), np.stack([-evidence, evidence])


RULES: dict[str, Callable[[np.ndarray], tuple[np.ndarray, Evidence]]] = {
    "Pos-Neg": pos_neg,
    "Adjacent-Pairs": adjacent_pairs,
    "4-Bags": four_bags,
}
# A tile is a patch and the grid of patches doesn't move, so that a bag is the same 30 instances to all.
TILE_IS_PATCH = {"network_def#patch_size": SIDE, "train#random_transforms#0#prob": 0.0, "severity": False}
SCHEDULE = {"batch_size": 16, "max_epochs": 15}


def scored(scores: np.ndarray, evidence: Evidence) -> tuple[float, float]:
    """AUPRC of evidence for a class, and of both signs (AUPRC-2): tiles that speak against it must have the lowest scores.

    Means over the classes of all bags, each sign where some but not all tiles have it. Scores are (bags, tiles, classes).
    """
    for_class, both = [], []
    for k, of_class in enumerate(evidence):
        for score, signs in zip(scores[..., k], of_class, strict=True):
            found = []
            for sign in (1, -1):
                mask = signs == sign
                if mask.any() and not mask.all():
                    found.append(average_precision_score(mask, sign * score))
                    for_class += found if sign == 1 else []
            both += [np.mean(found)] if found else []
    return float(np.mean(for_class)), float(np.mean(both))


def bag_auc(classes: np.ndarray, label: np.ndarray) -> float:
    """AUROC of the classes (bags, classes) against the rest, mean over classes."""
    return float(np.mean([roc_auc_score(label == k, classes[:, k]) for k in range(classes.shape[1])]))


def made(images: np.ndarray, shown: np.ndarray, seed: int, number: dict[str, int]) -> dict[str, Part]:
    """Digits (bags, 30) and tiles (bags, 30, 8, 8) of each part; test bags are of pictures that no other bag has."""
    rng = np.random.default_rng(seed)
    small = images[:, 2:26, 2:26].reshape(-1, SIDE, 3, SIDE, 3).mean((2, 4))  # what is cut off is empty
    pools, parts = {"train": {}, "test": {}}, {}
    for d in range(10):
        own = rng.permutation(np.flatnonzero(shown == d))
        pools["test"][d], pools["train"][d] = np.split(own, [round(TEST_SHARE * len(own))])
    pools["val"] = pools["train"]
    for part, bags in number.items():
        digits = drawn(bags, rng)
        tiles = np.stack([small[[rng.choice(pools[part][d]) for d in bag]] for bag in digits])
        parts[part] = digits, tiles
    return parts


def laid(tiles: np.ndarray) -> np.ndarray:
    """A bag's tiles (30, 8, 8) as one picture (40, 48), row by row."""
    return tiles.reshape(*GRID, SIDE, SIDE).swapaxes(1, 2).reshape(GRID[0] * SIDE, GRID[1] * SIDE)


def cohort(folder: Path, parts: dict, rule: str, of_class: int) -> Path:
    """Table of the bags that are trained on: those of the class die, the others live."""
    path, rows = folder / f"{rule}_{of_class}.csv", []
    for part in ("train", "val"):
        digits, tiles = parts[part]
        for index, label in enumerate(RULES[rule](digits)[0]):
            image, died = folder / "images" / f"{part}{index:04d}.nii", int(label == of_class)
            if not image.is_file():
                image.parent.mkdir(parents=True, exist_ok=True)
                write_picture(image, laid(tiles[index]))
            row = {"patient_id": image.stem, "image": f"images/{image.name}", "time": DIED if died else ALIVE}
            rows.append({**row, "event": died, "split": part})
    write_text(path, pd.DataFrame(rows).to_csv(index=False))
    return path


@torch.no_grad()
def read(ckpt: Path, tiles: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Each bag's risk (B,), and its tiles' locations in months and weights, (B, 30), each."""
    model = TrainedModel(str(ckpt))
    image = volumes(np.stack([laid(bag) for bag in tiles]))
    survival_map = model.network.eval()(image, torch.ones_like(image))
    location, weight = survival_map[:, :1], survival_map[:, -1:]
    # Cells may be finer than tiles: a tile has the mean of their months and the sum of their weights.
    tiled = [F.adaptive_avg_pool3d(values, (*GRID, 1)).flatten(1) for values in (location, weight)]
    return -(location * weight).flatten(1).sum(1), tiled[0], tiled[1] * (weight[0].numel() / TILES)


def measured_map(
    work: Path, images: np.ndarray, shown: np.ndarray, rule: str, seed: int, quick: bool, threads: int
) -> list[dict]:
    """Rows of the table: what our map says, as one class after the other is what kills."""
    parts = made(images, shown, seed, QUICK_BAGS if quick else BAGS)
    digits, tiles = parts["test"]
    label, evidence = RULES[rule](digits)
    killing = range(len(evidence)) if len(evidence) > 2 else [1]  # of two classes one is the other reversed
    risks, danger, weights, networks = [], [], [], []
    for k in killing:
        table = cohort(work / f"bags_{seed}", parts, rule, k)
        configs, options = ["configs/cohort/phantom.json"], {**TILE_IS_PATCH, **SCHEDULE}
        ckpt = train(work / f"{rule}_{k}_{seed}", table, configs, options, seed, threads)
        risk, location, weight = read(ckpt, tiles)
        risks, danger, weights = [*risks, risk], [*danger, -location], [*weights, weight]
        networks.append(kept(ckpt))
    if len(evidence) == 2:
        risks, danger, weights = [-risks[0], risks[0]], [-danger[0], danger[0]], weights * 2
    auc = bag_auc(torch.stack(risks, 1).numpy(), label)
    by_name = {"weight (heat)": weights, "months": danger}
    common = {"model": "Survival Map", "kept": " ".join(sorted(set(networks))), "bag_auc": auc}
    return [
        {**common, "score": name, "auprc": result[0], "auprc_2": result[1]}
        for name, values in by_name.items()
        for result in [scored(torch.stack(values, 2).numpy(), evidence)]
    ]


def measured_peers(images: np.ndarray, shown: np.ndarray, rule: str, seed: int, quick: bool) -> list[dict]:
    """Rows of the table: peers on 32 principal components of the same tiles, and scores drawn at random."""
    parts = made(images, shown, seed, QUICK_BAGS if quick else BAGS)
    pca = PCA(32, random_state=seed).fit(parts["train"][1].reshape(-1, SIDE**2))
    scale = pca.explained_variance_.sum() ** 0.5 / 6  # numbers of about 1
    sets = {}
    for part, (digits, tiles) in parts.items():
        features = (pca.transform(tiles.reshape(-1, SIDE**2)) / scale).reshape(len(tiles), TILES, -1)
        sets[part] = torch.from_numpy(features).float(), torch.from_numpy(RULES[rule](digits)[0])
    evidence = RULES[rule](parts["test"][0])[1]
    label, rows = sets["test"][1].numpy(), []
    for name in PEERS:
        model = fitted(name, sets["train"], sets["val"], len(evidence), seed)
        classes, scores = explained(model, sets["test"][0])
        for score, values in scores.items():
            found = scored(values.numpy(), evidence)
            auc = bag_auc(classes.numpy(), label)
            rows.append({"model": name, "score": score, "bag_auc": auc, "auprc": found[0], "auprc_2": found[1]})
    guess = np.random.default_rng(seed).random((*sets["test"][0].shape[:2], len(evidence)))
    found = scored(guess, evidence)
    return [*rows, {"model": "a guess", "score": "random", "bag_auc": 0.5, "auprc": found[0], "auprc_2": found[1]}]
