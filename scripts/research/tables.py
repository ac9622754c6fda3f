# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The rows that the sweep measures, and the page that is made of them."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from bundle.files import write_text
from bundle.metrics.bootstrap import bootstrap
from bundle.phantoms import PHANTOMS, PhantomParams, phantom_name
from bundle.survival import OBJECTIVES
from scripts.jobs import markdown, spread
from scripts.research.variants import VARIANTS

KEY = ["phantom", "size", "variant", "train_scans", "seed", "test"]
MEASURES = {  # what they are called in tables, in this order, and their digits
    "pointing_game": ("pointing", 3),
    "average_precision": ("AP", 3),
    "average_precision_ceiling": ("AP ceiling", 3),
    "mass_accuracy": ("heat in mask", 3),
    "confounder_mass": ("heat in confounder", 3),
    "survivor_heat": ("survivors / dead", 3),
    "heat_ratio": ("heat ratio", 3),
    "heat_ratio_oracle": ("of true volumes", 3),
    "inverted": ("inverted maps", 0),
    "c_index": ("C-index", 3),
    "c_index_oracle": ("of the oracle", 3),
    "mae_events": ("MAE events, months", 2),
    "integrated_brier": ("integrated Brier", 4),
    "correlation": ("correlation", 3),
    "mean_time_censored": ("mean time of censored", 0),
    "train_seconds": ("training, s", 0),
}
COLUMNS = [*KEY, "test_scans", "device", *MEASURES]

USUAL_SCANS = 100  # to train on
RESERVED = 1010  # seeds kept for the report; those from 1000 to 1009 showed what to improve

# The parts of the page, in this order, and whether the shipped configuration is shown there once more, as measured on the
# same phantoms and seeds of development.
AS_SHIPPED = "As shipped"
SECTIONS = {
    AS_SHIPPED: False,
    "Heads": True,
    "Objectives": True,
    "Single settings": True,
    "Other cohorts": True,
    "Other phantoms than trained on": True,
    "Drawn outcomes": False,
}

HEAD = f"""\
# Maps and months of phantoms

Each run trains one configuration on {USUAL_SCANS} phantoms of one seed, unless another number of scans is given: nine
tenths to train on, one to choose the weights by. It learns from survival times alone, and is measured on 24 phantoms of
another seed; masks serve these numbers only. A cell is the mean over seeds (least–greatest, where they differ). `default`
is the shipped configuration. `scripts/research/variants.py` says what a variant changes and what it is *measured on*.
Phantoms have 64³ voxels (`chest` 107³) unless a size is given. Seeds from {RESERVED} on were kept for the
report; they were seen once while the severity fit was being changed.

- *AP*: average precision; its *ceiling* is that of the mask itself at the map's resolution.
- *Survivors / dead*: heat of survivors over that of those who die.
- *Inverted maps* (summed): scans whose map ranks the lesion below the rest.
- *Heat ratio*: heat per voxel, in `mild-severe` of severe over mild lesions, in `protective-honeycomb` of the honeycomb over
  an even map. *Of true volumes*: the ratio that Cox's regression on the volumes of both kinds finds in the training scans.
- *Of the oracle*: C-index of the true risk.
- Seconds are of trainings on CPUs, with other work beside.

Every run is in [localisation.csv](localisation.csv). Made by `python -m scripts.research.sweep --table`.
"""


@dataclass(frozen=True)
class Target:
    """What the shipped configuration is to reach on phantoms whose outcome isn't drawn."""

    measure: str
    title: str
    how: str  # a function of numpy that puts seeds together
    side: str
    bound: float
    own: dict[str, float] = field(default_factory=dict)  # bounds of single phantoms


TARGETS = [
    Target("pointing_game", "pointing game, mean", "mean", "at least", 0.99),
    Target("pointing_game", "pointing game, worst seed", "min", "at least", 0.95),
    Target("average_precision", "average precision", "mean", "at least", 0.95, {"honeycomb": 0.85}),
    Target("mass_accuracy", "heat in mask", "mean", "at least", 0.90),
    Target("confounder_mass", "heat in confounder", "mean", "at most", 0.02),
    Target("survivor_heat", "survivors / dead", "mean", "at most", 0.02),
    Target("inverted", "inverted maps, all seeds", "sum", "at most", 0),
    Target("mae_events", "MAE events, months", "mean", "at most", 1.0, {"counted-spheres": 2.0}),
    Target("correlation", "correlation", "mean", "at least", 0.95),
    Target("mean_time_censored", "mean time of censored, months", "mean", "at least", 80.0),
    Target("train_seconds", "training, s", "mean", "at most", 300.0),
]

# What the summary of the objectives asks, by measure, and whether more of it is better.
QUESTIONS = {
    "average_precision": ("Best map (average precision)", True),
    "mass_accuracy": ("Most heat in the mask (mass accuracy)", True),
    "c_index": ("Best order of patients (C-index)", True),
    "integrated_brier": ("Best probabilities (integrated Brier)", False),
    "mae_events": ("Best months of those who die (MAE)", False),
}


def usual_size(phantom: str) -> int:
    """Voxels a side, unless another size is asked for."""
    return 107 if phantom == "chest" else PhantomParams.size


def label(phantom: str, size: int) -> str:
    return phantom if size == usual_size(phantom) else f"{phantom}, {size}³"


def read_rows(path: Path) -> pd.DataFrame:
    """The table; phantoms may be named by number, and a row without a size or a device has the usual one."""
    rows = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=KEY)
    rows = rows.rename(columns={"complexity": "phantom"})
    rows["phantom"] = rows.phantom.map(phantom_name)
    rows = rows.reindex(columns=COLUMNS)
    rows["size"] = rows["size"].fillna(rows.phantom.map(usual_size)).astype(int)
    return rows.assign(device=rows.device.astype(object).fillna("cpu"))


def write_rows(path: Path, rows: pd.DataFrame) -> None:
    """Write the whole table, phantoms in their order."""
    rows = in_order(rows.reindex(columns=COLUMNS))
    write_text(path, rows.to_csv(index=False, lineterminator="\n", float_format="%.5g"))


def in_order(rows: pd.DataFrame, by: list[str] = KEY) -> pd.DataFrame:
    place = {name: i for i, name in enumerate(PHANTOMS)}
    return rows.sort_values(by, key=lambda column: column.map(place) if column.name == "phantom" else column, kind="stable")


def section(phantom: str, variant: str, train_scans: int, test: str) -> str:
    """Which of the SECTIONS a row belongs to."""
    differs = VARIANTS.get(variant, {}).keys()
    if PHANTOMS[phantom].drawn_outcome:
        return "Drawn outcomes"
    if test != "same":
        return "Other phantoms than trained on"
    if train_scans != USUAL_SCANS or differs & {"phantoms", "shuffle"}:
        return "Other cohorts"
    if variant in OBJECTIVES:
        return "Objectives"
    if "network_def#head" in differs:
        return "Heads"
    return AS_SHIPPED if variant == "default" else "Single settings"


def numbers(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows in order, with their :func:`section` and whether the seed is reserved; seconds are those on CPUs only."""
    table = in_order(rows.reindex(columns=COLUMNS))
    table[list(MEASURES)] = table[list(MEASURES)].apply(pd.to_numeric)
    table.loc[table.device == "cuda", "train_seconds"] = np.nan  # not to be averaged with those on CPUs
    where = table[["phantom", "variant", "train_scans", "test"]].itertuples(index=False)
    return table.assign(section=[section(*row) for row in where], reserved=table.seed >= RESERVED)


def targets(table: pd.DataFrame) -> str:
    """How many phantoms meet each of the TARGETS and which miss it, with what they reach, by the shipped configuration."""
    table = table[table.section == AS_SHIPPED]
    groups = {(name, size): group for (name, size), group in table.groupby(["phantom", "size"], sort=False)}
    lines = []
    for target in TARGETS:
        met, missed = 0, []
        for (phantom, size), group in groups.items():
            values = group[target.measure]
            if target.measure in ("confounder_mass", "train_seconds"):
                values = values.dropna()  # not every phantom has confounders, not every run was on a CPU
                if values.empty:
                    continue
            # A measure that a run lacks is NaN, which misses any bound.
            bound, value = target.own.get(phantom, target.bound), getattr(np, target.how)(values.to_numpy())
            if value <= bound if target.side == "at most" else value >= bound:
                met += 1
            else:
                missed.append(f"{label(phantom, size)} ({value:.3g})")
        bounds = ", ".join([f"{target.side} {target.bound:g}", *(f"{name}: {b:g}" for name, b in target.own.items())])
        cells = {"measure": target.title, "target": bounds, "met": f"{met} of {met + len(missed)}"}
        lines.append(cells | {"missed on": "; ".join(missed) or "–"})
    seeds = "; ".join(f"{label(*key)} ({len(group)})" for key, group in groups.items())
    return f"Phantoms (seeds): {seeds}.\n\n{markdown(pd.DataFrame(lines))}"


def seeds_name(seeds: pd.Series) -> str:
    """Seeds in short: "0–2, 7" for 0, 1, 2 and 7."""
    seeds = np.array(sorted(seeds))
    runs = np.split(seeds, np.flatnonzero(np.diff(seeds) > 1) + 1)
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def answer(table: pd.DataFrame, measure: str, question: str, more: bool) -> str:
    """Which objective is best by a measure on the phantoms and seeds that all were trained on, and which are as good.

    As good are those whose mean difference from the best has a 95 % bootstrap interval over phantoms and seeds that
    contains 0.
    """
    values = table.pivot_table(measure, ["phantom", "size", "seed"], "variant").dropna()
    if values.empty or values.shape[1] < 2:
        return f"- **{question}**: not measured yet."
    digits = MEASURES[measure][1]
    means = values.mean().sort_values(ascending=not more, kind="stable")
    best, equal, worse = means.index[0], [], []
    for name in means.index[1:]:
        difference = (values[name] - values[best]).to_numpy()
        low, high = bootstrap(len(difference), lambda drawn, d=difference: float(d[drawn].mean()))
        (equal if low <= 0 <= high else worse).append(f"{name} {means[name]:.{digits}f}")
    text = f"- **{question}**: {best} {means[best]:.{digits}f}"
    text += f"; not significantly different: {', '.join(equal)}" if equal else ""
    return text + (f"; worse: {', '.join(worse)}." if worse else ".")


def answers(part: pd.DataFrame) -> str:
    """The QUESTIONS answered, by the rows of the objectives and of the shipped one, which is that of centime."""
    part = part[part["size"].isin(part[part.variant != "default"]["size"])]
    table = part.assign(variant=part.variant.replace("default", "centime"))
    shared = len(table.pivot_table("c_index", ["phantom", "size", "seed"], "variant").dropna())
    lines = [answer(table, measure, *question) for measure, question in QUESTIONS.items()]
    lines.append(f"\nMeans over the {shared} pairs of phantom and seed that every objective was trained on.")
    return "\n".join(lines) + "\n\n"


def page(rows: pd.DataFrame) -> str:
    """What of the targets is met; then, section by section, a line for each phantom and variant."""
    table, text = numbers(rows), HEAD
    for title, part in (("Reserved seeds", table[table.reserved]), ("Seeds of development", table[~table.reserved])):
        text += f"\n## {title}\n\n{targets(part)}" if len(part) else ""
    usual = table[(table.section == AS_SHIPPED) & ~table.reserved]
    for title, beside in SECTIONS.items():
        part = table[table.section == title]
        if part.empty:
            continue
        if beside:
            part = pd.concat([part, usual.merge(part[["phantom", "size"]].drop_duplicates())])
        text += f"\n## {title}\n\n{answers(part) if title == 'Objectives' else ''}{lines_of(part)}"
    return text


def lines_of(part: pd.DataFrame) -> str:
    """The lines of one section: means (least–greatest) over seeds. A column that says nothing there is left out."""
    keys = {"variant": "variant"}
    keys |= {"train_scans": "scans"} if (part.train_scans != USUAL_SCANS).any() else {}
    keys |= {"test": "measured on"} if (part.test != "same").any() else {}
    shown = {name: of for name, of in MEASURES.items() if part[name].notna().any()}
    by = ["phantom", "size", "differs", *keys, "reserved"]
    part = in_order(part.assign(differs=part.variant != "default"), by)  # the shipped configuration first
    lines = []
    for (phantom, size, *_), group in part.groupby(by, sort=False):
        cells = {"phantom": label(phantom, size), **{title: group[key].iloc[0] for key, title in keys.items()}}
        cells["seeds"] = seeds_name(group.seed)
        for name, (title, digits) in shown.items():
            cells[title] = spread(group[name], digits, "sum" if name == "inverted" else "mean")
        lines.append(cells)
    return markdown(pd.DataFrame(lines))
