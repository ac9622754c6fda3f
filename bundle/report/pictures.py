# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Pictures of one patient: the heat over the CT in three planes."""

import io
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from bundle.files import write_atomically

LUNG_WINDOW = (-1350.0, 150.0)  # HU
PLANES = (("axial", 2, "RLAP"), ("coronal", 1, "RLSI"), ("sagittal", 0, "APSI"))


def plane(volume: np.ndarray, axis: int, index: int) -> np.ndarray:
    """One plane of a RAS volume (D, H, W) as rows and columns of a picture in radiological convention.

    Axial (axis 2) and coronal (1): the patient's right is on the left. Sagittal (0): front on the left. Front (axial) or
    head (others) is at the top.
    """
    section = np.take(volume, index, axis=axis)
    # axes of `section` run right and front (axial), right and head (coronal), front and head (sagittal): all reversed
    return section[::-1, ::-1].T


def heat_colours() -> np.ndarray:
    """Red, green, blue and opacity (0 to 1) of 256 steps of heat, (256, 4), none to the hottest.

    Autumn-like, with an opacity that grows with heat, so that the lung stays visible where there is none.
    """
    ramp = np.linspace(0, 1, 256)
    colours = np.stack([np.ones(256), 0.15 + 0.8 * ramp**1.2, 0.1 * np.ones(256), np.minimum(1, 1.6 * ramp) * 0.75], 1)
    colours[0, 3] = 0
    return colours


def heat_figure(
    image: np.ndarray, heat: np.ndarray, spacing: tuple[float, float, float], horizon: int = 60, doubt: str = ""
) -> Figure:
    """Heat over the CT in the three planes through its hottest voxel (the centre of a map without heat).

    Args:
        image: HU, (D, H, W), axes towards right, front, head (RAS).
        heat: share of the risk of death by the horizon in each voxel, same shape.
        spacing: mm.
        horizon: months, for the label.
        doubt: why the map may mean nothing, to stand on its face.
    """
    density = heat / (np.prod(spacing) / 1000.0)
    peak = np.array(np.unravel_index(int(heat.argmax()), heat.shape)) if heat.max() > 0 else np.array(heat.shape) // 2
    figure = Figure(figsize=(11, 4.2), facecolor="black", layout="constrained")
    axes = figure.subplots(1, 3)
    for ax, (name, axis, letters) in zip(axes, PLANES):
        index = int(peak[axis])
        first, second = [i for i in range(3) if i != axis]
        extent = (0, image.shape[first] * spacing[first], 0, image.shape[second] * spacing[second])
        ax.imshow(plane(image, axis, index), cmap="gray", vmin=LUNG_WINDOW[0], vmax=LUNG_WINDOW[1], extent=extent)
        shown = ax.imshow(
            plane(density, axis, index),
            cmap=ListedColormap(heat_colours()),
            vmin=0,
            vmax=max(float(density.max()), 1e-9),
            extent=extent,
            interpolation="bilinear",
        )
        across, up = (image.shape[first] - peak[first] - 0.5) * spacing[first], (peak[second] + 0.5) * spacing[second]
        ax.axvline(across, color="white", lw=0.4, alpha=0.5)
        ax.axhline(up, color="white", lw=0.4, alpha=0.5)
        left, right, top, bottom = letters
        for x, y, letter in ((0.02, 0.5, left), (0.98, 0.5, right), (0.5, 0.97, top), (0.5, 0.03, bottom)):
            text = ax.text(x, y, letter, color="white", ha="center", va="center", transform=ax.transAxes, fontsize=9)
            text.set_path_effects([withStroke(linewidth=2, foreground="black")])  # on bright voxels too
        ax.set_title(name, color="white", fontsize=10)
        ax.set_axis_off()
    bar = figure.colorbar(shown, ax=axes, shrink=0.8, pad=0.01)
    bar.ax.set_facecolor("black")
    bar.set_label(f"share of the {horizon}-month risk of death per mL", color="white", fontsize=9)
    bar.ax.tick_params(colors="white", labelsize=8)
    if doubt:
        figure.suptitle(textwrap.fill(f"Don't rely on this map: {doubt}.", 130), color="#ffb000", fontsize=10)
    return figure


def png(figure: Figure, dpi: int = 90) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, dpi=dpi, format="png", facecolor=figure.get_facecolor())
    return buffer.getvalue()


def write_png(path: Path, figure: Figure, dpi: int = 90) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_bytes(png(figure, dpi)))


def svg(figure: Figure) -> bytes:
    """A figure as SVG with its text as text; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "survival map", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
