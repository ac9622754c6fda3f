# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""DeepSurv's public tables: the shipped `clinical_only` baseline on their training and test patients.

Source: Katzman et al., DeepSurv, BMC Medical Research Methodology 2018.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from bundle.data import encode_clinical
from bundle.files import write_text
from bundle.metrics.survival import c_index
from bundle.run.trained import TrainedModel
from bundle.survival import mean_months
from bundle.survival.cox import cox_regression
from scripts.research.benchmarks.runs import predicted, train, write_picture
from scripts.research.benchmarks.sources import TRAINED_ON

CONFIGS = ["configs/cohort/phantom.json", "configs/network/clinical_only.json"]
SCHEDULE = {"batch_size": 32, "max_epochs": 5, "learning_rate": 0.02}
LONGEST = 99.0  # months, to which the longest time is scaled; below tmax
EMPTY = np.array([[0, 5 / 6, 0, 5 / 6]] * 4)  # the scan that everybody has: air and water, as a CT must


def cohort(folder: Path, table: pd.DataFrame, name: str, seed: int) -> Path:
    """Their table with an empty scan for each part, times scaled, and a tenth of the training patients to validate on."""
    path, rng, trained = folder / "cohort.csv", np.random.default_rng(seed), TRAINED_ON[name]
    table = table.assign(split="test", time=(table.duration * LONGEST / table.duration.max()).clip(lower=0.01))
    table.loc[rng.permutation(trained), "split"] = np.where(np.arange(trained) < trained // 10, "val", "train")
    table = table.drop(columns="duration")
    table = table.assign(patient_id=[f"{name}{k}" for k in table.index], image="scan_" + table.split + ".nii")
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val", "test"):
        write_picture(folder / f"scan_{split}.nii", EMPTY)
    write_text(path, table.to_csv(index=False))
    return path


def encoded(ckpt: Path, test: pd.DataFrame, columns: list[str]) -> torch.Tensor:
    """Covariates of the test patients as the training encoded them, (B, K)."""
    records = [{"covariates": dict(zip(columns, map(float, row)))} for row in test[columns].itertuples(index=False)]
    known = encode_clinical(records, TrainedModel(str(ckpt)).settings["clinical"])
    return torch.stack([torch.as_tensor(record["clinical"]).float() for record in known])


def measured(work: Path, table: pd.DataFrame, name: str, seed: int, threads: int) -> dict:
    """C-index on their test patients, and that of Cox regression fitted whole on all of their training patients."""
    path = cohort(work / f"{name}_{seed}", table, name, seed)
    columns = [column for column in table if column.startswith("x")]
    options = {**SCHEDULE, "clinical": dict.fromkeys(columns, "numeric")}
    ckpt = train(path.parent / "run", path, CONFIGS, options, seed, threads)
    test = pd.read_csv(path).query("split == 'test'")
    time, event = (torch.tensor(test[key].to_numpy(np.float64)) for key in ("time", "event"))
    x = torch.tensor(((table[columns] - table[columns].mean()) / table[columns].std()).to_numpy(np.float64))
    first, rest = slice(TRAINED_ON[name]), slice(TRAINED_ON[name], None)
    outcome = (torch.tensor(table[key].to_numpy(np.float64)[first]) for key in ("duration", "event"))
    slopes = cox_regression(x[first], *outcome)
    pmf = predicted(ckpt, np.stack([EMPTY] * len(test)), encoded(ckpt, test, columns))
    return {
        "c_index": c_index(-mean_months(pmf.double()), time, event),
        "cox_regression": c_index(x[rest] @ slopes, time, event),
    }
