# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Negative controls and causal checks of trained maps: does the map depend on what was learnt, and on the lesion alone?

Takes the weights that scripts.research.sweep left in its folder of work, and held-out phantoms. Writes a page and a picture:

- random weights: the maps of five untrained networks of the same kind, and their rank correlation with the trained one's,
  both relative to the map of a network that knows nothing, which is darker at the borders;
- shuffled voxels: the map of a scan whose voxels are shuffled, against the lesion's mask;
- erased: slice by slice, the lesion of those who died is replaced by background; their risk must fall;
- implanted: slice by slice, a lesion is copied into those who lived; their risk must rise.
"""

import argparse
import sys
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

from bundle.errors import InputError
from bundle.files import write_text
from bundle.maps import GridShiftInferer
from bundle.metrics.localisation import average_precision
from bundle.networks import network_from
from bundle.phantoms import PHANTOMS, Phantom, PhantomCohort, PhantomParams, phantom_name
from bundle.report.pictures import write_png
from bundle.run import TrainedModel
from bundle.survival import mean_months
from scripts.jobs import markdown, spread
from scripts.research.sweep import HELD_OUT, TRAINED, name_of_run
from scripts.research.tables import USUAL_SCANS, label, usual_size

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
UNTRAINED = 5  # networks with random weights
SHIPPED = ["spheres", "corner-sphere", "spheres-honeycomb-corner", "texture"]
HEAD = f"""\
# Negative controls and causal checks

Maps of held-out phantoms by the weights of the shipped configuration. A map is taken relative to that of *nothing*, by a
network that gives all patches the same weight, which is darker at the scan's borders as any map is. *Random weights*: the
rank correlation of {UNTRAINED} untrained networks' maps with the trained one, and their AP: mean (least–greatest network).
*Shuffled voxels*: AP of the trained map of a scan whose voxels were shuffled. A guess has the mask's *base rate*. What is
above it was there before anything was learnt: any network answers to brightness, the lesion of `corner-sphere` always lies
in the same corner, and the spheres of the others seldom at the borders.
"""
CAUSAL = """
Causal check: mean predicted months while a share of the lesion is erased from those who died, or copied into survivors.
"""


class Trained:
    """The network of a run, from HU to its map on voxels and the patient's mean time.

    Args:
        run: folder of the weights.
        random: seed of random weights, in place of the trained ones.
    """

    def __init__(self, run: Path, random: int | None = None) -> None:
        self.model = TrainedModel(str(run / "model.pt"))
        self.network = self.model.network.eval()
        if random is not None:
            torch.manual_seed(random)
            self.network = network_from(self.model.settings["network"]).eval()

    def image(self, hu: np.ndarray) -> torch.Tensor:
        low, high = self.model.preprocessing["hu_window"]
        return ((torch.from_numpy(hu.astype(np.float32))[None, None] - low) / (high - low)).clamp(0, 1)

    def months(self, hu: np.ndarray) -> float:
        """Mean predicted time, from few origins of the patch grid."""
        severity = self.model.severity
        shifts, stride = self.model.usual_shifts, self.network.stride
        inferer = GridShiftInferer(shifts, stride, refine=False, few_origins=True, severity=severity)
        return float(mean_months(self.model.objective.pmf(inferer(self.image(hu), self.network))))

    def weights(self, hu: np.ndarray, network: Callable | None = None) -> np.ndarray:
        """Weight of each voxel in the map, by its own network or any other."""
        image = self.image(hu)
        inferer = GridShiftInferer(self.model.usual_shifts, self.network.stride)
        return inferer(image, network or self.network, lung=torch.ones_like(image))[0, -1].numpy()

    def weights_of_nothing(self, hu: np.ndarray) -> np.ndarray:
        """Weight of each voxel if all patches weigh the same: what is left is the way from patches to voxels."""

        def even(image: torch.Tensor, lung: torch.Tensor) -> torch.Tensor:
            ones = F.avg_pool3d(torch.ones_like(image), self.network.stride, ceil_mode=True)
            return torch.cat([ones, ones / ones.sum()], 1)

        return self.weights(hu, even)


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


def controls_of(run: Path, phantom: str, size: int, seed: int, num: int) -> tuple[dict, list[dict]]:
    """One row of the table and the points of the curves, from `num` held-out scans."""
    rng = np.random.default_rng(seed)
    trained, untrained = Trained(run), [Trained(run, random=k) for k in range(UNTRAINED)]
    scans = [scan for _, scan in PhantomCohort(phantom, num, seed + HELD_OUT, params=PhantomParams(size=size))]
    dead, alive = [s for s in scans if s.event], [s for s in scans if not s.event]
    nothing = trained.weights_of_nothing(scans[0].image)  # of any scan: looks change nothing in an even map
    found: dict[str, list] = {name: [] for name in ("ap", "rho", "random_ap", "shuffled_ap", "nothing_ap", "base_rate")}
    curves: list[dict] = []
    for scan, survivor in zip(dead, alive, strict=False):
        heat, others = trained.weights(scan.image), [network.weights(scan.image) for network in untrained]
        shuffled = rng.permutation(scan.image.ravel()).reshape(scan.image.shape)
        found["ap"].append(average_precision(heat, scan.gt_mask))
        found["rho"].append([spearmanr((heat / nothing).ravel(), (other / nothing).ravel())[0] for other in others])
        found["nothing_ap"].append(average_precision(nothing, scan.gt_mask))
        found["random_ap"].append([average_precision(other, scan.gt_mask) for other in others])
        found["shuffled_ap"].append(average_precision(trained.weights(shuffled), scan.gt_mask))
        found["base_rate"].append(float(scan.gt_mask.mean()))
        for share in SHARES:
            part = first_slices(scan.gt_mask, share)
            implanted = survivor.image.copy()
            implanted[part] = scan.image[part]
            for what, hu in (("erased", replaced(scan, part, rng)), ("implanted", implanted)):
                curves.append({"phantom": phantom, "what": what, "share": share, "months": trained.months(hu)})
    mean = {name: np.mean(values, 0) for name, values in found.items()}  # over scans; of random weights one a network
    row = {"phantom": label(phantom, size), "seed": seed, "scans": len(found["ap"]), "AP": f"{mean['ap']:.3f}"}
    row["random weights: rank correlation"] = spread(pd.Series(mean["rho"]))
    row["random weights: AP"] = spread(pd.Series(mean["random_ap"]), 3)
    rest = {"shuffled_ap": "shuffled voxels: AP", "nothing_ap": "nothing: AP", "base_rate": "base rate"}
    return row | {title: f"{mean[name]:.3f}" for name, title in rest.items()}, curves


def draw(curves: pd.DataFrame, path: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    titles = {"erased": "lesion erased from the dead", "implanted": "lesion copied into survivors"}
    for ax, (what, title) in zip(axes, titles.items(), strict=True):
        for phantom, group in curves[curves.what == what].groupby("phantom", sort=False):
            mean = group.groupby("share").months.mean()
            ax.plot(100 * mean.index, mean.to_numpy(), marker="o", label=phantom)
        ax.set_title(title)
        ax.set_xlabel("share of the lesion, %")
    axes[0].set_ylabel("mean predicted time, months")
    axes[1].legend(title="phantom", fontsize=8)
    write_png(path, figure)


def causal(curves: pd.DataFrame) -> pd.DataFrame:
    """Months by the share of the lesion, and whether they go one way only (but for half a month)."""
    rows = []
    for (phantom, what), group in curves.groupby(["phantom", "what"], sort=False):
        mean = group.groupby("share").months.mean()
        steps = np.diff(mean) if what == "erased" else -np.diff(mean)
        cells = {f"{share:.0%}": f"{months:.1f}" for share, months in mean.items()}
        rows.append({"phantom": phantom, "what": what, **cells, "monotone": "yes" if (steps > -0.5).all() else "no"})
    return pd.DataFrame(rows)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m scripts.research.controls", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--work", type=Path, default=Path("runs/sweep"), help="folder of work of the sweep (default runs/sweep)")
    p.add_argument("--phantoms", nargs="+", default=SHIPPED, help=f"names or numbers (default {' '.join(SHIPPED)})")
    p.add_argument("--size", type=int, help="voxels a side of the phantoms (default 64)")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the runs (default 0)")
    p.add_argument("--train_scans", type=int, default=USUAL_SCANS, help=f"of the runs (default {USUAL_SCANS})")
    p.add_argument("--num", type=int, default=16, help="held-out scans a run (default 16)")
    p.add_argument("--page", type=Path, default=Path("docs/results/controls.md"), help="to write (default %(default)s)")
    p.add_argument("--picture", type=Path, default=Path("docs/controls.png"), help="to draw (default %(default)s)")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    torch.set_flush_denormal(True)
    rows, curves = [], []
    try:
        names = [phantom_name(phantom) for phantom in args.phantoms]
        known = [name for name, kind in PHANTOMS.items() if not kind.drawn_outcome and kind.body.FIELD is None]
        if not set(names) <= set(known):
            raise InputError(f"--phantoms takes {', '.join(known)}.")
        for phantom, seed in tqdm(list(product(names, args.seeds)), unit="run"):
            size = args.size or usual_size(phantom)
            run = args.work / "runs" / name_of_run(phantom, size, "default", args.train_scans, seed)
            if not (run / TRAINED).is_file():
                raise InputError(f"{run} is not a finished run; make it with python -m scripts.research.sweep.")
            row, points = controls_of(run, phantom, size, seed, args.num)
            rows.append(row)
            curves += points
    except InputError as e:
        sys.exit(f"error: {e}")
    draw(pd.DataFrame(curves), args.picture)
    text = f"{HEAD}\n{markdown(pd.DataFrame(rows))}{CAUSAL}\n{markdown(causal(pd.DataFrame(curves)))}"
    command = " ".join(["python -m scripts.research.controls", *(sys.argv[1:] if argv is None else argv)])
    write_text(args.page, f"{text}\nMade by `{command}` after the sweep.\n")


if __name__ == "__main__":
    main()
