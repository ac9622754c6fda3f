# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Phantoms hold what they promise: geometry, times, masks that exclude each other, seeds that fix every voxel."""

from __future__ import annotations

import hashlib
import json
from itertools import product

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from lifelines import KaplanMeierFitter
from lifelines.utils import concordance_index
from scipy import ndimage

from bundle.errors import InputError
from bundle.phantoms import PHANTOMS, PhantomCohort, PhantomParams, make_phantom
from scripts.make_phantoms import main

from .conftest import ROOT

SMALL = PhantomParams(size=32)
DIGESTS = {  # of four scans of 32 voxels a side, seed 3
    "central-sphere": "66b7a953f2ed22e6",
    "spheres": "acad2b1bc25040da",
    "honeycomb": "cbb6a02eb3829c6f",
    "corner-sphere": "d442f3a291453703",
    "spheres-honeycomb": "2bf3a715397b3f80",
    "spheres-honeycomb-corner": "126fb1f8ad4f9fbe",
    "counted-spheres": "bde0cd8e378fd165",
    "texture": "4db2a6fd8f77b0af",
    "chest": "ea33cdabbbb4a906",
    "harmless-honeycomb": "38f11a508cacabab",
    "mild-severe": "df75cf4b20fc7cb3",
    "faint-spheres": "28b0fabbf4b9ac9f",
    "protective-honeycomb": "7120986c0c814b17",
}


def draw(number: int, dies: bool, index: int = 0, params: PhantomParams = SMALL):
    return make_phantom(number, np.random.default_rng([7, number, index]), dies, params)


@pytest.mark.parametrize("name", PHANTOMS)
def test_a_seed_fixes_every_voxel_by_name_and_number_whatever_the_number_of_scans(name):
    scans, digest = dict(PhantomCohort(name, 4, 3, params=SMALL)), hashlib.sha256()
    for patient_id, p in scans.items():
        risk = "" if p.true_risk is None else f"{p.true_risk:.4g}"
        digest.update(f"{patient_id} {p.time:.4g} {p.event} {risk}".encode())
        digest.update(p.image.tobytes())
        for mask in (p.gt_mask, p.confounder_mask, p.gt_filled_mask, p.lung_mask, p.gt_severe_mask):
            digest.update(b"-" if mask is None else np.packbits(mask).tobytes())
    assert digest.hexdigest()[:16] == DIGESTS[name]
    number = PHANTOMS[name].number
    for patient_id, p in PhantomCohort(number, 2, 3, params=SMALL):
        assert (p.image == scans[patient_id].image).all() and (p.gt_mask == scans[patient_id].gt_mask).all()
    other = next(iter(PhantomCohort(str(number), 1, 4, params=SMALL)))[1]
    assert (other.image != scans[f"phantom{number}_seed3_0000"].image).any()


@pytest.mark.parametrize("number", range(1, 10))
def test_masks_time_and_event(number):
    for index in range(3):
        dead, alive = (draw(number, dies, index) for dies in (True, False))
        assert dead.image.dtype == np.int16 and dead.image.shape == (32, 32, 32)
        assert dead.event == 1 and 1 <= dead.time <= 60 and dead.gt_mask.any()
        assert alive.event == 0 and alive.time == 99 and not alive.gt_mask.any()
        for p in (dead, alive):
            assert (p.confounder_mask is not None) == (number in (5, 6, 9))
            if p.confounder_mask is not None:
                assert not (p.gt_mask & p.confounder_mask).any()
            assert (p.lung_mask is not None) == (number == 9)
        assert (dead.gt_filled_mask is not None) or number != 3


def test_spheres_are_drawn_where_the_mask_says_and_set_the_time():
    for index in range(4):
        p = draw(1, True, index, PhantomParams(size=64))
        radius = 34 - p.time
        inside = sum((x - 32) ** 2 + (y - 32) ** 2 + (z - 32) ** 2 < radius**2 for x, y, z in product(range(64), repeat=3))
        assert p.gt_mask.sum() == inside
        assert np.isclose(inside, 4 / 3 * np.pi * radius**3, rtol=0.02)
        assert (p.image[p.gt_mask] == 0).all() and p.image[~p.gt_mask].max() < -700
        p = draw(2, True, index)
        assert np.isclose(p.time, np.clip(40 - 160 * p.gt_mask.mean(), 2, 40))


def test_average_brightness_sphere_has_no_noise_of_its_own():
    p = draw(4, True)
    assert (p.image[p.gt_mask] == -800).all()
    assert abs(p.image[~p.gt_mask].mean() + 800) < 0.5 and np.isclose(p.image[~p.gt_mask].std(), 8, rtol=0.05)


def test_honeycomb_walls_are_thin_and_their_inside_is_in_the_filled_mask():
    p = draw(3, True, params=PhantomParams(size=64))
    assert (p.gt_filled_mask >= p.gt_mask).all() and p.gt_filled_mask.sum() > 1.5 * p.gt_mask.sum()
    assert (p.image[p.gt_mask] == 0).all()
    assert p.image[p.gt_filled_mask & ~p.gt_mask].max() < -700


def test_what_the_corner_sphere_hides_is_no_cause():
    found = 0
    for index in range(12):
        p = draw(6, True, index)
        x = (np.arange(32) - 32.0) ** 2
        corner = x[:, None, None] + x[None, :, None] + x[None, None, :] < 12.5**2
        assert p.confounder_mask[corner].all() and not p.gt_mask[corner].any()
        found += p.gt_mask.any()
    assert found == 12


def similarity(image, mask):
    """Correlation of neighbouring voxels of the mask."""
    pairs = mask[1:] & mask[:-1]
    return abs(np.corrcoef(image[1:][pairs], image[:-1][pairs])[0, 1])


@pytest.mark.parametrize("number, off", [(8, 0.2), (11, 1)])
def test_texture_differs_only_in_its_correlation(number, off):
    found = 0
    for index in range(8):
        p = draw(number, True, index, PhantomParams(size=64))
        image = p.image.astype(float)
        smooth = p.gt_mask if number == 8 else p.gt_severe_mask
        other = ~p.gt_mask if number == 8 else p.gt_mask & ~p.gt_severe_mask
        if smooth.any() and other.any():
            found += 1
            assert abs(image[smooth].mean() - image[other].mean()) < off > abs(image[smooth].std() - image[other].std())
            assert similarity(image, smooth) > 0.7 > 0.1 > similarity(image, other)
    assert found >= 2


def test_more_spheres_mean_a_shorter_life():
    rows = []
    for index in range(40):
        p = draw(7, True, index, PhantomParams(size=32, small_radius=(8.0, 9.0)))
        rows.append((ndimage.label(p.gt_mask)[1], p.time))
    counts, times = np.array(rows).T
    assert np.corrcoef(counts, times)[0, 1] < -0.5


def test_chest_is_a_chest():
    params = PhantomParams(size=64)
    p = draw(9, True, params=params)
    lung, mm = p.lung_mask, 5.0
    assert 2.5e6 < lung.sum() * mm**3 < 7e6  # 2.5 to 7 litres
    assert (lung >= p.gt_mask).all() and (lung >= p.confounder_mask).all()
    healthy = lung & ~p.gt_mask & ~p.confounder_mask
    assert -900 < np.median(p.image[healthy]) < -780
    assert p.image[0, 0, 0] < -950 and p.image.max() > 250
    assert p.image[p.gt_mask].std() > 2 * p.image[p.confounder_mask & (p.image < -300)].std()
    spine = p.image[24:40, :12, 20:40].max(), p.image[24:40, -12:, 20:40].max()
    assert spine[0] > spine[1]  # at the back


def test_feature_fraction_is_the_share_of_deaths():
    for fraction, deaths in ((0.0, 0), (0.1, 1), (0.5, 5), (0.9, 9), (1.0, 10)):
        assert sum(p.event for _, p in PhantomCohort(2, 10, 0, fraction, SMALL)) == deaths


@pytest.mark.parametrize("number", (10, 11, 12, 13))
def test_drawn_outcomes_follow_the_true_risk_but_not_exactly(number):
    cohort = [p for _, p in PhantomCohort(number, 400, 0, params=PhantomParams(size=16))]
    risk, time, event = np.array([(p.true_risk, p.time, p.event) for p in cohort]).T
    assert 0.6 < event.mean() < 0.85 and time.min() >= 1 and time.max() <= 98
    assert 0.68 < concordance_index(time, -risk, event) < 0.85
    # With no lesion the time of death is Weibull with shape 1.5 and scale 80: half of the patients live 62.7 months.
    curve = KaplanMeierFitter().fit(time * np.exp(risk), event)
    assert 50 < curve.median_survival_time_ < 75


def test_risk_is_what_is_drawn():
    lesions = 0
    for index in range(8):
        ten, eleven, thirteen = (draw(c, False, index) for c in (10, 11, 13))
        assert np.isclose(ten.true_risk, 20 * ten.gt_mask.mean()) and ten.gt_severe_mask is None
        mild = eleven.gt_mask & ~eleven.gt_severe_mask
        assert not (eleven.gt_severe_mask & ~eleven.gt_mask).any()
        assert np.isclose(eleven.true_risk, 10 * (mild.mean() + 3 * eleven.gt_severe_mask.mean()))
        assert np.isclose(thirteen.true_risk, 20 * thirteen.gt_mask.mean() + 0.5 - thirteen.confounder_mask.any())
        assert not (ten.gt_mask & ten.confounder_mask).any()
        lesions += ten.gt_mask.any()
    assert 4 <= lesions


@pytest.mark.parametrize("contrast", [0.5, 2.0])
def test_faint_lesions_have_the_contrast_to_noise_asked_for(contrast):
    p = next(p for i in range(9) if (p := draw(12, False, i, PhantomParams(contrast=contrast))).gt_mask.any())
    inside, outside = p.image[p.gt_mask].astype(float), p.image[~p.gt_mask].astype(float)
    assert np.isclose((inside.mean() - outside.mean()) / outside.std(), contrast, atol=0.05)


def test_lengths_grow_with_the_size():
    small, large = (draw(1, True, params=PhantomParams(size=size)) for size in (32, 64))
    assert np.isclose(small.gt_mask.mean(), large.gt_mask.mean(), rtol=0.1) and small.time == large.time


def test_command_line_writes_a_cohort_once(tmp_path, capsys):
    args = ["--complexity", "5", "--num", "4", "--size", "32", "--out", str(tmp_path / "c")]
    main(args)
    args[:2] = ["--phantom", "spheres-honeycomb"]
    table = pd.read_csv(tmp_path / "c" / "cohort.csv")
    assert list(table) == ["patient_id", "image", "time", "event", "simulated", "gt_mask", "confounder_mask"]
    assert table.event.sum() == 2
    image = nib.load(tmp_path / "c" / table.image[0])
    mask = nib.load(tmp_path / "c" / table.gt_mask[0])
    assert image.shape == mask.shape == (32, 32, 32) and image.header.get_zooms() == (3, 3, 3)
    assert image.get_data_dtype() == np.int16
    stamp = (tmp_path / "c" / table.image[0]).stat().st_mtime_ns
    main(args)
    assert "already" in capsys.readouterr().out
    assert (tmp_path / "c" / table.image[0]).stat().st_mtime_ns == stamp
    with pytest.raises(SystemExit, match="seed differ"):
        main([*args, "--seed", "1"])


def test_clinical_columns_know_the_outcome_and_leave_the_scans_alone(tmp_path):
    args = ["--phantom", "spheres", "--num", "4", "--size", "16"]
    main([*args, "--out", str(tmp_path / "plain")])
    main([*args, "--out", str(tmp_path / "c"), "--clinical"])
    plain, table = (pd.read_csv(tmp_path / name / "cohort.csv") for name in ("plain", "c"))
    named = json.loads((ROOT / "configs" / "clinical" / "fibrosis.json").read_text())["clinical"]
    assert list(table) == [*plain, *named] and table[list(plain)].equals(plain)
    for name in plain.image:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    with pytest.raises(SystemExit, match="clinical differ"):
        main([*args, "--out", str(tmp_path / "c")])
    for number in (2, 10):
        rows, cohort = [], PhantomCohort(number, 300, 0, params=PhantomParams(size=16))
        for i, (_, phantom) in enumerate(cohort):
            risk = -phantom.time if phantom.true_risk is None else phantom.true_risk
            rows.append({**cohort.covariates(i, phantom), "risk": risk})
        assert cohort.covariates(i, phantom) == {k: v for k, v in rows[-1].items() if k != "risk"}
        drawn = pd.DataFrame(rows).replace("", np.nan)
        missing = drawn.isna().mean()
        assert 0.1 < missing.dlco_percent < 0.35 and 0 < missing.fvc_percent < missing.smoking < 0.2
        assert missing[["age", "sex", "antifibrotic", "risk"]].max() == 0
        ranks = drawn[["age", "fvc_percent", "dlco_percent", "risk"]].astype(float).corr("spearman").risk
        assert 0.1 < ranks.age < 0.5 and -0.7 < ranks.fvc_percent < -0.2 and -0.7 < ranks.dlco_percent < -0.2


@pytest.mark.parametrize(
    "args, message",
    [
        (["--complexity", "14"], "no phantom 14; expected 1 to 13 or one of central-sphere, spheres, honeycomb,"),
        (["--phantom", "cheest"], "no phantom cheest"),
        (["--phantom", "2", "--num", "0"], "num is 0"),
        (["--phantom", "2", "--feature_fraction", "1.5"], "feature_fraction is 1.5"),
        (["--phantom", "2", "--size", "8"], "size is 8"),
        (["--phantom", "2", "--noise", "-1"], "noise is -1"),
        (["--phantom", "2", "--spacing", "0"], "--spacing is 0"),
        (["--num", "4"], "--phantom and --out are needed"),
    ],
)
def test_bad_arguments_are_one_sentence(tmp_path, args, message):
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main([*args, "--out", str(tmp_path / "c")])
    assert not (tmp_path / "c" / "cohort.csv").exists()


def test_several_processes_write_the_same_cohort(tmp_path):
    found = []
    for jobs in "12":
        main(["--phantom", "honeycomb", "--num", "3", "--size", "16", "--jobs", jobs, "--out", str(tmp_path / jobs)])
        files = sorted(path for path in (tmp_path / jobs).rglob("*") if path.is_file())
        # The header of a .gz holds the time of writing.
        read = [np.asarray(nib.load(f).dataobj).tobytes() if f.suffix == ".gz" else f.read_bytes() for f in files]
        found.append(dict(zip([str(f.relative_to(tmp_path / jobs)) for f in files], read, strict=True)))
    assert found[0] == found[1] and len(found[0]) == 3 + 3 + 3 + 2  # images, two kinds of mask, cohort.csv, phantoms.json


def test_what_does_not_fit_into_the_cube_is_refused():
    for name in ("central_radius", "corner_radius", "sphere_radius", "small_radius", "lesion_radius", "bubble_layers"):
        with pytest.raises(InputError, match=name):
            PhantomParams(**{name: (10, 40)})
    with pytest.raises(InputError, match="sphere_radius"):
        PhantomParams(sphere_radius=(20.0, 10.0))
