# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Figures of a cohort that a survival researcher expects. Data in, figure out.

Where the cohort can't tell (no deaths, one group, nobody followed so far) the figure says so.
All times are months; `event` is 1 for a death, 0 for a censored patient.
"""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from scipy.stats import logrank

from bundle.report.pictures import LUNG_WINDOW, plane
from bundle.survival.kaplan_meier import censored_data, kaplan_meier

HIGH, LOW = "tab:red", "tab:blue"
MANY = 1000  # patients from which on points are pixels in an SVG


def _arrays(*values: ArrayLike) -> list[np.ndarray]:
    return [np.asarray(each, float) for each in values]


def _note(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", color="0.3", wrap=True)


def predicted_against_real(predicted: ArrayLike, time: ArrayLike, event: ArrayLike) -> Figure:
    """Predicted against real time with the line where they are equal; a censored patient is an arrow to later times.

    Args:
        predicted: months, (N,).
        time: months, (N,).
        event: (N,).
    """
    predicted, time, event = _arrays(predicted, time, event)
    died = event == 1
    figure = Figure(figsize=(5, 5), layout="constrained")
    ax = figure.subplots()
    end = 1.08 * max([1.0, *time, *predicted])
    ax.plot([0, end], [0, end], color="0.6", lw=1, ls="--", label="predicted = real")
    style = {"ls": "none", "alpha": 0.7, "rasterized": len(time) > MANY}
    if died.any():
        ax.plot(time[died], predicted[died], "o", ms=5, mew=0, color=HIGH, label=_count("died", died), **style)
    if not died.all():
        arrows = {"xerr": 0.03 * end, "xlolims": True, "fmt": ".", "ms": 4, "lw": 1, "color": LOW}
        ax.errorbar(time[~died], predicted[~died], **arrows, **style)
        ax.plot([], [], ls="none", marker=r"$\rightarrow$", ms=9, color=LOW, label=_count("censored", ~died))
    if not len(time):
        _note(ax, "no patients")
    ax.set(xlabel="real time, months", ylabel="predicted time (median), months")
    ax.set(xlim=(0, end), ylim=(0, end), aspect="equal")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def _count(label: str, mask: np.ndarray) -> str:
    return f"{label} (n = {int(mask.sum())})"


def risk_groups(risk: ArrayLike, num: int) -> np.ndarray:
    """Number of each patient's group by quantiles of risk, (N,), 0 for the lowest; equal risks stay together.

    There are fewer than `num` groups where ties leave some empty.
    """
    risk = np.asarray(risk, float)
    if not len(risk):
        return np.zeros(0, int)
    inner = np.quantile(risk, np.linspace(0, 1, num + 1)[1:-1])
    # Where the most common risk is the largest, no one lies above a quantile: those at it then are the upper group.
    inner = np.where(inner < risk.max(), inner, np.nextafter(risk.max(), -np.inf))
    return np.unique(np.searchsorted(inner, risk), return_inverse=True)[1]


def kaplan_meier_by_risk(risk: ArrayLike, time: ArrayLike, event: ArrayLike) -> Figure:
    """Kaplan-Meier curves of those above and below the median risk.

    With 95 % bands (log-log), p of the log-rank test, and the numbers at risk. A tick on a curve is a censored patient.

    Args:
        risk: grows with danger, (N,).
        time: months, (N,).
        event: (N,).
    """
    risk, time, event = _arrays(risk, time, event)
    group = risk_groups(risk, 2)
    figure = Figure(figsize=(7, 5), layout="constrained")
    ax, below = figure.subplots(2, 1, height_ratios=(6, 1), sharex=True)
    names = ("low risk", "high risk") if group.any() else ("all patients",)
    members = [group == g for g in range(len(names))]
    for name, mask, colour in zip(names, members, (LOW, HIGH)):
        if not mask.any():
            continue
        curve, low, high = _curve_and_band(time[mask], event[mask])
        steps = np.r_[0, curve.quantiles]
        ax.step(steps, np.r_[1, curve.probabilities], where="post", color=colour, label=_count(name, mask))
        band = np.r_[1, low.probabilities], np.r_[1, high.probabilities]
        ax.fill_between(steps, *band, step="post", color=colour, alpha=0.15, lw=0)
        censored = np.unique(time[mask & (event != 1)])
        ax.plot(censored, curve.evaluate(censored), "|", ms=7, color=colour, rasterized=len(censored) > MANY / 10)
    ax.set(ylabel="probability to be alive", xlim=(0, 1.03 * max([1.0, *time])), ylim=(0, 1.05))
    if len(time):
        ax.set_title(_logrank_text(members, time, event), fontsize=10)
        figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)  # never over a curve
    else:
        _note(ax, "no patients")
    ax.tick_params(labelbottom=False)
    ax.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 1.2, 2, 2.4, 3, 6, 10]))
    for row, (mask, colour) in enumerate(zip(members, (LOW, HIGH))):
        for tick in ax.get_xticks():
            if 0 <= tick <= ax.get_xlim()[1]:
                at_risk = int((time[mask] >= tick).sum())
                below.text(tick, row, at_risk, ha="center", va="center", fontsize=9, color=colour)
    below.set(xlabel="months", ylim=(len(names) - 0.4, -0.6), yticks=range(len(names)), yticklabels=names)
    below.set_title("at risk", fontsize=9, loc="left", pad=2)
    below.tick_params(axis="y", left=False, pad=12)
    below.spines[["top", "left", "right"]].set_visible(False)
    return figure


def _curve_and_band(time: np.ndarray, event: np.ndarray) -> tuple:
    """Kaplan-Meier curve and the ends of its 95 % interval (log-log), which are NaN where S is 0 or 1."""
    curve = kaplan_meier(time, event)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        band = curve.confidence_interval(method="log-log")
    return curve, band.low, band.high


def _logrank_text(members: list[np.ndarray], time: np.ndarray, event: np.ndarray) -> str:
    if not (event == 1).any():
        return "no deaths: nothing to compare"
    if len(members) < 2:
        return "all have the same risk: nothing to compare"
    low, high = (censored_data(time[mask], event[mask]) for mask in members)
    with np.errstate(all="ignore"):
        p = float(logrank(low, high).pvalue)
    if not np.isfinite(p):
        return "log-rank: no death while both groups are at risk"
    return "log-rank p < 0.001" if p < 0.001 else f"log-rank p = {p:.3f}"


def calibration(death: Mapping[int, ArrayLike], time: ArrayLike, event: ArrayLike, num_groups: int = 5) -> Figure:
    """Predicted against observed share of deaths by each horizon, in groups of similar predicted risk.

    Observed is 1 - S(horizon) of the group's Kaplan-Meier curve, with its 95 % interval (log-log). A group has at least
    5 patients where the cohort has; one that wasn't followed to the horizon can't be drawn, and is counted.

    Args:
        death: predicted P(T <= horizon), (N,), by horizon in months.
        time: months, (N,).
        event: (N,).
        num_groups: largest number of groups.
    """
    time, event = _arrays(time, event)
    figure = Figure(figsize=(3.6 * len(death), 4.3), layout="constrained")
    for ax, (horizon, predicted) in zip(np.atleast_1d(figure.subplots(1, len(death))), death.items()):
        ax.plot([0, 1], [0, 1], color="0.6", lw=1, ls="--")
        predicted = np.asarray(predicted, float)
        group = risk_groups(predicted, int(np.clip(len(time) // 5, 1, num_groups)))
        points, unknown = [], 0
        for mask in (group == g for g in np.unique(group)):
            curve, low, high = _curve_and_band(time[mask], event[mask])
            if horizon > curve.quantiles[-1] and curve.probabilities[-1] > 0:
                unknown += 1
                continue
            observed, least, most = (1 - side.evaluate(horizon) for side in (curve, high, low))
            points.append((predicted[mask].mean(), observed, observed - least, most - observed))
        if points:
            x, y, down, up = np.nan_to_num(np.array(points).T)
            ax.errorbar(x, y, yerr=np.clip([down, up], 0, 1), fmt="o", ms=6, capsize=2, color=LOW)
        if not len(time):
            _note(ax, "no patients")
        note = f"\n{unknown} of {unknown + len(points)} groups not followed so far" if unknown else ""
        ax.set_title(f"death by {horizon} months{note}", fontsize=10)
        ax.set(xlabel="predicted", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    figure.axes[0].set_ylabel("observed (Kaplan-Meier)")
    return figure


def training_curves(history: pd.DataFrame) -> Figure:
    """Each column of a training's history over its `epoch`: the loss, and the metrics of epochs with a validation.

    Args:
        history: columns `epoch`, `train_loss` and one a metric; empty cells in epochs without a validation; `learnt`,
            the verdict, in the last row.
    """
    columns = [name for name in history.columns if name not in ("epoch", "learnt")]
    figure = Figure(figsize=(6.5, 1.2 + 1.8 * len(columns)), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(columns), 1, sharex=True))
    for ax, name in zip(axes, columns):
        known = history[["epoch", name]].dropna()
        ax.plot(known["epoch"], known[name], marker="o" if len(known) < 30 else None, ms=3, lw=1.2, color=LOW)
        ax.set_ylabel(name.replace("_", " "))
        ax.grid(alpha=0.3)
        if not len(known):
            _note(ax, "no values")
    axes[-1].set_xlabel("epoch")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    if "learnt" in history:
        figure.suptitle(f"learnt: {history['learnt'].iloc[-1]}")
    return figure


def reconstructions(scans: Sequence[tuple[np.ndarray, np.ndarray]], hu_window: Sequence[float]) -> Figure:
    """What a :class:`~bundle.networks.MaskedAutoencoder` told of each scan, in the axial plane with most of the lung.

    Args:
        scans: images (D, H, W), from 0 to 1 over the HU window, and what was found of each, (4, D, H, W).
        hu_window: HU.
    """
    coded = any((found[2] >= 0).any() for _, found in scans)
    titles = ["scan", "what was seen", "what was told", "codes"][: 4 if coded else 3]
    figure = Figure(figsize=(3 * len(titles), 3 * len(scans)), layout="constrained", facecolor="black")
    low, high = hu_window
    for row, (image, found) in zip(figure.subplots(len(scans), len(titles), squeeze=False), scans):
        told, masked, code, _ = found
        k = int((masked > 0).sum((0, 1)).argmax())
        seen, full = np.where(masked > 0, np.nan, image), np.where(masked > 0, told, image)
        shown = [plane(low + (high - low) * volume, 2, k) for volume in (image, seen, full)]
        for ax, picture in zip(row, shown):
            ax.imshow(picture, cmap="gray", vmin=LUNG_WINDOW[0], vmax=LUNG_WINDOW[1])
        if coded:
            numbers = plane(code, 2, k).astype(int)
            colours = np.random.default_rng(0).permutation(code.max().astype(int) + 1)
            kept = np.where(numbers < 0, np.nan, colours[numbers.clip(0)])
            row[3].imshow(kept, cmap="hsv", interpolation="nearest")
        for ax, title in zip(row, titles):
            ax.set_axis_off()
            ax.set_title(title, color="white", fontsize=9)
    return figure


def map_distribution(groups: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> Figure:
    """How locations and weights of the maps are distributed, e.g. inside and outside the lesions.

    Args:
        groups: by label, locations (months) and weights (1: an equal share of the map), each of any length; see
            :class:`~bundle.metrics.MapDistribution`.
    """
    groups = {name: _arrays(*values) for name, values in groups.items() if len(values[0])}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2)
    colours = (HIGH, LOW, "0.4")
    if not groups:
        _note(axes[0], "no maps")
    for ax, values, least in zip(axes, zip(*groups.values()), (None, 1e-3)):
        values = [v if least is None else np.log10(v.clip(least)) for v in values]
        every = np.concatenate(values)
        low, high = every.min(), every.max()
        bins = np.linspace(low, high, 41) if high - low > 1e-6 else np.linspace(low - 1, high + 1, 41)
        for name, v, colour in zip(groups, values, colours):
            count = np.histogram(v, bins)[0]
            ax.stairs(count / count.max(), bins, fill=True, color=colour, alpha=0.2)
            ax.stairs(count / count.max(), bins, color=colour, label=name)
    axes[0].set(xlabel="location, months", ylabel="frequency (highest bin: 1)")
    axes[1].set(xlabel="weight, as a multiple of an equal share")
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[1].xaxis.set_major_formatter(lambda x, _: f"{10.0**x:g}" if x > -3 else "≤ 0.001")
    for ax in axes:
        ax.set_ylim(0, 1.08)
    if groups:
        lines = axes[0].get_legend_handles_labels()
        figure.legend(*lines, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure
