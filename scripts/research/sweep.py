# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Train and measure many configurations on phantoms: complexities x variants x seeds, one row each in a tidy CSV.

Every run goes through `monai.bundle run` with the shipped configs: phantoms of the seed to train on, phantoms of another
seed to measure on. A row is written when its run is complete, so a sweep that was killed goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from matplotlib.figure import Figure
from tqdm import tqdm

from bundle.files import file_sha256, load_checked, write_atomically, write_json, write_text
from bundle.metrics.survival import c_index
from bundle.phantoms.cubes import PhantomParams
from bundle.report.pictures import write_png
from bundle.run.settings import settings_file
from bundle.run.start import exit_on_sigterm
from bundle.survival import OBJECTIVES
from bundle.survival.cox import cox_regression
from bundle.survival.severity import Severity, minkowski_functionals

from scripts.jobs import run_jobs, run_module, threads_of

KEY = ["complexity", "size", "variant", "train_scans", "seed", "test"]
SURVIVAL = ["c_index", "integrated_brier", "mae_events", "correlation", "mean_time_censored"]
MAP = [
    "pointing_game",
    "average_precision",
    "average_precision_ceiling",
    "mass_accuracy",
    "confounder_mass",
    "survivor_heat",
    "inverted",
]
ORACLES = ["c_index_oracle", "mae_oracle", "heat_ratio_oracle"]  # what the true masks or risks allow
COLUMNS = [*KEY, "overrides", "test_scans", "device", "train_seconds", *MAP, "heat_ratio", *SURVIVAL, *ORACLES]
# Phantoms in which not all that matters is equally dangerous: the mask of the one, and whether its heat is compared with
# that of the rest of the lesions or of the whole scan.
OTHER_MASKS = {11: ("gt_severe_mask", "lesions"), 13: ("confounder_mask", "scan")}
TRAINED = "trained.json"  # in the folder of a run whose training is complete
HELD_OUT = 10_000  # added to the seed of the phantoms to measure on
USUAL_SCANS = 100  # to train on
RESERVED = 1010  # from this seed on nothing is chosen by what comes out; those from 1000 to 1009 showed what to mend

# What differs from the shipped configuration, by name of the variant; "phantoms" are options of scripts.make_phantoms,
# "config" are files stacked on top. (`monai.bundle run` passes over a None; "$None" is one.)
VARIANTS: dict[str, dict] = {
    "default": {},
    # heads
    "softmin": {"network_def#head": "softmin"},
    "mixture": {"network_def#head": "softmin", "objective#mixture": True},
    "attention": {"network_def#head": "attention"},
    "hazard": {"network_def#head": "hazard"},
    "mean": {"network_def#head": "mean"},
    "mean_global": {"network_def#head": "mean", "network_def#window": 0, "network_def#patch_size": 8},
    # regularisers and schedules
    "no_entropy": {"loss#entropy": 0.0},
    "entropy_1": {"loss#entropy": 1.0},
    "no_smoothness": {"loss#smoothness": 0.0},
    "smoothness_0.3": {"loss#smoothness": 0.3},
    "occlusion_0.1": {"loss#occlusion": 0.1},
    "occlusion_1": {"loss#occlusion": 1.0},
    "no_ease": {"train#handlers#2#vc_kwargs#end": 1.0},
    "anneal": {"train#handlers#1#vc_kwargs#start": 0.15},
    "fixed_steep": {"network_def#beta": 5.0},
    "anneal_to_8": {"train#handlers#1#vc_kwargs#start": 0.1 / 8, "network_def#beta": 8.0},
    "learn_beta": {"network_def#learn_beta": True},
    "learn_beta_from_15": {"network_def#beta": 1 / 15, "network_def#learn_beta": True},
    "no_warmup": {"lr_scheduler#warmup_steps": 0},
    "epochs_10": {"max_epochs": 10},
    "epochs_48": {"max_epochs": 48},
    "one_origin": {"train#random_transforms#0#prob": 0.0},
    "no_balance": {"train#dataloader#sampler": "$None", "train#dataloader#shuffle": True},
    # locations and the objective
    "no_range": {"network_def#loc_range": "$None", "severity": False},
    "range_-30": {"network_def#loc_range": [-30, 120]},
    "range_-15": {"network_def#loc_range": [-15, 120]},
    "loc_bias_1": {"network_def#loc_bias": 1.0},
    "loc_bias_50": {"network_def#loc_bias": 50.0},
    "loc_bias_log_mean": {"network_def#loc_bias": "$float(torch.tensor([r['time'] for r in @parts['train'] if r['event']]).log().mean().exp())"},
    "alpha_5": {"objective#alpha_censored": 5.0},
    "alpha_10": {"objective#alpha_censored": 10.0},
    "variance_9": {"objective#variance": 9.0},
    "variance_100": {"objective#variance": 100.0},
    "variance_144": {"objective#variance": 144.0},
    "variance_169": {"objective#variance": 169.0},
    **{name: {"config": [f"configs/objective/{name}.json"]} for name in OBJECTIVES if name != "centime"},
    "logistic_ipcw": {"config": ["configs/objective/logistic.json"], "ipcw": True},
    "learn_variance": {"objective#learn_variance": True},
    "predict_variance": {"objective#predict_variance": True},
    # covariates of fibrosis studies, with the image and without; "default" is the image alone
    "clinical": {"phantoms": {"clinical": ""}, "config": ["configs/clinical/fibrosis.json"]},
    "clinical_only": {
        "phantoms": {"clinical": ""},
        "config": ["configs/clinical/fibrosis.json", "configs/network/clinical_only.json"],
    },
    # receptive field and patches
    "no_window": {"network_def#window": 1},
    "window_4": {"network_def#window": 4},
    "global": {"network_def#window": 0, "network_def#patch_size": 8},
    "film_context": {"network_def#film_context": True},
    "patch_8": {"network_def#patch_size": 8},
    "overlap_50": {"network_def#overlap": 0.5, "network_def#patch_size": 8},
    "head_layers_2": {"network_def#head_layers": 2},
    "center_tokens": {"network_def#center_tokens": True},
    # what the network sees
    "no_texture": {"network_def#texture": False},
    "one_hu_window": {"narrow_hu_window": "$None"},
    "flips": {  # each scan in a random one of the 48 ways to lay a cube
        "train#preprocessing#transforms": "$@load_transforms"
        " + [monai.transforms.RandFlipd(['image', 'lung'], 0.5, axis) for axis in range(3)]"
        " + [monai.transforms.RandRotate90d(['image', 'lung'], 0.75, spatial_axes=axes) for axes in ((0, 1), (0, 2), (1, 2))]"
        " + @train#random_transforms"
    },
    # cohorts
    "events_10": {"phantoms": {"feature_fraction": 0.1}},
    "events_10_as_drawn": {
        "phantoms": {"feature_fraction": 0.1},
        "min_event_share": 0.0,
    },
    "events_30": {"phantoms": {"feature_fraction": 0.3}},
    "events_70": {"phantoms": {"feature_fraction": 0.7}},
    "events_90": {"phantoms": {"feature_fraction": 0.9}},
    "events_90_alpha_5": {"phantoms": {"feature_fraction": 0.9}, "objective#alpha_censored": 5.0},
    "radius_2": {"phantoms": {"sphere_radius": "2 3"}},
    "radius_4": {"phantoms": {"sphere_radius": "4 5"}},
    "radius_7": {"phantoms": {"sphere_radius": "7 8"}},
    # with room for what they are to say: a lesion that kills at 40 months and is 1/500 of the scan must lie below 0
    "radius_4_range_-30": {"phantoms": {"sphere_radius": "4 5"}, "network_def#loc_range": [-30, 120]},
    # 12 with less contrast still, in units of the noise
    "contrast_1": {"phantoms": {"contrast": 1.0}},
    "contrast_0.5": {"phantoms": {"contrast": 0.5}},
    # negative control
    "shuffled_outcomes": {"shuffle": True},
}

# What is measured of one training: other phantoms, moved phantoms, or weights without severity.
TESTS: dict[str, dict] = {
    "same": {},
    "severity_off": {"weights": "severity_off"},
    "no_refinement": {"options": {"refine": False}},
    "one_grid": {"options": {"refine": False, "shifts": 1}},
    "flip": {"move": lambda volume: volume[::-1]},
    "shift": {"move": lambda volume: np.pad(volume, [(7, 0), (5, 0), (3, 0)], "reflect")[:-7, :-5, :-3]},
    "noise_x2": {"phantoms": {"noise": 0.4}},
    "contrast_80": {"phantoms": {"bright": 16.0, "noise": 0.16}},
    "contrast_120": {"phantoms": {"bright": 24.0, "noise": 0.24}},
    "size_48": {"phantoms": {"size": 48}},
    "size_64": {"phantoms": {"size": 64}},
    "size_96": {"phantoms": {"size": 96}},
}

# What the shipped configuration is to reach on phantoms 1 to 9: measure, its name, how seeds are put together, the side and
# the bound, bounds of single phantoms.
TARGETS: list[tuple[str, str, str, str, float, dict[int, float]]] = [
    ("pointing_game", "pointing game, mean", "mean", "at least", 0.99, {}),
    ("pointing_game", "pointing game, worst seed", "min", "at least", 0.95, {}),
    ("average_precision", "average precision", "mean", "at least", 0.95, {3: 0.85}),
    ("mass_accuracy", "heat in mask", "mean", "at least", 0.90, {}),
    ("confounder_mass", "heat in confounder", "mean", "at most", 0.02, {}),
    ("survivor_heat", "survivors / dead", "mean", "at most", 0.02, {}),
    ("inverted", "inverted maps, all seeds", "sum", "at most", 0, {}),
    ("mae_events", "MAE events, months", "mean", "at most", 1.0, {7: 2.0}),
    ("correlation", "correlation", "mean", "at least", 0.95, {}),
    ("mean_time_censored", "mean time of censored, months", "mean", "at least", 80.0, {}),
    ("train_seconds", "training, s", "mean", "at most", 300.0, {}),
]


def usual_size(complexity: int) -> int:
    """Voxels a side of a phantom, unless another size is asked for."""
    return 107 if complexity == 9 else PhantomParams.size


def name_of_run(complexity: int, size: int, variant: str, train_scans: int, seed: int) -> str:
    """Name of the folder of a run."""
    name = f"{complexity}_{variant}_{train_scans}_{seed}"
    return name if size == usual_size(complexity) else f"{name}_size{size}"


class Runner:
    """Phantoms, trainings and evaluations in a folder of work; what is there already is not made again."""

    def __init__(self, work: Path, test_scans: int, threads: int) -> None:
        self.work = work
        self.test_scans = test_scans
        self.threads = threads

    def lock(self, name: str) -> FileLock:
        """One process at a time makes a thing, on all machines that share the folder of work."""
        folder = self.work / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{name}.lock")

    def python(self, *args: str, log: Path) -> None:
        """Run a module of this repository; see :func:`~scripts.jobs.run_module`."""
        run_module(*args, log=log, threads=self.threads)

    def phantoms(self, complexity: int, size: int, num: int, seed: int, options: dict) -> Path:
        """Folder of a cohort of phantoms."""
        options = {"size": size, **options} if size != PhantomParams.size else options
        name = "_".join([str(complexity), str(num), str(seed), *(f"{k}{v}" for k, v in options.items())]).replace(" ", "-")
        folder = self.work / "phantoms" / name
        with self.lock(name):
            if not (folder / "cohort.csv").is_file():  # written last
                self.python(
                    *("scripts.make_phantoms", "--complexity", str(complexity), "--num", str(num), "--seed", str(seed)),
                    *(text for key, value in options.items() for text in (f"--{key}", *str(value).split())),
                    *("--jobs", str(self.threads), "--out", str(folder)),
                    log=self.work / "phantoms" / f"{name}.log",
                )
        return folder

    def moved(self, phantoms: Path, test: str) -> Path:
        """A copy of a cohort whose volumes, images and masks alike, went through the `move` of a test."""
        folder = phantoms.with_name(f"{phantoms.name}_{test}")
        with self.lock(folder.name):
            if not (folder / "cohort.csv").is_file():
                for source in phantoms.glob("*/*.nii.gz"):
                    target = folder / source.relative_to(phantoms)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    volume = nib.load(source)
                    nib.save(nib.Nifti1Image(TESTS[test]["move"](np.asarray(volume.dataobj)), volume.affine), target)
                write_atomically(folder / "cohort.csv", lambda p: shutil.copy(phantoms / "cohort.csv", p))
        return folder

    def train(self, complexity: int, size: int, variant: str, train_scans: int, seed: int) -> tuple[Path, dict]:
        """Folder of the trained weights, and what is to be known of the training: `device`, and `train_seconds`, which are
        None where it was stopped and went on.

        Raises:
            RuntimeError: what is in the folder was trained with other settings.
        """
        overrides = dict(VARIANTS[variant])
        config = ["configs/train.json"] + ([] if complexity == 9 else ["configs/cohort/phantom.json"])
        config += overrides.pop("config", [])
        settings = {"configs": {name: file_sha256(name) for name in config}, "overrides": VARIANTS[variant]}
        phantoms = self.phantoms(complexity, size, train_scans, seed, overrides.pop("phantoms", {}))
        folder = self.work / "runs" / name_of_run(complexity, size, variant, train_scans, seed)
        done = folder / TRAINED
        if done.is_file():
            made = json.loads(done.read_text())
            if made.pop("settings") != settings:
                raise RuntimeError(f"{folder} was trained with other settings: delete it, or choose another --work.")
            return folder, made
        cohort = pd.read_csv(phantoms / "cohort.csv")
        # A tenth validates, with as many events as there are in the rest.
        validates = cohort.groupby("event").cumcount() % 10 == 5 - cohort.event
        cohort["split"] = np.where(validates, "val", "train")
        if overrides.pop("shuffle", False):
            order = np.random.default_rng(seed).permutation(len(cohort))
            cohort[["time", "event"]] = cohort[["time", "event"]].to_numpy()[order]
        table = phantoms / f"split_{variant}.csv"
        write_atomically(table, lambda p: cohort.to_csv(p, index=False))
        start, whole = time.time(), not (folder / "last.pt").is_file()
        self.python(
            *("monai.bundle", "run", "--config_file", str(config)),
            *("--cohort", str(table), "--ckpt_dir", str(folder), "--output_dir", str(folder), "--seed", str(seed)),
            *(text for key, value in overrides.items() for text in (f"--{key}", str(value))),
            log=folder / "log.txt",
        )
        shutil.rmtree(folder / "cache")
        made = {"train_seconds": round(time.time() - start) if whole else None}
        made["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        write_json(done, {**made, "settings": settings})
        return folder, made

    def row(self, complexity: int, size: int, variant: str, train_scans: int, seed: int, test: str) -> dict:
        """Train, unless that is done, and evaluate: one row of the table."""
        with self.lock(name_of_run(complexity, size, variant, train_scans, seed)):
            run, made = self.train(complexity, size, variant, train_scans, seed)
        what, own = TESTS[test], VARIANTS[variant].get("phantoms", {})
        options = {**own, **what.get("phantoms", {})}
        phantoms = self.phantoms(complexity, size, self.test_scans, seed + HELD_OUT, options)
        if "move" in what:
            phantoms = self.moved(phantoms, test)
        cohort = pd.read_csv(phantoms / "cohort.csv")
        masks = OTHER_MASKS.get(complexity)
        table = phantoms / "cohort.csv"
        if masks:  # scored as a confounder is, to learn its share of the heat
            table = phantoms / "cohort_heat_ratio.csv"
            write_atomically(table, lambda p: cohort.assign(confounder_mask=cohort[masks[0]]).to_csv(p, index=False))
        folder = run / f"test_{test}"
        model = run / "model.pt"
        if what.get("weights") == "severity_off":
            model = without_severity(run, folder)
        self.python(
            *("monai.bundle", "run", "--config_file", "configs/evaluate.json"),
            *("--cohort", str(table), "--ckpt", str(model), "--output_dir", str(folder)),
            *("--figures", "false"),
            *(text for key, value in what.get("options", {}).items() for text in (f"--{key}", str(value))),
            log=folder / "log.txt",
        )
        found = json.loads((folder / "metrics.json").read_text())
        scans = pd.read_csv(folder / "metrics_per_scan.csv")
        values = {**found["survival"], **found["localisation"]}
        row = dict(zip(KEY, (complexity, size, variant, train_scans, seed, test)))
        row |= {"overrides": json.dumps(VARIANTS[variant]), "test_scans": len(cohort), **made}
        row |= {name: values[name]["value"] for name in MAP + SURVIVAL if name in values}
        if masks:
            row.pop("confounder_mass", None)  # neither is one
            row["heat_ratio"] = heat_ratio(scans, cohort, phantoms, *masks)
        row["inverted"] = int((scans.auroc < 0.5).sum())  # a map that ranks its lesion below the rest
        run_phantoms = self.phantoms(complexity, size, train_scans, seed, own)
        if "true_risk" in cohort:
            row["c_index_oracle"] = c_index(*(torch.tensor(cohort[k]) for k in ("true_risk", "time", "event")))
        else:
            row["mae_oracle"] = mae_of_true_masks(run_phantoms, phantoms)
        if "gt_severe_mask" in cohort:
            row["heat_ratio_oracle"] = heat_ratio_of_true_volumes(run_phantoms)
        return row


def read_mask(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj) > 0


def heat_ratio(scans: pd.DataFrame, cohort: pd.DataFrame, folder: Path, column: str, other: str) -> float | None:
    """Heat per voxel in one mask over that in the rest of the lesions, or over the scan's mean.

    In 11 severe lesions over mild ones, which are a third as dangerous; in 13 the honeycomb that protects over an even map.

    Args:
        scans: `metrics_per_scan.csv` of an evaluation that had this mask in the place of the confounder's.
        cohort: of the same scans; its masks lie in `folder`.
        column: of the mask.
        other: "lesions" or "scan".

    Returns:
        The median over the scans that have lesions, this mask and the other; None without such a scan.
    """
    ratios = []
    for scan in scans.merge(cohort, on="patient_id").itertuples():
        if np.isnan(scan.confounder_mass) or np.isnan(scan.mass_accuracy):
            continue
        one, lesions = (read_mask(folder / getattr(scan, name)) for name in (column, "gt_mask"))
        if other == "scan":
            ratios.append(scan.confounder_mass / one.mean())
        elif (rest := lesions & ~one).any():
            heat = max(scan.mass_accuracy - scan.confounder_mass, 0.0)
            ratios.append(scan.confounder_mass / one.sum() / max(heat / rest.sum(), 1e-12))
    return float(np.median(ratios)) if ratios else None


def heat_ratio_of_true_volumes(train: Path) -> float:
    """How many times as dangerous severe lesions are than mild ones, by volume, as far as the training scans' outcomes tell:
    the ratio of the coefficients of Cox's regression on the true volumes of either kind."""
    cohort, volumes = pd.read_csv(train / "cohort.csv"), []
    for scan in cohort.itertuples():
        lesions, severe = read_mask(train / scan.gt_mask), read_mask(train / scan.gt_severe_mask)
        volumes.append([(lesions & ~severe).mean(), severe.mean()])
    volumes = torch.tensor(volumes, dtype=torch.float64)
    scale = volumes.std(0)
    mild, severe = cox_regression(volumes / scale, torch.tensor(cohort.time), torch.tensor(cohort.event)) / scale
    return float(severe / mild)


def mae_of_true_masks(train: Path, test: Path) -> float:
    """What severity could reach on a perfect map: a linear function of the true masks' Minkowski functionals, fitted by
    least squares to the training scans of those who die; its mean absolute error on those of `test`, months.

    Phantoms' times end at 2 months and, in 3 and 9, at 60: so does the function, and it isn't fitted to what lies there."""
    numbers, times = {}, {}
    for folder in (train, test):
        cohort = pd.read_csv(folder / "cohort.csv").query("event == 1")
        rows = []
        for scan in cohort.itertuples():
            mask = torch.from_numpy(read_mask(folder / scan.gt_mask)).float()
            volume = mask.numel()
            if isinstance(getattr(scan, "lung_mask", None), str):
                volume = int(read_mask(folder / scan.lung_mask).sum())
            scale = torch.tensor([volume, volume ** (2 / 3), volume ** (1 / 3), 1.0])
            rows.append((minkowski_functionals(mask[None])[0] / scale).tolist() + [1.0])
        numbers[folder], times[folder] = np.array(rows), cohort.time.to_numpy()
    first, last = 2, 60
    between = (times[train] > first) & (times[train] < last)
    fit = np.linalg.lstsq(numbers[train][between], times[train][between], rcond=None)[0]
    return float(np.abs((numbers[test] @ fit).clip(first, last) - times[test]).mean())


def draw_pictures(runner: Runner, path: Path, keys: list[tuple[int, int, str, int, int]]) -> None:
    """A grid of phantoms by variants: one held-out scan each, its lesion outlined, and the heat of the trained maps."""
    complexities, variants = sorted({key[0] for key in keys}), list(dict.fromkeys(key[2] for key in keys))
    shape = len(variants) + 1, len(complexities)
    figure = Figure(figsize=(1.6 * shape[1], 1.75 * shape[0]), layout="constrained")
    axes = figure.subplots(*shape, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for complexity, size, variant, train_scans, seed in tqdm(keys, desc="pictures"):
        run, _ = runner.train(complexity, size, variant, train_scans, seed)
        phantoms = runner.phantoms(complexity, size, runner.test_scans, seed + HELD_OUT, VARIANTS[variant].get("phantoms", {}))
        cohort = pd.read_csv(phantoms / "cohort.csv")
        scan = cohort[cohort.event == 1].iloc[0]
        folder, one = run / "picture", phantoms / "picture.csv"
        scan.to_frame().T.to_csv(one, index=False)
        runner.python(
            *("monai.bundle", "run", "--config_file", "configs/inference.json", "--output_dir", str(folder)),
            *("--cohort", str(one), "--ckpt", str(run / "model.pt")),
            log=folder / "log.txt",
        )
        names = [phantoms / scan.image, phantoms / scan.gt_mask, next(folder.glob("maps/*_heat.nii.gz"))]
        hu, mask, heat = (np.asarray(nib.load(name).dataobj) for name in names)
        k = int(mask.sum((0, 1)).argmax())
        column = axes[:, complexities.index(complexity)]
        window = (-820, -780) if complexity in (4, 8, 12) else (-1000, 100)
        column[0].imshow(hu[:, :, k].T, cmap="gray", vmin=window[0], vmax=window[1], origin="lower")
        column[0].set_title(f"phantom {complexity}", fontsize=9)
        ax = column[1 + variants.index(variant)]
        top = max(float(np.quantile(heat[heat > 0], 0.99)) if (heat > 0).any() else 0.0, 1e-12)
        ax.imshow(heat[:, :, k].T, cmap="inferno", origin="lower", vmin=0, vmax=top)
        ax.set_title(f"heat, {variant}", fontsize=9)
        for panel in (column[0], ax):
            panel.contour(mask[:, :, k].T, [0.5], colors="deepskyblue", linewidths=0.7)
    write_png(path, figure, dpi=80)


def without_severity(run: Path, folder: Path) -> Path:
    """A copy of the weights of a run whose severity says nothing."""
    weights = torch.load(run / "model.pt", map_location="cpu", weights_only=True)
    before = Severity(0.0, 1.0).state_dict(prefix="severity.")  # as before the fit
    if not before.keys() <= weights.keys():
        raise RuntimeError(f"{run}: its weights have no severity that could be left out.")
    weights |= before
    folder.mkdir(exist_ok=True)
    model = folder / "model.pt"
    torch.save(weights, model)
    settings = json.loads((run / "settings.json").read_text())
    settings["objective"] = load_checked(run / "last.pt")["best_objective"]  # with the variance of training
    write_json(settings_file(model), {**settings, "weights_sha256": file_sha256(model)})
    return model


def read_rows(path: Path) -> list[dict]:
    """Rows of the table; one without a size is of the usual size, and one without a device was run on CPUs."""
    rows = list(csv.DictReader(path.open())) if path.is_file() else []
    for row in rows:
        row |= {"size": row.get("size") or usual_size(int(row["complexity"])), "device": row.get("device") or "cpu"}
    return rows


def order(row: dict) -> tuple:
    return tuple(row[name] if name in ("variant", "test") else int(row[name]) for name in KEY)


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write the whole table."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in sorted(rows, key=order):
        writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    write_text(path, text.getvalue())


# What the page shows apart, in this order, and whether the shipped configuration stands beside it once more, on the
# seeds of development that the same phantom was run on.
AS_SHIPPED = "1 to 9, as shipped"
SECTIONS = {
    AS_SHIPPED: False,
    "Heads": True,
    "Single settings": True,
    "Other cohorts": True,
    "Other phantoms than trained on": True,
    "10 to 13": False,
}


def section(complexity: int, variant: str, train_scans: int, test: str) -> str:
    """Which of the SECTIONS a row belongs to."""
    differs = VARIANTS.get(variant, {}).keys()
    if complexity >= 10:
        return "10 to 13"
    if test != "same":
        return "Other phantoms than trained on"
    if train_scans != USUAL_SCANS or differs & {"phantoms", "shuffle"}:
        return "Other cohorts"
    if "network_def#head" in differs:
        return "Heads"
    return AS_SHIPPED if variant == "default" else "Single settings"


def numbers(rows: list[dict]) -> pd.DataFrame:
    """The rows as a table whose measures are numbers, with their :func:`section` and whether the seed is reserved; seconds
    are those on CPUs only."""
    table = pd.DataFrame(rows).reindex(columns=COLUMNS)
    text = ["variant", "test", "overrides", "device"]
    table[table.columns.difference(text)] = table[table.columns.difference(text)].apply(pd.to_numeric)
    table.loc[table.device == "cuda", "train_seconds"] = np.nan  # not to be averaged with those on CPUs
    where = zip(table.complexity, table.variant, table.train_scans, table.test)
    return table.assign(section=[section(*row) for row in where], reserved=table.seed >= RESERVED)


def cell(values: pd.Series, digits: int, total: bool = False) -> str:
    """Mean, or total, over seeds (minimum-maximum)."""
    values = values.dropna()
    if not len(values):
        return "–"
    spread = f" ({values.min():.{digits}f}–{values.max():.{digits}f})" if len(values) > 1 else ""
    return f"{values.sum() if total else values.mean():.{digits}f}{spread}"


def phantom_name(complexity: int, size: int) -> str:
    return str(complexity) if size == usual_size(complexity) else f"{complexity}, {size}³"


def targets(table: pd.DataFrame) -> str:
    """Which phantoms meet each of the TARGETS and which miss it, with what they reach, by the shipped configuration."""
    table = table[table.section == AS_SHIPPED]

    def by_size(cells: dict[tuple[int, int], str]) -> str:
        sizes = sorted({size for size, _ in cells}, reverse=True)
        return "; ".join(f"{size}³: " + ", ".join(text for key, text in cells.items() if key[0] == size) for size in sizes) or "–"

    groups = {key: group for key, group in table.groupby(["size", "complexity"])}
    seeds = by_size({key: f"{key[1]} ({len(group)})" for key, group in groups.items()})
    lines = [f"Phantoms (seeds) by voxels a side: {seeds}.", "", "| measure | target | met on | missed on |", "|---|---|---|---|"]
    for name, title, how, side, usual, own in TARGETS:
        met, missed = {}, {}
        for (size, complexity), group in groups.items():
            values = group[name].dropna() if name == "train_seconds" else group[name]  # some trained on GPUs
            if name in ("confounder_mass", "train_seconds") and values.isna().all():  # no confounder, no CPU
                continue
            # A measure that a run lacks is NaN, which misses any bound.
            bound, value = own.get(complexity, usual), getattr(np, how)(values.to_numpy())
            if value <= bound if side == "at most" else value >= bound:
                met[size, complexity] = str(complexity)
            else:
                missed[size, complexity] = f"{complexity} ({value:.3g})"
        bounds = ", ".join([f"{side} {usual:g}", *(f"{c}: {b:g}" for c, b in own.items())])
        lines.append(f"| {title} | {bounds} | {by_size(met)} | {by_size(missed)} |")
    return "\n".join(lines) + "\n"


def seeds_name(seeds: pd.Series) -> str:
    """Seeds in short: "0–2, 7" for 0, 1, 2 and 7."""
    runs: list[list[int]] = []
    for seed in sorted(seeds):
        if runs and seed == runs[-1][-1] + 1:
            runs[-1].append(seed)
        else:
            runs.append([seed])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def markdown(rows: list[dict]) -> str:
    """What of the targets is met; then, section by section, every measure's mean (minimum–maximum) over seeds, a line for each
    phantom and variant. A column that says nothing in a section is left out there."""
    table = numbers(rows)
    text = ""
    for title, part in (("Reserved seeds", table[table.reserved]), ("Seeds of development", table[~table.reserved])):
        text += f"**{title}.** {targets(part)}\n" if len(part) else ""
    usual = table[(table.section == AS_SHIPPED) & ~table.reserved]
    for title, beside in SECTIONS.items():
        part = table[table.section == title]
        if part.empty:
            continue
        if beside:
            part = pd.concat([part, usual.merge(part[["complexity", "size"]].drop_duplicates())])
        text += f"**{title}**\n\n{table_of(part)}\n"
    return text


def table_of(part: pd.DataFrame) -> str:
    """The lines of one section."""
    keys = {"variant": "variant"}
    keys |= {"train_scans": "scans"} if (part.train_scans != USUAL_SCANS).any() else {}
    keys |= {"test": "measured on"} if (part.test != "same").any() else {}
    names = {"pointing_game": "pointing", "average_precision": "AP", "average_precision_ceiling": "AP ceiling"}
    names |= {"mass_accuracy": "heat in mask", "confounder_mass": "heat in confounder", "survivor_heat": "survivors / dead"}
    names |= {"heat_ratio": "heat ratio", "heat_ratio_oracle": "of true volumes", "inverted": "inverted maps"}
    names |= {"c_index": "C-index", "c_index_oracle": "of the oracle", "mae_events": "MAE events, months"}
    names |= {"mae_oracle": "of true masks", "integrated_brier": "integrated Brier"}
    names |= {"correlation": "correlation", "mean_time_censored": "mean time of censored", "train_seconds": "training, s"}
    names = {name: title for name, title in names.items() if part[name].notna().any()}
    lines = [" | ".join(["| phantom", *keys.values(), "seeds", *names.values()]) + " |", "|" + "---|" * (len(keys) + len(names) + 2)]
    by = ["complexity", "size", "differs", *keys, "reserved"]  # the shipped configuration first
    for (complexity, size, *_), group in part.assign(differs=part.variant != "default").groupby(by):
        cells = [phantom_name(complexity, size), *(str(group[key].iloc[0]) for key in keys), seeds_name(group.seed)]
        for name in names:
            digits = 0 if name in ("train_seconds", "mean_time_censored", "inverted") else 2 if "mae" in name else 3
            cells.append(cell(group[name], digits, total=name == "inverted"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def renew_table(page: Path, text: str) -> None:
    """Put the text between the two marks of the page."""
    before, mark, rest = page.read_text().partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end of table -->\n")
    if not (mark and end):
        raise SystemExit(f"error: {page} lacks the marks <!-- table --> and <!-- end of table -->.")
    write_text(page, before + mark + text + end + after)


def rows_of_threads(work: Path, test_scans: int, todo: list[tuple], jobs: int) -> Iterator[dict | Exception]:
    """Rows of the runs as they are done, or what went wrong with one; `jobs` at a time on this machine."""
    yield from run_jobs(Runner(work, test_scans, threads_of(jobs)).row, todo, jobs)


def rows_of_ray(work: Path, test_scans: int, todo: list[tuple], jobs: int) -> Iterator[dict | Exception]:
    """The same through Ray Tune, on a local Ray or the cluster that RAY_ADDRESS names.

    The folder of work must be shared by its machines; each run takes as many CPUs as a job would here.
    """
    try:
        from ray import tune
    except ImportError:
        raise SystemExit("error: --engine ray needs Ray: pip install 'ray[tune]'.") from None
    cpus, here = threads_of(jobs), os.getcwd()
    folder = work / "ray_rows"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def run(config: dict) -> None:
        os.chdir(here)
        try:
            found = {"row": Runner(work, test_scans, cpus).row(*config["key"])}
        except Exception as e:
            found = {"error": str(e)}
        write_json(folder / f"{'_'.join(map(str, config['key']))}.json", found)

    tuner = tune.Tuner(
        tune.with_resources(run, {"cpu": cpus}),
        param_space={"key": tune.grid_search([list(key) for key in todo])},
        tune_config=tune.TuneConfig(max_concurrent_trials=jobs),
        run_config=tune.RunConfig(storage_path=str(work / "ray"), verbose=0),
    )
    with ThreadPoolExecutor(1) as pool:
        fit = pool.submit(tuner.fit)
        seen: set[Path] = set()
        while len(seen) < len(todo):
            over = fit.done()
            for path in sorted(set(folder.glob("*.json")) - seen):
                seen.add(path)
                found = json.loads(path.read_text())
                yield found["row"] if "row" in found else RuntimeError(found["error"])
            if over and len(seen) < len(todo):
                raise SystemExit(f"error: Ray ended with {len(todo) - len(seen)} runs missing; see {work / 'ray'}.")
            time.sleep(0.5)


ENGINES = {"threads": rows_of_threads, "ray": rows_of_ray}


def main(prog: str = "scripts.research.sweep", about: str | None = __doc__, layout: Callable = markdown, **defaults: object) -> None:
    """Run the sweep that the command line asks for.

    Args:
        prog: name of the module that was run.
        about: what it is for.
        layout: from all rows of the CSV to the text between the marks of the page.
        defaults: of options.
    """
    p = argparse.ArgumentParser(
        prog=f"python -m {prog}",
        description=about,
        epilog="variants: "
        + "; ".join(f"{k} {' '.join(f'--{a} {b}' for a, b in v.items()) or '(as shipped)'}" for k, v in VARIANTS.items()),
    )
    p.add_argument("--complexities", type=int, nargs="+", default=[1, 2], help="phantoms (default %(default)s)")
    p.add_argument("--size", type=int, help="voxels a side of the phantoms (default 64; 9 always has 107)")
    p.add_argument("--variants", nargs="+", default=["default"], choices=VARIANTS, help="see below (default %(default)s)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of network and data (default 0 1 2)")
    p.add_argument("--tests", nargs="+", default=["same"], choices=TESTS, help="what to measure on (default: same)")
    p.add_argument(
        "--train_scans",
        type=int,
        nargs="+",
        default=[USUAL_SCANS],
        help=f"scans a run, a tenth for validation (default {USUAL_SCANS})",
    )
    p.add_argument("--test_scans", type=int, default=24, help="held-out scans a run (default 24)")
    p.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores (default 1)")
    p.add_argument("--engine", choices=ENGINES, default="threads", help="ray: by Ray Tune, here or on a cluster")
    p.add_argument("--results", type=Path, default=Path("docs/results/localisation.csv"), help="the tidy CSV (default %(default)s)")
    p.add_argument("--work", type=Path, default=Path("runs/sweep"), help="phantoms and weights (default runs/sweep)")
    p.add_argument("--page", type=Path, default=Path("docs/localisation.md"), help="page whose table is renewed (default %(default)s)")
    p.add_argument("--table", action="store_true", help="renew the table and run nothing")
    p.add_argument("--pictures", type=Path, metavar="PNG", help="draw the maps of these runs as well: phantoms x variants")
    p.set_defaults(**defaults)
    args = p.parse_args()
    rows = read_rows(args.results)
    if args.table:
        renew_table(args.page, layout(rows))
        return
    scans = str(args.test_scans)
    done = {tuple(str(row[k]) for k in KEY) for row in rows if str(row.get("test_scans") or scans) == scans}
    sizes = {c: args.size if args.size and c != 9 else usual_size(c) for c in args.complexities}
    what = [(c, sizes[c], v) for v in args.variants for c in args.complexities]
    wanted = [(*w, n, s, t) for s in args.seeds for w in what for n in args.train_scans for t in args.tests]
    todo = [key for key in wanted if tuple(map(str, key)) not in done]
    work, failed = args.work.resolve(), 0
    exit_on_sigterm()
    with tqdm(total=len(wanted), initial=len(wanted) - len(todo)) as bar:
        for row in ENGINES[args.engine](work, args.test_scans, todo, args.jobs) if todo else ():
            if isinstance(row, Exception):
                failed += 1
                bar.write(f"failed, the others go on: {row}")
                continue
            with FileLock(f"{args.results}.lock"):  # another sweep may write to it as well
                rows = [*(other for other in read_rows(args.results) if order(other) != order(row)), row]
                write_rows(args.results, rows)
                renew_table(args.page, layout(rows))
            bar.update()
            bar.write(" ".join(f"{k}={row[k]}" for k in (*KEY, "pointing_game", "average_precision", "mae_events")))
    if failed:
        raise SystemExit(f"error: {failed} of {len(todo)} runs failed; the same command tries them again.")
    if args.pictures:
        runner = Runner(work, args.test_scans, os.cpu_count() or 1)
        draw_pictures(runner, args.pictures, [(*w, args.train_scans[0], args.seeds[0]) for w in what])


if __name__ == "__main__":
    main()
