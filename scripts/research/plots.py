# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Draw how maps and months depend on the cohort (training scans, events, lesions) and on single settings.

It draws what `scripts.research.sweep` has measured and measures nothing itself: cohorts.png and settings.png.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from bundle.phantoms import PHANTOMS, PhantomParams
from bundle.report.pictures import write_png
from scripts.research.tables import AS_SHIPPED, USUAL_SCANS, label, numbers, read_rows
from scripts.research.variants import VARIANTS

MEASURES = {
    "average_precision": "average precision",
    "mass_accuracy": "heat in the mask",
    "mae_events": "months off, of those who die",
}


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


def measured(rows: pd.DataFrame) -> pd.DataFrame:
    """What was measured, on seeds of development, of phantoms like those trained on whose outcome isn't drawn."""
    table = numbers(rows[rows.test == "same"])
    return table[~table.reserved & ~table.phantom.map(lambda name: PHANTOMS[name].drawn_outcome).astype(bool)]


def cohorts(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """For each property of a cohort that is varied the rows that belong to it, with its value as `x`."""
    table = measured(rows)
    found = {"training scans": table[table.variant == "default"].assign(x=lambda t: t.train_scans)}
    usual = table[table.train_scans == USUAL_SCANS]
    for title, values in varied().items():
        found[title] = usual[usual.variant.isin(values)].assign(x=lambda t, v=values: t.variant.map(v))
    # Phantoms of which only the shipped point is there have no curve.
    curves = {title: part.groupby(["phantom", "size"], sort=False) for title, part in found.items()}
    return {title: groups.filter(lambda group: group.x.nunique() > 1) for title, groups in curves.items()}


def settings(rows: pd.DataFrame) -> dict[tuple[str, int], pd.DataFrame]:
    """By phantom and size the rows of single settings, in the order of VARIANTS, with those of the shipped configuration."""
    table = measured(rows)
    table = table[table.section.isin([AS_SHIPPED, "Single settings"])]
    table = table.assign(place=table.variant.map({name: i for i, name in enumerate(VARIANTS)})).dropna(subset=["place"])
    groups = {key: group.sort_values("place") for key, group in table.groupby(["phantom", "size"], sort=False)}
    return {key: group for key, group in groups.items() if group.variant.nunique() > 5}  # those that most were run on


def draw_cohorts(rows: pd.DataFrame, path: Path) -> None:
    """A column for each property that is varied, a row for each measure; a line joins the means over seeds."""
    parts = cohorts(rows)
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(len(MEASURES), len(parts), sharex="col", sharey="row")
    for column, (title, part) in zip(axes.T, parts.items(), strict=True):
        for ax, measure in zip(column, MEASURES, strict=True):
            for key, group in part.groupby(["phantom", "size"], sort=False):
                mean = group.groupby("x")[measure].mean()
                (line,) = ax.plot(mean.index, mean.to_numpy(), label=label(*key))
                ax.scatter(group.x, group[measure], s=14, color=line.get_color())
            ax.grid(alpha=0.3)
        column[-1].set_xlabel(title)
        if title == "training scans":
            column[-1].set_xscale("log")
            ticks = sorted(part.x.unique())
            column[-1].set_xticks(ticks, [f"{n:.0f}" for n in ticks])
            column[-1].minorticks_off()
        if len(part):
            column[0].legend(title="phantom", fontsize=8)
    for row, (measure, name) in zip(axes, MEASURES.items(), strict=True):
        row[0].set_ylabel(name)
        if measure == "mae_events":
            row[0].set_yscale("symlog", linthresh=1)
            row[0].set_ylim(bottom=0)
        else:
            row[0].set_ylim(0, 1.03)
    write_png(path, figure)


def draw_settings(rows: pd.DataFrame, path: Path) -> None:
    """A line for each setting, a column for each measure, a dot for each run; the band is what the shipped one reaches."""
    parts = settings(rows)
    names = [name for name in VARIANTS if any((part.variant == name).any() for part in parts.values())]
    figure = Figure(figsize=(10, 1.2 + 0.22 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(MEASURES), sharey=True)
    for ax, (measure, title) in zip(axes, MEASURES.items(), strict=True):
        for i, (key, part) in enumerate(parts.items()):
            shift = 0.5 * ((i + 0.5) / len(parts) - 0.5)  # side by side, so that one doesn't hide the other
            y = [names.index(name) + shift for name in part.variant]
            dots = ax.scatter(part[measure], y, s=14, color=f"C{i}", label=label(*key))
            shipped = part[part.variant == "default"][measure]
            if len(shipped):
                ax.axvspan(shipped.min(), shipped.max(), color=dots.get_facecolor()[0], alpha=0.2, lw=1)
        ax.set_xlabel(title)
        ax.grid(alpha=0.3)
        if measure == "mae_events":
            ax.set_xscale("symlog", linthresh=1)
            ax.set_xlim(left=0)
        else:
            ax.set_xlim(-0.03, 1.03)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].set_ylim(max(len(names), 1) - 0.5, -0.5)
    if parts:
        axes[0].legend(title="phantom", fontsize=8)
    write_png(path, figure)


def draw_maps(heat_of_one: Callable[..., tuple[Path, Path, Path]], path: Path, keys: list[tuple]) -> None:
    """A grid of phantoms by variants: one held-out scan each, its lesion outlined, and the heat of the trained maps.

    Args:
        heat_of_one: image, mask of the lesion and heat by a key.
        path: PNG to write.
        keys: phantom, size, variant, training scans and seed of runs.
    """
    phantoms, variants = (list(dict.fromkeys(key[i] for key in keys)) for i in (0, 2))
    shape = len(variants) + 1, len(phantoms)
    figure = Figure(figsize=(1.6 * shape[1], 1.75 * shape[0]), layout="constrained")
    axes = figure.subplots(*shape, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for key in tqdm(keys, desc="pictures"):
        hu, mask, heat = (np.asarray(nib.load(name).dataobj) for name in heat_of_one(*key))
        k = int(mask.sum((0, 1)).argmax())
        scan, *maps = axes[:, phantoms.index(key[0])]
        low, high = PHANTOMS[key[0]].window
        scan.imshow(hu[:, :, k].T, cmap="gray", vmin=low, vmax=high, origin="lower")
        scan.set_title(key[0], fontsize=7)
        ax = maps[variants.index(key[2])]
        top = max(float(np.quantile(heat[heat > 0], 0.99)) if (heat > 0).any() else 0.0, 1e-12)
        ax.imshow(heat[:, :, k].T, cmap="inferno", origin="lower", vmin=0, vmax=top)
        ax.set_title(f"heat, {key[2]}", fontsize=9)
        for panel in (scan, ax):
            panel.contour(mask[:, :, k].T, [0.5], colors="deepskyblue", linewidths=0.7)
    write_png(path, figure, dpi=80)


def main() -> None:
    p = argparse.ArgumentParser(
        prog="python -m scripts.research.plots", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--results", type=Path, default=Path("docs/results/localisation.csv"), help="CSV (default %(default)s)")
    p.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the pictures (default %(default)s)")
    args = p.parse_args()
    rows = read_rows(args.results)
    draw_cohorts(rows, args.out / "cohorts.png")
    draw_settings(rows, args.out / "settings.png")


if __name__ == "__main__":
    main()
