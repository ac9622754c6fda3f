# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Survival Map itself, by its own commands: train.json, then inference.json on the scans to measure on."""

import hashlib
import json
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


def write_table(path: Path, scans: list[Scan], columns: tuple[str, ...] = ()) -> Path:
    """A cohort table of these scans, with these columns beside image and lung mask."""
    table = pd.DataFrame([scan.row[["patient_id", "image", "lung_mask", *columns]] for scan in scans])
    for column in ("image", "lung_mask"):
        table[column] = [str((scan.folder / scan.row[column]).absolute()) for scan in scans]
    write_text(path, table.to_csv(index=False))
    return path


def folder_of(cohort: Cohort) -> Path:
    return (cohort.folder / f"survival_map_{digest()}_{len(cohort.train)}").absolute()


def verdict_of(cohort: Cohort) -> str:
    """What the training said that it learnt: yes, unsure or no."""
    return json.loads((folder_of(cohort) / "settings.json").read_text())["learnt"]["verdict"]


def train(cohort: Cohort, seed: int) -> Path:
    """Its weights. What a stopped training had reached is beside the cohort, and the same command goes on from there."""
    folder = folder_of(cohort)
    if not (folder / "done").is_file():
        folder.mkdir(exist_ok=True)
        # The recipe "auto" fits the transformer as well, four more minutes, and has kept the codebooks on implants.
        where = {"ckpt_dir": folder, "output_dir": folder, "cache_dir": cohort.folder.absolute() / "cache"}
        table = write_table(folder / "train.csv", cohort.train, ("time", "event", "split", "site"))
        bundle_run("train", folder / "log.txt", cohort=table, seed=seed, recipe="codebook", **where)
        (folder / "done").touch()
    return folder / "model.pt"


def fit(cohort: Cohort, seed: int) -> Predict:
    ckpt = train(cohort, seed)
    out = ckpt.parent / "test"
    test, log = write_table(ckpt.parent / "test.csv", cohort.test), ckpt.parent / "log.txt"
    bundle_run("inference", log, cohort=test, ckpt=ckpt, output_dir=out)
    risk = pd.read_csv(out / "predictions.csv", dtype={"patient_id": str}).set_index("patient_id").risk

    def predict(scan: Scan) -> tuple[float, np.ndarray]:
        name = str(scan.row.patient_id)
        heat = np.asarray(nib.load(out / "maps" / f"{name}_heat.nii.gz").dataobj, dtype=np.float32)
        return float(risk[name]), heat

    return predict
