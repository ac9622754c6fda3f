# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import json
import os

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine, Events

from bundle.errors import InputError
from bundle.handlers import report_evaluation
from bundle.handlers.metrics_writer import MetricsWriter, format_metrics_table, merge_rows
from bundle.metrics import LocalisationMetric, MapDistribution, SurvivalMetric

NUM = 7


def scan(index: int) -> dict:
    """One synthetic patient; those with an odd index are censored and have an empty mask, the last has no mask."""
    make = torch.Generator().manual_seed(index)
    mask = torch.zeros(1, 6, 6, 6)
    mask[:, 1:3, 1:3, 1 : 3 + index % 3] = 1 - index % 2
    return {
        "patient_id": f"p{index}",
        "pmf": torch.softmax(torch.randn(40, generator=make), 0),
        "outcome": torch.tensor([5.0 + 4 * index, 1.0 - index % 2]),
        "heat": torch.rand(1, 6, 6, 6, generator=make) + mask,
        "mask": mask if index < NUM - 1 else None,
    }


def evaluator(output_dir, report: bool = False) -> Engine:
    """An engine over scan indices that fills both metrics and writes them, and the report if wanted."""
    survival, localisation = SurvivalMetric(num_resamples=5), LocalisationMetric(num_resamples=5)
    distribution = MapDistribution()

    def step(engine: Engine, indices: list[int]) -> None:
        batch = [scan(i) for i in indices]
        pmf, outcome, heat, mask, names = (
            [item[key] for item in batch] for key in ("pmf", "outcome", "heat", "mask", "patient_id")
        )
        survival(pmf, outcome, patient_id=names)
        localisation(heat, mask, event=[float(o[1]) for o in outcome], patient_id=names)
        distribution([torch.cat([h, h / h.sum()]) for h in heat], [None if m is None else m[0] for m in mask], names)

    engine = Engine(step)
    engine.add_event_handler(Events.EPOCH_STARTED, lambda _: (survival.reset(), localisation.reset()))
    writer = MetricsWriter(output_dir, {"survival": survival, "localisation": localisation}, extra={"horizon": 60})
    writer.attach(engine)
    if report:
        engine.add_event_handler(Events.COMPLETED, lambda _: report_evaluation(output_dir, survival, distribution))
    return engine


def strict_json(path) -> dict:
    def refuse(constant):
        raise AssertionError(f"{constant} in {path}")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_writes_metrics_and_one_row_a_scan(tmp_path):
    folder = tmp_path / "made" / "on demand"
    evaluator(folder).run([[0, 1], [2, 3], [4, 5], [6]], max_epochs=1)
    assert sorted(p.name for p in folder.iterdir()) == ["metrics.json", "metrics_per_scan.csv", "survival_curves.csv"]
    metrics = strict_json(folder / "metrics.json")
    assert list(metrics) == ["horizon", "survival", "localisation"]
    assert metrics["survival"]["num_scans"] == NUM and metrics["localisation"]["num_empty_mask"] == 3
    assert metrics["localisation"]["auroc"]["num_scans"] == 3
    assert metrics["survival"]["auc_60m"] == {"value": None, "lower": None, "upper": None, "num_scans": 0}
    with open(folder / "metrics_per_scan.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:6] == ["patient_id", "time", "event", "median_months", "mean_months", "death_12m"]
    assert list(rows[0])[9:11] == ["rmst_60m", "pointing_game"]
    assert [row["patient_id"] for row in rows] == [f"p{i}" for i in range(NUM)]
    assert rows[2]["time"] == "13" and rows[2]["event"] == "1" and 0 < float(rows[2]["auroc"]) <= 1
    assert rows[1]["auroc"] == "" and rows[1]["num_lesions"] == "0" and rows[6]["num_lesions"] == ""
    mean = float((scan(3)["pmf"] * torch.arange(1, 41)).sum())
    assert float(rows[3]["mean_months"]) == pytest.approx(mean, rel=1e-5)
    with open(folder / "survival_curves.csv", newline="") as file:
        curve = [row for row in csv.DictReader(file) if row["patient_id"] == "p3"][0]
    alive = 1 - scan(3)["pmf"].cumsum(0)
    assert [float(curve[f"survival_{t}m"]) for t in range(1, 41)] == pytest.approx(alive.tolist(), abs=1e-6)


def test_rows_join_by_patient_or_by_position():
    left = [{"patient_id": "a", "time": 3.0, "x": None}, {"patient_id": "b", "time": None, "x": 1.0}]
    right = [{"patient_id": "b", "time": 5.0, "y": 2.0}, {"patient_id": "c", "time": 6.0, "y": None}]
    assert merge_rows([left, right]) == [
        {"patient_id": "a", "time": 3.0, "x": None},
        {"patient_id": "b", "time": 5.0, "x": 1.0, "y": 2.0},
        {"patient_id": "c", "time": 6.0, "y": None},
    ]
    unnamed = [[{"patient_id": None, "time": 3.0}], [{"patient_id": None, "y": 1.0}]]
    assert merge_rows(unnamed) == [{"patient_id": None, "time": 3.0, "y": 1.0}]


def test_a_failed_write_is_one_sentence_and_leaves_the_old_file(tmp_path, monkeypatch):
    evaluator(tmp_path).run([[0, 2]], max_epochs=1)
    before = (tmp_path / "metrics.json").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    engine = evaluator(tmp_path)
    engine.logger.setLevel("CRITICAL")
    with pytest.raises(InputError, match="metrics.json can't be written: No space left on device"):
        engine.run([[0, 1]], max_epochs=1)
    assert (tmp_path / "metrics.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.json", "metrics_per_scan.csv", "survival_curves.csv"]
    monkeypatch.undo()
    engine = evaluator(tmp_path / "metrics.json")
    engine.logger.setLevel("CRITICAL")
    with pytest.raises(InputError, match="expected a folder with room to write"):
        engine.run([[0, 1]], max_epochs=1)


def test_table_shows_values_intervals_counts_and_gaps():
    entry = {"value": 0.81234, "lower": 0.7, "upper": 0.9, "num_scans": 32}
    gap = {"value": None, "lower": None, "upper": None, "num_scans": 0}
    survival = {"c_index": entry, "auc_60m": gap, "num_scans": 32}
    table = format_metrics_table({"horizon": 60, "survival": survival, "localisation": {"froc": entry}})
    lines = table.splitlines()
    assert lines[0] == "survival (scans 32)" and "localisation" in lines and "horizon" not in table
    assert lines[2].split() == ["c_index", "0.812", "0.700", "-", "0.900", "32"]
    assert lines[3].split() == ["auc_60m", "-", "-", "-", "-", "0"]
    assert len({len(line) for line in lines[1:4]}) == 1


def _distributed_run(rank: int, folder: str) -> None:
    # Scan 2 comes to both, as a sampler that pads would have it.
    engine = evaluator(f"{folder}/two/{idist.get_rank()}", report=True)
    engine.run([[0, 2], [4]] if rank == 0 else [[1, 2, 3, 5, 6]], max_epochs=1)


def test_two_processes_write_what_one_does(tmp_path):
    evaluator(tmp_path / "one", report=True).run([list(range(NUM))], max_epochs=1)
    with idist.Parallel(backend="gloo", nproc_per_node=2, start_method="spawn") as parallel:
        parallel.run(_distributed_run, str(tmp_path))
    assert [p.name for p in (tmp_path / "two").iterdir()] == ["0"]
    for name in ("metrics.json", "metrics_per_scan.csv", "report.html", "figures/map_distribution.svg"):
        assert (tmp_path / "two" / "0" / name).read_text() == (tmp_path / "one" / name).read_text()
