# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Survival Map itself, by its own commands: train.json, then inference.json on the scans to measure on."""

import hashlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from bundle.files import file_sha256, write_text
from scripts.jobs import overrides, run_module, threads_of
from scripts.research.peers.cohort import Cohort, Predict, Scan

TITLE = "Survival Map"


def bundle_run(config: str, log: Path, **options: object) -> None:
    """`python -m monai.bundle run` with a shipped config."""
    words = overrides({"config_file": f"configs/{config}.json", **options})
    run_module("monai.bundle", "run", *words, log=log, threads=threads_of(1))


def digest() -> str:
    """Of the bundle as it is now: weights of another are never taken for its own."""
    files = [*sorted(Path("bundle").rglob("*.py")), Path("configs/train.json"), Path("configs/inference.json")]
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()[:8]


def fit(cohort: Cohort, seed: int) -> Predict:
    """What a stopped training had reached is kept beside the cohort, and the same command goes on from there."""
    folder = (cohort.path.parent / f"survival_map_{digest()}").absolute()
    folder.mkdir(exist_ok=True)
    # The recipe "auto" fits the transformer as well, four more minutes, and has kept the codebooks on implants.
    where = {"ckpt_dir": folder, "output_dir": folder, "recipe": "codebook"}
    bundle_run("train", folder / "log.txt", cohort=cohort.path.absolute(), seed=seed, **where)
    table = pd.DataFrame([scan.row[["patient_id", "image", "lung_mask"]] for scan in cohort.test])
    for column in ("image", "lung_mask"):
        table[column] = [str((cohort.path.parent / name).absolute()) for name in table[column]]
    write_text(folder / "test.csv", table.to_csv(index=False))
    out = folder / "test"
    bundle_run("inference", folder / "log.txt", cohort=folder / "test.csv", ckpt=folder / "model.pt", output_dir=out)
    risk = pd.read_csv(out / "predictions.csv", dtype={"patient_id": str}).set_index("patient_id").risk

    def predict(scan: Scan) -> tuple[float, np.ndarray]:
        name = str(scan.row.patient_id)
        heat = np.asarray(nib.load(out / "maps" / f"{name}_heat.nii.gz").dataobj, dtype=np.float32)
        return float(risk[name]), heat

    return predict
