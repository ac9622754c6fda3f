# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Does a model know what it learnt, how far its intervals reach, and what it hasn't seen? Measured on implants.

- verdicts: trainings on shuffled outcomes must end in "no", those on outcomes that follow the disease in "yes";
- intervals: how many true times of scans of anatomies never trained on lie in the 95 % intervals;
- familiarity: how well its distance tells strange scans from scans of anatomies never trained on.

Takes cohorts of scripts.make_implants. Trainings are those of configs/train.json by the recipe "codebook", without the
student, which draws maps and is asked for none of this. Scans are described once, and kept in --out.
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
from scripts import make_implants
from scripts.jobs import markdown, spread

HU_WINDOW = (-1000.0, 200.0)
FILES = ("image", "lung_mask", "gt_mask", "confounder_mask")
HEAD = """\
# Does it know what it knows?

Made by `{command}`.
Test scans are of anatomies that no training has seen: {anatomies}. Recipe: codebook. Implants, by
`python -m scripts.make_implants`:

{implants}

## Verdicts

A training on shuffled outcomes should end in "no", one on outcomes that follow the disease in "yes". Each seed draws
other times and another censoring; p is the test's.

"""
INTERVALS = """
## Intervals

Share of true times, the censored ones' included, within the 95 % interval of scans of the test anatomies. A cell is the
mean over seeds of the drawn outcomes, with the least and greatest. Beyond the last death of the training an interval is
open; those that aren't are *closed*. D-calibration is of observed times: in how many seeds p is below 0.05. The C-index
of the test scans stands beside that of the diseased share itself (oracle).

"""
FAMILIAR = """
## Familiarity

AUROC with which the distance from the training scans tells strange scans from the {test} of the test anatomies
({disease}), and the median familiarity of the strange ones; that of the test scans themselves is {usual:.2f}. Strange
scans are test scans that were changed, or chest phantoms. An abdomen has no familiarity: it is refused
([real scans](real_scans.md)).

"""


def table_of(cohort: Path) -> pd.DataFrame:
    """The table of a cohort of implants, with absolute paths."""
    table = pd.read_csv(cohort, dtype={"patient_id": str})
    for name in FILES:
        table[name] = [str((cohort.parent / path).resolve()) for path in table[name]]
    return table


def params_of(known: dict) -> ImplantParams:
    """What implants were drawn by, from their `implants.json`."""
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

    def __init__(self, cohort: Path, known: dict, out: Path) -> None:
        self.table, self.params = table_of(cohort), params_of(known)
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
        self.stage.fit_outcomes()
        outcome = of_records(self.stage.train.data)
        found = {"kind": kind, "seed": seed, **verdict(-self.stage.location, *outcome.unbind(1), by="out of fold")}
        if kind == "drawn":
            unseen = self.stage.objective.pmf(as_maps(self.stage.location))
            known = {"last_death": last_death(outcome), "interval_levels": interval_levels(unseen, outcome)}
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
        covered, is_open = (low <= true) & (true <= high), high >= tmax
        return {
            "covered": float(covered.mean()),
            "covered_closed": float(covered[~is_open].mean()) if not is_open.all() else None,
            "below": float((true < low).mean()),
            "above": float((true > high).mean()),
            "open": float(is_open.mean()),
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


def page(found: pd.DataFrame, about: list[str], anatomies: list[str], strange: str, command: str) -> str:
    """The page of results: a row for each training, a line about each cohort, and what is said of strange scans."""
    counts, intervals = [], []
    for (disease, kind), rows in found.groupby(["disease", "kind"], sort=False):
        verdicts = rows["verdict"].value_counts()
        p = rows["p_value"].quantile([0, 0.5, 1]).map("{:.4f}".format)
        counts.append({"disease": disease, "outcomes": kind, "trainings": len(rows)})
        counts[-1] |= {verdict: verdicts.get(verdict, 0) for verdict in ("yes", "unsure", "no")}
        counts[-1] |= {"p: least, median, greatest": ", ".join(p), "C-index": f"{rows['c_index'].mean():.2f}"}
    for disease, rows in found[found["kind"] == "drawn"].groupby("disease", sort=False):
        cells = {name.replace("_", ", "): spread(rows[name], 3) for name in ("covered", "covered_closed", "below", "above")}
        cells |= {"open": spread(rows["open"]), "not D-calibrated": f"{sum(rows['d_calibration_p'] < 0.05)} of {len(rows)}"}
        cells |= {"C-index": spread(rows["c_index_test"]), "oracle": spread(rows["oracle"])}
        intervals.append({"disease": disease, **cells})
    text = HEAD.format(command=command, implants="\n".join(about), anatomies=", ".join(anatomies))
    return text + markdown(pd.DataFrame(counts)) + INTERVALS + markdown(pd.DataFrame(intervals)) + strange


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m scripts.research.honesty",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--cohort", type=Path, nargs="+", required=True, metavar="CSV",
        help="cohort.csv of scripts.make_implants; several: of other diseases in the same test anatomies",
    )  # fmt: skip
    p.add_argument("--phantoms", type=Path, metavar="CSV", help="cohort.csv of chest phantoms, which must look strange")
    p.add_argument("--shuffled", type=int, default=20, help="trainings on shuffled outcomes (default 20)")
    p.add_argument("--drawn", type=int, default=10, help="trainings on outcomes that follow the disease (default 10)")
    p.add_argument("--out", type=Path, default=Path("runs/honesty"), metavar="DIR", help="folder of work")
    p.add_argument("--page", type=Path, default=Path("docs/results/honesty.md"), metavar="MD", help="page of results")
    return p


def check(cohorts: list[Path]) -> tuple[list[dict], list[str]]:
    """What the implants of each cohort were drawn by, and the test anatomies of all.

    Raises:
        InputError: two cohorts are of one disease, or their test anatomies differ.
    """
    known = [json.loads((cohort.parent / "implants.json").read_text()) for cohort in cohorts]
    anatomies = []
    for i, cohort in enumerate(cohorts):
        if known[i]["disease"] in [one["disease"] for one in known[:i]]:
            raise InputError(f"{cohort} is the second cohort of {known[i]['disease']} (expected one of each disease).")
        table = pd.read_csv(cohort, dtype=str)
        anatomies.append(sorted(table.loc[table["split"] == "test", "anatomy"].unique()))
        if anatomies[i] != anatomies[0]:
            raise InputError(f"{cohort} has other test anatomies than {cohorts[0]} (expected the same).")
    return known, anatomies[0]


def chosen(known: dict) -> str:
    """Options of `scripts.make_implants`, as words of a command line: disease, number, what differs from the defaults."""
    usual, words = make_implants.parser().parse_args([]), [f"--disease {known['disease']} --num {known['num']}"]
    for name, value in known.items():
        default = getattr(usual, name, value)
        default = list(default) if isinstance(default, tuple) else default
        if value != default and name not in ("disease", "num", "backgrounds", "test_anatomies"):
            words.append(f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    return " ".join(words)


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(words)
    todo = [("drawn", seed) for seed in range(args.drawn)] + [("shuffled", seed) for seed in range(args.shuffled)]
    found, about, strange = [], [], ""
    try:
        known, anatomies = check(args.cohort)
        args.out.mkdir(parents=True, exist_ok=True)
        for cohort, implants in zip(args.cohort, known, strict=True):
            disease = implants["disease"].replace("_", " ")
            trials = Trials(cohort, implants, args.out / implants["disease"])
            bar = tqdm(todo, desc=f"trainings, {disease}", unit="training")
            found += [{"disease": disease, **trials.train(*which)} for which in bar]
            train, test = len(trials.stage.train.data), len(trials.test.data)
            about.append(f"- `{chosen(implants)}`: {train} scans to train on, {test} to test.")
            if not strange:
                rows, usual = familiarity(trials, args.phantoms)
                strange = FAMILIAR.format(test=test, disease=disease, usual=usual) + markdown(rows)
        command = shlex.join(["python", "-m", "scripts.research.honesty", *words])
        write_text(args.page, page(pd.DataFrame(found), about, anatomies, strange, command))
    except InputError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
