# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Heat less the cohort's mean: by place in the lungs' box, whatever the grid, and of the others alone."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from scripts import cohort_mean

SIDE = 32  # voxels of the lungs' box


def write(folder, name, heat, mm=2.0, flip=False) -> None:
    """A map whose lungs fill a box within it; flipped, its first axis runs to the left, and is the last of the file."""
    (folder / "maps").mkdir(parents=True, exist_ok=True)
    volume, lung = np.zeros((40, 40, 40), np.float32), np.zeros((40, 40, 40), np.uint8)
    volume[3 : 3 + SIDE, 4 : 4 + SIDE, 5 : 5 + SIDE], lung[3 : 3 + SIDE, 4 : 4 + SIDE, 5 : 5 + SIDE] = heat, 1
    affine = np.diag([mm, mm, mm, 1.0])
    if flip:
        volume, lung = (x[::-1].transpose(1, 2, 0) for x in (volume, lung))
        affine = np.array([[0, 0, -mm, 0], [mm, 0, 0, 0], [0, mm, 0, 0], [0, 0, 0, 1.0]])
    for kind, values in (("heat", volume), ("lung", lung)):
        nib.save(nib.Nifti1Image(values, affine), folder / "maps" / f"{name}_{kind}.nii.gz")


def difference(folder, name) -> np.ndarray:
    return np.asarray(nib.load(folder / "maps" / f"{name}_heat_minus_cohort.nii.gz").dataobj)


def test_what_is_alike_vanishes_and_what_is_more_stays_on_any_grid(tmp_path):
    ramp = np.broadcast_to(np.arange(SIDE)[:, None, None] // 2 / 1000.0, (SIDE,) * 3).copy()  # constant in a cell
    hot = ramp.copy()
    hot[:4, 8:12, 20:24] += 0.5
    write(tmp_path, "a", ramp)
    write(tmp_path, "b", 8 * ramp, mm=4.0)  # the same heat per mL
    write(tmp_path, "c", hot, flip=True)
    cohort_mean.main([str(tmp_path)])
    found = difference(tmp_path, "c").transpose(2, 0, 1)[::-1]
    expected = np.zeros((40, 40, 40))
    expected[3:7, 12:16, 25:29] = 0.5 / 0.008  # per mL, of voxels of 2 mm
    assert np.allclose(found, expected, atol=1e-3)
    assert np.allclose(difference(tmp_path, "a"), -expected / 2, atol=1e-3)  # the mean of b and c, without its own


def test_another_cohort_and_bad_folders(tmp_path):
    write(tmp_path / "one", "a", np.ones((SIDE,) * 3))
    write(tmp_path / "other", "a", 2 * np.ones((SIDE,) * 3))
    write(tmp_path / "other", "b", 4 * np.ones((SIDE,) * 3))
    cohort_mean.main([str(tmp_path / "one"), "--cohort", str(tmp_path / "other")])
    assert difference(tmp_path / "one", "a").min() == pytest.approx(-3 / 0.008)  # b's alone: a is the same patient
    with pytest.raises(SystemExit, match="^error: .* one scan only"):
        cohort_mean.main([str(tmp_path / "one")])
    with pytest.raises(SystemExit, match="^error: .* has no maps/"):
        cohort_mean.main([str(tmp_path)])
    nib.save(nib.Nifti1Image(np.ones((3, 3, 3), np.uint8), np.eye(4)), tmp_path / "one" / "maps" / "a_lung.nii.gz")
    with pytest.raises(SystemExit, match="another shape"):
        cohort_mean.main([str(tmp_path / "one"), "--cohort", str(tmp_path / "other")])
