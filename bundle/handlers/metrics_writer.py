# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Write what an evaluation found: `metrics.json`, `metrics_per_scan.csv`, and a table for the terminal."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from monai.metrics.metric import CumulativeIterationMetric

from bundle.files import write_text

__all__ = ["MetricsWriter", "format_metrics_table", "merge_rows"]

FIRST_COLUMNS = ("patient_id", "time", "event", "median_months", "mean_months")


class MetricsWriter:
    """Ignite handler that writes the metrics of an epoch when it is complete.

    ``metrics.json`` holds one object a metric set, e.g. ``{"survival": {"c_index": {"value", "lower", "upper",
    "num_scans"}, ...}, "localisation": {...}}``, with null where there is no value. ``metrics_per_scan.csv`` has one
    row a scan and empty cells where a value was left out. A metric with `curves()`, one dict a scan, adds
    ``survival_curves.csv``.

    In a distributed run all processes gather their scans, and the first one writes.

    Args:
        output_dir: folder for both files; made if it isn't there.
        metrics: names and metrics, such as ``{"survival": SurvivalMetric(), "localisation": LocalisationMetric()}``.
            Each is filled elsewhere and has `aggregate()`, a dict, and `rows()`, one dict a scan.
        extra: further top-level entries of ``metrics.json`` that JSON can hold, such as settings.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        metrics: Mapping[str, CumulativeIterationMetric],
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.metrics = dict(metrics)
        self.extra = dict(extra or {})

    def attach(self, engine: Engine) -> None:
        """Write at the end of every epoch of an evaluator."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        self.write()

    def write(self) -> None:
        """Write the files; called by the engine, or directly where the metrics were filled without one.

        Raises:
            InputError: the folder or a file can't be written; a file that was there before is then as it was.
        """
        for metric in self.metrics.values():
            metric.get_buffer()  # gathers, which every process must take part in
        if idist.get_rank() != 0:
            return
        summary = {**self.extra, **{name: metric.aggregate() for name, metric in self.metrics.items()}}
        rows = merge_rows([metric.rows() for metric in self.metrics.values()])
        curves = [row for metric in self.metrics.values() if hasattr(metric, "curves") for row in metric.curves()]
        texts = {"metrics.json": json.dumps(summary, indent=2, allow_nan=False) + "\n"}
        texts["metrics_per_scan.csv"] = _csv(rows, FIRST_COLUMNS)
        if curves:
            texts["survival_curves.csv"] = _csv(curves, ())
        for name, text in texts.items():
            write_text(self.output_dir / name, text)


def merge_rows(tables: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Join tables of one dict a scan by `patient_id`, or by position for rows without one.

    A later table fills what an earlier one leaves None.
    """
    merged: dict[Any, dict[str, Any]] = {}
    for table in tables:
        for position, row in enumerate(table):
            scan = merged.setdefault(row["patient_id"] or position, {})
            scan.update({name: value for name, value in row.items() if scan.get(name) is None})
    return list(merged.values())


def _csv(rows: list[dict[str, Any]], first: Sequence[str]) -> str:
    """A table whose columns begin with `first`."""
    others = {name: None for row in rows for name in row if name not in first}
    text = io.StringIO()
    writer = csv.DictWriter(text, [*first, *others], lineterminator="\n")
    writer.writeheader()
    # Seven digits: what a float32 holds.
    writer.writerows({k: f"{v:.7g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue()


def format_metrics_table(metrics: Mapping[str, Any]) -> str:
    """A plain-text table of what ``metrics.json`` holds, for the terminal.

    Args:
        metrics: sets of metrics by name; entries that aren't metrics are left out, whole numbers in a set become its
            caption.
    """
    lines = []
    for title, group in metrics.items():
        if not isinstance(group, Mapping):
            continue
        entries = {name: entry for name, entry in group.items() if isinstance(entry, Mapping) and "value" in entry}
        if not entries:
            continue
        counts = [f"{name.removeprefix('num_')} {entry}" for name, entry in group.items() if isinstance(entry, int)]
        width = max(map(len, entries))
        lines += ["", f"{title} ({', '.join(counts)})".replace("_", " ").removesuffix(" ()")]
        lines.append(f"  {'':{width}}  {'value':>8}  {'95 % interval':^19}  {'scans':>5}")
        for name, entry in entries.items():
            value, lower, upper = (_cell(entry[key]) for key in ("value", "lower", "upper"))
            lines.append(f"  {name:{width}}  {value:>8}  {lower:>8} - {upper:>8}  {entry['num_scans']:>5}")
    return "\n".join(lines).lstrip("\n")


def _cell(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"
