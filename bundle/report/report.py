# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page about the scans of an inference run, or about an evaluation."""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path

from bundle.files import write_text
from bundle.report.pictures import png, survival_figure

__all__ = ["failed_section", "patient_section", "write_evaluation_report", "write_report"]

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; height: auto; border-radius: 6px; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #8884; }
td:first-child, th:first-child { text-align: left; }
section { margin: 2.5rem 0; break-inside: avoid; } .failed { color: #c33; } .note { opacity: .75; }
"""

COLUMNS = {
    "median_months": ("median, months", "{:.1f}"),
    "lower_months": ("2.5 %", "{:.0f}"),
    "upper_months": ("97.5 %", "{:.0f}"),
    "death_12m": ("death by 12 months", "{:.1%}"),
    "death_24m": ("24", "{:.1%}"),
    "death_36m": ("36", "{:.1%}"),
    "death_60m": ("60", "{:.1%}"),
}


FIGURES = {
    # name: heading, note
    "predicted_against_real": (
        "Predicted against real time",
        "An arrow is a censored patient, last seen alive at that time: death comes later, so an arrow above the line "
        "is no error.",
    ),
    "kaplan_meier_by_risk": (
        "Kaplan-Meier curves by risk",
        "Those above and below the median predicted risk (minus the mean predicted time), with 95 % bands. A tick is a "
        "censored patient.",
    ),
    "calibration": (
        "Calibration",
        "Share of deaths predicted and observed, in groups of similar predicted risk, with 95 % intervals (none where "
        "nobody or everybody died).",
    ),
    "map_distribution": (
        "Locations and weights",
        "How they are distributed over the cells of the maps. Every scan counts the same.",
    ),
    "training_curves": (
        "Training",
        "Loss of each epoch, and metrics of its validation, in the training that left these weights.",
    ),
}


def picture(content: bytes, text: str) -> str:
    """An <img> that holds its PNG."""
    data = base64.b64encode(content).decode()
    return f'<img alt="{escape(text, quote=True)}" src="data:image/png;base64,{data}">'


def table(rows: list[dict]) -> str:
    head = "<tr><th>scan</th>" + "".join(f"<th>{label}</th>" for label, _ in COLUMNS.values()) + "</tr>"
    lines = []
    for row in rows:
        name = escape(row["patient_id"])
        if row["status"] == "ok":
            cells = "".join(f"<td>{form.format(row[key])}</td>" for key, (_, form) in COLUMNS.items())
        else:
            cells = f'<td class="failed" colspan="{len(COLUMNS)}">failed</td>'
        lines.append(f'<tr><td><a href="#{escape(name, quote=True)}">{name}</a></td>{cells}</tr>')
    return f"<table>{head}{''.join(lines)}</table>"


def patient_section(patient: dict) -> str:
    """HTML about one scan.

    Args:
        patient: `patient_id`; `picture`, a PNG of :func:`~bundle.report.pictures.heat_figure`; `pmf`,
            P(T = 1..tmax months); `risk`, P(T <= horizon); `horizon` (months); `row` of `predictions.csv`;
            `lung_mask_source`.
    """
    row, name = patient["row"], escape(patient["patient_id"])
    imputed = f"; {escape(row['message'])}" if row["message"] else ""
    curve = survival_figure(patient["pmf"], row["median_months"], (row["lower_months"], row["upper_months"]))
    return (
        f'<section id="{escape(name, quote=True)}"><h2>{name}</h2>{table([row])}'
        f'<p class="note">lung mask: {escape(patient["lung_mask_source"])}; the heat sums to {patient["risk"]:.3f}, '
        f"the risk of death by {patient['horizon']} months{imputed}</p>"
        f"<p>{picture(patient['picture'], 'heat over the CT in three planes')}</p>"
        f"<p>{picture(png(curve), 'survival curve')}</p></section>"
    )


def failed_section(patient_id: str, message: str) -> str:
    """HTML about a scan without a prediction."""
    name = escape(patient_id)
    return f'<section id="{escape(name, quote=True)}"><h2>{name}</h2><p class="failed">{escape(message)}</p></section>'


def write_report(path: str | Path, sections: list[str], rows: list[dict], settings: dict) -> None:
    """Write the page to a temporary name, then rename.

    Args:
        path: of the HTML file.
        sections: of the scans, from :func:`patient_section` and :func:`failed_section`.
        rows: of `predictions.csv`, for the table on top.
        settings: of the weights.
    """
    shown = {k: v for k, v in settings.items() if k != "trained_on"}
    body = (
        "<p>Heat is the share of the patient's risk of death by the horizon that a voxel carries: it adds up to that "
        "risk over the lung, and can be compared between patients. Each picture is scaled to its own hottest voxel; "
        "see the bar beside it.</p>"
        f"{table(rows)}{''.join(sections)}"
        f"<details><summary>Settings of the model</summary><pre>{escape(json.dumps(shown, indent=2))}</pre></details>"
    )
    _write_page(Path(path), "Survival Map report", body)


def write_evaluation_report(path: str | Path, metrics: dict, pictures: dict[str, bytes]) -> None:
    """Write the page about an evaluation to a temporary name, then rename.

    Args:
        path: of the HTML file.
        metrics: what `metrics.json` holds.
        pictures: PNGs by their name in FIGURES, in the order to show them.
    """
    figures = "".join(figure_section(*item) for item in pictures.items())
    tables = "".join(metric_table(title, group) for title, group in metrics.items() if isinstance(group, dict))
    _write_page(Path(path), "Survival Map evaluation", figures + tables)


def figure_section(name: str, content: bytes) -> str:
    """HTML about one of FIGURES, from its PNG."""
    title, note = FIGURES[name]
    return f'<section><h2>{title}</h2><p>{picture(content, title)}</p><p class="note">{note}</p></section>'


def metric_table(title: str, group: dict) -> str:
    """One set of metrics with their 95 % bootstrap intervals; a dash where there is no value."""

    def cells(entry: dict) -> str:
        values = ("–" if entry[key] is None else f"{entry[key]:.3f}" for key in ("value", "lower", "upper"))
        return "".join(f"<td>{value}</td>" for value in (*values, entry["num_scans"]))

    entries = {name: entry for name, entry in group.items() if isinstance(entry, dict)}
    numbers = {k.removeprefix("num_").replace("_", " "): v for k, v in group.items() if isinstance(v, int)}
    counts = ", ".join(f"{number} {what}" for what, number in numbers.items())
    head = "<tr><th>metric</th><th>value</th><th>2.5 %</th><th>97.5 %</th><th>scans</th></tr>"
    rows = "".join(f"<tr><td>{escape(name)}</td>{cells(entry)}</tr>" for name, entry in entries.items())
    return (
        f'<section><h2>{escape(title.capitalize())}</h2><p class="note">{escape(counts)}</p>'
        f"<table>{head}{rows}</table></section>"
    )


def _write_page(path: Path, title: str, body: str) -> None:
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>'
        f"<h1>{title}</h1><p><b>Research use only, not for diagnosis or treatment.</b></p>"
        f"{body}</body></html>\n"
    )
    write_text(path, page)
