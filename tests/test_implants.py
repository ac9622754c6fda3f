# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Implants: what is drawn is what the masks say, times follow the formula, and a seed fixes every voxel."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from bundle.data import read_cohort, split_cohort
from bundle.errors import InputError
from bundle.phantoms import PhantomParams, make_phantom
from bundle.phantoms.implants import DISEASES, Anatomy, ImplantParams, make_implant, outcomes
from scripts.make_implants import COLUMNS, main
from scripts.make_phantoms import main as make_phantoms

STILL = dict(rotation=0.0, scaling=0.0, elastic=0.0, offset=0.0, noise_hu=(0.0, 0.0), gravity=(0.0, 0.0))


@pytest.fixture(scope="module")
def anatomy():
    chest = make_phantom(9, np.random.default_rng(0), False, PhantomParams(size=64))
    return Anatomy(chest.image, chest.lung_mask, 321 / 64)


@pytest.fixture(scope="module")
def backgrounds(tmp_path_factory):
    """Five chests with lung masks, as a table of backgrounds."""
    out = tmp_path_factory.mktemp("chests")
    make_phantoms(["--complexity", "9", "--num", "5", "--size", "54", "--feature_fraction", "0", "--out", str(out)])
    return out / "cohort.csv"


def command(backgrounds, out, *more):
    return ["--backgrounds", str(backgrounds), "--spacing", "6", "--num", "10", "--out", str(out), *more]


@pytest.mark.parametrize("disease", DISEASES)
def test_masks_are_where_voxels_changed(anatomy, disease):
    params = ImplantParams(disease=disease, lookalikes=(), **STILL)
    healthy = make_implant(anatomy, np.random.default_rng(3), False, params)
    sick = make_implant(anatomy, np.random.default_rng(3), True, params)
    assert np.array_equal(healthy.image, anatomy.image) and not healthy.gt.any() and healthy.share == 0
    change = np.abs(sick.image.astype(int) - healthy.image)
    near = ndimage.binary_dilation(sick.gt, iterations=3)  # edges are soft
    assert change[~near].sum() < 0.02 * change.sum() and not change[~sick.lung].any()
    aerated = sick.gt & (healthy.image < -700)
    assert np.median(change[aerated]) > 30 and change[sick.gt].mean() > 10 * change[~sick.gt].mean()
    assert np.isclose(sick.share, sick.gt.sum() / sick.lung.sum()) and not (sick.gt & ~sick.lung).any()


def test_diseases_look_as_they_should(anatomy):
    def draw(disease):
        params = ImplantParams(disease=disease, lookalikes=(), count=(2, 2), **STILL)
        before, after = (make_implant(anatomy, np.random.default_rng(5), sick, params) for sick in (False, True))
        inside = after.gt & (before.image < -700)
        return before, after, after.image[inside].astype(float), before.image[inside].astype(float)

    before, _, inside, healthy = draw("emphysema")
    assert inside.mean() < healthy.mean() - 40 and inside.min() >= -1024
    _, fibrosis, inside, healthy = draw("fibrosis")
    assert inside.mean() > healthy.mean() + 60 and inside.std() > 2 * healthy.std()
    depth = ndimage.distance_transform_edt(fibrosis.lung) * anatomy.spacing
    assert depth[fibrosis.gt].max() < 28
    _, glass, inside, healthy = draw("ground_glass")
    assert 60 < inside.mean() - healthy.mean() < 300
    _, _, inside, healthy = draw("texture")
    assert abs(inside.mean() - healthy.mean()) < 15 and inside.std() > 1.5 * healthy.std()
    _, nodules, inside, _ = draw("nodules")
    assert np.median(inside) > -60
    volume = nodules.gt.sum() * anatomy.spacing**3
    assert 0.3 * 2 * 4 / 3 * np.pi * 5**3 < volume < 3 * 2 * 4 / 3 * np.pi * 10**3


def test_lookalikes_are_in_everyone_and_apart_from_what_kills(anatomy):
    params = ImplantParams(disease="nodules", lookalikes=("fibrosis", "emphysema"), lookalike_count=(2, 3))
    for sick in (False, True):
        scan = make_implant(anatomy, np.random.default_rng(1), sick, params)
        assert scan.confounder.any() and scan.gt.any() == sick and not (scan.gt & scan.confounder).any()
    assert ImplantParams(disease="nodules").others == ("emphysema", "fibrosis")


def test_deformation_moves_image_and_mask_alike(anatomy):
    params = ImplantParams(lookalikes=(), **{**STILL, "elastic": 4.0, "rotation": 4.0, "scaling": 0.05})
    scan = make_implant(anatomy, np.random.default_rng(2), False, params)
    assert (scan.lung != anatomy.lung).mean() > 0.01 and 0.7 < scan.lung.sum() / anatomy.lung.sum() < 1.4
    within = scan.image[ndimage.binary_erosion(scan.lung, iterations=2)]
    assert np.mean(within < -600) > 0.8 and scan.image.dtype == np.int16


def test_offset_noise_and_gravity(anatomy):
    plain = make_implant(anatomy, np.random.default_rng(2), False, ImplantParams(lookalikes=(), **STILL)).image.astype(float)

    def change(**given):
        params = ImplantParams(lookalikes=(), **{**STILL, **given})
        return make_implant(anatomy, np.random.default_rng(2), False, params).image - plain

    inside = (plain > -900) & (plain < 2000)
    assert abs(change(noise_hu=(40.0, 40.0))[inside].std() - 40) < 3
    assert np.ptp(change(offset=12.0)[inside]) == 0 and 0 < abs(change(offset=12.0)[inside].mean()) <= 12
    slope = change(gravity=(90.0, 90.0))
    back = np.flatnonzero(anatomy.lung.any((0, 2)))[:10]
    assert slope[:, back][anatomy.lung[:, back]].mean() > 15 and not slope[~anatomy.lung].any()


def test_same_seed_same_voxels(anatomy):
    one, two, other = (make_implant(anatomy, np.random.default_rng(seed), True) for seed in (4, 4, 5))
    for name in ("image", "lung", "gt", "confounder"):
        assert np.array_equal(getattr(one, name), getattr(two, name))
    assert not np.array_equal(one.image, other.image)


def test_times_follow_the_formula():
    share = np.linspace(0, 0.1, 4000)
    time, event, true = outcomes(share, 0, ImplantParams(noise=0.0, base=50.0, effect=14.0, last=1000.0))
    assert np.allclose(true, 50 * np.exp(-14 * share))
    assert np.array_equal(time[event == 1], true[event == 1]) and (time[event == 0] < true[event == 0]).all()
    _, _, noisy = outcomes(share, 0, ImplantParams(noise=0.5, base=50.0, effect=14.0))
    rest = np.log(noisy) - np.log(50) + 14 * share
    assert abs(rest.mean()) < 0.03 and abs(rest.std() - 0.5) < 0.02
    assert time.min() >= 1 and (outcomes(share, 0, ImplantParams())[0] <= 99).all()
    assert not np.array_equal(true, noisy) and np.array_equal(
        noisy, outcomes(share, 0, ImplantParams(noise=0.5, base=50.0, effect=14.0))[2]
    )


@pytest.mark.parametrize("censoring", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_censoring_is_the_share_asked_for(censoring):
    share = np.random.default_rng(0).uniform(0, 0.1, 200)
    params = ImplantParams(censoring=censoring, last=1e6)
    time, event, true = outcomes(share, 0, params)
    assert event.sum() == round((1 - censoring) * 200) and (time <= true).all()
    free = outcomes(share, 0, replace(params, censoring=None))
    assert np.array_equal(free[2], true) and free[0][free[1] == 0].min() >= 12 and free[0].max() <= max(84, true.max())


def test_command_line_writes_a_cohort_that_the_bundle_reads(backgrounds, tmp_path, capsys):
    args = command(backgrounds, tmp_path / "c", "--test_share", "0.3")
    main(args)
    table = pd.read_csv(tmp_path / "c" / "cohort.csv")
    assert tuple(table) == COLUMNS and len(table) == 10 and (table.share > 0).sum() == 7
    parts = split_cohort(read_cohort(tmp_path / "c" / "cohort.csv"))
    assert [len(parts[name]) for name in ("train", "val", "test")] == [6, 1, 3]
    tested = set(table.anatomy[table.split == "test"])
    assert tested and not tested & set(table.anatomy[table.split != "test"]) and table.anatomy.nunique() == 5
    for row in table.itertuples():
        image, lung, gt = (nib.load(tmp_path / "c" / name) for name in (row.image, row.lung_mask, row.gt_mask))
        assert image.get_data_dtype() == np.int16 and np.allclose(image.header.get_zooms(), 6)
        assert np.array_equal(image.affine, lung.affine) and image.shape == gt.shape
        assert np.isclose((np.asarray(gt.dataobj) > 0).sum() / (np.asarray(lung.dataobj) > 0).sum(), row.share, atol=1e-6)
    assert (tmp_path / "c" / "implants.png").stat().st_size > 10_000
    # the anatomy stays where it was in the scanner's space
    first = nib.load(tmp_path / "c" / "anatomies" / f"{table.anatomy[0]}_lung.nii.gz")
    theirs = pd.read_csv(backgrounds).set_index("patient_id").lung_mask[table.anatomy[0]]
    original = nib.load(backgrounds.parent / theirs)
    centres = [nib.affines.apply_affine(m.affine, np.argwhere(np.asarray(m.dataobj) > 0).mean(0)) for m in (first, original)]
    assert np.allclose(*centres, atol=3)

    stamp = (tmp_path / "c" / table.image[0]).stat().st_mtime_ns
    main(args)
    assert "already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="disease differ"):
        main([*args, "--disease", "nodules"])
    # what a stopped run left is kept
    (tmp_path / "c" / "cohort.csv").unlink()
    (tmp_path / "c" / "scans" / f"{table.patient_id[3]}.json").unlink()
    main(args)
    assert pd.read_csv(tmp_path / "c" / "cohort.csv").equals(table)
    assert (tmp_path / "c" / table.image[0]).stat().st_mtime_ns == stamp


def test_several_processes_write_the_same_cohort(backgrounds, tmp_path):
    for jobs in ("1", "2"):
        main(command(backgrounds, tmp_path / jobs, "--jobs", jobs, "--num", "4"))
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*") if path.is_file())
    assert len(files) > 4 * 5
    for name in files:
        if name.suffix != ".png":
            assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name


def test_test_anatomies_may_be_named(backgrounds, tmp_path):
    names = list(pd.read_csv(backgrounds).patient_id)
    main(command(backgrounds, tmp_path / "c", "--test_anatomies", names[1], names[3]))
    table = pd.read_csv(tmp_path / "c" / "cohort.csv")
    assert set(table.anatomy[table.split == "test"]) == {names[1], names[3]}
    main(command(backgrounds, tmp_path / "d", "--test_anatomies", "none", "--num", "2"))
    assert "test" not in set(pd.read_csv(tmp_path / "d" / "cohort.csv").split)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--disease", "measles"], "invalid choice"),
        (["--num", "1"], "num is 1"),
        (["--diseased", "1.5"], "diseased is 1.5"),
        (["--radius", "20", "10"], "radius is 20.0 10.0"),
        (["--noise", "-1"], "noise is -1"),
        (["--censoring", "2"], "censoring is 2"),
        (["--lookalikes", "fibrosis"], "lookalikes has fibrosis"),
        (["--test_anatomies", "nobody"], "test_anatomies has nobody"),
        (["--backgrounds", "nowhere.csv"], "nowhere.csv"),
        (["--spacing", "0"], "spacing is 0"),
    ],
)
def test_bad_arguments_are_one_sentence(backgrounds, tmp_path, args, message):
    line = [sys.executable, "-m", "scripts.make_implants", *command(backgrounds, tmp_path / "c"), *args]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode and "error: " in done.stderr and message in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "c" / "cohort.csv").exists()


def test_all_anatomies_tested_or_an_empty_lung_is_refused(backgrounds, tmp_path, anatomy):
    names = list(pd.read_csv(backgrounds).patient_id)
    with pytest.raises(SystemExit, match="at least one to train on"):
        main(command(backgrounds, tmp_path / "c", "--test_anatomies", *names))
    with pytest.raises(InputError, match="lung mask is empty"):
        make_implant(replace(anatomy, lung=np.zeros_like(anatomy.lung)), np.random.default_rng(0), True)


def test_lungs_stay_within_the_scan():
    """Near the lower end a deformation would cut them off, and the quality gate refuse the scan."""
    lung = np.zeros((32, 32, 40), bool)
    lung[6:26, 6:26, 1:38] = True
    anatomy = Anatomy(np.where(lung, -850, 40).astype(np.int16), lung, 6.0)
    params = ImplantParams(lookalikes=(), elastic=8.0, scaling=0.1)
    masks = [make_implant(anatomy, np.random.default_rng(i), False, params).lung for i in range(8)]
    ends = [max(mask[:, :, end].sum() for end in (0, -1)) / mask.sum((0, 1)).max() for mask in masks]
    assert max(ends) <= 0.25
