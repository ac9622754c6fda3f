# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The report: the right way round, self-contained, safe to open, all or nothing on disk."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
from markupsafe import escape

from bundle.errors import InputError
from bundle.report import patient_section, write_evaluation_report, write_report
from bundle.report.pictures import heat_figure, plane, png

ROW = dict(patient_id="a", status="ok", message="", median_months=30.0, lower_months=20.0, upper_months=40.0)
ROW |= dict(mean_months=30.0, risk=-30.0, death_12m=0.1, death_24m=0.2, death_36m=0.5, death_60m=0.9)


def picture(heat: float):
    volume = np.full((6, 5, 4), -800.0)
    hot = np.zeros(volume.shape)
    hot[1, 2, 3] = heat
    return heat_figure(volume, hot, (1.0, 1.0, 2.0))


def test_planes_are_in_radiological_convention():
    volume = np.zeros((6, 5, 4))
    volume[5, 4, 3] = 1  # right, front, head
    assert plane(volume, 2, 3)[0, 0] == 1  # axial: right is on the left, front at the top
    assert plane(volume, 1, 4)[0, 0] == 1  # coronal: right is on the left, head at the top
    assert plane(volume, 0, 5)[0, 0] == 1  # sagittal: front is on the left, head at the top
    assert plane(volume, 2, 0).shape == (5, 6)


@pytest.mark.parametrize("heat", [0.0, 0.9])
def test_pictures_are_drawn_with_and_without_heat(heat):
    figure = picture(heat)
    assert png(figure)[:8] == b"\x89PNG\r\n\x1a\n"
    assert [ax.get_title() for ax in figure.axes[:3]] == ["axial", "coronal", "sagittal"]


HOSTILE = '"><script>alert("&")</script>'


def shown(path) -> str:
    """A page that holds all it needs, and in which what is hostile is text."""
    page = path.read_text()
    assert "<script" not in page and str(escape(HOSTILE)) in page and "Research use only" in page
    assert all(link.startswith(("#", "data:")) for link in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert os.listdir(path.parent) == ["report.html"]
    return page


def test_report_is_self_contained_and_escapes_what_it_is_given(tmp_path):
    rows = [{**ROW, "patient_id": HOSTILE}, dict(patient_id="b", status="failed", message="torn <file>")]
    drawn = dict(picture=png(picture(1.0)), risk=1.0, horizon=60, lung_mask_source="threshold")
    sections = [patient_section(rows[0], np.full(100, 0.01), **drawn), patient_section(rows[1])]
    settings = {"network": {"dim": "<b>"}, "trained_on": ["secret"]}
    write_report(tmp_path / "report.html", iter(sections), rows, settings)
    page = shown(tmp_path / "report.html")
    assert "torn &lt;file&gt;" in page and "secret" not in page and "&lt;b&gt;" in page
    assert page.count("<img") == 2
    assert set(re.findall(r'href="#([^"]*)"', page)) == set(re.findall(r'section id="([^"]*)"', page))


def test_report_of_an_evaluation_escapes_names_of_metrics_and_scans(tmp_path):
    entry = {"value": 0.5, "lower": None, "upper": None, "num_scans": 3}
    metrics = {HOSTILE: {HOSTILE: entry}, "failed": {"num_scans": 1, "scans": [{"patient_id": HOSTILE, "message": HOSTILE}]}}
    write_evaluation_report(tmp_path / "report.html", metrics, {"calibration": png(picture(0.0))})
    page = shown(tmp_path / "report.html")
    assert page.count(str(escape(HOSTILE))) == page.count("alert") == 4
    assert page.count("<img") == 1 and "1 failed" in page


def test_a_report_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="No space left on device"):
        write_report(path, [], [], {})
    assert path.read_text() == "old"
