# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What given weights bring to a small cohort, measured on real chests with implanted disease.

Another hospital has 100 scans with outcomes. One's own has 100 scans, and outcomes of 12, 25, 50 or all of them. The
anatomies of the two and those that are tested on differ. Every way to begin is measured on the same test scans. What is done
is kept in --out: a command that was stopped goes on where it was.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from bundle.errors import InputError, input_error_of
from bundle.files import write_json, write_text
from bundle.maps import GridShiftInferer
from bundle.metrics.localisation import average_precision
from bundle.metrics.survival import c_index
from bundle.run import TrainedModel
from bundle.survival.readout import mean_months
from scripts import make_implants
from scripts.implant_test import followed_to_the_end
from scripts.jobs import markdown
from scripts.research.honesty import table_of

OTHER = ("lidc-idri_0001", "lidc-idri_0002")  # anatomies of the other hospital
OWN = ("lidc-idri_0028", "lidc-idri_0295")
TEST = ("lidc-idri_0350", "pyradiomics_lung1")
SCANS = 100  # of either hospital
TRAIN = "configs/train.json"
SMALL = {"network_def#patch_size": 2, "network_def#dim": 32}  # 12 mm, as shipped, where voxels have 6 mm
# Weights that are given: by what config, and with which options.
GIVEN: dict[str, tuple[str, dict[str, Any]]] = {
    "images": ("configs/pretrain.json", SMALL),
    "images_codes": ("configs/pretrain.json", {**SMALL, "vector_quantisation": True}),
    "other_codebooks": (TRAIN, {"recipe": "codebook"}),
    "other_network": (TRAIN, {**SMALL, "recipe": "network"}),
}
# Ways to begin: what they are called, from which given weights, and with which options.
ARMS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "codebooks": ("codebooks, from scratch", None, {"recipe": "codebook"}),
    "codebooks_given": ("codebooks, fine-tuned", "other_codebooks", {}),
    "network": ("network, from scratch", None, {**SMALL, "recipe": "network"}),
    "network_images": ("network, pre-trained on scans alone", "images", {"recipe": "network"}),
    "network_codes": ("network, pre-trained on scans alone, with codes", "images_codes", {"recipe": "network"}),
    "network_given": ("network, fine-tuned", "other_network", {}),
    "network_head": ("network, fine-tuned, its head alone", "other_network", {"trainable": "head"}),
}
AS_GIVEN = {
    "other_codebooks": "codebooks of the other hospital, as they are",
    "other_network": "network of the other hospital, as it is",
}
HEAD = """\
# What given weights bring

Made by `python -m scripts.research.pretraining`. Disease ({disease}) in real chests, log T has noise of {noise:g}. Voxels
of {spacing:g} mm, patches of 12 mm and {steps} steps a training keep it small.

- The other hospital: {scans} scans with outcomes, anatomies {other}.
- One's own: {scans} scans, anatomies {own}. The outcomes of as many as the column says are known; a fifth validates.
- Measured on {test} scans of anatomies {tested}.
- Pre-training on scans alone sees the {both} scans of both hospitals and no outcome.

A cell is the mean over seeds (least–greatest); one number is of one seed. An empty cell was not run: `--seeds`, `--arms` and
`--labelled` name what to run.

"""


def bundle_run(configs: Sequence[str], **override: Any) -> None:
    """`monai.bundle run` in this process, which has imported all already.

    Raises:
        InputError: what was at fault.
    """
    try:
        monai.bundle.run(config_file=list(configs), logging_file=False, **override)
    except Exception as e:
        raise (input_error_of(e) or e) from e


class Experiment:
    """The runs of one seed, in a folder of its own."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args, self.seed = args, seed
        self.out = args.out / f"{args.disease}_seed{seed}"

    def cohort(self, name: str, anatomies: Sequence[str], num: int, *words: object) -> pd.DataFrame:
        """The table of implants in some of the anatomies, made unless they are there."""
        table = pd.read_csv(self.args.backgrounds, dtype=str)
        table["image"] = [str((self.args.backgrounds.parent / image).absolute()) for image in table["image"]]
        table = table[table["patient_id"].isin(anatomies)]
        if len(table) < len(anatomies):
            raise InputError(f"{self.args.backgrounds} lacks some of {', '.join(anatomies)}.")
        write_text(self.out / f"{name}.csv", table.to_csv(index=False))
        options = ["--backgrounds", self.out / f"{name}.csv", "--disease", self.args.disease, "--num", num]
        options += ["--noise", self.args.noise, "--spacing", self.args.spacing, "--out", self.out / name, *words]
        make_implants.main([str(word) for word in options])
        return table_of(self.out / name / "cohort.csv").drop(columns="site")

    def make(self) -> None:
        """Implants of both hospitals."""
        self.other = self.cohort("other", OTHER, SCANS, "--seed", 1000 + self.seed, "--test_anatomies", "none")
        share = self.args.test_scans / (SCANS + self.args.test_scans)
        words = ("--seed", self.seed, "--test_anatomies", *TEST, "--test_share", share)
        own = self.cohort("own", (*OWN, *TEST), SCANS + self.args.test_scans, *words)
        last = json.loads((self.out / "own" / "implants.json").read_text())["last"]
        self.test = followed_to_the_end(own, last)
        order = np.random.default_rng(self.seed).permutation(SCANS)
        self.own = own[own["split"] != "test"].iloc[order]

    def train(self, name: str, table: pd.DataFrame, configs: Sequence[str], **override: Any) -> Path:
        """Weights of a training on a table, of which every fifth scan validates."""
        folder = self.out / name
        table = table.assign(split=["val" if i % 5 == 4 else "train" for i in range(len(table))])
        write_text(folder / "cohort.csv", table.to_csv(index=False))
        epochs = math.ceil(self.args.steps / math.ceil((table["split"] == "train").sum() / 4))
        where = {"cohort": folder / "cohort.csv", "ckpt_dir": folder, "cache_dir": self.out / "cache"}
        options = {**{key: str(path) for key, path in where.items()}, "max_epochs": epochs, "seed": self.seed, **override}
        bundle_run(configs, **options)
        return folder / "model.pt"

    def given(self, name: str) -> Path:
        """Given weights, made unless they are there."""
        ckpt, (config, override) = self.out / name / "model.pt", GIVEN[name]
        if (self.out / name / "done").is_file():
            return ckpt
        configs, table = [TRAIN, config], self.other
        if config == TRAIN:
            configs = [TRAIN]
        else:
            table = pd.concat([self.other, self.own])[["patient_id", "image", "lung_mask"]]
        self.train(name, table, configs, spacing=self.args.spacing, **override)
        (self.out / name / "done").touch()
        return ckpt

    def run(self, arm: str, labelled: int) -> None:
        """Train and measure, unless it is done; for an arm of AS_GIVEN there is nothing to train."""
        path = self.result(arm, labelled)
        if path.is_file():
            return
        if arm in AS_GIVEN:
            ckpt = self.given(arm)
        else:
            _, given, override = ARMS[arm]
            configs, options = [TRAIN], {"spacing": self.args.spacing}
            if given is not None:
                configs, options = [TRAIN, "configs/finetune.json"], {"pretrained": str(self.given(given))}
            ckpt = self.train(f"{arm}_{labelled}", self.own[:labelled], configs, **options, **override)
        row = {"arm": arm, "labelled": labelled, "seed": self.seed, **measure(TrainedModel(ckpt), self.test)}
        write_json(path, {**row, "deaths": int(self.own[:labelled]["event"].sum())})

    def result(self, arm: str, labelled: int) -> Path:
        return self.out / "results" / f"{arm}_{labelled}.json"


def measure(model: TrainedModel, table: pd.DataFrame) -> dict[str, float]:
    """C-index, that of the true diseased share, and mean average precision in diseased scans."""
    network, (low, high) = model.network.eval(), model.preprocessing["hu_window"]
    inferer = GridShiftInferer(model.usual_shifts, model.stride, few_origins=True, severity=model.severity)
    risks, precisions = [], []
    for row in table.itertuples():
        hu, lung, lesion = (
            np.asarray(nib.load(path).dataobj, np.float32) for path in (row.image, row.lung_mask, row.gt_mask)
        )
        image = torch.from_numpy((hu - low) / (high - low)).clamp(0, 1)[None, None]
        survival_map = inferer(image, network, lung=torch.from_numpy(lung)[None, None])
        risks.append(-float(mean_months(model.objective.pmf(survival_map))))
        if lesion.any():
            weight = survival_map[0, -1, : lesion.shape[0], : lesion.shape[1], : lesion.shape[2]].numpy()
            precisions.append(average_precision(weight * (lung > 0), lesion > 0))
    risk, time, event, share = (
        torch.tensor(np.asarray(x, float)) for x in (risks, table["time"], table["event"], table["share"])
    )
    found = {"c_index": c_index(risk, time, event), "oracle": c_index(share, time, event)}
    return {**found, "average_precision": float(np.mean(precisions))}


def page(args: argparse.Namespace, rows: pd.DataFrame) -> str:
    """The page of all results that are there."""
    names = {"other": OTHER, "own": OWN, "tested": TEST}
    told = {"scans": SCANS, "both": 2 * SCANS, "test": args.test_scans}
    text = HEAD.format(**vars(args) | told | {k: ", ".join(v) for k, v in names.items()})
    titles = {**{arm: title for arm, (title, *_) in ARMS.items()}, **AS_GIVEN}
    oracle = rows.groupby("seed")["oracle"].first().mean()
    for measured, title in (("c_index", f"C-index (of the true diseased share: {oracle:.2f})"), ("average_precision", "AP")):
        table = []
        for arm, name in titles.items():
            cells: dict[str, str] = {}
            for labelled, of in rows[rows["arm"] == arm].groupby("labelled"):
                values = of[measured]
                spread = f" ({values.min():.2f}–{values.max():.2f})" if len(values) > 1 else ""
                cells[f"{labelled} labelled"] = f"{values.mean():.2f}{spread}"
            if cells:
                table.append({"": name, **cells})
        columns = ["", *(f"{n} labelled" for n in sorted(rows["labelled"].unique()))]
        text += f"## {title}\n\n{markdown(pd.DataFrame(table).reindex(columns=columns).fillna(''))}\n"
    return text.rstrip() + "\n"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m scripts.research.pretraining", description=__doc__)
    p.add_argument("--disease", default="fibrosis", choices=list(make_implants.DISEASES), help="default fibrosis")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="S", help="default 0 1")
    p.add_argument("--labelled", type=int, nargs="+", default=[12, 25, 50, 100], metavar="N", help="default 12 25 50 100")
    p.add_argument("--arms", nargs="+", default=[*ARMS, *AS_GIVEN], choices=[*ARMS, *AS_GIVEN], help="default all")
    p.add_argument("--test_scans", type=int, default=40, metavar="N", help="default 40")
    p.add_argument("--noise", type=float, default=0.1, help="of log T; with much the network learns nothing (default 0.1)")
    p.add_argument("--spacing", type=float, default=6.0, metavar="MM", help="of all voxels (default 6)")
    p.add_argument("--steps", type=int, default=300, metavar="N", help="of a training (default 300)")
    p.add_argument("--backgrounds", type=Path, default=Path("demo/anatomies.csv"), metavar="CSV")
    p.add_argument("--out", type=Path, default=Path("runs/pretraining"), metavar="DIR", help="folder of work")
    p.add_argument("--page", type=Path, default=Path("docs/results/pretraining.md"), metavar="MD", help="page of results")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    runs = [(arm, 0) for arm in args.arms if arm in AS_GIVEN]
    runs += [(arm, n) for n in args.labelled for arm in args.arms if arm in ARMS]
    try:
        with tqdm(total=len(runs) * len(args.seeds), desc="pre-training", unit="run") as bar:
            for seed in args.seeds:
                experiment = Experiment(args, seed)
                experiment.make()
                for arm, labelled in runs:
                    experiment.run(arm, labelled)
                    bar.update()
        done = [json.loads(path.read_text()) for path in sorted(args.out.glob(f"{args.disease}_seed*/results/*.json"))]
        write_text(args.page, page(args, pd.DataFrame(done)))
    except InputError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
