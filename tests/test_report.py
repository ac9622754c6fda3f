# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The report: the right way round, self-contained, safe to open, all or nothing on disk."""

from __future__ import annotations

import base64
import gzip
import os
import re

import nibabel as nib
import numpy as np
import pytest
from markupsafe import escape

from bundle.errors import InputError
from bundle.report import ScanViews, viewer, write_cohort_page, write_evaluation_report, write_scan_report
from bundle.report.pictures import heat_figure, plane, png
from bundle.report.regions import ranked_regions
from bundle.run.results import maps_on_grid

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
    assert "<script>alert" not in page and str(escape(HOSTILE)) in page and "Research use only" in page
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(link.startswith(("#", "data:", "maps/", "reports/", "../cohort.html")) for link in links)
    assert not any(name.startswith(".") for name in os.listdir(path.parent))
    return page


def chest() -> ScanViews:
    """Two lungs of voxels of 3 mm, with one hot ball in the right one's upper third and one in the left one's lower."""
    lung, heat = np.zeros((60, 40, 40), bool), np.zeros((60, 40, 40))
    lung[5:25, 5:35, 5:35] = lung[35:55, 5:35, 5:35] = True
    at = np.stack(np.indices(lung.shape), -1)
    for centre, most in (((45, 20, 30), 1.0), ((10, 20, 10), 0.5)):
        distance = np.linalg.norm(at - centre, axis=-1)
        heat += np.where(distance <= 3.5, most * (1 - distance / 10), 0)
    heat[lung] += 1e-3
    hu = np.where(lung, -850.0, 40.0) + 800 * (heat > 0.1)
    affine = np.diag([3.0, 3.0, 3.0, 1])
    affine[:3, 3] = -90, -60, -100
    return ScanViews(hu, lung, True, affine, {"heat": (heat, "per mL")})


def report_of(path, views, settings=None, **row):
    about = dict(
        risk=0.9,
        horizon=60,
        hu_window=(-1000.0, 200.0),
        lung_mask_source="threshold" if views.masked else "none",
        notes=[HOSTILE],
    )
    about |= dict(read=HOSTILE, picture=png(picture(1.0)), provenance={"Survival Map": "1", HOSTILE: HOSTILE})
    write_scan_report(path, ROW | row, np.full(100, 0.01), views, about, settings or {})
    return path


def test_regions_are_where_they_were_drawn():
    views = chest()
    heat, affine = views.overlays["heat"][0], views.affine
    first, second = ranked_regions(heat, views.hu, views.lung, affine)
    assert (first.side, first.third, second.side, second.third) == ("right", "upper", "left", "lower")
    assert first.mm == (45, 0, -10) and second.mm == (-60, 0, -70)
    for region, centre in ((first, (45, 20, 30)), (second, (10, 20, 10))):
        near = np.linalg.norm(np.stack(np.indices(heat.shape), -1) - centre, axis=-1) <= 3.5
        inside = near & (heat >= 0.25 * heat.max())
        assert region.volume == pytest.approx(inside.sum() * 0.027)
        assert region.share == pytest.approx(heat[inside].sum() / heat.sum()) and region.hu == pytest.approx(-50)
        to_surface = [min(v[0] - 35, 54 - v[0], v[2] - 5, 34 - v[2]) for v in np.argwhere(inside)]
        if region is first:
            assert region.pleura == pytest.approx(3 * min(to_surface))


@pytest.mark.parametrize("level, fault", [(0.0, "no heat"), (1.0, "nearly even"), (np.nan, "no numbers")])
def test_a_map_without_regions_is_said_to_be_none(tmp_path, level, fault):
    views = chest()
    even = views._replace(overlays={"heat": (np.where(views.lung, level, 0.0), "per mL")})
    assert ranked_regions(even.overlays["heat"][0], views.hu, views.lung, views.affine) == []
    page = report_of(tmp_path / "a.html", even).read_text()
    assert fault in page and 'id="regions"' not in page


@pytest.mark.parametrize("spacing, shape", [((0.7, 0.7, 1.0), (200, 170, 160)), ((3.0, 3.0, 3.0), (90, 80, 70))])
def test_volumes_of_a_report_are_small_and_keep_their_place(spacing, shape):
    voxels = np.zeros(shape, np.float32)
    voxels[20:60, 50:70, 30:60] = 80.0
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = 5, -7, 11
    blocks = viewer.blocks_of(shape, np.array(spacing))
    small, coarse = viewer.block_means(voxels, blocks), viewer.block_affine(affine, blocks)
    read = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(viewer.volume_text(small, coarse, -1000, 200))))
    assert small.size <= viewer.MOST_VOXELS and abs(read.get_fdata() - small).max() <= 0.5 * 1200 / 255 + 1e-3
    mm = [m[:3, :3] @ np.argwhere(v > 79).mean(0) + m[:3, 3] for m, v in ((affine, voxels), (read.affine, small))]
    assert np.abs(mm[0] - mm[1]).max() < max(spacing) * max(blocks) / 2


def test_explanations_are_brought_to_the_grid_of_the_report(tmp_path):
    voxels = np.zeros((12, 10, 8), np.float32)
    voxels[2:6, 3:7, 2:6] = 2
    voxels[8, 8, 7] = -1
    nib.Nifti1Image(voxels[::-1], np.diag([-3.0, 3, 3, 1]) + np.eye(4, k=3) * 33).to_filename(tmp_path / "p_q_ig.nii.gz")
    nib.Nifti1Image(voxels.astype(np.uint8), np.eye(4)).to_filename(tmp_path / "p_q_rgb.nii.gz")
    affine = np.diag([3.0, 3.0, 3.0, 1])
    maps = maps_on_grid([*tmp_path.iterdir(), tmp_path / "p_q_cubelets.png"], "p_q", affine, voxels.shape)
    assert list(maps) == ["ig"] and np.allclose(maps["ig"][0], voxels)
    views = ScanViews(voxels, voxels > 0, True, affine, {"heat": (voxels, ""), **maps})
    shown = viewer.volumes(views, (-1000, 200))[0]
    read = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(shown["overlays"][1]["base64"]))).get_fdata()
    assert abs(read - voxels).max() < 0.01 and shown["left_out"] == []  # what is below 0 is told as such


def test_maps_without_room_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(viewer, "MOST_BYTES", 10)
    views = chest()
    views.overlays["other"] = views.overlays["heat"]
    assert "Too large for this page: other." in report_of(tmp_path / "a.html", views).read_text()


def test_explanations_that_are_constant_or_no_numbers_are_said_to_be_so(tmp_path):
    voxels = np.ones((12, 10, 8), np.float32)
    affine = np.diag([3.0, 3.0, 3.0, 1])
    nib.Nifti1Image(voxels, affine).to_filename(tmp_path / "p_even.nii.gz")
    voxels[3, 3, 3] = np.nan
    nib.Nifti1Image(voxels, affine).to_filename(tmp_path / "p_torn.nii.gz")
    maps = maps_on_grid(sorted(tmp_path.iterdir()), "p", affine, voxels.shape)
    assert maps["even"][1] == "" and maps["torn"][1] == "(0 where it is no number)" and maps["torn"][0][3, 3, 3] == 0
    heat = np.random.default_rng(0).random(voxels.shape)
    views = ScanViews(heat, heat > 0, True, affine, {"heat": (heat, "per mL"), **maps})
    assert "The same everywhere, so that there is nothing to see: even." in report_of(tmp_path / "a.html", views).read_text()


def test_report_places_the_patient_in_the_training_cohort(tmp_path):
    settings = {"outcomes": {"pmf": [0.02] * 50 + [0.0] * 50, "last_death": 50.0}, "network": {"dim": "<b>"}}
    settings |= {"trained_on": ["secret"]}
    page = shown(report_of(tmp_path / "a.html", chest(), settings, patient_id=HOSTILE, familiarity=0.0))
    assert "By that median 60 % of the training cohort had died" in page and "unlike the training scans" in page
    assert re.search(r"training cohort</td><td>24.0 %</td><td>48.0 %</td><td>72.0 %</td><td>–</td>", page)
    assert "secret" not in page and "&lt;b&gt;" in page and page.count("Show ") == 2


def test_cohort_page_has_failures_first_and_escapes_what_it_is_given(tmp_path):
    rows = [
        {**ROW, "patient_id": HOSTILE, "familiarity": None},
        dict(patient_id="b", status="failed", message="torn <file>"),
    ]
    write_cohort_page(tmp_path, rows, {})
    page = shown(tmp_path / "cohort.html")
    assert page.index("torn &lt;file&gt;") < page.index("%3Cscript%3E") and "1 of 2 scans failed" in page
    assert "url=reports/%22%3E%3Cscript%3E" in (tmp_path / "report.html").read_text()
    write_cohort_page(tmp_path, rows[1:], {})
    assert "url=cohort.html" in (tmp_path / "report.html").read_text()


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
        write_cohort_page(tmp_path, [], {})
    assert path.read_text() == "old"
