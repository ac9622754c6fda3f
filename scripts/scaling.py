# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Draw how maps and months depend on the number of training scans, the share of events and the size of the lesions.

It draws what `scripts.sweep` has measured (docs/results/localisation.csv) and measures nothing itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from bundle.data.phantoms import PhantomParams
from bundle.files import write_atomically

from .sweep import VARIANTS, numbers, phantom_name, read_rows

MEASURES = {"average_precision": "average precision", "mass_accuracy": "heat in the mask", "mae_events": "months off, of those who die"}


def settings() -> dict[str, dict[str, float]]:
    """By what is varied, the variants that do so and the value that each of them has; the shipped one is among them."""
    cohorts = {v: options["phantoms"] for v, options in VARIANTS.items() if options.keys() == {"phantoms"}}
    events = {v: of["feature_fraction"] for v, of in cohorts.items() if "feature_fraction" in of}
    radii = {v: of["sphere_radius"] for v, of in cohorts.items() if "sphere_radius" in of}
    mean = {v: sum(map(float, radius.split())) / 2 for v, radius in radii.items()}
    return {
        "share of scans that die": {"default": 0.5, **events},
        "mean radius of a lesion, voxels of 64": {"default": sum(PhantomParams.sphere_radius) / 2, **mean},
    }


def points(rows: list[dict]) -> dict[str, pd.DataFrame]:
    """For each thing that is varied the rows that belong to it, with its value as `x`."""
    table = numbers([row for row in rows if row["test"] == "same"])
    found = {"training scans": table[table.variant == "default"].assign(x=lambda t: t.train_scans)}
    usual = table[table.train_scans == 100]
    for title, values in settings().items():
        found[title] = usual[usual.variant.isin(values)].assign(x=lambda t, v=values: t.variant.map(v))
    # Phantoms of which only the shipped point is there have no curve.
    return {
        title: part.groupby(["complexity", "size"]).filter(lambda group: group.x.nunique() > 1) for title, part in found.items()
    }


def draw(rows: list[dict], path: Path) -> None:
    """A column for each thing that is varied, a row for each measure; a line joins the means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = points(rows)
    figure, axes = plt.subplots(len(MEASURES), len(parts), figsize=(10, 8), sharex="col", sharey="row", layout="constrained")
    for column, (title, part) in zip(axes.T, parts.items()):
        for ax, (measure, name) in zip(column, MEASURES.items()):
            for (complexity, size), group in part.groupby(["complexity", "size"]):
                mean = group.groupby("x")[measure].mean()
                (line,) = ax.plot(mean.index, mean.to_numpy(), label=phantom_name(complexity, size))
                ax.scatter(group.x, group[measure], s=14, color=line.get_color())
            ax.grid(alpha=0.3)
            if column[0] is axes[0, 0]:
                ax.set_ylabel(name)
        column[-1].set_xlabel(title)
        if title == "training scans":
            column[-1].set_xscale("log")
            ticks = sorted(part.x.unique())
            column[-1].set_xticks(ticks, [f"{n:.0f}" for n in ticks])
            column[-1].minorticks_off()
        if len(part):
            column[0].legend(title="phantom", fontsize=8)
    for ax in axes[:2].flat:
        ax.set_ylim(0, 1.03)
    for ax in axes[2]:
        ax.set_ylim(bottom=0)
    write_atomically(path, lambda p: figure.savefig(p, dpi=90, format="png"))
    plt.close(figure)


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m scripts.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", type=Path, default=Path("docs/results/localisation.csv"), help="of the sweep (default %(default)s)")
    p.add_argument("--out", type=Path, default=Path("docs/scaling.png"), help="picture to write (default %(default)s)")
    args = p.parse_args()
    draw(read_rows(args.results), args.out)


if __name__ == "__main__":
    main()
