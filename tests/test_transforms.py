# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    CropForegroundd,
    DivisiblePadd,
    Invertd,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
    SpatialResample,
)
from scipy.spatial.transform import Rotation

from bundle.errors import InputError
from bundle.maps import GridShiftInferer
from bundle.transforms import LoadCTd, LungMaskd, RandOrigind, check_hu, check_preprocessing

from .bad_scans import KINDS
from .dicom_files import write_series

SHAPE = (12, 10, 8)


def hu(shape=SHAPE, seed=0) -> np.ndarray:
    """Air, and in it a block of soft tissue; integers."""
    values = np.random.default_rng(seed).normal(-900, 20, shape).round()
    values[tuple(slice(n // 4, n // 2) for n in shape)] += 940
    return values.astype(np.int16)


def save(path, values, affine=None) -> str:
    nib.save(nib.Nifti1Image(values, np.diag([2.0, 2.0, 3.0, 1.0]) if affine is None else affine), path)
    return str(path)


def fault_of(image: str, **masks: str) -> str:
    with pytest.raises(InputError) as caught:
        LoadCTd()({"patient_id": "P7", "image": image, **masks})
    message = str(caught.value)
    assert "P7" in message and "\n" not in message
    assert any(file in message for file in (image, *masks.values()))
    return message


# --- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".mhd", ""])
def test_all_formats_give_the_same_volume_in_the_same_place(tmp_path, suffix):
    values, spacing, origin = hu(), (0.8, 0.7, 2.5), (-5.0, 7.0, 100.0)  # origin in LPS, as DICOM and ITK have it
    path = tmp_path / f"scan{suffix}"
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = -origin[0], -origin[1], origin[2]
    if suffix.startswith(".nii"):
        save(path, values, affine)
    elif suffix:
        image = itk.image_from_array(np.ascontiguousarray(values.T))
        image.SetSpacing(spacing)
        image.SetOrigin(origin)
        itk.imwrite(image, str(path))
    else:
        write_series(path, values, spacing, origin)

    image = LoadCTd()({"patient_id": "P7", "image": str(path)})["image"]
    assert image.shape == (1, *SHAPE) and image.dtype == (torch.int16 if suffix else torch.float32)  # DICOM has slopes
    np.testing.assert_array_equal(image[0].numpy(), values)
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)
    np.testing.assert_allclose(image.meta["original_affine"], affine, atol=1e-5)
    assert tuple(image.meta["spatial_shape"]) == SHAPE


def test_a_nifti_that_does_not_say_how_it_lies_is_noted(tmp_path):
    path = save(tmp_path / "scan.nii.gz", hu())
    assert LoadCTd()({"patient_id": "P7", "image": path})["notes"] == ""
    image = nib.load(path)
    image.header["sform_code"] = image.header["qform_code"] = 0
    nib.save(nib.Nifti1Image(hu(), None, image.header), path)
    assert "left and right are a guess" in LoadCTd()({"patient_id": "P7", "image": path})["notes"]


def test_padding_becomes_air_and_masks_become_zero_or_one(tmp_path):
    values = hu()
    values[0] = -3024
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:5], mask[5:7] = 3, 255
    out = LoadCTd()(
        {"image": save(tmp_path / "i.nii.gz", values), "gt_mask": save(tmp_path / "m.nii.gz", mask), "time": 3.0}
    )
    assert (out["image"][0, 0] == -1024).all() and float(out["image"].min()) == -1024
    np.testing.assert_array_equal(out["gt_mask"][0].numpy(), mask > 0)
    assert "lung_mask" not in out and out["time"] == 3.0
    # A single trailing volume is still a 3-D scan.
    assert LoadCTd()({"image": save(tmp_path / "one.nii.gz", hu()[..., None])})["image"].shape == (1, *SHAPE)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("no such file", "does not exist"),
        ("truncated .nii", "truncated"),
        ("truncated .nii.gz", "truncated"),
        ("truncated .nrrd", "truncated"),
        ("truncated .mha", "truncated"),
        ("text named .nii.gz", "is text (expected gzip-compressed NIfTI)"),
        ("2-D", "is 2-D, 24 x 20"),
        ("4-D, .nii.gz", "several volumes or channels, 24 x 20 x 16 x 2"),
        ("two slices, .nrrd", "expected at least 3 slices, rows and columns"),
        ("NaN among the voxels", "2 voxels are NaN or infinite"),
        ("infinity among the voxels, .mha", "1 voxel is NaN or infinite"),
        ("spacing in metres", "0.002 x 0.002 x 0.003 mm"),
        ("huge spacing", "2 x 2 x 300 mm (expected 0.1 to 20 mm)"),
        ("two axes that are the same", "sheared by 90 degrees"),
        ("an empty folder", "no DICOM series"),
        ("DICOM: slices missing in the middle", "3 slices missing"),
        ("HU windowed to a picture of 0 to 255", "8-bit"),
        ("HU + 1024", "HU + 1024"),
    ],
)
def test_a_bad_scan_is_refused_in_one_sentence(tmp_path, kind, says):
    assert says in fault_of(str(KINDS[kind](tmp_path)))


# --- Hounsfield units ----------------------------------------------------------------------------------------------


def tissue(seed=0) -> torch.Tensor:
    """A third each of air, lung and soft tissue."""
    rng = np.random.default_rng(seed)
    parts = [rng.normal(mean, sd, 5000) for mean, sd in ((-1000, 10), (-850, 60), (40, 30))]
    return torch.from_numpy(np.concatenate(parts)).round()


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("8-bit", lambda x: (x.clamp(-1000, 400) + 1000) / 1400 * 255, "8-bit picture"),
        ("0..1", lambda x: (x.clamp(-1000, 400) + 1000) / 1400, "8-bit picture or scaled"),
        ("thousandths", lambda x: x / 1000, "8-bit picture or scaled"),
        ("no intercept", lambda x: (x + 1024).clamp_min(0), "look like HU + 1024"),
        ("no intercept, padded", lambda x: torch.cat([x + 1024, torch.full((9000,), -2000.0)]), "like HU + 1024"),
        ("intercept twice", lambda x: x - 1024, "applied twice"),
        ("slope twice", lambda x: x * 2, "applied twice"),
        ("half the slope", lambda x: x * 0.5, "no air"),
        ("MR", lambda x: x - x.min() + 5000, "no air"),
        ("overflow", lambda x: torch.cat([x, torch.tensor([65535.0])]), "beyond -4000..32000"),
    ],
)
def test_not_hounsfield_units(name, wrong, says):
    assert check_hu(tissue()) is None
    assert says in check_hu(wrong(tissue()))


def test_ct_with_padding_and_phantoms_are_hounsfield_units():
    for padding in (-1024, -2048, -3024):
        assert check_hu(torch.cat([tissue(), torch.full((8000,), float(padding))])) is None
    noise = -800 + 40 * 0.2 * torch.randn(20000)
    assert check_hu(noise.round()) is None
    noise[:500] += 40 * 20
    assert check_hu(noise.round()) is None


# --- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["lung_mask", "gt_mask", "confounder_mask"])
def test_a_mask_of_another_grid_is_refused(tmp_path, column):
    image = save(tmp_path / "image.nii.gz", hu())
    smaller = save(tmp_path / "smaller.nii.gz", np.ones((12, 10, 7), np.uint8))
    message = fault_of(image, **{column: smaller})
    assert "the mask has 12 x 10 x 7 voxels, the image 12 x 10 x 8" in message and column in message

    for change in ((0, 3), (2, 2)):  # moved by 1 mm; slices 1 mm thicker
        affine = np.diag([2.0, 2.0, 3.0, 1.0])
        affine[change] += 1.0
        assert "the mask's affine is" in fault_of(image, **{column: save(tmp_path / "m.nii.gz", hu() * 0, affine)})

    rounded = np.diag([2.0, 2.0, 3.0, 1.0])
    rounded[0, 3] += 1e-4  # as different file formats round
    assert LoadCTd()({"image": image, column: save(tmp_path / "m.nii.gz", hu() * 0 + 1, rounded)})[column].all()


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0), (0, 1, 2)])
@pytest.mark.parametrize("hounsfield", [True, False])
def test_a_mask_of_the_same_grid_may_have_its_axes_in_another_order(tmp_path, order, hounsfield):
    """A mask for a scan, or for a heat map."""
    affine = np.array([[-2.0, 0, 0, 5], [0, 2, 0.1, 6], [0, 0, 3, 7], [0, 0, 0, 1]])
    image = nib.Nifti1Image(hu(), affine)
    mask = nib.Nifti1Image((hu() > 0).astype(np.uint8), affine)
    turned = mask.as_reoriented(np.array([[axis, side] for axis, side in zip(order, (-1, 1, -1))]))
    nib.save(image, tmp_path / "image.nii.gz")
    nib.save(turned, tmp_path / "mask.nii.gz")
    record = {"image": str(tmp_path / "image.nii.gz"), "gt_mask": str(tmp_path / "mask.nii.gz")}
    out = LoadCTd(hounsfield=hounsfield)(record)
    np.testing.assert_array_equal(out["gt_mask"][0].numpy(), hu() > 0)
    assert torch.equal(out["gt_mask"].affine, out["image"].affine)


def test_lung_mask_methods(tmp_path):
    scan = {"patient_id": "P7", "image": MetaTensor(torch.from_numpy(hu()).float()[None])}
    given = {**scan, "lung_mask": MetaTensor((torch.arange(12) > 5).float().view(1, 12, 1, 1).expand(1, *SHAPE))}

    out = LungMaskd(method="auto")(given)
    assert out["lung_mask_source"] == "given" and torch.equal(out["lung"].as_tensor(), given["lung_mask"].as_tensor())
    assert torch.equal(out["lung_mask"], given["lung_mask"])
    out = LungMaskd(method="none")(given)
    assert out["lung_mask_source"] == "none" and out["lung"].shape == (1, *SHAPE) and out["lung"].all()
    assert "lung_mask" not in out

    for method, data, says in (
        ("given", scan, "P7: no lung mask given"),
        ("given", {**scan, "lung_mask": given["lung_mask"] * 0}, r"P7: the lung mask \(given\) is empty"),
        ("threshold", scan, r"P7: the lung mask \(threshold\) is empty"),
    ):
        with pytest.raises(InputError, match=says):
            LungMaskd(method=method)(data)
    for options, says in (
        ({"method": "otsu"}, "expected one of auto, given"),
        ({"method": "lungmask"}, "without weights"),
        ({"method": "lungmask", "weights": "lost.pth"}, "no such file"),
        ({"method": "auto", "weights": "lost.pth"}, "no such file"),
        ({"method": "auto", "weights": 7}, "lungmask weights 7: no such file"),
    ):
        with pytest.raises(InputError, match=says):
            LungMaskd(**options)
    with pytest.raises(ValueError, match="Orientationd"):
        flipped = MetaTensor(torch.zeros(1, 4, 4, 4), affine=torch.diag(torch.tensor([-1.0, 1, 1, 1])))
        LungMaskd(method="threshold")({"image": flipped})


# --- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            {"spacing": "abc"},
            "spacing is 'abc' (expected one number or three, 0.1 to 20 mm, such as 3 or [3, 3, 3], or native)",
        ),
        ({"spacing": 0}, "spacing is [0, 0, 0] (expected"),
        ({"spacing": True}, "spacing is True (expected"),
        ({"spacing": [3, 3]}, "spacing is [3, 3] (expected"),
        ({"spacing": [3, 3, "3"]}, "spacing is [3, 3, '3'] (expected"),
        ({"hu_window": 5}, "hu_window is 5 (expected two ascending HU, such as [-1000, 200])"),
        ({"hu_window": [200, -1000]}, "hu_window is [200, -1000] (expected"),
        ({"lung_mask": 7}, "lung_mask is 7 (expected one of auto, given, lungmask, threshold, none)"),
        ({"margin": "abc"}, "margin is 'abc' (expected a number of mm, at least 0)"),
        ({"margin": float("nan")}, "margin is nan (expected"),
        ({"margin": -1}, "margin is -1 (expected"),
        ({"spacing": "native"}, "margin is 6 (expected 0 where the spacing is native)"),
    ],
)
def test_an_argument_of_the_wrong_shape_is_one_sentence(given, says):
    usual = {"spacing": 3.0, "hu_window": [-1000, 200], "lung_mask": "auto", "margin": 6}
    assert check_preprocessing(**usual)["spacing"] == check_preprocessing(**usual | {"spacing": (3, 3, 3)})["spacing"]
    with pytest.raises(InputError) as caught:
        check_preprocessing(**usual | given)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_phantoms_are_not_resampled_and_what_resampling_loses_is_noted(tmp_path, caplog):
    scan = {"patient_id": "P7", "image": save(tmp_path / "fine.nii.gz", hu((20, 20, 20)), np.diag([0.9, 0.9, 0.9, 1]))}

    def prepared(**options) -> dict:
        config = ConfigParser()
        config.read_config(["configs/train.json", "configs/cohort/phantom.json"])
        config.update(options)
        assert config.get_parsed_content("preprocessing_settings")["spacing"] == options.get("spacing", "native")
        return Compose(config.get_parsed_content("load_transforms"))(scan)

    out = prepared()
    expected = torch.from_numpy((hu((20, 20, 20)).astype(np.float32) + 1000) / 1200).clamp(0, 1)
    torch.testing.assert_close(out["image"][0].as_tensor(), expected)
    assert out["lung"].all() and out["notes"] == "" and not caplog.messages
    for _ in range(2):
        coarse = prepared(spacing=[3.0] * 3)
    assert coarse["image"].shape == (1, 7, 7, 7) and "resampling keeps 4.3 % of the voxels" in coarse["notes"]
    assert len([message for message in caplog.messages if "--spacing native" in message]) == 1
    assert prepared(spacing=[1.5] * 3)["notes"] == ""


# --- the way there and back ----------------------------------------------------------------------------------------

MASKS = ["lung_mask", "gt_mask"]
PIXDIM, PATCH = 3.0, 4


def preprocessing(lung_mask="auto") -> Compose:
    keys = ["image", "gt_mask"]
    kept = ["image", "lung", "gt_mask"]
    return Compose(
        [
            LoadCTd(keys="image", mask_keys=MASKS),
            Orientationd(keys=keys, axcodes="RAS", labels=None, allow_missing_keys=True),
            Spacingd(keys=keys, pixdim=(PIXDIM,) * 3, mode=["bilinear", "nearest"], allow_missing_keys=True),
            LungMaskd(keys="image", method=lung_mask),
            ScaleIntensityRanged(keys="image", a_min=-1000, a_max=200, b_min=0, b_max=1, clip=True),
            CropForegroundd(keys=kept, source_key="lung", margin=2, allow_smaller=True, allow_missing_keys=True),
            DivisiblePadd(keys=kept, k=PATCH, allow_missing_keys=True),
        ]
    )


def rotated(angles, spacing, flips=(1, 1, 1), order=(0, 1, 2)) -> np.ndarray:
    """Axis i runs along the rotated x, y, z number order[i], forwards or backwards."""
    axes = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(np.multiply(flips, spacing))
    affine = np.eye(4)
    affine[:3, :3] = axes[:, order]
    affine[:3, 3] = 12, -34, 56
    return affine


GRIDS = {
    "RAS": (rotated((0, 0, 0), (1.5, 1.5, 2)), (50, 44, 40)),
    "LPS, 0.7 x 0.7 x 5": (rotated((0, 0, 0), (0.7, 0.7, 5), (-1, -1, 1)), (100, 96, 16)),
    "oblique, 0.7 x 0.7 x 5": (rotated((12, -8, 20), (0.7, 0.7, 5), (-1, 1, -1)), (100, 96, 16)),
    "sagittal, oblique": (rotated((5, 9, -14), (2, 1, 1.5), (1, -1, -1), (2, 0, 1)), (48, 40, 70)),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("masked", [True, False])
def test_a_known_point_goes_to_its_voxel_and_comes_back(tmp_path, grid, masked):
    affine, shape = GRIDS[grid]
    inside = np.array(shape) * (0.6, 0.45, 0.4)
    world = affine[:3, :3] @ inside.round() + affine[:3, 3]
    places = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    distance = np.linalg.norm(places - world, axis=-1)
    values = (-900 + 1000 * np.exp(-0.5 * (distance / 5) ** 2)).astype(np.int16)
    record = {"patient_id": "P7", "image": save(tmp_path / "image.nii.gz", values, affine)}
    if masked:
        record["lung_mask"] = save(tmp_path / "lung.nii.gz", (distance < 22).astype(np.uint8), affine)
        record["gt_mask"] = save(tmp_path / "gt.nii.gz", (distance < 8).astype(np.uint8), affine)

    transforms = preprocessing("auto" if masked else "none")
    out = transforms(record)
    image = out["image"]
    assert out["lung_mask_source"] == ("given" if masked else "none")
    assert out["lung"].shape == image.shape and torch.equal(out["lung"].affine, image.affine)
    assert all(size % PATCH == 0 for size in image.shape[1:])
    assert nib.aff2axcodes(image.affine.numpy()) == ("R", "A", "S")
    np.testing.assert_allclose(np.linalg.norm(image.affine.numpy()[:3, :3], axis=0), PIXDIM, rtol=1e-5)

    def in_world(voxels: torch.Tensor, weights: torch.Tensor) -> np.ndarray:
        """Centre of mass in mm."""
        centre = (torch.nonzero(weights).double() * weights[weights != 0][:, None]).sum(0) / weights.sum()
        return voxels.numpy()[:3, :3] @ centre.numpy() + voxels.numpy()[:3, 3]

    def off(centre: np.ndarray) -> float:
        return float(np.linalg.norm(centre - world))

    spot = torch.where(image[0] > 0.5, image[0] - 0.5, 0).as_tensor().double()
    assert off(in_world(image.affine, spot)) < PIXDIM / 2
    if masked:
        for key in ("lung", "gt_mask"):
            assert off(in_world(out[key].affine, out[key][0].as_tensor().double())) < PIXDIM
            assert set(out[key].unique().tolist()) == {0.0, 1.0}

    # (a) MONAI's inversion, for the image's own history.
    heat = MetaTensor((image > 0.5).float().as_tensor()).copy_meta_from(image)
    back = Invertd(keys="heat", transform=transforms, orig_keys="image", nearest_interp=False)({**out, "heat": heat})
    # (b) What inference does: resample from the processed grid to the scan's own.
    resampled = SpatialResample(mode="bilinear", padding_mode="zeros")(
        heat, dst_affine=image.meta["original_affine"], spatial_size=tuple(image.meta["spatial_shape"])
    )
    for result in (back["heat"], resampled):
        assert result.shape == (1, *shape)
        np.testing.assert_allclose(result.affine, affine, atol=1e-4)
        assert off(in_world(result.affine, result[0].as_tensor().double().clamp_min(0))) < PIXDIM
        peak = affine[:3, :3] @ np.unravel_index(int(result[0].argmax()), shape) + affine[:3, 3]
        assert off(peak) < 4 * PIXDIM

    if masked:  # the mask comes back as well
        lung = Invertd(keys="lung", transform=transforms, orig_keys="image", nearest_interp=True)(out)["lung"]
        wanted, got = distance < 22, lung[0].numpy() > 0.5
        assert 2 * (wanted & got).sum() / (wanted.sum() + got.sum()) > 0.9


# --- augmentation --------------------------------------------------------------------------------------------------


def test_a_moved_origin_pads_all_keys_alike_and_loses_nothing():
    image = torch.arange(2 * 9 * 8 * 7, dtype=torch.float32).view(2, 9, 8, 7)
    origin = RandOrigind(["image", "lung"], max_pad=3, mode=["replicate", "constant"]).set_random_state(seed=5)
    seen = set()
    for _ in range(40):
        out = origin({"image": image, "lung": MetaTensor(image + 1), "time": 4})
        seen.add(origin.pad)
        pad = [(0, 0), *((n, 0) for n in origin.pad)]
        np.testing.assert_array_equal(out["image"].numpy(), np.pad(image.numpy(), pad, mode="edge"))
        np.testing.assert_array_equal(out["lung"].numpy(), np.pad(image.numpy() + 1, pad))
        assert isinstance(out["lung"], MetaTensor) and out["time"] == 4
    assert {n for pad in seen for n in pad} == {0, 1, 2, 3}


def test_a_moved_origin_is_reproducible_and_can_be_off():
    image = {"image": torch.rand(1, 6, 6, 6)}
    first, second = (RandOrigind("image", 2).set_random_state(seed=1) for _ in range(2))
    assert all(torch.equal(first(image)["image"], second(image)["image"]) for _ in range(5))
    assert torch.equal(RandOrigind("image", 2, prob=0.0)(image)["image"], image["image"])
    assert torch.equal(RandOrigind("image", 0)(image)["image"], image["image"])
    with pytest.raises(ValueError, match="max_pad"):
        RandOrigind("image", -1)
    with pytest.raises(ValueError):
        RandOrigind(["image", "lung"], 1, mode=["replicate"] * 3)


def test_training_and_inference_begin_the_patch_grid_in_the_same_places():
    """What the network learns with is what it is asked about: the origins of both, in voxels, of 4 in a patch."""
    config = ConfigParser()
    config.read_config("configs/train.json")
    config["network_def"] = {"_target_": "bundle.networks.SurvivalMapNet", "patch_size": 4}
    (origin,) = config.get_parsed_content("train#random_transforms")
    seen = set()

    def network(image: torch.Tensor) -> torch.Tensor:
        seen.add(image.shape[2] - 8)
        return torch.ones(1, 2, *[-(-size // 4) for size in image.shape[2:]])

    GridShiftInferer(4, 4)(torch.zeros(1, 1, 8, 8, 8), network)
    assert origin.max_pad == max(seen) == 7 and {n % 4 for n in seen} == {0, 1, 2, 3}
