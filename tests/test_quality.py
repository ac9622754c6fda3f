# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose

from bundle.errors import InputError, input_error_of
from bundle.phantoms.chest import Chest
from bundle.phantoms.cohort import make_phantom
from bundle.phantoms.cubes import PhantomParams
from bundle.transforms import QualityGated, check_quality

from .conftest import write_scan

MM = Chest.FIELD / 65


@pytest.fixture(scope="module")
def chest() -> tuple[np.ndarray, np.ndarray]:
    """A chest phantom, a little below 5 mm: HU and its lungs."""
    phantom = make_phantom(9, np.random.default_rng(0), True, PhantomParams(size=65))
    return phantom.image.astype(np.float32), phantom.lung_mask > 0


def judge(hu, lung, spacing=(MM, MM, MM), **kwargs) -> tuple[str, str]:
    faults, notes = check_quality(hu, lung, spacing, kwargs.pop("on_file", spacing), **kwargs)
    return "; ".join(faults), "; ".join(notes)


def test_a_chest_passes_without_a_word(chest):
    assert judge(*chest) == ("", "")


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda hu: hu + 250, "fat and soft tissue peak at 290 HU"),
        (lambda hu: np.minimum(hu, -310), "0.0 % of the voxels are in -300 to 300 HU"),
        (lambda hu: np.where(hu < -500, 0, hu), "the median in the lung mask is 0 HU"),
        (lambda hu: np.where(hu < -500, -1024, hu), "the median in the lung mask is -1024 HU"),
    ],
)
def test_values_that_are_no_chest_in_hu(chest, change, fault):
    assert fault in judge(change(chest[0]), chest[1])[0]


def test_lungs_that_are_cut(chest):
    hu, lung = chest
    k = np.flatnonzero(lung.any((0, 1)))
    middle, near_end = (k[0] + k[-1]) // 2, k[-1] - 1
    faults, _ = judge(hu[:, :, :middle], lung[:, :, :middle])
    assert "the lungs are cut at the upper end (" in faults and "(expected them whole)" in faults
    faults, _ = judge(hu[:, :, middle:], lung[:, :, middle:])
    assert "cut at the lower end" in faults
    faults, notes = judge(hu[:, :, :near_end], lung[:, :, :near_end])
    assert not faults and "cut at the upper end" in notes
    x = np.flatnonzero(lung.any((1, 2)))
    assert "cut at the left side" in judge(hu[x[0] + 6 :], lung[x[0] + 6 :])[0]  # in RAS the first is leftmost
    y = np.flatnonzero(lung.any((0, 2)))
    assert "cut at the front" in judge(hu[:, : y[-1] - 5], lung[:, : y[-1] - 5])[0]


def test_volume_and_voxels(chest):
    hu, lung = chest
    litres = lung.sum() * MM**3 / 1e6
    assert f"lung volume is {litres / 8:.2f} L (expected 0.8 to 10 L)" in judge(hu, lung, (MM / 2,) * 3)[0]
    assert f"lung volume is {litres * 8:.2f} L" in judge(hu, lung, (MM * 2,) * 3)[0]
    assert judge(hu, lung, (MM / 2,) * 3, lung_litres=(0.2, 10)) == ("", "")
    assert "voxels are 12 mm long (expected at most 10 mm)" in judge(hu, lung, on_file=(1, 1, 12))[0]
    assert judge(hu, lung, on_file=(1, 1, 8)) == ("", "slices 8 mm apart, small lesions may be missed")


def test_hints(chest):
    hu, lung = chest
    metal = hu.copy()
    metal[30:33, 50:52, 30:32] = 3000
    faults, notes = judge(metal, lung)
    assert not faults and f"metal ({12 * MM**3 / 1000:.1f} mL above 2500 HU)" in notes
    moved = hu.copy()
    moved[:, :, 32:] = np.roll(moved[:, :, 32:], 3, axis=0)
    faults, notes = judge(moved, np.roll(lung, 1, 0))
    assert not faults and "a jump between neighbouring slices" in notes
    half = lung.copy()
    half[32:] = False
    assert "only one lung is seen" in judge(hu, half)[1]


def scan(hu, lung, source="given", **more) -> dict:
    affine = torch.diag(torch.tensor([MM, MM, MM, 1.0], dtype=torch.float64))
    image = MetaTensor(
        torch.as_tensor(hu)[None], affine=affine, meta={"original_affine": affine, "filename_or_obj": "a.nii"}
    )
    mask = MetaTensor(torch.as_tensor(lung)[None].float(), affine=affine)
    return {"patient_id": "P7", "image": image, "lung": mask, "lung_mask_source": source, **more}


def test_the_transform(chest):
    hu, lung = chest
    assert QualityGated()(scan(hu, lung))["notes"] == "contrast phase unknown"
    known = QualityGated()(scan(hu, lung, notes="contrast agent given"))
    assert known["notes"] == "contrast agent given" and torch.equal(known["image"], torch.as_tensor(hu)[None])
    with pytest.raises(InputError, match=r"patient P7, image a.nii: not a chest CT.*upper end.*\(lung mask: threshold\)"):
        QualityGated()(scan(hu[:, :, :32], lung[:, :, :32], "threshold"))
    unseen = scan(hu[:, :, :5], np.ones((65, 65, 5)), "none")
    assert QualityGated()(unseen) == unseen


def test_limits_are_two_volumes_and_a_length(chest):
    hu, lung = chest
    small = scan(hu, lung, notes="")
    small["image"].affine = small["lung"].affine = torch.diag(torch.tensor([MM / 2, MM / 2, MM / 2, 1.0]))
    with pytest.raises(InputError, match="lung volume"):
        QualityGated()(small)
    assert QualityGated(lung_litres=[0.2, 10])(small)["lung"] is small["lung"]
    for limits, says in (
        ({"lung_litres": 5}, r"lung_litres is 5 \(expected two ascending volumes in litres, such as \[0.8, 10\]\)"),
        ({"lung_litres": [10, 0.3]}, r"lung_litres is \[10, 0.3\]"),
        ({"lung_litres": "abc"}, "lung_litres is 'abc'"),
        ({"max_spacing": "x"}, r"max_spacing is 'x' \(expected a number of mm above 0\)"),
    ):
        with pytest.raises(InputError, match=says):
            QualityGated(**limits)


def load(config: str, **record: str) -> dict:
    """What a config's preprocessing makes of a record."""
    parser = ConfigParser()
    parser.read_config(config)
    try:
        return Compose(parser.get_parsed_content("load_transforms"))(record)
    except Exception as e:
        raise (input_error_of(e) or e) from None


def test_real_chests_pass_and_an_abdomen_does_not(shared_data):
    ct = shared_data / "ct"
    notes = {
        path: load("configs/train.json", patient_id="P7", image=str(path))["notes"]
        for path in (
            ct / "chest_lungpetctdx_A0001_ct.nii.gz",
            shared_data / "dicom_lungpetctdx_A0002_B40f",
            ct / "chest_pyradiomics_lung1_ct.nrrd",
            ct / "chest_cip_64_lowres_ct.nrrd",
            ct / "rightlung_elastix_ct.mha",
        )
    }
    a0001, a0002, pyradiomics, cip, right = notes.values()
    assert "metal" in a0001  # three electrodes on the skin
    assert "slices 8 mm apart" in a0002
    assert "lungs are cut at the lower end" in pyradiomics
    assert cip == "contrast phase unknown"
    assert "only one lung is seen" in right
    with pytest.raises(InputError, match="NOTchest.*not a chest CT|lung mask .* is empty"):
        load("configs/train.json", patient_id="P7", image=str(ct / "NOTchest_abdomenpelvis_totalsegmentator_ct.nii.gz"))


def test_the_demo_passes(root):
    assert (
        "contrast phase unknown"
        in load("configs/train.json", patient_id="P7", image=str(root / "demo" / "chest_ct.nii.gz"))["notes"]
    )


def test_predictions_say_what_the_gate_saw(chest, tmp_path):
    from .commands import run

    hu, lung = chest
    affine = np.diag([MM, MM, MM, 1])
    for name, end in (("good", 64), ("cut", 32)):
        write_scan(tmp_path / f"{name}.nii.gz", np.where(hu > 400, 3000, hu)[:, :, :end], affine)
        write_scan(tmp_path / f"{name}_lung.nii.gz", lung[:, :, :end], affine)
    rows = "good,good.nii.gz,good_lung.nii.gz\ncut,cut.nii.gz,cut_lung.nii.gz\n"
    (tmp_path / "cohort.csv").write_text(f"patient_id,image,lung_mask\n{rows}")
    with pytest.raises(InputError, match="1 of 2 scans failed"):
        run("configs/inference.json", cohort=str(tmp_path / "cohort.csv"), output_dir=str(tmp_path / "out"), shifts=1)
    good, cut = pd.read_csv(tmp_path / "out" / "predictions.csv").to_dict("records")
    assert good["status"] == "ok" and "metal" in good["message"] and "contrast phase unknown" in good["message"]
    assert cut["status"] == "failed" and "cut at the upper end" in cut["message"]
    assert "streaks may mislead the map" in (tmp_path / "out" / "reports" / "good.html").read_text()
    assert "cut at the upper end" in (tmp_path / "out" / "cohort.html").read_text()
