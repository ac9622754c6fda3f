# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import ignite.distributed as idist
import pandas as pd
import pytest
import torch
from ignite.engine import Engine, Events
from markupsafe import escape

from bundle.data import ScanStream
from bundle.errors import InputError
from bundle.handlers import evaluation, report_evaluation
from bundle.handlers.metrics_writer import MetricsWriter, format_metrics_table, merge_tables
from bundle.maps import GridShiftInferer
from bundle.metrics import LocalisationMetric, MapDistribution, SurvivalMetric

from .commands import run
from .conftest import absolute_table

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


def evaluator(output_dir, report: bool = False, stream: ScanStream | None = None) -> Engine:
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
    writer = MetricsWriter(output_dir, {"survival": survival, "localisation": localisation}, stream)
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda _: writer.write())
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
    assert list(metrics) == ["survival", "localisation"]
    assert metrics["survival"]["num_scans"] == NUM and metrics["localisation"]["num_empty_mask"] == 3
    assert metrics["localisation"]["auroc"]["num_scans"] == 3
    assert metrics["survival"]["auc_60m"] == {"value": None, "lower": None, "upper": None, "num_scans": 0}
    rows = pd.read_csv(folder / "metrics_per_scan.csv", dtype=str, keep_default_na=False)
    assert list(rows)[:6] == ["patient_id", "time", "event", "median_months", "mean_months", "death_12m"]
    assert list(rows)[9:11] == ["rmst_60m", "pointing_game"]
    assert rows.patient_id.tolist() == [f"p{i}" for i in range(NUM)]
    assert rows.time[2] == "13" and rows.event[2] == "1" and 0 < float(rows.auroc[2]) <= 1
    assert rows.auroc[1] == "" and rows.num_lesions[1] == "0" and rows.num_lesions[6] == ""
    mean = float((scan(3)["pmf"] * torch.arange(1, 41)).sum())
    assert float(rows.mean_months[3]) == pytest.approx(mean, rel=1e-5)
    curve = pd.read_csv(folder / "survival_curves.csv", index_col="patient_id").loc["p3"]
    assert list(curve.index) == [f"survival_{t}m" for t in range(1, 41)]
    assert curve.tolist() == pytest.approx((1 - scan(3)["pmf"].cumsum(0)).tolist(), abs=1e-6)


def test_tables_join_by_patient_or_by_position():
    left = pd.DataFrame({"patient_id": ["a", "b"], "time": [3.0, None], "x": [None, 1.0]})
    right = pd.DataFrame({"patient_id": ["b", "c"], "time": [5.0, 6.0], "y": [2.0, None]})
    joined = merge_tables([left, right])
    assert list(joined.columns) == ["patient_id", "time", "x", "y"]
    assert joined.fillna(-1).to_numpy().tolist() == [["a", 3, -1, -1], ["b", 5, 1, 2], ["c", 6, -1, -1]]
    unnamed = [pd.DataFrame({"patient_id": [None], **column}) for column in ({"time": [3.0]}, {"y": [1.0]})]
    assert merge_tables(unnamed).to_dict("records") == [{"patient_id": None, "time": 3.0, "y": 1.0}]


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
    assert lines[0] == "survival (32 scans)" and "localisation" in lines and "horizon" not in table
    assert lines[2].split() == ["c_index", "0.812", "0.700", "0.900", "32"]
    assert lines[3].split() == ["auc_60m", "-", "-", "-", "0"]
    assert len({len(line) for line in lines[1:4]}) == 1


def stream_of(*indices: int) -> ScanStream:
    """Scans of which those with an index beyond the last patient's failed."""
    records = [{"patient_id": f"p{i}", "image": f"/secret/p{i}.nii.gz", "time": 5.0 + i, "event": 1} for i in indices]
    stream = ScanStream(records, lambda record: record)
    stream.faults = [(r["patient_id"], f"{r['image']} is torn.") for r in records if r["time"] >= 5 + NUM]
    return stream


def _distributed_run(rank: int, folder: str) -> None:
    # Scan 2 comes to both, as a sampler that pads would have it.
    indices = [[0, 2], [4]] if rank == 0 else [[1, 2, 3, 5, 6]]
    stream = stream_of(*sum(indices, []), *([] if rank == 0 else [NUM]))
    evaluator(f"{folder}/two/{rank}", report=True, stream=stream).run(indices, max_epochs=1)
    with pytest.raises(InputError, match=f"1 of .* scans failed.*p{NUM}.nii.gz is torn"):
        stream.require_all()
    metric = SurvivalMetric()
    if rank == 1:  # all scans of the other one failed
        metric(scan(0)["pmf"][None], scan(0)["outcome"][None], patient_id=["p0"])
    assert metric.table().patient_id.tolist() == ["p0"]


def test_two_processes_write_what_one_does(tmp_path):
    indices = list(range(NUM))
    evaluator(tmp_path / "one", report=True, stream=stream_of(*indices, NUM)).run([indices], max_epochs=1)
    with idist.Parallel(backend="gloo", nproc_per_node=2, start_method="spawn") as parallel:
        parallel.run(_distributed_run, str(tmp_path))
    assert [p.name for p in (tmp_path / "two").iterdir()] == ["0"]
    for name in ("metrics.json", "metrics_per_scan.csv", "report.html", "figures/map_distribution.svg"):
        assert (tmp_path / "two" / "0" / name).read_text() == (tmp_path / "one" / name).read_text()
    assert strict_json(tmp_path / "one" / "metrics.json")["failed"]["scans"] == [
        {"patient_id": f"p{NUM}", "message": f"p{NUM}.nii.gz is torn."}
    ]


def test_an_evaluation_goes_on_where_scans_fail(tiny_cohort, trained, tmp_path, monkeypatch):
    """Of five scans one can't be read, one not predicted, one not scored; the others are, and all are listed."""
    table = absolute_table(tiny_cohort)[:5].assign(patient_id=[f"q{i}" for i in range(5)])
    (tmp_path / "private").mkdir()
    table.loc[1, "image"] = str(tmp_path / "private" / "torn.nii.gz")
    Path(table.image[1]).write_bytes(b"no scan")
    table.to_csv(tmp_path / "c.csv", index=False)
    predict, ceiling, predicted = GridShiftInferer.__call__, evaluation.ceiling_map, []

    def predict_but_q2(self, *args, **kwargs):
        predicted.append(1)
        if len(predicted) == 2:
            raise MemoryError("no more memory")
        return predict(self, *args, **kwargs)

    def ceiling_but_q4(cells, mask, *args):
        if len(predicted) == 4:
            raise RuntimeError("no ceiling")
        return ceiling(cells, mask, *args)

    monkeypatch.setattr(GridShiftInferer, "__call__", predict_but_q2)
    monkeypatch.setattr(evaluation, "ceiling_map", ceiling_but_q4)
    options = {"cohort": str(tmp_path / "c.csv"), "ckpt": str(trained), "output_dir": str(tmp_path / "out"), "shifts": 1}
    with pytest.raises(InputError, match="3 of 5 scans failed, the others are done; the first: .*q1"):
        run("configs/evaluate.json", **options)
    metrics = strict_json(tmp_path / "out" / "metrics.json")
    assert metrics["survival"]["num_scans"] == metrics["localisation"]["num_scans"] == 2
    assert metrics["failed"]["num_scans"] == 3
    said = {scan["patient_id"]: scan["message"] for scan in metrics["failed"]["scans"]}
    assert "torn.nii.gz" in said["q1"] and "private" not in said["q1"]
    assert said["q2"] == "patient q2: MemoryError while predicting: no more memory"
    assert said["q4"] == "patient q4: RuntimeError while scoring: no ceiling"
    rows = pd.read_csv(tmp_path / "out" / "metrics_per_scan.csv", index_col="patient_id")
    assert rows.status.to_dict() == {"q0": "ok", "q1": "failed", "q2": "failed", "q3": "ok", "q4": "failed"}
    assert rows.message.dropna().to_dict() == said and rows.time.notna().all()
    assert rows.median_months.notna().tolist() == (rows.status == "ok").tolist()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "3 failed" in page and all(str(escape(message)) in page for message in said.values())
    predicted.clear()
    run("configs/evaluate.json", on_fault="skip", figures=False, **options)


def test_a_map_of_another_tool_that_is_missing_fails_alone(tiny_cohort, tmp_path):
    for i in range(15):
        shutil.copy(tiny_cohort.parent / f"p{i}_gt.nii.gz", tmp_path / f"p{i}_heat.nii.gz")
    (tmp_path / "p3_heat.nii.gz").write_bytes(b"no map")
    with pytest.raises(InputError, match="2 of 16 scans failed"):
        run("configs/evaluate.json", cohort=str(tiny_cohort), maps_dir=str(tmp_path), output_dir=str(tmp_path / "out"))
    metrics = strict_json(tmp_path / "out" / "metrics.json")
    assert metrics["localisation"]["num_scans"] == 14
    assert [scan["patient_id"] for scan in metrics["failed"]["scans"]] == ["p15", "p3"]
