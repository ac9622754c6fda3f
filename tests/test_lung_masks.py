# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import time

import lungmask.mask
import numpy as np
import pytest
import torch
from lungmask.resunet import UNet
from monai.data import ITKReader, MetaTensor
from monai.transforms import Compose, LoadImaged, Orientationd, Spacingd

from bundle.errors import InputError
from bundle.transforms import LungMaskd, lungmask_network, threshold_lung_mask
from bundle.transforms.lung import _lungmask


def ball(places: np.ndarray, centre, radii) -> np.ndarray:
    return (((places - np.array(centre)) / np.array(radii)) ** 2).sum(-1) < 1


def chest(spacing=(4.0, 4.0, 4.0), size=(300.0, 220.0, 240.0)) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
    """A body in HU with two lungs, a trachea, a stomach bubble, a table, and lesions; mm, x across, z to the head."""
    axes = [np.arange(0, length, step) for length, step in zip(size, spacing)]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    x, y, z = np.moveaxis(places, -1, 0)
    body = ((x - 150) / 130) ** 2 + ((y - 110) / 90) ** 2 < 1
    parts = {
        "right": ball(places, (85, 110, 130), (45, 60, 85)),
        "left": ball(places, (215, 110, 130), (45, 60, 85)),
        "trachea": (np.hypot(x - 150, y - 120) < 9) & (z > 120),
        "bubble": ball(places, (190, 150, 20), (16, 16, 14)),
        "vessel": np.hypot(y - 110, z - 130) < 5,
        "nodule": ball(places, (85, 110, 170), (12, 12, 12)),
        "juxtapleural": ball(places, (44, 110, 140), (6, 6, 6)),
    }
    parts["lungs"] = parts["right"] | parts["left"]
    parts["table"] = (y > 206) & (y < 214)
    hu = np.full(x.shape, -1000.0)
    hu[body] = 40
    hu[parts["table"]] = -100
    hu[parts["lungs"]] = -850
    for name in ("trachea", "bubble"):
        hu[parts[name]] = -990
    for name in ("vessel", "nodule", "juxtapleural"):
        hu[parts[name] & body] = 40
    return torch.from_numpy(hu + np.random.default_rng(0).normal(0, 20, hu.shape)).float()[None], parts


def dice(a, b) -> float:
    a, b = np.asarray(a) > 0.5, np.asarray(b) > 0.5
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("spacing", [(4, 4, 4), (2.5, 2.5, 7), (6, 5, 3)])
def test_threshold_finds_both_lungs_with_their_lesions_and_nothing_else(spacing):
    hu, parts = chest(spacing)
    mask = threshold_lung_mask(hu, spacing)
    assert mask.shape == hu.shape and mask.dtype == torch.float32 and set(mask.unique().tolist()) == {0.0, 1.0}
    found = mask[0].numpy() > 0
    assert dice(found, parts["lungs"]) > 0.97
    for lesion, least in {"nodule": 1.0, "vessel": 0.9, "juxtapleural": 0.5}.items():  # a ball rounds the pleura off
        assert found[parts[lesion] & parts["lungs"]].mean() >= least, lesion
    for air in ("trachea", "bubble", "table"):
        assert not found[parts[air]].any(), air


def test_threshold_on_one_lung_fused_lungs_and_none():
    hu, parts = chest()
    one = hu.clone()
    one[0][torch.from_numpy(parts["left"])] = 40  # white-out
    assert dice(threshold_lung_mask(one, (4, 4, 4))[0], parts["right"]) > 0.95

    fused = hu.clone()
    fused[0, 30:46, 26:29, 30:36] = -850
    assert dice(threshold_lung_mask(fused, (4, 4, 4))[0], parts["lungs"]) > 0.95

    none = hu.clone()
    none[0][torch.from_numpy(parts["lungs"])] = 40
    for empty in (none, torch.full((1, 16, 16, 16), -1000.0), torch.full((1, 16, 16, 16), 40.0)):
        assert not threshold_lung_mask(empty, (4, 4, 4)).any()


def test_trachea_is_left_out_where_it_opens_into_a_lung_or_lies_against_it():
    hu, parts = chest()
    x, y, z = np.meshgrid(*(4 * np.arange(n) for n in hu.shape[1:]), indexing="ij")
    trachea = (np.hypot(x - 142, y - 110) < 9) & (z > 120)  # a wall of one voxel between it and the right lung
    bronchus = (np.hypot(y - 110, z - 120) < 9) & (x > 120) & (x < 150)
    hu[0][torch.from_numpy(parts["trachea"] & (z > 60))] = 40
    hu[0][torch.from_numpy(trachea | bronchus)] = -990
    found = threshold_lung_mask(hu, (4, 4, 4))[0].numpy() > 0
    assert not found[trachea & (z > 130)].any()
    assert dice(found, parts["lungs"]) > 0.97


def test_threshold_survives_a_narrow_field_of_view():
    hu, parts = chest()
    cut = slice(13, None)  # the border just cuts both lungs, in some slices along 2 cm
    assert parts["lungs"][:, 13].any()
    found = threshold_lung_mask(hu[:, :, cut], (4, 4, 4))[0]
    assert dice(found, parts["lungs"][:, cut]) > 0.97


@pytest.mark.parametrize(
    ("image", "mask", "least"),
    [
        ("chest_cip_64_lowres_ct.nrrd", "chest_cip_64_lowres_lung_labelmap.nrrd", 0.94),
        ("rightlung_elastix_ct.mha", "rightlung_elastix_lung_mask.mha", 0.96),
    ],
)
def test_threshold_against_reference_masks_of_real_scans(shared_data, image, mask, least):
    data = {"image": shared_data / "ct" / image, "mask": shared_data / "ct" / mask}
    keys = ["image", "mask"]
    out = Compose(
        [
            LoadImaged(keys, reader=ITKReader(), ensure_channel_first=True),
            Orientationd(keys, axcodes="RAS", labels=None),
            Spacingd(keys, pixdim=(3, 3, 3), mode=["bilinear", "nearest"]),
        ]
    )(data)
    start = time.perf_counter()
    found = threshold_lung_mask(out["image"].as_tensor(), (3, 3, 3))
    assert time.perf_counter() - start < 5
    labels = out["mask"].as_tensor().long()
    reference = (labels > 0) & ((labels & 255) != 0)  # the Chest Imaging Platform's codes: low byte 0 is no lung region
    assert dice(found, reference) > least


class FakeLungmask:
    """Takes what is below -500 HU for lung, and notes what it was shown."""

    def apply(self, slices: np.ndarray) -> np.ndarray:
        self.seen = slices
        return (slices < -500).astype(np.uint8) * 2


def test_lungmask_sees_dicom_slices_and_its_mask_comes_back(monkeypatch):
    fake = FakeLungmask()
    monkeypatch.setattr("bundle.transforms.lung._lungmask", lambda weights: fake)
    hu = torch.zeros(1, 7, 6, 5)
    hu[0, 1, 4, 2] = -900  # RAS: on the patient's left, towards the front
    mask = lungmask_network(hu, "weights.pth")
    assert fake.seen.shape == (5, 6, 7)
    # Slices from feet to head; rows from front to back; columns from the patient's right to left.
    assert np.argwhere(fake.seen < 0).tolist() == [[2, 6 - 1 - 4, 7 - 1 - 1]]
    assert torch.equal(mask, (hu < -500).float())


def test_lungmask_runs_from_a_local_file_without_a_download(tmp_path, monkeypatch):
    def no_download(*args, **kwargs):
        raise AssertionError("lungmask tried to download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_download)
    monkeypatch.setattr(lungmask.mask, "UNet", functools.partial(UNet, wf=1))  # the same network, thin
    torch.manual_seed(0)
    net = UNet(n_classes=3, padding=True, depth=5, up_mode="upsample", batch_norm=True, residual=False, wf=1)
    torch.save(net.state_dict(), tmp_path / "thin.pth")
    # Whatever the untrained network says, its mask replaces none; a patient without a given mask takes it.
    monkeypatch.setattr(lungmask.mask.LMInferer, "apply", lambda self, image: np.ones(image.shape, np.uint8))
    scan = {"patient_id": "P7", "image": MetaTensor(torch.zeros(1, 8, 8, 4), affine=torch.eye(4))}
    for method in ("auto", "lungmask"):
        out = LungMaskd(method=method, weights=str(tmp_path / "thin.pth"))(scan)
        assert out["lung_mask_source"] == "lungmask" and out["lung"].all()

    monkeypatch.undo()
    (tmp_path / "wrong.pth").write_bytes(b"not weights")
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "other.pth")
    for name in ("wrong.pth", "other.pth"):
        with pytest.raises(InputError, match="not a state dict of lungmask's U-net"):
            LungMaskd(method="lungmask", weights=str(tmp_path / name))(scan)
    _lungmask.cache_clear()


def test_source_is_threshold_without_weights_or_mask():
    hu, parts = chest((6, 6, 6))
    affine = torch.diag(torch.tensor([6.0, 6, 6, 1]))
    out = LungMaskd(method="auto")({"patient_id": "P7", "image": MetaTensor(hu, affine=affine)})
    assert out["lung_mask_source"] == "threshold"
    assert dice(out["lung"][0], parts["lungs"]) > 0.95 and torch.equal(out["lung"].affine, out["image"].affine)
