# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The page of an implant test: whether the disease would be found, by how many patients, and how sure that is."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bundle.files import write_text
from bundle.report.pictures import LUNG_WINDOW, plane, png
from bundle.report.report import write_page
from bundle.run.codebooks import LEAST_AT_SITE
from scripts.jobs import spread

FOUND = 0.5  # of the way from the base rate to the ceiling
VISIBLE = 0.1  # average precision of the ceiling, at least; and twice the base rate
TOLD = 0.6  # C-index of the oracle, at least
SHOWN = {  # columns of the tables: heading and digits
    "deaths": ("deaths", 0),
    "c_index": ("C-index", 2),
    "c_index_oracle": ("oracle", 2),
    "average_precision": ("AP", 2),
    "ceiling": ("ceiling", 2),
    "base_rate": ("base rate", 3),
    "pointing_game": ("pointing", 2),
}


def reached(rows: pd.DataFrame) -> pd.Series:
    """How far each run's map comes from the base rate, 0, to the ceiling, 1."""
    return (rows.average_precision - rows.base_rate) / (rows.ceiling - rows.base_rate)


def verdict(rows: pd.DataFrame) -> tuple[str, str]:
    """Of the runs of one number of patients: yes, no, unsure or hidden; and a sentence that says so with its numbers."""
    n, found, runs = rows.patients.iloc[0], int((reached(rows) >= FOUND).sum()), len(rows)
    deaths = spread(rows.deaths, 0)
    head = f"With {n} patients ({deaths} deaths)"
    numbers = (
        f"AP {spread(rows.average_precision)} of a ceiling of {spread(rows.ceiling)}, base rate "
        f"{rows.base_rate.mean():.2g}; C-index {spread(rows.c_index)} of at most {spread(rows.c_index_oracle)}; found on "
        f"{found} of {runs} seeds."
    )
    if rows.ceiling.mean() < max(VISIBLE, 2 * rows.base_rate.mean()):
        return "hidden", f"{head} even a classifier shown the masks hardly sees it: {numbers}"
    if found == runs:
        return "yes", f"{head} the map finds it: {numbers}"
    if not found:
        return "no", f"{head} the map does not find it: {numbers}"
    return "unsure", f"{head} it is luck whether the map finds it: {numbers}"


def answer(verdicts: dict[int, str], num_seeds: int) -> str:
    """One sentence: from how many patients on. A number counts if it and all larger ones find it."""
    enough = None
    for n, word in sorted(verdicts.items(), reverse=True):
        if word != "yes":
            break
        enough = n
    most = max(verdicts)
    few = " One seed only: another may say otherwise." if num_seeds < 2 else ""
    if enough is not None:
        less = " Fewer were not tried." if enough == min(verdicts) else ""
        return f"Yes: with {enough} patients the map finds it.{less}{few}"
    if all(word == "hidden" for word in verdicts.values()):
        return (
            f"It can't be told: this disease can hardly be seen in these scans, even by a classifier shown the masks.{few}"
        )
    if "yes" in verdicts.values() or "unsure" in verdicts.values():
        return f"Not surely: up to {most} patients it depends on the seed or the number whether the map finds it.{few}"
    return f"No: with up to {most} patients the map does not find it.{few}"


def doubts(rows: pd.DataFrame, expected: int) -> list[str]:
    """What a reader must know before believing the rest."""
    found = []
    if len(rows) < expected:
        found.append(f"{len(rows)} of {expected} runs are done; the same command goes on.")
    if (oracle := rows.c_index_oracle.mean()) < TOLD:
        found.append(
            f"The times hardly depend on the disease: even its true share orders patients with a C-index of {oracle:.2f} "
            "only. More patients help little; a larger effect or less noise would."
        )
    most = rows.get("most_a_chest", pd.Series(dtype=float)).max()  # runs of earlier versions don't tell
    if most >= LEAST_AT_SITE:
        found.append(
            f"Up to {most:.0f} patients were made of one chest, and training compares them with each other. Real patients "
            "share no chest: they are harder, and more of them may be needed."
        )
    anatomies = {name for names in rows.test_anatomies for name in names.split(", ")}
    if len(anatomies) < 3:
        found.append(f"Measured on {', '.join(sorted(anatomies))} only: few anatomies to speak for others.")
    return found


def draw_curves(rows: pd.DataFrame) -> bytes:
    """C-index and its oracle, AP and its ceiling, by number of patients: a dot a seed, lines through their means."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    maps = {"average_precision": "map", "ceiling": "ceiling: shown the masks", "base_rate": "base rate"}
    panels = {"C-index": {"c_index": "learnt", "c_index_oracle": "oracle: the true share"}, "average precision": maps}
    numbers = sorted(rows.patients.unique())
    for ax, (title, curves) in zip(figure.subplots(1, 2), panels.items()):
        for (name, label), colour, style in zip(curves.items(), ("tab:red", "tab:blue", "0.5"), ("-", "--", ":")):
            mean = rows.groupby("patients")[name].mean()
            ax.plot(mean.index, mean, ls=style, color=colour, label=label)
            ax.plot(rows.patients, rows[name], "o", ms=4, color=colour, alpha=0.6)
        if title == "C-index":
            ax.axhline(0.5, ls=":", color="0.5", label="chance")
        low = min(0.4, rows.c_index.min() - 0.05) if title == "C-index" else 0
        ax.set(xlabel="patients to learn from", ylabel=title, xscale="log", ylim=(low, 1.02))
        ax.set_xticks(numbers, [str(n) for n in numbers])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return png(figure)


def draw_examples(examples: list[tuple[str, Path, Path, Path]]) -> bytes:
    """A row of slices with most disease, each without and with heat, the disease outlined.

    Args:
        examples: for each a title and NIfTI files on one RAS grid: the scan, its disease, its heat.
    """
    figure = Figure(figsize=(4.4 * len(examples), 2.0), layout="constrained", facecolor="black")
    pairs = figure.subplots(1, 2 * len(examples)).reshape(-1, 2)
    for pair, (title, *files) in zip(pairs, examples):
        image, gt, heat = (np.asarray(nib.load(path).dataobj, np.float32) for path in files)
        k = int(gt.sum((0, 1)).argmax())
        for ax in pair:
            ax.imshow(plane(image, 2, k), cmap="gray", vmin=LUNG_WINDOW[0], vmax=LUNG_WINDOW[1])
            ax.set_axis_off()
        shown = plane(heat, 2, k)
        top = max(float(np.quantile(heat[heat > 0], 0.999)) if (heat > 0).any() else 0.0, 1e-12)
        pair[1].imshow(shown, cmap="inferno", vmin=0, vmax=top, alpha=np.clip(2 * shown / top, 0, 0.85))
        for ax in pair:
            ax.contour(plane(gt, 2, k), [0.5], colors="deepskyblue", linewidths=0.8)
        pair[0].set_title(title, color="white", fontsize=9, loc="left")
    return png(figure, dpi=140)


def example_of(out: Path, row) -> tuple[str, Path, Path, Path]:
    """What :func:`draw_examples` needs of a run."""
    folder = out / "runs" / f"{row.patients}_seed{row.seed}"
    implants = folder / "implants"
    scan = pd.read_csv(implants / "example.csv").iloc[0]
    title = f"{row.patients} patients, seed {row.seed}"
    return title, implants / scan.image, implants / scan.gt_mask, folder / "example" / "maps" / f"{row.example}_heat.nii.gz"


def report(out: Path, rows: pd.DataFrame, expected: int, command: str) -> list[str]:
    """Write implant_test.csv and implant_test.html; what they say in sentences, the answer first.

    Args:
        rows: of the runs that are done, at least one.
        expected: how many runs are asked for.
    """
    rows = rows.astype(dict.fromkeys(SHOWN, float))  # what couldn't be measured is NaN
    by_number = [group for _, group in rows.groupby("patients")]
    verdicts = [verdict(group) for group in by_number]
    first = answer({int(g.patients.iloc[0]): word for g, (word, _) in zip(by_number, verdicts)}, rows.seed.nunique())
    sentences = [sentence for _, sentence in verdicts] + doubts(rows, expected)
    means = [
        {"patients": group.patients.iloc[0], "seeds": ", ".join(map(str, group.seed))}
        | {title: spread(group[name], digits) for name, (title, digits) in SHOWN.items()}
        | {"found": f"{int((reached(group) >= FOUND).sum())} of {len(group)}"}
        | {"learnt": ", ".join(group.learnt)}
        for group in by_number
    ]
    runs = [
        {"patients": row.patients, "seed": row.seed, "tested on": f"{row.test_scans} scans of {row.test_anatomies}"}
        | {title: f"{getattr(row, name):.{digits}f}" for name, (title, digits) in SHOWN.items()}
        | {"learnt": row.learnt}
        for row in rows.itertuples()
    ]
    write_text(out / "implant_test.csv", rows.to_csv(index=False, float_format="%.6g"))
    write_page(
        out / "implant_test.html",
        "implant_test.html",
        answer=first,
        sentences=sentences,
        curves=draw_curves(rows),
        examples=draw_examples([example_of(out, row) for row in rows.drop_duplicates("patients").itertuples()]),
        tables={"By number of patients": means, "Every run": runs},
        found=FOUND,
        command=command,
    )
    return [first, *sentences]
