# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Compare the objectives on phantoms: which gives the best map, which the best prediction?

A sweep over phantoms 1, 2, 6 and 7, all objectives and three seeds, which writes a page of its own.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from bundle.metrics.bootstrap import bootstrap
from bundle.survival import OBJECTIVES

from . import sweep

# The shipped configuration is CenTime's.
VARIANTS = ["default" if name == "centime" else name for name in OBJECTIVES]
MEASURES = {
    "c_index": "C-index",
    "mae_events": "MAE events, months",
    "integrated_brier": "integrated Brier",
    "pointing_game": "pointing",
    "average_precision": "AP",
    "mass_accuracy": "heat in mask",
    "train_seconds": "training, s",
}
DIGITS = {"mae_events": 2, "integrated_brier": 4, "train_seconds": 0}
SCAN = ["complexity", "size", "train_scans", "seed"]
# What the summary asks, by measure, and whether more of it is better.
QUESTIONS = {
    "average_precision": ("Best map (average precision)", True),
    "mass_accuracy": ("Most heat in the mask (mass accuracy)", True),
    "c_index": ("Best order of patients (C-index)", True),
    "integrated_brier": ("Best probabilities (integrated Brier)", False),
    "mae_events": ("Best months of those who die (MAE)", False),
}


def answer(table: pd.DataFrame, measure: str, question: str, more: bool) -> str:
    """Which objective is best by a measure, on the phantoms and seeds that all have, and which can't be told from it.

    Those whose mean difference from the best has a 95 % bootstrap interval over phantoms and seeds that contains 0.
    """
    values = table.pivot_table(measure, SCAN, "variant").dropna()
    if values.empty or values.shape[1] < 2:
        return f"- **{question}**: not measured yet."
    digits = DIGITS.get(measure, 3)
    means = values.mean().sort_values(ascending=not more, kind="stable")
    best, equal, worse = means.index[0], [], []
    for name in means.index[1:]:
        difference = (values[name] - values[best]).to_numpy()
        low, high = bootstrap(len(difference), lambda drawn: float(difference[drawn].mean()))
        (equal if low <= 0 <= high else worse).append(f"{name} {means[name]:.{digits}f}")
    text = f"- **{question}**: {best} {means[best]:.{digits}f}"
    text += f"; not told apart from it: {', '.join(equal)}" if equal else ""
    return text + (f"; worse: {', '.join(worse)}." if worse else ".")


def layout(rows: list[dict]) -> str:
    """The answers, and a line for each phantom and objective: mean over seeds (minimum-maximum)."""
    table = sweep.numbers([row for row in rows if row["test"] == "same"])
    table["variant"] = table.variant.replace("default", "centime")
    objectives = table[table.variant.isin(OBJECTIVES)]
    lines = [answer(objectives, measure, *question) for measure, question in QUESTIONS.items()]
    shared = len(objectives.pivot_table("c_index", SCAN, "variant").dropna())
    lines += ["", f"Means over the {shared} pairs of phantom and seed that every objective was trained on.", ""]
    lines += ["| phantom | objective | seeds | " + " | ".join(MEASURES.values()) + " |", "|" + "---|" * (len(MEASURES) + 3)]
    known = list(OBJECTIVES)
    table["rank"] = [known.index(name) if name in known else len(known) for name in table.variant]
    for (complexity, size, scans, _, variant), group in table.groupby([*SCAN[:3], "rank", "variant"]):
        cells = [sweep.cell(group[name], DIGITS.get(name, 3)) for name in MEASURES]
        lines.append(f"| {sweep.phantom_name(complexity, size)} | {variant} | {len(group)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    sweep.main(
        prog="scripts.research.objectives",
        about=__doc__,
        layout=layout,
        complexities=[1, 2, 6, 7],
        variants=VARIANTS,
        results=Path("docs/results/objectives.csv"),
        page=Path("docs/objectives.md"),
    )


if __name__ == "__main__":
    main()
