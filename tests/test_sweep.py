# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The sweep runs nothing twice, loses nothing when killed, and its table says what its CSV says."""

from __future__ import annotations

import csv

import pytest

from scripts import sweep


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- table -->\nold\n<!-- end of table -->\nafter\n")
    return path


def command(tmp_path, *args):
    where = ["--results", str(tmp_path / "results.csv"), "--page", str(tmp_path / "page.md")]
    return ["sweep", *where, *args]


def test_a_killed_sweep_goes_on_and_runs_nothing_twice(tmp_path, page, monkeypatch):
    ran = []

    def one_run(complexity, variant, train_scans, seed, args):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append((complexity, seed))
        row = {"complexity": complexity, "variant": variant, "train_scans": train_scans, "seed": seed, "overrides": "{}"}
        row |= {"test_scans": 8, "train_seconds": 60 + seed, "pointing_game": 0.9 + seed / 10, "inverted": seed}
        return row | {"average_precision": 0.5, "mae_events": 1.0}

    monkeypatch.setattr(sweep, "one_run", one_run)
    monkeypatch.setattr("sys.argv", command(tmp_path, "--complexities", "10", "2", "--seeds", "0", "1"))
    with pytest.raises(KeyboardInterrupt):
        sweep.main()
    first, ran[:] = list(ran), []
    sweep.main()
    assert sorted(first + ran) == [(2, 0), (2, 1), (10, 0), (10, 1)]
    ran.clear()
    sweep.main()
    assert ran == []
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(r["complexity"], r["seed"]) for r in rows] == [("2", "0"), ("2", "1"), ("10", "0"), ("10", "1")]
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    line = next(line for line in text.splitlines() if line.startswith("| 2 | default | 96 | 2 |"))
    assert "0.950 (0.900–1.000)" in line  # pointing: mean over seeds, minimum, maximum
    assert "| 1 (0–1) |" in line  # inverted maps are summed
    assert "| 60 (60–61) |" in line or "| 61 (60–61) |" in line


def test_every_variant_changes_a_part_that_the_configuration_has():
    from monai.bundle import ConfigParser

    config = ConfigParser()
    config.read_config("configs/train.json")
    for overrides in sweep.VARIANTS.values():
        for key in overrides:
            assert key.rpartition("#")[0] in config
