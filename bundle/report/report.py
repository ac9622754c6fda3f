# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Self-contained HTML pages from the templates beside this file; whatever is put into them is text, never HTML.

A new page is a template that extends `base.html`, and a function here that says what goes into it. `patient.html` is the
part about one scan, `tables.html` has the tables that pages share.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bundle.files import write_atomically
from bundle.metrics.verdict import in_words
from bundle.report.pictures import png, survival_figure

COLUMNS = {
    # of predictions.csv: heading, format
    "median_months": ("median, months", "{:.1f}"),
    "lower_months": ("2.5 %", "{:.0f}"),
    "upper_months": ("97.5 %", "{:.0f}"),
    "death_12m": ("death by 12 months", "{:.1%}"),
    "death_24m": ("24", "{:.1%}"),
    "death_36m": ("36", "{:.1%}"),
    "death_60m": ("60", "{:.1%}"),
    "familiarity": ("familiarity", "{:.2f}"),
}

LONG = ("trained_on", "familiarity", "outcomes")  # of the settings, which nobody reads


def data_uri(picture: bytes) -> str:
    """A PNG as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


PAGES = Environment(
    loader=PackageLoader("bundle.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)
PAGES.globals["COLUMNS"] = COLUMNS
PAGES.filters["data_uri"] = data_uri


def _write(path: str | Path, template: str, **content: Any) -> None:
    """Write a page piece by piece to a temporary name, then rename."""
    page = PAGES.get_template(template).stream(**content)
    write_atomically(path, lambda temporary: page.dump(str(temporary), encoding="utf-8"))


def patient_section(row: dict, pmf: np.ndarray | None = None, **content: Any) -> Markup:
    """The part of a page about one scan.

    Args:
        row: of `predictions.csv`.
        pmf: P(T = 1..tmax months); None for a scan that failed, which needs nothing else.
        content: `picture`, a PNG of :func:`~bundle.report.pictures.heat_figure`; `risk`, P(T <= horizon); `horizon`,
            months; `lung_mask_source`.
    """
    if pmf is not None:
        interval = row["lower_months"], row["upper_months"]
        content["curve"] = png(survival_figure(pmf, row["median_months"], interval))
    return Markup(PAGES.get_template("patient.html").render(row=row, **content))


def write_report(path: str | Path, sections: Iterable[Markup], rows: list[dict], settings: dict) -> None:
    """Write the page about the scans of an inference run.

    Args:
        path: of the HTML file.
        sections: of the scans, from :func:`patient_section`; made one at a time if they come from a generator.
        rows: of `predictions.csv`, for the table on top.
        settings: of the weights.
    """
    shown = {name: value for name, value in settings.items() if name not in LONG}
    _write(path, "inference.html", sections=sections, rows=rows, settings=json.dumps(shown, indent=2), **believed(settings))


def believed(settings: dict) -> dict:
    """What pages say of the training that left weights with these settings: `verdict` in words, and if it is `doubtful`."""
    learnt = settings.get("learnt")
    if learnt is None:
        return {"verdict": "these weights have no record of what their training learnt", "doubtful": True}
    return {"verdict": in_words(learnt), "doubtful": learnt["verdict"] != "yes"}


def write_evaluation_report(
    path: str | Path, metrics: dict, pictures: dict[str, bytes], settings: dict | None = None
) -> None:
    """Write the page about an evaluation.

    Args:
        path: of the HTML file.
        metrics: what `metrics.json` holds.
        pictures: PNGs by the name of their figure in `evaluation.html`.
        settings: of the weights; None for maps of another tool.
    """
    failed = metrics.get("failed", {}).get("scans", [])
    said = believed(settings) if settings else {"verdict": "", "doubtful": False}
    _write(path, "evaluation.html", groups=metric_groups(metrics), pictures=pictures, failed=failed, **said)


def write_implant_test(path: str | Path, **content: Any) -> None:
    """Write the page of `scripts.implant_test`.

    Args:
        path: of the HTML file.
        content: `answer`, a sentence; `sentences`, one for each number of patients and each doubt; `curves` and `examples`,
            PNGs; `tables`, by title a list of rows, each a mapping from heading to text; `found`, the share of the way from
            base rate to ceiling that counts as found; `command`.
    """
    _write(path, "implant_test.html", **content)


class MetricGroup(NamedTuple):
    """One set of metrics as pages and terminals show it."""

    title: str
    counts: list[str]  # such as "32 scans"
    entries: dict[str, dict]  # "value", "lower", "upper" and "num_scans" of each metric


def metric_groups(metrics: Mapping[str, Any]) -> list[MetricGroup]:
    """The sets of metrics of `metrics.json`; its other entries are left out.

    >>> entry = {"value": 0.7, "lower": 0.6, "upper": 0.8, "num_scans": 32}
    >>> metric_groups({"survival": {"c_index": entry, "num_scans": 32}, "horizon": 60})[0].counts
    ['32 scans']
    """
    groups = []
    for title, group in metrics.items():
        if isinstance(group, Mapping):
            entries = {name: entry for name, entry in group.items() if isinstance(entry, Mapping) and "value" in entry}
            numbers = {name: number for name, number in group.items() if isinstance(number, int)}
            counts = [f"{number} {name.removeprefix('num_').replace('_', ' ')}" for name, number in numbers.items()]
            groups.append(MetricGroup(title, counts, entries))
    return [group for group in groups if group.entries]
