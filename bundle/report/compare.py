# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The page and the pictures of a comparison of maps, two a scan."""

from pathlib import Path
from urllib.parse import quote

import numpy as np
from matplotlib.figure import Figure

from bundle.report import viewer
from bundle.report.pictures import PLANES, plane
from bundle.report.report import write_page

# of compare.csv: heading, format
NUMBERS = {
    "rank_correlation": ("rank correlation", "{:.2f}".format),
    "region_dice": ("Dice of regions", "{:.2f}".format),
    "lung_dice": ("Dice of lungs", "{:.2f}".format),
    "difference_months": ("B − A, months", "{:+.1f}".format),
    "risk_a": ("P(death) A", "{:.2f}".format),
    "risk_b": ("P(death) B", "{:.2f}".format),
}
SUMMARY = ("rank_correlation", "region_dice", "lung_dice", "difference_months")


def difference_figure(first: np.ndarray, other: np.ndarray, lungs: np.ndarray, spacing: np.ndarray) -> Figure:
    """Two maps and their difference in the three planes through the voxel where they differ most (A's hottest if nowhere).

    Args:
        first, other: heat per mL, (D, H, W), axes towards right, front, head (RAS).
        lungs: True in the lung of either, outlined; same shape.
        spacing: mm.
    """
    difference = other - first
    where = abs(difference) if difference.any() else first
    at = np.unravel_index(int(where.argmax()), where.shape)
    most = max(float(first.max()), float(other.max()), 1e-12)
    figure = Figure(figsize=(7.5, 7), layout="constrained")
    axes = figure.subplots(3, 3)
    rows = (("A", first, "plasma", 0, most), ("B", other, "plasma", 0, most), ("B − A", difference, "PuOr_r", -most, most))
    for row, (title, volume, colours, low, high) in zip(axes, rows):
        for ax, (name, axis, (left, right, top, bottom)) in zip(row, PLANES):
            across, up = [i for i in range(3) if i != axis]
            lung = plane(lungs, axis, at[axis])
            extent = (0, lung.shape[1] * spacing[across], 0, lung.shape[0] * spacing[up])
            shown = np.where(lung, plane(volume, axis, at[axis]), np.nan)
            image = ax.imshow(shown, cmap=colours, vmin=low, vmax=high, extent=extent)
            if lung.any() and not lung.all():
                ax.contour(lung, [0.5], colors="0.4", linewidths=0.6, extent=extent, origin="upper")
            for x, y, letter in ((0.02, 0.5, left), (0.98, 0.5, right), (0.5, 0.97, top), (0.5, 0.03, bottom)):
                ax.text(x, y, letter, color="0.5", ha="center", va="center", transform=ax.transAxes, fontsize=8)
            ax.set_title(f"{title}, {name}", fontsize=9)
            ax.set_axis_off()
        figure.colorbar(image, ax=row, shrink=0.8, label="per mL").ax.tick_params(labelsize=7)
    return figure


def write_compare_page(folder: str | Path, rows: list[dict], said: list[str]) -> None:
    """Write `compare.html`.

    Args:
        folder: that has `pictures/<patient_id>.png` of each pair that could be compared.
        rows: of `compare.csv`.
        said: sentences on what was compared.
    """
    done = [row for row in rows if row["status"] == "ok"]
    summary = []
    for name in SUMMARY:
        values = [row[name] for row in done if row[name] is not None]
        if values:
            heading, form = NUMBERS[name]
            summary.append((heading, *(form(q) for q in np.quantile(values, [0.5, 0, 1])), len(values)))
    links = [(row, f"pictures/{quote(row['patient_id'], safe='')}.png") for row in done]
    content = {"said": said, "summary": summary, "done": links, "failed": [row for row in rows if row["status"] != "ok"]}
    content |= {"NUMBERS": NUMBERS, "script": viewer.script("listing.js"), "policy": viewer.policy("listing.js")}
    write_page(Path(folder) / "compare.html", "compare.html", **content)
