# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What was measured, as a CSV, as tables in a page, and as a picture."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from bundle.errors import InputError
from bundle.explain import EXPLAINERS
from bundle.files import write_text
from bundle.metrics.faithfulness import agreement
from bundle.phantoms import PHANTOMS
from bundle.report.pictures import LUNG_WINDOW, plane, write_png
from scripts.jobs import markdown
from scripts.research.explanations.measure import NOISE, TRUTH, mean

BEGIN, END = "<!-- measured -->", "<!-- end of what is measured -->"  # in the page, around what is replaced
MEASURES = {  # their columns in the page, and their digits
    "average_precision": ("AP ↑", 2),
    "pointing_game": ("pointing ↑", 2),
    "deletion": ("deletion ↓", 2),
    "insertion": ("insertion ↑", 2),
    "comprehensiveness": ("comprehensive ↑", 2),
    "sufficiency": ("sufficiency ↓", 2),
    "random_weights": ("random weights ↓", 2),
    "random_labels": ("random labels ↓", 2),
    "seeds": ("seeds ↑", 2),
    "shift": ("shift ↑", 2),
    "completeness_error": ("sum off ↓", 2),
    "seconds": ("s", 2),
}
COLUMNS = 12  # of the picture
PICTURED = ("spheres-honeycomb", "fibrosis")  # where they were measured, else the first phantom and the first implant


def write_results(table: Path, page: Path, files: list[tuple[Path, Path]]) -> None:
    """Write the CSV, the tables of the page and its picture, from results: rows and maps of each cohort and seed.

    Raises:
        InputError: the page has no place for tables.
    """
    before, after = around(page)
    rows = pd.DataFrame([row for record, _ in files for row in json.loads(record.read_text())])
    rows = rows.merge(repeatability(files), how="left", on=["cohort", "seed", "method"])
    first = ["cohort", "seed", "method", "scans", *MEASURES]
    rows = rows.reindex(columns=[*first, *(name for name in rows.columns if name not in first)])
    write_text(table, rows.to_csv(index=False, lineterminator="\n", float_format="%.4g"))
    write_text(page, f"{before}{BEGIN}\n{tables(rows)}\n{END}{after}")
    files = sorted(files, key=lambda each: cohort_of(each[0]) not in PICTURED)  # keeps the order of the rest
    shown = {cohort_of(record) in PHANTOMS: maps for record, maps in reversed(files)}
    draw(page.with_suffix(".png"), [shown[kind] for kind in (True, False) if kind in shown])


def around(page: Path) -> tuple[str, str]:
    """The text of a page before and after what is measured."""
    text = page.read_text() if page.is_file() else ""
    if not 0 <= text.find(BEGIN) < text.find(END):
        raise InputError(f"{page} has no lines {BEGIN} and {END} (expected around its tables).")
    return text[: text.index(BEGIN)], text[text.index(END) + len(END) :]


def cohort_of(record: Path) -> str:
    return record.stem.rsplit("_", 1)[0]


def repeatability(files: list[tuple[Path, Path]]) -> pd.DataFrame:
    """`seeds`: the mean rank correlation of the maps of one seed with those of the others, of the same scans."""
    maps: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    for record, file in files:
        cohort, seed = record.stem.rsplit("_", 1)
        maps.setdefault(cohort, {})[int(seed)] = dict(np.load(file))
    found: dict[tuple, list] = {}
    for cohort, seeds in maps.items():
        for one, other in combinations(seeds, 2):
            for key in seeds[one]:
                method, _, number = key.rpartition("/")
                if number.isdigit() and key in seeds[other]:
                    value = agreement(*(torch.from_numpy(seeds[seed][key]) for seed in (one, other)))
                    for seed in (one, other):
                        found.setdefault((cohort, seed, method), []).append(np.nan if value is None else value)
    rows = [(*key, mean(values)) for key, values in found.items() if key[2] not in (TRUTH, NOISE)]
    return pd.DataFrame(rows, columns=["cohort", "seed", "method", "seeds"])


def tables(rows: pd.DataFrame) -> str:
    """Means over phantoms, means over implants, and average precision by method and cohort."""
    text, order = "", one_level(list(dict.fromkeys(rows.method)))
    for title, part in (("phantoms", rows[rows.cohort.isin(PHANTOMS)]), ("implants", rows[~rows.cohort.isin(PHANTOMS)])):
        if part.empty:
            continue
        seeds = part.groupby("cohort", sort=False).seed.nunique()
        names = ", ".join(f"{name} ({number})" for name, number in seeds.items())
        text += f"\n**Means over {title}.** Seeds: {names}. ± is the standard deviation over seeds, mean over {title}.\n\n"
        own, lines = one_level(list(part.method.unique())), []
        for method in own:
            by_cohort = part[part.method == method].groupby("cohort")[list(MEASURES)].agg(["mean", "std"])
            cells = {name: cell(by_cohort[key], digits) for key, (name, digits) in MEASURES.items()}
            lines.append({"method": method, **cells})
        text += markdown(pd.DataFrame(lines))
    by_cohort = rows.pivot_table("average_precision", "method", "cohort", sort=False).reindex(order)
    by_cohort = by_cohort.map(lambda value: "–" if np.isnan(value) else f"{value:.2f}")
    return f"{text}\n**Average precision** by cohort, means over seeds:\n\n{markdown(by_cohort.reset_index())}"


def one_level(methods: list[str]) -> list[str]:
    """Of the levels of a method only the transformer's output, where it has one, else the last."""
    found: dict[str, str] = {}
    for name in methods:
        base = max((key for key in EXPLAINERS if name == key or name.startswith(f"{key}_")), key=len, default=name)
        if not found.get(base, "").endswith("_output"):
            found[base] = name
    return list(found.values())


def cell(by_cohort: pd.DataFrame, digits: int) -> str:
    """Means of the columns mean and std, of which the latter is over seeds; None of them where there are none."""
    value, spread = by_cohort["mean"].mean(), by_cohort["std"].mean()
    if np.isnan(value):
        return "–"
    return f"{value:.{digits}f}" + ("" if np.isnan(spread) else f"±{spread:.{digits}f}")


def draw(path: Path, files: list[Path]) -> None:
    """One scan of each file: the CT with the truth, and the map of every method with the truth's outline."""
    planes = [{name[8:]: x for name, x in np.load(file).items() if name.startswith("picture/")} for file in files]
    lines = [-(-(len(each) - 1) // COLUMNS) for each in planes]  # the truth has no panel of its own
    figure = Figure(figsize=(1.6 * COLUMNS, 1.85 * sum(lines)), layout="constrained", facecolor="black")
    axes = list(figure.subplots(sum(lines), COLUMNS, squeeze=False).flat)
    for ax in axes:
        ax.set_axis_off()
    for each, start in zip(planes, np.cumsum([0, *lines[:-1]]) * COLUMNS):
        lesion = section(each.pop("lesion"))[..., 0] > 0
        lung = next(section(values)[..., 0] for name, values in each.items() if name.startswith("norm_")) > 0
        for ax, (name, values) in zip(axes[start:], each.items()):
            ax.set_title("CT and truth" if name == "image" else name, color="white", fontsize=8)
            shown = section(values)
            if name == "image":
                low, high = ((hu + 1000) / 1200 for hu in LUNG_WINDOW)
                ax.imshow(shown[..., 0], cmap="gray", vmin=low, vmax=high)
            elif shown.shape[2] == 3:
                ax.imshow(shown)
            else:
                low, high = np.percentile(shown[lung], [1, 99.5])
                inside = np.where(lung, shown[..., 0], np.nan)
                ax.imshow(inside, cmap="inferno", vmin=low, vmax=max(high, low + 1e-12))
            ax.contour(lesion, [0.5], colors="#00c8ff", linewidths=0.7)
    write_png(path, figure)


def section(values: np.ndarray) -> np.ndarray:
    """A plane (C, D, H) as a picture, with its channels last."""
    return np.stack([plane(channel[:, :, None].astype(np.float32), 2, 0) for channel in values], -1)
