# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Negative controls and causal checks of trained maps: does the map depend on what was learnt, and on the lesion alone?

Takes the weights that scripts.research.sweep left in its folder of work, and held-out phantoms. Writes a table and a picture:

- random weights: the maps of five untrained networks of the same kind, and their rank correlation with the trained one's,
  both relative to the map of a network that knows nothing, which is darker at the borders;
- shuffled voxels: the map of a scan whose voxels are shuffled, against the lesion's mask;
- erased: slice by slice, the lesion of those who died is replaced by background; their risk must fall;
- implanted: slice by slice, a lesion is copied into those who lived; their risk must rise;
- what protects (13): the honeycomb by which patients live longer must have a later location than what is neither it nor
  a lesion, and less heat than an even map.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from tqdm import tqdm

from bundle.files import write_text
from bundle.maps import GridShiftInferer
from bundle.metrics.localisation import average_precision
from bundle.networks import network_from
from bundle.phantoms.cohort import PhantomCohort
from bundle.phantoms.cubes import Phantom, PhantomParams
from bundle.report.pictures import write_png
from bundle.survival import mean_months, objective_from

from .sweep import HELD_OUT, TRAINED, USUAL_SCANS, cell, name_of_run, phantom_name, usual_size

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
UNTRAINED = 5  # networks with random weights
PROTECTS = 13  # the phantom with a structure that protects


class Trained:
    """The network of a run, from HU to its map on voxels and the patient's mean time.

    Args:
        run: folder of the weights.
        random: seed of random weights, in place of the trained ones.
    """

    def __init__(self, run: Path, random: int | None = None) -> None:
        settings = json.loads((run / "settings.json").read_text())
        torch.manual_seed(random or 0)
        self.network = network_from(settings["network"]).eval()
        if random is None:
            self.network.load_state_dict(torch.load(run / "model.pt", map_location="cpu", weights_only=True))
        self.low, self.high = settings["preprocessing"]["hu_window"]
        self.sigma = json.loads(Path("configs/inference.json").read_text())["sigma"]
        self.objective = objective_from(settings["objective"])

    def image(self, hu: np.ndarray) -> torch.Tensor:
        hu = torch.from_numpy(hu.astype(np.float32))[None, None]
        return ((hu - self.low) / (self.high - self.low)).clamp(0, 1)

    @torch.no_grad()
    def months(self, hu: np.ndarray) -> float:
        """Mean predicted time, from one origin of the patch grid."""
        return float(mean_months(self.objective.pmf(self.network(self.image(hu)))))

    def weights(self, hu: np.ndarray) -> np.ndarray:
        """Weight of each voxel."""
        return self.map_by(self.network, hu)[1]

    def weights_of_nothing(self, hu: np.ndarray) -> np.ndarray:
        """Weight of each voxel if all patches weigh the same: what is left is the way from patches to voxels."""

        def even(image: torch.Tensor, lung: torch.Tensor) -> torch.Tensor:
            ones = F.avg_pool3d(torch.ones_like(image), self.network.stride, ceil_mode=True)
            return torch.cat([ones, ones / ones.sum()], 1)

        return self.map_by(even, hu)[1]

    def map_by(self, network: Callable, hu: np.ndarray, refine: bool = True) -> np.ndarray:
        """Location and weight of each voxel in the map by any network, (2, D, H, W)."""
        image = self.image(hu)
        inferer = GridShiftInferer(4, self.network.stride, sigma=self.sigma, refine=refine)
        return inferer(image, network, lung=torch.ones_like(image))[0, [0, -1]].numpy()


def first_slices(mask: np.ndarray, share: float) -> np.ndarray:
    """The part of a mask that lies in its first slices, about `share` of its voxels."""
    filled = mask.sum((1, 2)).cumsum()
    return mask & (filled <= share * filled[-1] + 0.5)[:, None, None]


def replaced(scan: Phantom, where: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The scan's HU with background drawn from elsewhere in it."""
    free = ~scan.gt_mask if scan.confounder_mask is None else ~(scan.gt_mask | scan.confounder_mask)
    hu = scan.image.copy()
    hu[where] = rng.choice(scan.image[free], int(where.sum()))
    return hu


def controls_of(run: Path, complexity: int, size: int, seed: int, num: int) -> tuple[dict, list[dict]]:
    """One row of the table and the points of the curves, from `num` held-out scans."""
    rng = np.random.default_rng(seed)
    trained, untrained = Trained(run), [Trained(run, random=k) for k in range(UNTRAINED)]
    scans = [phantom for _, phantom in PhantomCohort(complexity, num, seed + HELD_OUT, params=PhantomParams(size=size))]
    dead, alive = [s for s in scans if s.event], [s for s in scans if not s.event]
    nothing = trained.weights_of_nothing(scans[0].image)  # of any scan: looks change nothing in an even map
    found: dict[str, list] = {name: [] for name in ("ap", "random_rho", "random_ap", "shuffled_ap", "nothing_ap", "base_rate")}
    curves: list[dict] = []
    for scan, survivor in zip(dead, alive):
        heat, others = trained.weights(scan.image), [network.weights(scan.image) for network in untrained]
        shuffled = rng.permutation(scan.image.ravel()).reshape(scan.image.shape)
        found["ap"].append(average_precision(heat, scan.gt_mask))
        said = [(weights / nothing).ravel() for weights in (heat, *others)]
        found["random_rho"].append([float(spearmanr(said[0], other)[0]) for other in said[1:]])
        found["nothing_ap"].append(average_precision(nothing, scan.gt_mask))
        found["random_ap"].append([average_precision(other, scan.gt_mask) for other in others])
        found["shuffled_ap"].append(average_precision(trained.weights(shuffled), scan.gt_mask))
        found["base_rate"].append(float(scan.gt_mask.mean()))
        for share in SHARES:
            part = first_slices(scan.gt_mask, share)
            implanted = survivor.image.copy()
            implanted[part] = scan.image[part]
            for what, hu in (("erased", replaced(scan, part, rng)), ("implanted", implanted)):
                point = {"complexity": complexity, "what": what, "share": share}
                curves.append(point | {"months": trained.months(hu)})
    row = {"phantom": phantom_name(complexity, size), "seed": seed, "scans": len(found["ap"])}
    # A mean over scans; of random weights one for each network.
    return row | {name: np.mean(values, 0) for name, values in found.items()}, curves


def protection_of(run: Path, size: int, seed: int, num: int) -> dict:
    """One row about the honeycomb of phantom 13: a number for each of `num` held-out scans that have one.

    `later`: its mean location less that of what is neither honeycomb nor lesion, months. `own` and `refined`: its weight a
    voxel in units of an even map's, without and with refinement; `rest`: that of what is neither, refined.
    """
    trained = Trained(run)
    found: dict[str, list] = {name: [] for name in ("later", "own", "refined", "rest")}
    for _, scan in PhantomCohort(PROTECTS, num, seed + HELD_OUT, params=PhantomParams(size=size)):
        honeycomb = scan.confounder_mask
        if honeycomb is None or not honeycomb.any():
            continue
        rest = ~honeycomb & ~scan.gt_mask
        (location, own), (_, refined) = (trained.map_by(trained.network, scan.image, refine) for refine in (False, True))
        found["later"].append(location[honeycomb].mean() - location[rest].mean())
        found["own"].append(own[honeycomb].mean() / own.mean())
        found["refined"].append(refined[honeycomb].mean() / refined.mean())
        found["rest"].append(refined[rest].mean() / refined.mean())
    return {"phantom": phantom_name(PROTECTS, size), "seed": seed, "scans": len(found["later"])} | found


def draw(curves: pd.DataFrame, path: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, what, title in zip(axes, ("erased", "implanted"), ("lesion erased from the dead", "lesion copied into survivors")):
        for complexity, group in curves[curves.what == what].groupby("complexity"):
            mean = group.groupby("share").months.mean()
            ax.plot(100 * mean.index, mean.to_numpy(), marker="o", label=str(complexity))
        ax.set_title(title)
        ax.set_xlabel("share of the lesion, %")
    axes[0].set_ylabel("mean predicted time, months")
    axes[1].legend(title="phantom", fontsize=8)
    write_png(path, figure)


def page(table: pd.DataFrame, curves: pd.DataFrame, protection: list[dict], picture: str, command: str) -> str:
    lines = [
        "# Negative controls and causal checks",
        "",
        f"Maps of held-out phantoms by the weights of the shipped configuration. *Random weights*: the maps of {UNTRAINED} untrained "
        "networks, the rank correlation of what they say with what the trained one says, and their average precision: mean (least–greatest network). What a map says "
        "is its weight over that of *nothing*, a map by a network that gives all patches the same weight, which is darker at the scan's borders as any map is. *Shuffled voxels*: average precision "
        "of the trained map of a scan whose voxels were shuffled. A guess has the mask's *base rate*. What is above it was there before anything was "
        "learnt, or is known without looking: any network answers to brightness, so that an average precision on bright spheres (2, 6) "
        "proves little by itself; and the lesion of 4 always lies in the same corner, the spheres of the others seldom at the borders.",
        "",
        "| phantom | seed | scans | AP | random weights: rank correlation | AP | shuffled voxels: AP | nothing: AP | base rate |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in table.itertuples():
        numbers = f"{r.ap:.3f} | {cell(pd.Series(r.random_rho), 2)} | {cell(pd.Series(r.random_ap), 3)} | {r.shuffled_ap:.3f} | {r.nothing_ap:.3f}"
        lines.append(f"| {r.phantom} | {r.seed} | {r.scans} | {numbers} | {r.base_rate:.3f} |")
    lines += [
        "",
        "Causal check: mean predicted months while the lesion is erased from those who died, and copied into those who lived.",
        "",
        f"![predicted time against the share of the lesion]({picture})",
        "",
        "| phantom | what | " + " | ".join(f"{share:.0%}" for share in SHARES) + " | monotone |",
        "|---|---|" + "---|" * (len(SHARES) + 1),
    ]
    for (complexity, what), group in curves.groupby(["complexity", "what"]):
        mean = group.groupby("share").months.mean().to_numpy()
        steps = np.diff(mean) if what == "erased" else -np.diff(mean)
        cells = " | ".join(f"{months:.1f}" for months in mean)
        lines.append(f"| {complexity} | {what} | {cells} | {'yes' if (steps > -0.5).all() else 'no'} |")
    if protection:
        lines += [
            "",
            "What protects: half of the patients of 13 have a honeycomb, and live longer for it. *Later* is its mean location less that of "
            "what is neither honeycomb nor lesion, in months, which must be positive; the others are heat a voxel in units of an even map's, which "
            "must be below 1: mean (least–greatest scan).",
            "",
            "| phantom | seed | scans | later | honeycomb, the network alone | honeycomb, refined | neither honeycomb nor lesion, refined |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in protection:
            cells = [cell(pd.Series(row[name]), digits) for name, digits in (("later", 1), ("own", 3), ("refined", 3), ("rest", 3))]
            lines.append(f"| {row['phantom']} | {row['seed']} | {row['scans']} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\nMade by `{command}` after the sweep.\n"


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m scripts.research.controls", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--work", type=Path, default=Path("runs/sweep"), help="folder of work of the sweep (default runs/sweep)")
    p.add_argument("--complexities", type=int, nargs="+", default=[2, 4, 6, 8, PROTECTS], help="1 to 8, 13 (default 2 4 6 8 13)")
    p.add_argument("--size", type=int, help="voxels a side of the phantoms (default 64)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the runs (default 0)")
    p.add_argument("--train_scans", type=int, default=USUAL_SCANS, help=f"of the runs (default {USUAL_SCANS})")
    p.add_argument("--num", type=int, default=16, help="held-out scans a run (default 16)")
    p.add_argument("--page", type=Path, default=Path("docs/controls.md"), help="page to write, with a PNG beside it")
    args = p.parse_args()
    if set(args.complexities) <= {PROTECTS}:
        p.error("--complexities needs one of 1 to 8")
    torch.set_flush_denormal(True)
    rows, curves, protection = [], [], []
    for complexity, seed in tqdm(list(product(args.complexities, args.seeds)), unit="run"):
        size = args.size or usual_size(complexity)
        run = args.work / "runs" / name_of_run(complexity, size, "default", args.train_scans, seed)
        if not (run / TRAINED).is_file():
            raise SystemExit(f"error: {run} is not a finished run; make it with python -m scripts.research.sweep.")
        if complexity == PROTECTS:
            protection.append(protection_of(run, size, seed, args.num))
            continue
        row, points = controls_of(run, complexity, size, seed, args.num)
        rows.append(row)
        curves += points
    picture = args.page.with_suffix(".png")
    draw(pd.DataFrame(curves), picture)
    command = f"python -m scripts.research.controls --complexities {' '.join(map(str, args.complexities))} --seeds {' '.join(map(str, args.seeds))}"
    command += f" --size {args.size}" if args.size else ""
    command += f" --num {args.num}" if args.num != p.get_default("num") else ""
    write_text(args.page, page(pd.DataFrame(rows), pd.DataFrame(curves), protection, picture.name, command))


if __name__ == "__main__":
    main()
