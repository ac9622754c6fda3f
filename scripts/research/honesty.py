# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Does a model know what it learnt, how far its intervals reach, and what it hasn't seen? Measured on implants.

- verdicts: trainings on shuffled outcomes must end in "no", those on outcomes that follow the disease in "yes";
- intervals: how many true times of scans of anatomies never trained on lie in the 95 % intervals;
- familiarity: how well its distance tells strange scans from scans of anatomies never trained on.

Takes a cohort of scripts.make_implants. Every training and every inference is a `monai.bundle run` of the shipped
configs. What is done is kept in --out, so that a measurement that was stopped goes on there.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from scipy.stats import rankdata
from tqdm import tqdm

from bundle.errors import InputError
from bundle.files import write_json, write_text
from bundle.maps import Familiarity, look
from bundle.metrics.survival import c_index, d_calibration
from bundle.networks.descriptors import describe, tokens_at
from bundle.phantoms.implants import ImplantParams, outcomes
from scripts.jobs import markdown, overrides, run_jobs, run_module, threads_of

HU_WINDOW = (-1000.0, 200.0)
FILES = ("image", "lung_mask", "gt_mask", "confounder_mask")
HEAD = """\
# Does it know what it knows?

Made by `python -m scripts.research.honesty`. Implants: {implants}. {train} scans to train and validate on, {test} of
anatomies that no training has seen. Recipe: {recipe}.

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
were changed, or chest phantoms.

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


def measure(args: argparse.Namespace, kind: str, seed: int) -> dict:
    """The verdict of a training and, unless its outcomes were shuffled, how its intervals hold; read if it is there."""
    folder = args.out / f"{kind}_{seed}"
    record = folder / "honesty.json"
    if record.is_file():
        return json.loads(record.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    table = cohort_of(table_of(args.cohort), params_of(args.cohort), kind, seed)
    table.to_csv(folder / "cohort.csv", index=False)
    run = partial(run_module, "monai.bundle", "run", log=folder / "log.txt", threads=threads_of(args.jobs))
    train = {"cohort": folder / "cohort.csv", "ckpt_dir": folder, "output_dir": folder, "cache_dir": args.out / "cache"}
    train |= {"recipe": args.recipe, "seed": seed}
    run("--config_file", "configs/train.json", *overrides(train))
    settings = json.loads((folder / "settings.json").read_text())
    found = {"kind": kind, "seed": seed, "network": settings["network"]["name"], **settings["learnt"]}
    if kind == "drawn":
        test = table[table["split"] == "test"]
        test.to_csv(folder / "test.csv", index=False)
        infer = {"cohort": folder / "test.csv", "ckpt": folder / "model.pt", "output_dir": folder / "test", "jobs": 1}
        run("--config_file", "configs/inference.json", *overrides(infer))
        found |= intervals(test, folder / "test")
    write_json(record, found)
    return found


def intervals(test: pd.DataFrame, folder: Path) -> dict:
    """How the predictions in a folder hold for the scans of a table."""
    rows = test.merge(pd.read_csv(folder / "predictions.csv", dtype={"patient_id": str}), on="patient_id")
    rows = rows[rows["status"] == "ok"]
    curves = pd.read_csv(folder / "survival_curves.csv", dtype={"patient_id": str}).set_index("patient_id")
    survival = torch.tensor(curves.loc[rows["patient_id"]].to_numpy())
    pmf = -torch.cat([torch.ones(len(rows), 1), survival], 1).diff(dim=1)
    tmax = pmf.shape[1]
    true = rows["true_time"].clip(upper=tmax)
    time, event = (torch.tensor(rows[name].to_numpy(float)) for name in ("time", "event"))
    return {
        "scans": len(rows),
        "covered": float(((rows["lower_months"] <= true) & (true <= rows["upper_months"])).mean()),
        "below": float((true < rows["lower_months"]).mean()),
        "above": float((true > rows["upper_months"]).mean()),
        "open": float((rows["upper_months"] >= tmax).mean()),
        "d_calibration_p": d_calibration(pmf, time, event),
        "c_index_test": c_index(torch.tensor(rows["risk"].to_numpy()), time, event),
        "oracle": c_index(torch.tensor(rows["share"].to_numpy()), time, event),
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


def familiarity(args: argparse.Namespace) -> tuple[pd.DataFrame, float]:
    """A row for each kind of strange scan, and the median familiarity of scans that are not."""
    known = Familiarity(**json.loads((args.out / "drawn_0" / "settings.json").read_text())["familiarity"])
    table = table_of(args.cohort)
    scans = [load(row) for _, row in table[table["split"] == "test"].iterrows()]
    usual = [look_of(*scan) for scan in tqdm(scans, desc="familiarity", unit="scan")]
    rows, distances = [], [known.distance(seen) for seen in usual]
    kinds = {name: [look_of(change(hu, lung), lung) for hu, lung in scans] for name, change in STRANGE.items()}
    kinds["phantoms instead of patients"] = [look_of(*load(row)) for _, row in table_of(args.phantoms).iterrows()]
    for name, looks in kinds.items():
        strange = [known.distance(seen) for seen in looks]
        median = float(np.median([known.quantile(seen) for seen in looks]))
        rows.append({"strange scans": name, "AUROC": f"{auroc(strange, distances):.2f}", "familiarity": f"{median:.2f}"})
    return pd.DataFrame(rows), float(np.median([known.quantile(seen) for seen in usual]))


def page(args: argparse.Namespace, found: list[dict]) -> str:
    """The page of results."""
    table = table_of(args.cohort)
    test = int((table["split"] == "test").sum())
    known = json.loads((args.cohort.parent / "implants.json").read_text())
    implants = f"{known['disease']}, seed {known['seed']}"
    text = HEAD.format(implants=implants, train=len(table) - test, test=test, recipe=args.recipe)
    found = pd.DataFrame(found)
    counts = []
    for kind, rows in found.groupby("kind"):
        verdicts = rows["verdict"].value_counts()
        p = rows["p_value"].quantile([0, 0.5, 1]).map("{:.4f}".format)
        counts.append({"outcomes": kind, "trainings": len(rows), **{v: verdicts.get(v, 0) for v in ("yes", "unsure", "no")}})
        counts[-1] |= {"p, least, median, greatest": ", ".join(p)}
    text += markdown(pd.DataFrame(counts))
    drawn = found[found["kind"] == "drawn"].sort_values("seed")
    if len(drawn):
        names = ("seed", "scans", "covered", "below", "above", "open", "d_calibration_p", "c_index_test", "oracle")
        mean = drawn[list(names[1:])].mean().to_dict()
        rows = [*drawn[list(names)].to_dict("records"), {"seed": "mean", **mean}]
        cells = [{k: v if k == "seed" else f"{v:.0f}" if k == "scans" else f"{v:.3f}" for k, v in r.items()} for r in rows]
        text += INTERVALS + markdown(pd.DataFrame(cells))
        if args.phantoms:
            strange, usual = familiarity(args)
            text += FAMILIAR.format(test=test, usual=usual) + markdown(strange)
    return text


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
    p.add_argument("--recipe", default="auto", help="codebook, network or auto (default)")
    p.add_argument("--jobs", type=int, default=1, help="trainings at a time (default 1)")
    p.add_argument("--out", type=Path, default=Path("runs/honesty"), metavar="DIR", help="folder of work")
    p.add_argument("--page", type=Path, default=Path("docs/results/honesty.md"), metavar="MD", help="page of results")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        todo = [(args, "drawn", seed) for seed in range(args.drawn)]
        todo += [(args, "shuffled", seed) for seed in range(args.shuffled)]
        found = []
        for result in tqdm(run_jobs(measure, todo, args.jobs), total=len(todo), desc="honesty", unit="training"):
            if isinstance(result, Exception):
                raise InputError(str(result))
            found.append(result)
        write_text(args.page, page(args, found))
    except InputError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
