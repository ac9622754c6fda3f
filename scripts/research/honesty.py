# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Does a model know what it learnt, how far its intervals reach, and what it hasn't seen? Measured on implants.

- verdicts: trainings on shuffled outcomes must end in "no", those on outcomes that follow the disease in "yes";
- intervals: how many true times of scans of anatomies never trained on lie in the 95 % intervals;
- familiarity: how well its distance tells strange scans from scans of anatomies never trained on.

Takes a cohort of scripts.make_implants. Trainings are those of configs/train.json by the recipe "codebook". Scans are
described once, and kept in --out.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from monai.bundle import ConfigParser
from scipy import ndimage
from scipy.stats import rankdata
from tqdm import tqdm

from bundle.data import ScanCache, fill_caches
from bundle.errors import InputError
from bundle.files import write_text
from bundle.maps import look
from bundle.metrics.survival import c_index, d_calibration
from bundle.metrics.verdict import verdict
from bundle.networks.descriptors import describe, tokens_at
from bundle.phantoms.implants import ImplantParams, outcomes
from bundle.run import CodebookStage
from bundle.run import outcomes as of_records
from bundle.run.codebooks import as_maps
from bundle.run.results import prediction_row
from bundle.survival.calibration import interval_levels, last_death
from scripts.jobs import markdown

HU_WINDOW = (-1000.0, 200.0)
FILES = ("image", "lung_mask", "gt_mask", "confounder_mask")
HEAD = """\
# Does it know what it knows?

Made by `{command}`.
Implants: {implants}; other options of `python -m scripts.make_implants` as by default. {train} scans to train on, {test}
to measure on, of anatomies that no training has seen. Recipe: codebook.

## Verdicts

A training on shuffled outcomes should end in "no", one on outcomes that follow the disease in "yes". Each seed draws
other times and another censoring; p is the test's.

"""
INTERVALS = """
## Intervals

Share of true times, the censored ones' included, within the 95 % interval of scans of the test anatomies. Beyond the last
death of the training an interval is open. `d_calibration_p` is of observed times. `c_index_test` stands beside that of
the diseased share itself (`oracle`).

"""
FAMILIAR = """
## Familiarity

AUROC with which the distance from the training scans tells strange scans from the {test} of the test anatomies, and the
median familiarity of the strange ones; that of the test scans themselves is {usual:.2f}. Strange scans are test scans that
were changed, or chest phantoms. An abdomen has no familiarity: it is refused ([real scans](real_scans.md)).

"""


def table_of(cohort: Path) -> pd.DataFrame:
    """The table of a cohort of implants, with absolute paths."""
    table = pd.read_csv(cohort, dtype={"patient_id": str})
    for name in FILES:
        table[name] = [str((cohort.parent / path).resolve()) for path in table[name]]
    return table


def params_of(cohort: Path) -> ImplantParams:
    """What the implants were drawn by."""
    known = json.loads((cohort.parent / "implants.json").read_text())
    fields = {name: known[name] for name in vars(ImplantParams())}
    return ImplantParams(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})


def cohort_of(table: pd.DataFrame, params: ImplantParams, kind: str, seed: int) -> pd.DataFrame:
    """The table with times drawn anew by the `kind` "drawn", or outcomes that are "shuffled" among its scans."""
    table = table.copy()
    table["time"], table["event"], table["true_time"] = outcomes(table["share"], seed, params)
    if kind == "shuffled":
        order = np.random.default_rng([seed, 7]).permutation(len(table))
        table[["time", "event"]] = table[["time", "event"]].to_numpy()[order]
        table["event"] = table["event"].astype(int)
    return table


class Trials:
    """Trainings by the recipe "codebook" on the same scans with other outcomes: what no outcome shapes is made once."""

    def __init__(self, cohort: Path, out: Path) -> None:
        self.table, self.params = table_of(cohort), params_of(cohort)
        config = ConfigParser()
        config.read_config("configs/train.json")
        where = {"ckpt_dir": str(out), "output_dir": str(out), "cache_dir": str(out / "cache")}
        config.update({"cohort": str(cohort), "recipe": "codebook", **where})
        self.stage: CodebookStage = config.get_parsed_content("train#codebooks")
        test = config.get_parsed_content("parts")["test"]
        self.test = ScanCache(test, self.stage.val.transform, where["cache_dir"])
        fill_caches(self.stage.train, self.test)
        self.stage.describe()

    def train(self, kind: str, seed: int) -> dict:
        """The verdict of a training and, unless its outcomes were shuffled, how its intervals hold."""
        table = cohort_of(self.table, self.params, kind, seed).set_index("patient_id")
        for dataset in (self.stage.train, self.test):
            for record in dataset.data:
                record |= table.loc[record["patient_id"], ["time", "event"]].to_dict()
        self.stage.learn()
        outcome = of_records(self.stage.train.data)
        found = {"kind": kind, "seed": seed, **verdict(-self.stage.location, *outcome.unbind(1), by="out of fold")}
        if kind == "drawn":
            unseen = self.stage.objective.pmf(as_maps(self.stage.location))
            known = {"last_death": last_death(outcome), "levels": interval_levels(unseen, outcome)}
            found |= self.intervals(table.loc[[r["patient_id"] for r in self.test.data]], known)
        return found

    def intervals(self, rows: pd.DataFrame, known: dict) -> dict:
        """How the predictions hold for the test scans, whose rows of the table are given in the same order."""
        pmf = self.stage.objective.pmf(as_maps(self.stage.predict(self.test)))
        predicted = pd.DataFrame([prediction_row("", one, **known) for one in pmf])
        tmax, true = pmf.shape[1], rows["true_time"].clip(upper=pmf.shape[1]).to_numpy()
        low, high = (predicted[name].to_numpy() for name in ("lower_months", "upper_months"))
        time, event, share, risk = (
            torch.tensor(np.asarray(x, float)) for x in (rows["time"], rows["event"], rows["share"], predicted["risk"])
        )
        return {
            "scans": len(rows),
            "covered": float(((low <= true) & (true <= high)).mean()),
            "below": float((true < low).mean()),
            "above": float((true > high).mean()),
            "open": float((high >= tmax).mean()),
            "d_calibration_p": d_calibration(pmf, time, event),
            "c_index_test": c_index(risk, time, event),
            "oracle": c_index(share, time, event),
        }


def load(row: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """HU and lung mask of a scan, (D, H, W)."""
    image, lung = (np.asarray(nib.load(row[name]).dataobj) for name in ("image", "lung_mask"))
    return image.astype(np.float32), lung > 0


def sharpened(hu: np.ndarray, lung: np.ndarray) -> np.ndarray:
    return hu + 1.5 * (hu - ndimage.gaussian_filter(hu, 0.8))


def thick(hu: np.ndarray, lung: np.ndarray) -> np.ndarray:
    return ndimage.uniform_filter1d(hu, 4, axis=2)


def contrast(hu: np.ndarray, lung: np.ndarray) -> np.ndarray:
    vessels = ndimage.gaussian_filter(hu, 0.7) > -500
    return hu + 200.0 * ndimage.gaussian_filter((vessels & lung).astype(np.float32), 0.5)


def expired(hu: np.ndarray, lung: np.ndarray) -> np.ndarray:
    return np.where(lung, hu + 0.3 * (hu + 1000), hu)


def tumour(hu: np.ndarray, lung: np.ndarray) -> np.ndarray:
    deepest = np.unravel_index(ndimage.distance_transform_edt(lung).argmax(), lung.shape)
    away = np.linalg.norm(np.indices(lung.shape) - np.array(deepest)[:, None, None, None], axis=0) * 3
    return np.where(away < 30, 40 + 20 * np.sin(np.indices(lung.shape).sum(0)), hu)


STRANGE = {
    "sharp kernel (unsharp mask)": sharpened,
    "slices of 12 mm": thick,
    "vessels 200 HU brighter (contrast)": contrast,
    "expiration (lung 30 % denser)": expired,
    "a tumour of 60 mm": tumour,
}


def look_of(hu: np.ndarray, lung: np.ndarray) -> torch.Tensor:
    low, high = HU_WINDOW
    image, mask = torch.from_numpy((hu - low) / (high - low)).float().clamp(0, 1), torch.from_numpy(lung).float()
    return look(describe(image, mask, tokens_at(mask)))


def auroc(strange: list[float], usual: list[float]) -> float:
    rank = rankdata([*strange, *usual])[: len(strange)]
    return float((rank.sum() - len(strange) * (len(strange) + 1) / 2) / (len(strange) * len(usual)))


def familiarity(trials: Trials, phantoms: Path | None) -> tuple[pd.DataFrame, float]:
    """A row for each kind of strange scan, and the median familiarity of scans that are not."""
    known, table = trials.stage.familiarity, trials.table
    scans = [load(row) for _, row in table[table["split"] == "test"].iterrows()]
    usual = [look_of(*scan) for scan in tqdm(scans, desc="familiarity", unit="scan")]
    distances = [known.distance(seen) for seen in usual]
    kinds = {}
    for name, change in tqdm(STRANGE.items(), desc="strange scans", unit="kind"):
        kinds[name] = [look_of(change(hu, lung), lung) for hu, lung in scans]
    if phantoms is not None:
        kinds["phantoms instead of patients"] = [look_of(*load(row)) for _, row in table_of(phantoms).iterrows()]
    rows = []
    for name, looks in kinds.items():
        strange = [known.distance(seen) for seen in looks]
        median = float(np.median([known.quantile(seen) for seen in looks]))
        rows.append({"strange scans": name, "AUROC": f"{auroc(strange, distances):.2f}", "familiarity": f"{median:.2f}"})
    return pd.DataFrame(rows), float(np.median([known.quantile(seen) for seen in usual]))


def page(args: argparse.Namespace, trials: Trials, found: pd.DataFrame, command: str) -> str:
    """The page of results."""
    test = len(trials.test.data)
    known = json.loads((args.cohort.parent / "implants.json").read_text())
    implants = f"{known['disease']}, {known['num']} scans, seed {known['seed']}, "
    implants += f"tested on {', '.join(known['test_anatomies'])}"
    text = HEAD.format(command=command, implants=implants, train=len(trials.stage.train.data), test=test)
    counts = []
    for kind, rows in found.groupby("kind"):
        verdicts = rows["verdict"].value_counts()
        p = rows["p_value"].quantile([0, 0.5, 1]).map("{:.4f}".format)
        counts.append({"outcomes": kind, "trainings": len(rows), **{v: verdicts.get(v, 0) for v in ("yes", "unsure", "no")}})
        counts[-1] |= {"p: least, median, greatest": ", ".join(p), "C-index": f"{rows['c_index'].mean():.2f}"}
    names = ["scans", "covered", "below", "above", "open", "d_calibration_p", "c_index_test", "oracle"]
    drawn = found[found["kind"] == "drawn"].sort_values("seed")
    rows = [*drawn[["seed", *names]].to_dict("records"), {"seed": "mean", **drawn[names].mean().to_dict()}]
    cells = [{k: v if k == "seed" else f"{v:.0f}" if k == "scans" else f"{v:.3f}" for k, v in r.items()} for r in rows]
    strange, usual = familiarity(trials, args.phantoms)
    text += markdown(pd.DataFrame(counts)) + INTERVALS + markdown(pd.DataFrame(cells))
    return text + FAMILIAR.format(test=test, usual=usual) + markdown(strange)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m scripts.research.honesty",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--cohort", type=Path, required=True, metavar="CSV", help="cohort.csv of scripts.make_implants")
    p.add_argument("--phantoms", type=Path, metavar="CSV", help="cohort.csv of chest phantoms, which must look strange")
    p.add_argument("--shuffled", type=int, default=20, help="trainings on shuffled outcomes (default 20)")
    p.add_argument("--drawn", type=int, default=10, help="trainings on outcomes that follow the disease (default 10)")
    p.add_argument("--out", type=Path, default=Path("runs/honesty"), metavar="DIR", help="folder of work")
    p.add_argument("--page", type=Path, default=Path("docs/results/honesty.md"), metavar="MD", help="page of results")
    return p


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(words)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        trials = Trials(args.cohort, args.out)
        todo = [("drawn", seed) for seed in range(args.drawn)] + [("shuffled", seed) for seed in range(args.shuffled)]
        found = pd.DataFrame([trials.train(*which) for which in tqdm(todo, desc="trainings", unit="training")])
        write_text(args.page, page(args, trials, found, shlex.join(["python", "-m", "scripts.research.honesty", *words])))
    except InputError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
