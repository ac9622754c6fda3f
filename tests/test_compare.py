# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Comparing maps of two models, or of two scans of a patient."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from markupsafe import escape
from scipy.stats import rankdata

from bundle.metrics.agreement import dice, rank_correlation
from scripts.compare import main

SHAPE = (24, 20, 18)
AFFINE = np.diag([3.0, 3.0, 3.0, 1.0])
AFFINE[:3, 3] = -40, -30, -20
LUNG = np.zeros(SHAPE, bool)
LUNG[2:10, 3:17, 2:16] = LUNG[14:22, 3:17, 2:16] = True


def ball(centre, radius: float = 9.0) -> np.ndarray:
    """Heat in the lung around a voxel, which sums to 0.6 and fades over `radius` mm; no two voxels alike."""
    at = np.stack(np.indices(SHAPE), -1) * 3.0
    heat = np.where(LUNG, np.exp(-(((at - 3.0 * np.array(centre)) / radius) ** 2).sum(-1)) + 1e-5 * at @ (1, 0.37, 0.11), 0)
    return 0.6 * heat / heat.sum()


def folder(path, affine=AFFINE, lung=LUNG, months=None, **heats):
    """An output folder of inference with these maps; `months` by name: median, lower, upper."""
    (path / "maps").mkdir(parents=True)
    for name, heat in heats.items():
        nib.save(nib.Nifti1Image(heat.astype(np.float32), affine), path / "maps" / f"{name}_heat.nii.gz")
        if lung is not None:
            nib.save(nib.Nifti1Image(lung.astype(np.uint8), affine), path / "maps" / f"{name}_lung.nii.gz")
    if months:
        rows = [
            dict(zip(("patient_id", "median_months", "lower_months", "upper_months"), (n, *m))) for n, m in months.items()
        ]
        pd.DataFrame(rows).to_csv(path / "predictions.csv", index=False)
    return path


def compared(a, b, out) -> pd.DataFrame:
    main([str(a), str(b), "--out", str(out)])
    return pd.read_csv(out / "compare.csv", keep_default_na=False, na_values=[""], dtype={"patient_id": str})


def refused(a, b, out, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(a), str(b), "--out", str(out)])
    assert stop.value.code == 1
    return capsys.readouterr().err.splitlines()[-1]


def test_numbers_are_those_of_an_independent_computation(tmp_path):
    first, other = ball((6, 10, 8)), ball((7, 10, 9), 12.0)
    months = {"p": (30.5, 10.0, 60.0)}, {"p": (24.0, 8.0, 50.0)}
    a = folder(tmp_path / "a", months=months[0], p=first, q=other)
    b = folder(tmp_path / "b", months=months[1], p=other, q=other, r=first)
    p, q = compared(a, b, tmp_path / "out").to_dict("records")
    ranks = [rankdata(heat[LUNG].astype(np.float32)) for heat in (first, other)]
    assert p["rank_correlation"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-4)
    hot = [{*map(tuple, np.argwhere(heat >= 0.25 * heat.max()))} for heat in (first, other)]
    overlap = 2 * len(hot[0] & hot[1]) / (len(hot[0]) + len(hot[1]))
    assert 0.1 < overlap < 0.9 and p["region_dice"] == pytest.approx(overlap, abs=1e-4)
    assert p["difference_months"] == -6.5 and (p["lower_b"], p["upper_b"], p["upper_a"]) == (8, 50, 60)
    assert p["risk_a"] == pytest.approx(0.6, abs=1e-4)
    assert (q["rank_correlation"], q["region_dice"], q["lung_dice"]) == (1, 1, 1) and np.isnan(q["median_a"])
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "1 scan is in B alone" in page and "30.5 (10 to 60)" in page and "24.0 (8 to 50)" in page and "-6.5" in page
    assert (tmp_path / "out" / "pictures" / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_what_has_no_agreement_has_no_number():
    flat = np.ones((2, 2, 2))
    assert rank_correlation(flat, np.arange(8.0).reshape(2, 2, 2), flat > 0) is None
    assert dice(flat < 0, flat < 0) is None and dice(flat > 0, flat < 0) == 0


def test_another_grid_is_brought_over_by_the_affines_and_said(tmp_path):
    heat = ball((6, 10, 8), 15.0)
    fine = np.diag([-1.5, 1.5, 1.5, 1.0])  # half the spacing, the first axis the other way round, and last
    fine[:3, 3] = AFFINE[:3, 3] - 0.75 + np.array([1.5 * (2 * SHAPE[0] - 1), 0, 0])
    turned = fine[:, [1, 2, 0, 3]]
    repeated = [np.kron(v, np.ones((2, 2, 2)))[::-1].transpose(1, 2, 0) for v in (heat / 8, LUNG)]
    a = folder(tmp_path / "a", p=heat)
    b = folder(tmp_path / "b", turned, repeated[1], later=repeated[0])
    (row,) = compared(a / "maps" / "p_heat.nii.gz", b / "maps" / "later_heat.nii.gz", tmp_path / "out").to_dict("records")
    assert row["message"] == "grids differ: B was brought to A's by the affines, without registration"
    assert row["lung_dice"] == 1 and row["rank_correlation"] > 0.99 and row["region_dice"] > 0.85
    assert row["patient_id_b"] == "later" and row["risk_b"] == pytest.approx(0.6, abs=1e-4)


def test_lungs_that_lie_apart_are_one_sentence_and_cost_one_row(tmp_path, capsys):
    heat, far = ball((6, 10, 8)), AFFINE.copy()
    far[0, 3] = 500
    a = folder(tmp_path / "a", p=heat, q=heat)
    folder(tmp_path / "b", p=heat)
    folder(tmp_path / "far", far, q=heat)
    for file in (tmp_path / "far" / "maps").iterdir():
        file.rename(tmp_path / "b" / "maps" / file.name)
    said = refused(a, tmp_path / "b", tmp_path / "out", capsys)
    assert "1 of 2 pairs failed, the others are done" in said and "patient q: the lungs of A and B nowhere overlap" in said
    left, right = (AFFINE[:3, 3] + 3 * np.argwhere(LUNG).mean(0)).round(), np.array([540, 0, 0])
    assert f"{left.astype(int).tolist()} and {(left + right).astype(int).tolist()} mm" in said
    table = pd.read_csv(tmp_path / "out" / "compare.csv")
    assert list(table["status"]) == ["ok", "failed"] and "1 of 2 pairs failed" in (tmp_path / "out/compare.html").read_text()


def test_maps_without_masks_or_regions_are_said_to_be_so(tmp_path):
    even = np.where(LUNG, 0.6 / LUNG.sum(), 0)
    a, b = folder(tmp_path / "a", lung=None, p=even), folder(tmp_path / "b", lung=None, p=ball((6, 10, 8)))
    (row,) = compared(a, b, tmp_path / "out").to_dict("records")
    assert np.isnan(row["rank_correlation"]) and np.isnan(row["region_dice"]) and row["lung_dice"] == 1
    for words in ("no lung mask", "constant in the lung", "no regions to compare, A: the map is nearly even"):
        assert words in row["message"]


def test_bad_input_is_one_sentence(tmp_path, capsys):
    heat, broken = ball((6, 10, 8)), ball((6, 10, 8))
    broken[6, 10, 8] = np.nan
    a = folder(tmp_path / "a", p=heat, q=heat)
    assert "no heat maps (expected an output folder" in refused(a, tmp_path / "none", tmp_path / "out", capsys)
    b = folder(tmp_path / "b", other=heat)
    assert "none of 2 scans of A is among 1 of B by name" in refused(a, b, tmp_path / "out", capsys)
    c = folder(tmp_path / "c", q=broken)
    assert "NaN" in refused(a, c, tmp_path / "out", capsys)


def test_hostile_names_are_text(tmp_path):
    name = "a\"'&{{7*7}}<b> é"
    a = folder(tmp_path / "a", **{name: ball((6, 10, 8))})
    compared(a, a, tmp_path / "out")
    page = (tmp_path / "out" / "compare.html").read_text()
    assert str(escape(name)) in page and "<b> é" not in page
