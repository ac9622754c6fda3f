# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What the page of a cohort says of predictions whose outcome is known."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from lifelines.statistics import logrank_test
from lifelines.utils import concordance_index
from markupsafe import escape

from bundle.data.cohort import patient_digest
from bundle.report import write_cohort_page
from bundle.report.figures import kaplan_meier_by_risk
from bundle.run.outcomes import against_outcomes
from bundle.run.results import DoneScans, source_in_words
from tests.test_report import ROW, shown

RNG = np.random.default_rng(0)


def predictions(count: int, tmax: int = 100) -> list[tuple[dict, list[float]]]:
    """Records with outcomes, and distributions that know a little of them."""
    found = []
    for i in range(count):
        time, event = float(RNG.integers(5, 90)), int(RNG.random() < 0.7)
        weights = np.exp(-(((np.arange(1, tmax + 1) - time - RNG.normal(0, 25)) / 20) ** 2))
        found.append(({"patient_id": f"p{i}", "time": time, "event": event}, (weights / weights.sum()).tolist()))
    return found


def test_numbers_are_of_those_whose_outcome_is_known_and_whom_the_weights_have_not_seen():
    found = predictions(60)
    for record, _ in found[:5]:
        del record["time"], record["event"]
    settings = {"trained_on": [patient_digest(f"p{i}") for i in range(20)]}
    content = against_outcomes(found, settings)
    assert content["said"] == [
        "The outcome is known of 55 of 60 scans.",
        "The weights were trained on the patients of 15 of these; they don't count.",
    ]
    kept = found[20:]
    mean = [np.dot(np.arange(1, 101), pmf) for _, pmf in kept]
    time, event = ([record[key] for record, _ in kept] for key in ("time", "event"))
    c_index = content["metrics"]["c_index"]
    assert c_index["value"] == pytest.approx(concordance_index(time, mean, event)) and c_index["num_scans"] == 40
    assert c_index["lower"] < c_index["value"] < c_index["upper"]
    assert all(picture[:4] == b"\x89PNG" for picture in content["pictures"].values()) and len(content["pictures"]) == 2
    high, time, event = np.array(mean) <= np.median(mean), np.array(time), np.array(event)
    p = logrank_test(time[high], time[~high], event[high], event[~high]).p_value
    title = kaplan_meier_by_risk(-np.array(mean), time, event).axes[0].get_title()
    assert title == ("log-rank p < 0.001" if p < 0.001 else f"log-rank p = {p:.3f}")


def test_nothing_is_claimed_where_nothing_is_known():
    found = predictions(3)
    everyone = {"trained_on": [patient_digest(f"p{i}") for i in range(3)], "trained_on_left_out": True}
    content = against_outcomes(found, everyone)
    assert content["metrics"] is None and len(content["said"]) == 3 and not content["pictures"]
    for record, _ in found:
        del record["time"]
    assert against_outcomes(found, everyone) == {"said": [], "metrics": None, "pictures": {}}


def test_one_patient_and_a_follow_up_beyond_the_model_are_shown(tmp_path):
    ((record, pmf),) = predictions(1, tmax=40)
    content = against_outcomes([(record | {"time": 70.0, "event": 1}, pmf)], {"trained_on": []})
    assert content["metrics"]["num_scans"] == 1 and content["metrics"]["num_events"] == 0  # censored at month 40
    name = '"><script>alert("&")</script>'
    write_cohort_page(tmp_path, [{**ROW, "patient_id": name, "familiarity": None}], {}, content)
    page = shown(tmp_path / "cohort.html")
    assert (
        page.index("The outcome is known of 1 of 1 scans.") < page.index("<table id=") and page.count("data:image/png") == 2
    )
    assert "<td>c_index</td><td>–</td>" in page and str(escape(name)) in page


def test_a_mask_that_has_changed_is_drawn_anew(tmp_path):
    scan = {"patient_id": "a", "image": str(tmp_path / "a.nii.gz"), "gt_mask": str(tmp_path / "gt.nii.gz")}
    keys = []
    for value in (0, 1):
        for path in (scan["image"], scan["gt_mask"]):
            volume = np.zeros((4, 4, 4), np.uint8)
            volume[0, 0, 0] = value if path == scan["gt_mask"] else 0
            nib.save(nib.Nifti1Image(volume, np.eye(4)), path)
        keys.append(DoneScans(tmp_path, []).key(scan))
    assert keys[0] != keys[1] != DoneScans(tmp_path, []).key({**scan, "gt_mask": scan["image"]})


def test_a_folder_is_read_as_slices(tmp_path):
    meta = {"filename_or_obj": str(tmp_path), "spatial_shape": (4, 5, 6), "original_affine": np.diag([1, 2, 2.5, 1])}
    assert source_in_words(meta, None) == "DICOM slices of 4 × 5 × 6 voxels, 1 × 2 × 2.5 mm"
    assert source_in_words(meta, "1.2.3").startswith("the DICOM series 1.2.3 of 4 × 5 × 6")
