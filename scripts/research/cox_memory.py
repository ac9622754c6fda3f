# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Cox in batches of a few patients: no memory, our memory bank, and torchsurv's Momentum, on drawn patients.

A linear model is trained by each. Measured: its C-index on unseen patients, and the angle between the gradients of batches
and of the whole cohort at the same weights, step by step and summed over an epoch.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
import torch.nn as nn
from torch import Tensor
from torchsurv.loss.cox import neg_partial_log_likelihood
from torchsurv.loss.momentum import Momentum
from tqdm import tqdm

from bundle.files import write_text
from bundle.metrics.survival import c_index
from bundle.survival import CoxMemory
from bundle.survival.cox import Cox, cox_regression, partial_log_likelihood

PATIENTS, UNSEEN, COVARIATES, MEMORY = 96, 1000, 8, 64
# Share of the target network that a step of Momentum keeps, by name.
RATES = {"Momentum, rate 0.999": 0.999, "Momentum, rate 0.9": 0.9}
METHODS = ["no memory", "cox_memory", *RATES]


def drawn(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Covariates (num, 8), and outcomes (num, 2): proportional hazards, no ties, about a half censored."""
    x = torch.randn(num, COVARIATES, generator=generator)
    log_hazard = x @ torch.linspace(-0.8, 0.8, COVARIATES)
    death = -30 * torch.rand(num, generator=generator).log() * torch.exp(-log_hazard)
    censored = 60 * torch.rand(num, generator=generator)
    return x, torch.stack([torch.minimum(death, censored), (death <= censored).float()], 1)


def map_of(objective: Cox, log_hazard: Tensor) -> Tensor:
    """Survival maps of one patch, whose log hazard under the objective is this."""
    location = objective.tmax / 2 - objective.scale * log_hazard
    return torch.stack([location, torch.ones_like(location)], 1)[..., None, None, None]


def loss_of(method: str, network: nn.Module, batch: int) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """The network that learns, and the loss of a batch of covariates and outcomes."""
    if method in RATES:
        steps = MEMORY // batch + 1  # it forgets a batch before it adds the next
        momentum = Momentum(network, neg_partial_log_likelihood, batch, steps, RATES[method])
        return momentum, lambda x, outcome: momentum(x, outcome[:, 1] > 0, outcome[:, 0])
    objective = Cox() if method == "no memory" else CoxMemory(memory=MEMORY)
    return network, lambda x, outcome: objective(map_of(objective, network(x)[:, 0]), outcome)


def angle(a: Tensor, b: Tensor) -> float:
    return torch.rad2deg(torch.arccos(nn.functional.cosine_similarity(a, b, dim=0).clamp(-1, 1))).item()


def cohort_of(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], torch.Generator]:
    """Patients to train on, unseen ones, and what draws the batches."""
    generator = torch.Generator().manual_seed(seed)
    return drawn(PATIENTS, generator), drawn(UNSEEN, generator), generator


def train(method: str, batch: int, epochs: int, seed: int) -> dict:
    """C-index of a training."""
    (x, outcome), (unseen, then), generator = cohort_of(seed)
    network = nn.Linear(COVARIATES, 1, bias=False)
    nn.init.zeros_(network.weight)
    learner, loss = loss_of(method, network, batch)
    online = learner.online if method in RATES else network
    optimizer = torch.optim.Adam(online.parameters(), 0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (PATIENTS // batch))
    for _ in range(epochs):
        for rows in torch.randperm(PATIENTS, generator=generator).split(batch):
            optimizer.zero_grad()
            loss(x[rows], outcome[rows]).backward()
            optimizer.step()
            schedule.step()
    found = {"c_index": c_index(online(unseen)[:, 0].detach(), *then.T)}
    return found | ({"c_index_target": c_index(learner.infer(unseen)[:, 0], *then.T)} if method in RATES else {})


def angles(method: str, batch: int, epochs: int, seed: int) -> dict:
    """Angles between gradients, on the straight way from 0 to nine tenths of the fit to the whole cohort."""
    (x, outcome), _, generator = cohort_of(seed)
    fit = cox_regression(x, *outcome.T)
    network = nn.Linear(COVARIATES, 1, bias=False)
    nn.init.zeros_(network.weight)
    learner, loss = loss_of(method, network, batch)
    online = learner.online if method in RATES else network
    steps, sums = [], []
    for epoch in range(epochs):
        total = torch.zeros(2, COVARIATES)
        for k, rows in enumerate(torch.randperm(PATIENTS, generator=generator).split(batch)):
            way = 0.9 * (epoch + k * batch / PATIENTS) / epochs
            online.weight.data.copy_(way * fit)
            whole = -partial_log_likelihood(online(x)[:, 0], *outcome.T) / PATIENTS
            (of_all,) = torch.autograd.grad(whole, online.weight)
            online.zero_grad()
            loss(x[rows], outcome[rows]).backward()
            gradient = torch.stack([online.weight.grad[0], of_all[0]])
            total += gradient
            if epoch and bool(gradient[0].any()):  # the first fills the memory
                steps.append(angle(*gradient))
        if epoch:
            sums.append(angle(*total))
    return {"angle_of_a_step": sum(steps) / len(steps), "angle_of_an_epoch": sum(sums) / len(sums)}


def row_of(method: str, batch: int, epochs: int, seed: int) -> dict:
    key = (method, batch, epochs, seed)
    return {"method": method, "batch": batch, "seed": seed, **train(*key), **angles(*key)}


def c_index_of_all(seed: int) -> float:
    """C-index of the fit to the whole cohort at once."""
    (x, outcome), (unseen, then), _ = cohort_of(seed)
    return c_index(unseen @ cox_regression(x, *outcome.T), *then.T)


def page(table: pd.DataFrame, whole: list[float], epochs: int, command: str) -> str:
    mean = table.groupby(["batch", "method"], sort=False).mean(numeric_only=True)
    lines = [
        "# Risk sets that reach across batches",
        "",
        f"Cox's partial likelihood compares patients, and a batch of scans holds few. A linear model of {COVARIATES} covariates is trained on "
        f"{PATIENTS} drawn patients, about half of them censored, for {epochs} epochs: with the risk sets of the batch alone (`cox`), with those of the "
        f"last {MEMORY} patients as well (`cox_memory`), and with torchsurv's `Momentum`, which remembers as many, not what the network said of "
        "them but what a second network says, of whose weights a step keeps the *rate* (0.999 unless told otherwise) and takes the rest from "
        "the first. All else is the same. Means over "
        f"{table.seed.nunique()} draws.",
        "",
        f"*C-index* on {UNSEEN} unseen patients; fitted to the whole cohort at once it is {sum(whole) / len(whole):.3f}. Momentum recommends its "
        "second network, the *target*, for predictions. *Angle*: between the gradient of a batch and that of the whole cohort at the same weights, "
        f"of each *step* and of the sums over an *epoch* (without the first, which fills the memory), while the weights go, for all alike, from 0 to nine "
        f"tenths of the fit to the whole cohort in {epochs} epochs; 90° is no better than chance. Lengths differ by a constant, which the optimiser takes out.",
        "",
        "| batch | risk sets | C-index | of the target | angle of a step | of an epoch |",
        "|---|---|---|---|---|---|",
    ]
    for (batch, method), row in mean.iterrows():
        numbers = [(row.c_index, ".3f"), (row.c_index_target, ".3f"), (row.angle_of_a_step, ".0f"), (row.angle_of_an_epoch, ".0f")]
        cells = " | ".join("–" if pd.isna(value) else f"{value:{form}}{'°' if form == '.0f' else ''}" for value, form in numbers)
        lines.append(f"| {batch} | {method} | {cells} |")
    return "\n".join(lines) + f"\n\nMade by `{command}`.\n"


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m scripts.research.cox_memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--batches", type=int, nargs="+", default=[2, 4], help="patients a batch (default 2 4)")
    p.add_argument("--epochs", type=int, default=10, help="(default 10)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the patients (default 0 1 2)")
    p.add_argument("--page", type=Path, default=Path("docs/cox_memory.md"), help="page to write (default %(default)s)")
    args = p.parse_args()
    # torchsurv's, of batches without a death and of patients who are in the memory as well
    warnings.filterwarnings("ignore", message="No events OR single sample|Ties in `time` detected")
    todo = [(method, batch, args.epochs, seed) for batch in args.batches for method in METHODS for seed in args.seeds]
    table = pd.DataFrame([row_of(*key) for key in tqdm(todo, unit="run")])
    command = "python -m scripts.research.cox_memory"
    write_text(args.page, page(table, [c_index_of_all(s) for s in args.seeds], args.epochs, command))
    print(args.page.read_text())


if __name__ == "__main__":
    main()
