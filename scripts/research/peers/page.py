# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The page of what was measured, and its picture."""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bundle.report.pictures import LUNG_WINDOW, plane, write_png
from scripts.jobs import markdown
from scripts.research.peers.measure import MEASURES

HEAD = """\
# Peers on real chests with implanted disease

Each cohort is real chest CTs, deformed, into which known disease was put (`python -m scripts.make_implants`). Every method
learns from the months and events of the training scans alone, but for the last two, which are given the masks; it is
measured by the same code on test scans of anatomies that no method has seen: {anatomies}.
The oracle's C-index is that of the true share of diseased lung. Of a seed, the smaller cohort is the first scans of the
larger, and the test scans are the same. Every method compares patients within their anatomy alone, as within a site. A
cell is the mean over seeds, with the least and greatest. Made by code and configs {versions} (`version_of` in
`scripts/jobs.py`).

    {command}
"""
NOTES = """
AP, pointing and heat in look-alikes are of diseased scans. Heat in look-alikes: their share of the heat over their share of
the lung. What each peer is given, and how its settings are chosen, is at the top of its file in
`scripts/research/peers/`. The picture scales each map by its own greatest heat in the scan.

![CT, what kills (red), what only looks like it (blue, if the plane has any), and the heat of each method](peers.png)
"""


AIMS = """
A cell says in how many cohorts (disease and seed) the aim was met, then the mean over cohorts with the least and greatest.
A peer is every other method that learns from outcomes. Which is the best differs by cohort, measure, and luck. So the peer
that is best on average is set beside it: chosen once for each measure and number of scans. Heat adds up to the risk of
death within 60 months, so that even a perfect map has heat in the healthy: they die within 60 months {healthy} times
as often as the diseased.
"""
TOLD = {"masked": "the same network's, told the masks", "ceiling": "the ceiling's"}  # learn from masks


def targets(rows: pd.DataFrame) -> pd.DataFrame:
    """What was aimed at, and in how many cohorts of each number of scans it was met."""
    of = rows.set_index(["num", "disease", "seed", "method"])
    table = {name: of[name].unstack("method").astype(float) for name in MEASURES if name in of and name != "fit_seconds"}
    ours = {name: values["ours"] for name, values in table.items()}
    peers = {name: values.drop(columns=["ours", *TOLD], errors="ignore") for name, values in table.items()}
    best = {name: values.max(axis=1) for name, values in peers.items()}
    usual = {name: best_on_average(values.dropna(axis=1)) for name, values in peers.items()}
    c, ap = "c_index_less_oracle", "average_precision"
    aims = [
        ("C-index less the oracle's", {120: -0.06, 300: -0.04}, 1, ours[c]),
        ("C-index less the best peer's", {}, 1, ours[c] - best[c]),
        ("C-index less that of the peer best on average", {}, 1, ours[c] - usual[c]),
        ("AP less the best peer's", {}, 1, ours[ap] - best[ap]),
        ("AP less that of the peer best on average", {}, 1, ours[ap] - usual[ap]),
        *(
            (f"AP over {of_it}", {120: 0.85, 300: 0.9}, 1, ours[ap] / table[ap][method])
            for method, of_it in TOLD.items()
            if method in table[ap]
        ),
        ("pointing", {120: 0.8, 300: 0.8}, 1, ours["pointing_game"]),
        ("heat in look-alikes / their share", {120: 2.0, 300: 2.0}, -1, ours["lookalike_heat"]),
        ("heat of the healthy / of the diseased", {120: 0.3, 300: 0.3}, -1, ours["healthy_heat"]),
    ]
    lines = []
    for name, aim, sign, values in aims:
        line = {"measure": name, "aim": "≥ 0" if not aim else ("≥ " if sign > 0 else "≤ ") + aim_text(aim)}
        for num, part in values.dropna().groupby(level="num"):
            met = f"{int((sign * (part - aim.get(num, 0.0)) >= 0).sum())} of {len(part)}; " if not aim or num in aim else ""
            line[f"{num} scans"] = met + cell(part, 2)
        lines.append(line)
    return pd.DataFrame(lines).fillna("–")


def best_on_average(peers: pd.DataFrame) -> pd.Series:
    """A measure of the peer that has the highest mean, over cohorts of as many scans, in each cohort; NaN without peers."""
    if peers.empty:
        return pd.Series(np.nan, peers.index)
    parts = [part[part.mean().idxmax()] for _, part in peers.groupby(level="num")]
    return pd.concat(parts).loc[peers.index]


def verdicts(rows: pd.DataFrame) -> str:
    """What trainings said that they learnt, with the AP that went with it."""
    own = rows[rows.method == "ours"]
    parts = [f"{v} in {len(p)} (AP {cell(p.average_precision, 2)})" for v, p in own.groupby("learnt", sort=False)]
    return f"Verdict of the training in these {len(own)} cohorts: {', '.join(parts)}.\n"


def aim_text(aim: dict[int, float]) -> str:
    """One number, or one for each number of scans."""
    values = list(dict.fromkeys(aim.values()))
    return f"{values[0]:g}" if len(values) == 1 else "; ".join(f"{value:g} at {num}" for num, value in aim.items())


def cell(values: pd.Series, digits: int, sign: str = "") -> str:
    """The mean, with the least and greatest where they differ; `sign` "+" shows it of numbers above 0, too."""
    values, form = values.dropna(), f"{sign}.{digits}f"
    if values.empty:
        return "–"
    text = f"{values.mean():{form}}"
    return text if values.min() == values.max() else f"{text} ({values.min():{form}} to {values.max():{form}})"


def page(rows: pd.DataFrame, titles: dict[str, str], command: str, anatomies: list[str]) -> str:
    """A table for each disease and number of training scans, a method a row."""
    versions = " and ".join(f"`{version}`" for version in sorted(rows.code.unique()))
    text = [HEAD.format(command=command, anatomies=", ".join(anatomies), versions=versions)]
    if (rows.method == "ours").any():
        healthy = cell(rows[rows.method == "ours"].healthy_deaths, 2)
        aims = AIMS.format(healthy=healthy)
        text.append(f"\n## Survival Map against what was aimed at\n{aims}\n{markdown(targets(rows))}\n{verdicts(rows)}")
    for (disease, num), part in rows.groupby(["disease", "num"], sort=False):
        lines, same = [], part.drop_duplicates("seed")
        for method, title in titles.items():
            own = part[part.method == method]
            if len(own):
                fewer = "" if len(own) == len(same) else f" (seed {', '.join(map(str, sorted(own.seed)))})"
                digits = {name: 0 if name == "fit_seconds" else 2 for name in MEASURES}
                lines.append({"method": title + fewer} | {MEASURES[n]: cell(own[n], digits[n]) for n in MEASURES})
        seeds = ", ".join(map(str, sorted(same.seed)))
        text.append(f"\n## {disease.replace('_', ' ').capitalize()}, {num} training scans\n\nSeeds: {seeds}.")
        text.append(f" {same.test_scans.iloc[0]} test scans, {cell(same.test_diseased, 0)} of them diseased.")
        text.append(f" C-index of the oracle {cell(same.c_index_oracle, 2)},")
        text.append(f" share of the lung that is diseased {cell(same.base_rate, 4)}.\n")
        text.append("\n" + markdown(pd.DataFrame(lines)))
    return "".join(text) + NOTES


def draw(path: Path, planes: dict[str, dict[str, Path]], titles: dict[str, str]) -> None:
    """A row a disease: CT, truth, and the heat of each method, from the planes that were kept."""
    figure = Figure(figsize=(2.2 * (2 + len(titles)), 2.4 * len(planes)), layout="constrained", facecolor="black")
    axes = figure.subplots(len(planes), 2 + len(titles), squeeze=False)
    for line, (disease, files) in zip(axes, planes.items()):
        kept = {method: np.load(file) for method, file in files.items()}
        first = next(iter(kept.values()))
        for ax, name in zip(line, ["CT", "truth", *titles]):
            ax.set_axis_off()
            title = f"{disease.replace('_', ' ')}" if name == "CT" else titles.get(name, name)
            title += " (not measured)" if name in titles and name not in kept else ""
            ax.set_title(title, color="white", fontsize=7, wrap=True)
            ax.imshow(section(first["image"]), cmap="gray", vmin=LUNG_WINDOW[0], vmax=LUNG_WINDOW[1])
            for mask, colour in (("lesion", "red"), ("lookalike", "deepskyblue")):
                if name == "truth" and first[mask].any():
                    ax.contour(section(first[mask]), [0.5], colors=colour, linewidths=0.8)
            if name in kept:
                heat = section(kept[name]["heat"])
                ax.imshow(heat, cmap="autumn", vmin=0, vmax=1, alpha=np.clip(1.5 * heat, 0, 0.8))
    write_png(path, figure)


def section(values: np.ndarray) -> np.ndarray:
    """An axial plane as a picture."""
    return plane(values[:, :, None], 2, 0).astype(float)
