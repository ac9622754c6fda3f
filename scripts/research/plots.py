# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Draw how maps and months depend on the cohort (training scans, events, lesions) and on single settings.

It draws what `scripts.research.sweep` has measured (docs/results/localisation.csv) and measures nothing itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from bundle.phantoms.cubes import PhantomParams
from bundle.report.pictures import write_png

from .sweep import AS_SHIPPED, USUAL_SCANS, VARIANTS, numbers, phantom_name, read_rows

MEASURES = {"average_precision": "average precision", "mass_accuracy": "heat in the mask", "mae_events": "months off, of those who die"}


def varied() -> dict[str, dict[str, float]]:
    """By what is varied, the variants that do so and the value that each of them has; the shipped one is among them."""
    cohorts = {v: options["phantoms"] for v, options in VARIANTS.items() if options.keys() == {"phantoms"}}
    events = {v: of["feature_fraction"] for v, of in cohorts.items() if "feature_fraction" in of}
    radii = {v: of["sphere_radius"] for v, of in cohorts.items() if "sphere_radius" in of}
    mean = {v: sum(map(float, radius.split())) / 2 for v, radius in radii.items()}
    return {
        "share of scans that die": {"default": 0.5, **events},
        "mean radius of a lesion, voxels of 64": {"default": sum(PhantomParams.sphere_radius) / 2, **mean},
    }


def measured(rows: list[dict]) -> pd.DataFrame:
    """What was measured of phantoms 1 to 9 like those trained on, on seeds of development."""
    table = numbers([row for row in rows if row["test"] == "same"])
    return table[~table.reserved & (table.complexity <= 9)]


def cohorts(rows: list[dict]) -> dict[str, pd.DataFrame]:
    """For each property of a cohort that is varied the rows that belong to it, with its value as `x`."""
    table = measured(rows)
    found = {"training scans": table[table.variant == "default"].assign(x=lambda t: t.train_scans)}
    usual = table[table.train_scans == USUAL_SCANS]
    for title, values in varied().items():
        found[title] = usual[usual.variant.isin(values)].assign(x=lambda t, v=values: t.variant.map(v))
    # Phantoms of which only the shipped point is there have no curve.
    return {
        title: part.groupby(["complexity", "size"]).filter(lambda group: group.x.nunique() > 1) for title, part in found.items()
    }


def settings(rows: list[dict]) -> dict[tuple[int, int], pd.DataFrame]:
    """By phantom and size the rows of single settings, in the order of VARIANTS, with those of the shipped configuration."""
    table = measured(rows)
    table = table[table.section.isin([AS_SHIPPED, "Single settings"])]
    table = table.assign(place=table.variant.map({name: i for i, name in enumerate(VARIANTS)})).dropna(subset=["place"])
    groups = {key: group.sort_values("place") for key, group in table.groupby(["complexity", "size"])}
    return {key: group for key, group in groups.items() if group.variant.nunique() > 5}  # those that most were run on


def draw_cohorts(rows: list[dict], path: Path) -> None:
    """A column for each property that is varied, a row for each measure; a line joins the means over seeds."""
    parts = cohorts(rows)
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(len(MEASURES), len(parts), sharex="col", sharey="row")
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
        ax.set_yscale("symlog", linthresh=1)
        ax.set_ylim(bottom=0)
    write_png(path, figure)


def draw_settings(rows: list[dict], path: Path) -> None:
    """A line for each setting, a column for each measure, a dot for each run; the band is what the shipped one reaches."""
    parts = settings(rows)
    names = [name for name in VARIANTS if any((part.variant == name).any() for part in parts.values())]
    figure = Figure(figsize=(10, 1.2 + 0.22 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(MEASURES), sharey=True)
    for ax, (measure, title) in zip(axes, MEASURES.items()):
        for i, ((complexity, size), part) in enumerate(parts.items()):
            shift = 0.5 * ((i + 0.5) / len(parts) - 0.5)  # side by side, so that one doesn't hide the other
            y = [names.index(name) + shift for name in part.variant]
            dots = ax.scatter(part[measure], y, s=14, color=f"C{i}", label=phantom_name(complexity, size))
            shipped = part[part.variant == "default"][measure]
            if len(shipped):
                ax.axvspan(shipped.min(), shipped.max(), color=dots.get_facecolor()[0], alpha=0.2, lw=1)
        ax.set_xlabel(title)
        ax.grid(alpha=0.3)
    for ax in axes[:2]:
        ax.set_xlim(-0.03, 1.03)
    axes[2].set_xscale("symlog", linthresh=1)
    axes[2].set_xlim(left=0)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].set_ylim(max(len(names), 1) - 0.5, -0.5)
    if parts:
        axes[0].legend(title="phantom", fontsize=8)
    write_png(path, figure)


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m scripts.research.plots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", type=Path, default=Path("docs/results/localisation.csv"), help="of the sweep (default %(default)s)")
    p.add_argument("--out", type=Path, default=Path("docs"), help="folder for cohorts.png and settings.png (default %(default)s)")
    args = p.parse_args()
    rows = read_rows(args.results)
    draw_cohorts(rows, args.out / "cohorts.png")
    draw_settings(rows, args.out / "settings.png")


if __name__ == "__main__":
    main()
