# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The sweep runs nothing twice, loses nothing when killed, and its table says what its CSV says."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from bundle.networks import SurvivalMapNet
from bundle.settings import file_sha256
from bundle.survival import CenTime
from scripts import sweep


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("before\n<!-- table -->\nold\n<!-- end of table -->\nafter\n")
    return path


def command(tmp_path, *args):
    where = ["--work", str(tmp_path), "--results", str(tmp_path / "results.csv"), "--page", str(tmp_path / "page.md")]
    return ["sweep", *where, *args]


def test_a_killed_sweep_goes_on_and_runs_nothing_twice(tmp_path, page, monkeypatch):
    ran = []

    def row_of(runner, complexity, variant, train_scans, seed, test):
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append((complexity, seed))
        row = dict(zip(sweep.KEY, (complexity, variant, train_scans, seed, test))) | {"overrides": "{}"}
        row |= {"test_scans": 8, "train_seconds": 60 + seed, "pointing_game": 0.9 + seed / 10, "inverted": seed}
        return row | {"average_precision": 0.5, "mae_events": 1.0}

    monkeypatch.setattr(sweep.Runner, "row", row_of)
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
    line = next(line for line in text.splitlines() if line.startswith("| 2 | default | 100 | same | 2 |"))
    assert "0.950 (0.900–1.000)" in line  # pointing: mean over seeds, minimum, maximum
    assert "| 1 (0–1) |" in line  # inverted maps are summed
    assert "| 60 (60–61) |" in line or "| 61 (60–61) |" in line


def test_a_run_that_fails_does_not_take_the_others_with_it(tmp_path, page, monkeypatch, capsys):
    def row_of(runner, complexity, variant, train_scans, seed, test):
        if complexity == 2:
            raise RuntimeError("no such luck")
        return dict(zip(sweep.KEY, (complexity, variant, train_scans, seed, test))) | dict.fromkeys(
            ("pointing_game", "average_precision", "mae_events", "inverted"), 1
        )

    monkeypatch.setattr(sweep.Runner, "row", row_of)
    monkeypatch.setattr("sys.argv", command(tmp_path, "--complexities", "2", "3", "--seeds", "0"))
    with pytest.raises(SystemExit, match="1 of 2 runs failed"):
        sweep.main()
    assert "no such luck" in capsys.readouterr().out
    assert [r["complexity"] for r in csv.DictReader((tmp_path / "results.csv").open())] == ["3"]


def test_every_variant_changes_a_part_that_the_configuration_has():
    from monai.bundle import ConfigParser

    config = ConfigParser()
    config.read_config("configs/train.json")
    for overrides in sweep.VARIANTS.values():
        for key in overrides.keys() - {"phantoms", "shuffle", "config"}:
            assert key.rpartition("#")[0] in config
        assert "config" not in overrides or Path(overrides["config"]).is_file()
    with_options = [test.get("options", {}) for test in sweep.TESTS.values()]
    config = json.load(open("configs/evaluate.json"))
    assert all(key in config for options in with_options for key in options)


def test_weights_without_severity_say_the_months_of_the_softmin(tmp_path):
    net = SurvivalMapNet(dim=16).eval()
    image = torch.rand(1, 1, 16, 16, 16)
    before = net(image)
    net.severity.slope.fill_(1.0)
    net.severity.offset.fill_(3.0)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    settings = {"objective": CenTime(variance=1.5).arguments, "network": net.arguments}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert (net(image)[0, 0] - before[0, 0]).abs().min() > 1
    model = sweep.without_severity(tmp_path, tmp_path / "test")
    net.load_state_dict(torch.load(model, weights_only=True))
    torch.testing.assert_close(net(image), before)
    found = json.loads((tmp_path / "test" / "settings.json").read_text())
    assert found["objective"]["variance"] == 36.0 and found["weights_sha256"] == file_sha256(model)
