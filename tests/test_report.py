# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The report: the right way round, self-contained, safe to open, all or nothing on disk."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest

from bundle.errors import InputError
from bundle.report import failed_section, patient_section, write_report
from bundle.report.pictures import heat_figure, plane, png

ROW = dict(patient_id="a", status="ok", message="", median_months=30.0, lower_months=20.0, upper_months=40.0)
ROW |= dict(mean_months=30.0, risk=-30.0, death_12m=0.1, death_24m=0.2, death_36m=0.5, death_60m=0.9)


def patient(name: str = "a", heat: float = 1.0) -> dict:
    common = dict(picture=png(picture(heat)), pmf=np.full(100, 0.01), horizon=60, lung_mask_source="threshold")
    return dict(patient_id=name, risk=heat, row={**ROW, "patient_id": name}, **common)


def picture(heat: float):
    volume = np.full((6, 5, 4), -800.0)
    hot = np.zeros(volume.shape)
    hot[1, 2, 3] = heat
    return heat_figure(volume, hot, (1.0, 1.0, 2.0), contour=hot > 0)


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


def test_report_is_self_contained_and_escapes_what_it_is_given(tmp_path):
    name = "<script>alert(1)</script>"
    rows = [{**ROW, "patient_id": name}, dict(patient_id="b", status="failed", message="torn <file>")]
    sections = [patient_section(patient(name)), failed_section("b", "torn <file>")]
    write_report(tmp_path / "report.html", sections, rows, {"network": {"dim": 64}, "trained_on": ["secret"]})
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "torn &lt;file&gt;" in page and "secret" not in page
    assert page.count("<img") == 2
    assert all(link.startswith(("#", "data:")) for link in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert set(re.findall(r'href="#([^"]*)"', page)) == set(re.findall(r'section id="([^"]*)"', page))
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_report_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="No space left on device"):
        write_report(path, [], [], {})
    assert path.read_text() == "old"
