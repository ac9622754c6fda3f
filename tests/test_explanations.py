# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The table of explanations: a command that was stopped goes on, every method has its numbers, and the page says them."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from scripts.research.explanations import __main__ as command
from scripts.research.explanations import page
from scripts.research.explanations.measure import NOISE, TRUTH

TINY = "--cohorts central-sphere --size 16 --train_scans 12 --epochs 2 --test_scans 1 --checked central-sphere".split()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of two seeds in a folder, and the words of its command."""
    folder = tmp_path_factory.mktemp("explanations")
    (folder / "page.md").write_text(f"Before.\n{page.BEGIN}\nold\n{page.END}\nAfter.\n")
    words = [*TINY, "--out", str(folder), "--table", str(folder / "table.csv"), "--page", str(folder / "page.md")]
    command.main([*words, "--seeds", "0", "1"])
    return folder, words


def test_every_method_has_the_same_numbers(made):
    table = pd.read_csv(made[0] / "table.csv").set_index(["seed", "method"])
    methods = set(table.loc[0].index)
    assert {"heat", "location", "norm_head", "gradcam++_output", "pcam+-", "occlusion", "rise", TRUTH, NOISE} <= methods
    assert not {"pca_input", "heat_minus_gradient", "cubelets"} & methods  # they have no hot side
    assert set(table.loc[1].index) == methods
    for name in ("average_precision", "pointing_game", "deletion", "insertion", "comprehensiveness", "sufficiency"):
        assert table[name].notna().all(), name
    on_tokens = table.average_precision.drop("heat", level="method")  # which is finer
    assert (on_tokens.groupby("seed").max() <= on_tokens.xs(TRUTH, level="method") + 0.05).all()  # ties may fall well
    maps = table.drop([TRUTH, NOISE], level="method")
    assert maps.seconds.notna().all()
    for name in ("random_weights", "random_head", "random_labels", "shift"):  # of seed 0 alone
        assert maps.loc[0][name].notna().mean() > 0.5 and maps.loc[1][name].isna().all(), name
        assert maps[name].dropna().abs().max() <= 1 + 1e-6
    assert table.completeness_error.notna().sum() == 2 * 3 * 2  # seeds, methods and levels
    assert (maps.xs("integrated_gradients_output", level="method").completeness_error < 0.1).all()


def test_seeds_are_compared_on_the_same_scans(made):
    table = pd.read_csv(made[0] / "table.csv")
    heat = table[table.method == "heat"].seeds
    maps = [np.load(made[0] / "results" / f"central-sphere_{seed}.npz")["heat/0"] for seed in (0, 1)]
    rank = [pd.Series(values).rank() for values in maps]
    assert np.allclose(heat, np.corrcoef(*rank)[0, 1], atol=1e-3)


def test_the_page_keeps_what_is_around_its_tables(made):
    text = (made[0] / "page.md").read_text()
    assert text.startswith("Before.\n") and text.endswith("After.\n") and "old" not in text
    assert "central-sphere (2)" in text and "| rise | " in text and "implants" not in text
    assert (made[0] / "page.png").stat().st_size > 10_000


def test_a_stopped_command_goes_on_and_measures_nothing_twice(made, monkeypatch):
    folder, words = made
    measured, measure = [], command.Work.measure
    monkeypatch.setattr(command.Work, "measure", lambda work, *key: measured.append(key) or measure(work, *key))
    (folder / "results" / "central-sphere_1.json").unlink()
    trained = (folder / "runs" / "central-sphere_1" / "trained" / "model.pt").stat().st_mtime_ns
    command.main([*words, "--seeds", "0", "1"])
    assert measured == [("central-sphere", 1)]
    assert (folder / "runs" / "central-sphere_1" / "trained" / "model.pt").stat().st_mtime_ns == trained


def test_what_is_there_can_be_drawn_alone(made, monkeypatch):
    folder, words = made
    monkeypatch.setattr(command.Work, "measure", lambda *args: 1 / 0)
    (folder / "table.csv").unlink()
    command.main([*words, "--seeds", "0", "1", "2", "--draw"])
    assert set(pd.read_csv(folder / "table.csv").seed) == {0, 1}


def test_a_network_that_fails_does_not_take_the_others_with_it(made, monkeypatch, capsys):
    monkeypatch.setattr(command.Work, "train", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(SystemExit, match="1 of 2 networks are missing"):
        command.main([*made[1], "--seeds", "0", "7"])
    assert "central-sphere, seed 7: ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--cohorts", "sphere"], "there is no phantom sphere"),
        (["--size", "8"], "size is 8"),
        (["--test_scans", "0"], "at least 1"),
        (["--page", "README.md"], "README.md has no lines"),
        (["--epochs", "3"], "holds results of other epochs; choose another --out"),
    ],
)
def test_bad_arguments_are_one_sentence(made, words, said):
    settings = json.loads((made[0] / "explanations.json").read_text())
    with pytest.raises(SystemExit, match=f"^error: .*{said}"):
        command.main([*made[1], *words])
    assert json.loads((made[0] / "explanations.json").read_text()) == settings
