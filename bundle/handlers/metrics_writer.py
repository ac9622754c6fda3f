# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Write what an evaluation found: `metrics.json`, `metrics_per_scan.csv`, and a table for the terminal."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import pandas as pd

from bundle.data.stream import ScanStream
from bundle.files import write_text
from bundle.handlers.failed import failed_scans, noted_scans
from bundle.metrics import LocalisationMetric
from bundle.metrics.scan_metric import ScanMetric
from bundle.report import metric_groups

FIRST_COLUMNS = ["patient_id", "time", "event", "median_months", "mean_months"]


class MetricsWriter:
    """Write the metrics of an evaluation that is over.

    ``metrics.json`` holds one object a metric set, e.g. ``{"survival": {"c_index": {"value", "lower", "upper",
    "num_scans"}, ...}, "localisation": {...}}``, with null where there is no value. ``metrics_per_scan.csv`` has one
    row a scan and empty cells where a value was left out. A metric with `curves()`, one row a scan, adds
    ``survival_curves.csv``.

    With a `stream`, the scans that failed are in both: ``"failed": {"num_scans", "scans": [{"patient_id", "message"},
    ...]}``, and the columns `status` (ok or failed) and `message`.

    In a distributed run all processes gather their scans, and the first one writes while the others wait.

    Args:
        output_dir: folder for the files; made if it isn't there.
        metrics: names and metrics, such as ``{"survival": SurvivalMetric(), "localisation": LocalisationMetric()}``.
        stream: of the scans; knows which failed.
        explanations: localisation of each kind of explanation, which goes to ``"explanations"``; a scan's scores are in
            columns ``<name>_<score>``.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        metrics: Mapping[str, ScanMetric],
        stream: ScanStream | None = None,
        explanations: Mapping[str, LocalisationMetric] | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.metrics = dict(metrics)
        self.explanations = explanations or {}
        self.stream = stream

    def write(self) -> None:
        """Write the files. Every process must call this.

        Raises:
            InputError: the folder or a file can't be written; a file that was there before is then as it was.
        """
        failed = None if self.stream is None else failed_scans(self.stream)
        notes = {} if self.stream is None else noted_scans(self.stream)
        for metric in (*self.metrics.values(), *self.explanations.values()):
            metric.get_buffer()  # gathers, which every process must take part in
        if idist.get_rank() == 0:
            self._write_files(failed, notes)
        idist.barrier()  # a process that ends with an error, because a scan failed, ends the others

    def _write_files(self, failed: list[dict] | None, notes: Mapping[str, str]) -> None:
        summary: dict[str, Any] = {name: metric.aggregate() for name, metric in self.metrics.items()}
        tables = [metric.table() for metric in self.metrics.values()]
        if self.explanations:
            summary["explanations"] = {name: metric.aggregate() for name, metric in self.explanations.items()}
        for name, metric in self.explanations.items():
            scores = metric.table().set_index("patient_id")[list(metric.SCORES)].dropna(axis=1, how="all")
            tables.append(scores.add_prefix(f"{name}_").reset_index())
        table = merge_tables(tables)
        if failed is not None:
            named = [{"patient_id": row["patient_id"], "message": row["message"]} for row in failed]
            summary["failed"] = {"num_scans": len(failed), "scans": named}
            table = table.assign(status="ok", message=table["patient_id"].map(notes).fillna(""))
            table = pd.concat([table, pd.DataFrame(failed)]) if failed else table
        table = table.reindex(columns=[*FIRST_COLUMNS, *table.columns.drop(FIRST_COLUMNS, errors="ignore")])
        texts = {"metrics.json": json.dumps(summary, indent=2, allow_nan=False) + "\n"}
        texts["metrics_per_scan.csv"] = _csv(table)
        curves = [metric.curves() for metric in self.metrics.values() if hasattr(metric, "curves")]
        if curves:
            texts["survival_curves.csv"] = _csv(pd.concat(curves))
        for name, text in texts.items():
            write_text(self.output_dir / name, text)


def merge_tables(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Join tables of one row a scan by `patient_id`, or by position for rows without one.

    A later table fills what an earlier one leaves empty.

    >>> left = pd.DataFrame({"patient_id": ["a", "b"], "time": [3.0, None]})
    >>> merge_tables([left, pd.DataFrame({"patient_id": ["b"], "time": [5.0], "auroc": [0.9]})])
      patient_id  time  auroc
    0          a   3.0    NaN
    1          b   5.0    0.9
    """
    rows = pd.concat(tables)
    scan = np.where(rows["patient_id"].isna(), rows.index, rows["patient_id"])
    return rows.groupby(scan, sort=False).first().reset_index(drop=True)


def _csv(table: pd.DataFrame) -> str:
    """With seven digits: what a float32 holds."""
    return table.to_csv(index=False, float_format="%.7g", lineterminator="\n")


def format_metrics_table(metrics: Mapping[str, Any]) -> str:
    """A plain-text table of what ``metrics.json`` holds, for the terminal.

    >>> entry = {"value": 0.8123, "lower": 0.7, "upper": None, "num_scans": 32}
    >>> print(format_metrics_table({"survival": {"c_index": entry, "num_scans": 32}}))
    survival (32 scans)
             value  2.5 %  97.5 %  scans
    c_index  0.812  0.700       -     32
    """
    tables = []
    for title, counts, entries in metric_groups(metrics):
        columns = {"value": "value", "lower": "2.5 %", "upper": "97.5 %", "num_scans": "scans"}
        table = pd.DataFrame.from_dict(entries, orient="index", columns=list(columns)).rename(columns=columns)
        table = table.astype({"value": float, "2.5 %": float, "97.5 %": float})
        heading = f"{title} ({', '.join(counts)})".removesuffix(" ()")
        tables.append(heading + "\n" + table.to_string(float_format="%.3f", na_rep="-"))
    return "\n\n".join(tables)
