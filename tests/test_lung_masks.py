# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import pickle
from pathlib import Path

import lungmask.mask
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from lungmask.resunet import UNet
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd, Spacingd
from scipy import ndimage

from bundle.errors import InputError
from bundle.grids import mask_on_grid
from bundle.networks import CodebookNet
from bundle.phantoms.cohort import PhantomCohort
from bundle.report.report import lungs_in_words
from bundle.transforms import LoadCTd, LungMaskd, fill_thorax, lungmask_digests, lungmask_network, threshold_lung_mask
from bundle.transforms.lung import _lungmask
from scripts.research.measure_lung_masks import CHESTS, read, with_mass

from . import bad_scans
from .commands import run


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


def masked(hu: torch.Tensor, spacing=(4, 4, 4)) -> np.ndarray:
    """Where the threshold segmentation sees lung."""
    return threshold_lung_mask(hu, spacing)[0].numpy() > 0


def grid(hu: torch.Tensor) -> list[np.ndarray]:
    """x, y, z of each voxel of 4 mm."""
    return np.meshgrid(*(4 * np.arange(n) for n in hu.shape[1:]), indexing="ij")


def fill(hu: torch.Tensor, where, value: float) -> torch.Tensor:
    """The same scan with other values in a region."""
    changed = hu.clone()
    changed[0][torch.from_numpy(where)] = value
    return changed


def dice(a, b) -> float:
    a, b = np.asarray(a) > 0.5, np.asarray(b) > 0.5
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("spacing", [(4, 4, 4), (1.5, 1.4, 6), (6, 5, 3)])
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
    assert dice(masked(fill(hu, parts["left"], 40)), parts["right"]) > 0.95  # white-out

    fused = hu.clone()
    fused[0, 30:46, 26:29, 30:36] = -850
    assert dice(masked(fused), parts["lungs"]) > 0.95

    none = fill(hu, parts["lungs"], 40)
    for empty in (none, torch.full((1, 16, 16, 16), -1000.0), torch.full((1, 16, 16, 16), 40.0)):
        assert not masked(empty).any()


def test_trachea_is_left_out_where_it_opens_into_a_lung_or_lies_against_it():
    hu, parts = chest()
    x, y, z = grid(hu)
    trachea = (np.hypot(x - 142, y - 110) < 9) & (z > 120)  # a wall of one voxel between it and the right lung
    bronchus = (np.hypot(y - 110, z - 120) < 9) & (x > 120) & (x < 150)
    found = masked(fill(fill(hu, parts["trachea"] & (z > 60), 40), trachea | bronchus, -990))
    assert not found[trachea & (z > 130)].any()
    assert dice(found, parts["lungs"]) > 0.97


def test_threshold_survives_a_narrow_field_of_view():
    hu, parts = chest()
    cut = slice(13, None)  # the border just cuts both lungs, in some slices along 2 cm
    assert parts["lungs"][:, 13].any()
    assert dice(masked(hu[:, :, cut]), parts["lungs"][:, cut]) > 0.97


def test_lungs_that_touch_do_not_take_the_mediastinum_with_them():
    hu, parts = chest()
    x, y, z = grid(hu)
    # Both lungs reach the middle in front of the heart, and meet there along a whole line.
    found = masked(fill(hu, (abs(x - 150) < 30) & (y > 140) & (y < 152) & (z > 80) & (z < 180), -850))
    heart = (abs(x - 150) < 12) & (abs(y - 100) < 25) & (abs(z - 130) < 60) & ~parts["trachea"]
    assert found[heart].mean() < 0.1 and found[parts["lungs"]].mean() > 0.98


def test_gap_in_the_wall_of_the_body_and_air_beside_an_arm():
    hu, parts = chest()
    x, y, z = grid(hu)
    with_arm = fill(hu, np.hypot(x - 12, y - 110) < 10, 40)
    found = masked(fill(with_arm, (abs(x - 85) < 12) & (y > 160) & (abs(z - 130) < 30), -850))
    assert found[parts["lungs"]].mean() > 0.97 and dice(found, parts["lungs"]) > 0.9  # what is in the gap counts as lung
    assert not found[x < 22].any()


@pytest.mark.parametrize(
    ("image", "least"),
    [
        ("ct/chest_cip_64_lowres_ct.nrrd", 0.96),
        ("ct/rightlung_elastix_ct.mha", 0.975),
        ("ct/chest_pyradiomics_lung1_ct.nrrd", 1.0),
        ("ct/chest_lungpetctdx_A0001_ct.nii.gz", 0.6),
        ("dicom_lungpetctdx_A0002_B40f", 0.6),
    ],
)
def test_threshold_against_reference_masks_of_real_scans(shared_data, image, least):
    scan = read(shared_data, image, *CHESTS[image])
    assert (scan.dice() if scan.kind == "lungs" else scan.kept()) >= least
    assert scan.kept(filled=True) >= scan.kept() and 2 < scan.litres() < 7


def test_threshold_on_chest_phantoms_keeps_what_lies_at_the_pleura():
    scans = [scan for _, scan in PhantomCohort(9, 4, 7)]
    for scan in scans:
        found = masked(torch.from_numpy(scan.image).float()[None], (5, 5, 5))
        assert dice(found, scan.lung_mask) > 0.96
        assert not scan.gt_mask.any() or found[scan.gt_mask].mean() > 0.8
    for radius, least in ((10, 0.5), (30, 0.7)):
        kept = []
        for i, scan in enumerate(scans):
            hu, mass = with_mass(scan, radius, True, np.random.default_rng(i))
            kept.append(masked(torch.from_numpy(hu).float()[None], (5, 5, 5))[mass].mean())
        assert np.median(kept) > least  # one in a corner of the lung is lost


def test_filling_the_thorax_brings_a_white_lung_back():
    hu, parts = chest()
    white = fill(hu, parts["left"], 40)
    white[0, 36:40, 14:17] = 500  # spine
    lungs = threshold_lung_mask(white, (4, 4, 4))
    filled = fill_thorax(lungs, white)[0].numpy() > 0
    assert lungs[0].numpy()[parts["left"]].mean() < 0.05 and filled[parts["left"]].mean() > 0.9
    assert filled[lungs[0].numpy() > 0].all()
    for outside in (filled[parts["trachea"] & ~parts["vessel"]], filled[36:40, 14:17], filled[parts["table"]]):
        assert not outside.any()

    affine = torch.diag(torch.tensor([4.0, 4, 4, 1]))
    scan = {"patient_id": "P7", "image": MetaTensor(white, affine=affine), "lung_mask": MetaTensor(lungs, affine=affine)}
    for method, source in (("threshold", "threshold, thorax filled"), ("auto", "given, thorax filled")):
        out = LungMaskd(method=method, fill=True)(scan)
        assert out["lung_mask_source"] == source and np.array_equal(out["lung"][0].numpy() > 0, filled)
    none = LungMaskd(method="none", fill=True)(scan)
    assert none["lung_mask_source"] == "none" and none["lung"].all()


class FakeLungmask:
    """Takes what is below -500 HU for lung, and notes what it was shown."""

    def apply(self, slices: np.ndarray) -> np.ndarray:
        self.seen = slices
        return (slices < -500).astype(np.uint8) * 2


def test_lungmask_sees_dicom_slices_and_its_mask_comes_back(monkeypatch):
    fake = FakeLungmask()
    monkeypatch.setattr("bundle.transforms.lung._lungmask", lambda weights, fill_weights: fake)
    hu = torch.zeros(1, 7, 6, 5)
    hu[0, 1, 4, 2] = -900  # RAS: on the patient's left, towards the front
    mask = lungmask_network(hu, "weights.pth")
    assert fake.seen.shape == (5, 6, 7)
    # Slices from feet to head; rows from front to back; columns from the patient's right to left.
    assert np.argwhere(fake.seen < 0).tolist() == [[2, 6 - 1 - 4, 7 - 1 - 1]]
    assert torch.equal(mask, (hu < -500).float())


def unet(n_classes: int, seed: int, path: Path, **width: int) -> dict[str, torch.Tensor]:
    """Random weights of lungmask's network, saved as lungmask's own are; those of the last layer tell voxels apart."""
    torch.manual_seed(seed)
    net = UNet(n_classes=n_classes, padding=True, depth=5, up_mode="upsample", batch_norm=True, residual=False, **width)
    torch.nn.init.normal_(net.last.weight)
    torch.nn.init.zeros_(net.last.bias)
    torch.save(net.state_dict(), path)
    return net.state_dict()


@pytest.fixture
def no_download(monkeypatch):
    def download(*args, **kwargs):
        raise AssertionError("lungmask tried to download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    _lungmask.cache_clear()
    yield
    _lungmask.cache_clear()


def test_lungmask_loads_its_own_architecture_from_a_local_file(tmp_path, no_download):
    state = unet(6, 0, tmp_path / "lobes.pth")  # full width, as LTRCLobes
    model = _lungmask(str(tmp_path / "lobes.pth"), None).model
    assert type(model) is UNet and not model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.last.out_channels == 6 and sum(p.numel() for p in model.parameters()) > 3e7


def test_lungmask_fuses_two_files_as_the_package_does(tmp_path, no_download, monkeypatch):
    monkeypatch.setattr(lungmask.mask, "UNet", functools.partial(UNet, wf=1))  # the same network, thin
    files = [str(tmp_path / name) for name in ("lobes.pth", "r231.pth")]
    for file, classes, seed in zip(files, (6, 3), (4, 0)):
        unet(classes, seed, Path(file), wf=1)
    hu, _ = chest((10, 10, 30))
    scan = {"patient_id": "P7", "image": MetaTensor(hu, affine=torch.diag(torch.tensor([10.0, 10, 30, 1])))}
    slices = np.ascontiguousarray(hu[0].numpy().transpose(2, 1, 0)[:, ::-1, ::-1])
    inferer = lungmask.mask.LMInferer
    found = {}
    for weights in (files[:1], files):
        options = dict(zip(("modelpath", "fillmodel_path"), weights))
        expected = inferer(**options, force_cpu=True, tqdm_disable=True).apply(slices)[:, ::-1, ::-1].transpose(2, 1, 0) > 0
        for given in (weights, weights[0] if len(weights) == 1 else tuple(weights)):
            out = LungMaskd(method="auto", weights=given)(scan)
            assert out["lung_mask_source"] == "lungmask" and np.array_equal(out["lung"][0].numpy() > 0, expected)
        found[len(weights)] = expected
    assert not np.array_equal(found[1], found[2]) and found[1].any()
    assert len(set(lungmask_digests(files))) == 2 and lungmask_digests(None) == []


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_files_that_are_not_lungmasks_weights_are_refused_and_run_nothing(tmp_path, no_download, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    scan = {"patient_id": "P7", "image": MetaTensor(torch.zeros(1, 8, 8, 4), affine=torch.eye(4))}
    (tmp_path / "wrong.pth").write_bytes(b"not weights")
    (tmp_path / "malice.pth").write_bytes(pickle.dumps(Malice(tmp_path / "ran")))
    torch.save(Malice(tmp_path / "ran"), tmp_path / "zipped_malice.pth")
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "other.pth")
    for name in ("wrong", "malice", "zipped_malice", "other"):
        with pytest.raises(InputError, match="not a state dict of lungmask's U-net"):
            LungMaskd(method="lungmask", weights=str(tmp_path / f"{name}.pth"))(scan)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(InputError, match="gone.pth: no such file"):
        LungMaskd(weights=[str(tmp_path / "other.pth"), str(tmp_path / "gone.pth")])
    with pytest.raises(InputError, match="3 files"):
        LungMaskd(weights=[str(tmp_path / "other.pth")] * 3)
    assert LungMaskd(method="threshold", weights="gone.pth").method == "threshold"  # not needed


def test_source_is_threshold_without_weights_or_mask():
    hu, parts = chest((6, 6, 6))
    affine = torch.diag(torch.tensor([6.0, 6, 6, 1]))
    out = LungMaskd(method="auto")({"patient_id": "P7", "image": MetaTensor(hu, affine=affine)})
    assert out["lung_mask_source"] == "threshold"
    assert dice(out["lung"][0], parts["lungs"]) > 0.95 and torch.equal(out["lung"].affine, out["image"].affine)


@pytest.mark.parametrize(
    "rotation", [np.eye(3), [[0, 0, -1], [1, 0, 0], [0, -1, 0]], [[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]]
)
def test_mask_comes_back_to_the_voxels_of_the_scan(rotation):
    affine = np.eye(4)
    affine[:3, :3] = np.array(rotation) * [0.71, 0.93, 2.57]
    affine[:3, 3] = [3.1, -5.2, 11.3]
    grid = torch.diag(torch.tensor([3.0, 3, 3, 1]))
    grid[:3, 3] = torch.tensor([-4.0, -6, 2])
    mask = MetaTensor((torch.rand(1, 9, 8, 7) > 0.5).float(), affine=grid)
    shape = (20, 15, 9)
    found = mask_on_grid(mask, torch.from_numpy(affine), shape)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    near = (index @ affine[:3, :3].T + affine[:3, 3] - [-4, -6, 2]) / 3
    inside = ((near > -0.5) & (near < np.array([8.5, 7.5, 6.5]))).all(-1)
    i, j, k = np.moveaxis(np.rint(near).astype(int).clip(0, [8, 7, 6]), -1, 0)
    expected = np.where(inside, mask[0].numpy()[i, j, k], 0)
    assert found.dtype == np.uint8 and found.shape == shape and 0 < inside.mean() < 1
    assert np.array_equal(found, expected) and 0.05 < found.mean()


@pytest.mark.parametrize("spacing", [(1.5, 1.4, 5), (2, 3, 4), (4, 6, 3), (2.9, 3.1, 8)])
@pytest.mark.parametrize("shear", [0.0, 0.3])
def test_a_mask_that_was_made_gives_the_same_lung_when_it_is_given(tmp_path, spacing, shear):
    hu, _ = chest(spacing)
    affine = np.diag([-spacing[0], spacing[1], spacing[2], 1.0])  # 3 mm apart there are ties among these voxels
    affine[1, 2] = shear * spacing[2]
    nib.save(nib.Nifti1Image(hu[0].numpy().astype(np.int16), affine), tmp_path / "scan.nii.gz")
    load = Compose([LoadCTd(), Orientationd("image", axcodes="RAS", labels=None), Spacingd("image", pixdim=(3.0,) * 3)])
    record = {"patient_id": "A", "image": str(tmp_path / "scan.nii.gz")}
    made = LungMaskd(method="threshold")(load(record))
    nib.save(nib.Nifti1Image(made["lung_mask"][0].numpy(), affine), tmp_path / "lung.nii.gz")
    given = LungMaskd(method="given")(load(record | {"lung_mask": str(tmp_path / "lung.nii.gz")}))
    assert made["lung"].any() and torch.equal(made["lung"].as_tensor(), given["lung"].as_tensor())
    if not shear:  # what of it the heat may be on is the same, too
        on_file = mask_on_grid(made["lung"], affine, hu.shape[1:], clamp=True)
        assert np.array_equal(on_file, made["lung_mask"][0].numpy())


@pytest.mark.parametrize("scan", ["demo/chest_ct.nii.gz", "ct/chest_cip_64_lowres_ct.nrrd"])
def test_the_mask_that_a_run_wrote_repeats_the_run(tmp_path, root, request, monkeypatch, scan):
    image = root / scan if scan.startswith("demo") else request.getfixturevalue("shared_data") / scan
    monkeypatch.chdir(root)
    found = {}
    for name, lung in (("first", ""), ("again", tmp_path / "first" / "maps" / "A_lung.nii.gz")):
        (tmp_path / f"{name}.csv").write_text(f"patient_id,image,lung_mask\nA,{image},{lung}\n")
        options = {"cohort": str(tmp_path / f"{name}.csv"), "output_dir": str(tmp_path / name)}
        run("configs/inference.json", shifts=1, refine=False, **options)
        maps = [nib.load(tmp_path / name / "maps" / f"A_{kind}.nii.gz").get_fdata() for kind in ("heat", "lung")]
        found[name] = [(tmp_path / name / "predictions.csv").read_text(), *maps]
    assert ",ok," in found["first"][0] and found["first"][0] == found["again"][0]
    for once, again in zip(*(found[name][1:] for name in ("first", "again"))):
        np.testing.assert_array_equal(once, again)


def test_the_mask_named_on_the_command_line_decides_which_tokens_there_are(tmp_path, root, monkeypatch):
    monkeypatch.chdir(root)
    hu, parts = chest((6, 6, 6))
    affine = np.diag([-6.0, 6, 6, 1])  # not the order that the network sees
    nib.save(nib.Nifti1Image(hu[0].numpy().astype(np.int16), affine), tmp_path / "scan.nii.gz")
    right = parts["right"]
    nib.save(nib.Nifti1Image(right.astype(np.uint8), affine), tmp_path / "given.nii.gz")
    (tmp_path / "c.csv").write_text("patient_id,image,lung_mask\nA,scan.nii.gz,given.nii.gz\n")
    tokens: list[int] = []
    words_of = CodebookNet.words_of

    def counted(self, x):
        tokens.append(len(x))
        return words_of(self, x)

    monkeypatch.setattr(CodebookNet, "words_of", counted)
    found, counts = {}, {}
    for name, options in {
        "given": {},
        "threshold": {"lung_mask": "threshold"},
        "filled": {"lung_mask": "threshold", "lung_mask_fill": "true"},
    }.items():
        tokens.clear()
        out = tmp_path / name
        run("configs/inference.json", cohort=str(tmp_path / "c.csv"), output_dir=str(out), shifts=1, refine=False, **options)
        assert pd.read_csv(out / "predictions.csv").status.tolist() == ["ok"]
        saved = nib.load(out / "maps" / "A_lung.nii.gz")
        assert np.allclose(saved.affine, affine) and saved.shape == hu.shape[1:] and saved.get_data_dtype() == np.uint8
        found[name], counts[name] = np.asarray(saved.dataobj) > 0, tokens[0]
        heat = nib.load(out / "maps" / "A_heat.nii.gz").get_fdata()
        # A voxel of the scan is made of the network's voxels around it, so the heat ends one voxel further out.
        assert not heat[~ndimage.binary_dilation(found[name], np.ones((3, 3, 3)))].any() and heat[found[name]].sum() > 0
        source = {"given": "given", "threshold": "threshold", "filled": "threshold, thorax filled"}[name]
        assert f"Lungs: {lungs_in_words(source)}." in (out / "reports" / "A.html").read_text()
    assert dice(found["given"], right) > 0.97 and dice(found["threshold"], parts["lungs"]) > 0.94
    volume = {name: mask.sum() * 6**3 for name, mask in found.items()}
    assert volume["given"] < 0.6 * volume["threshold"] < 0.6 * volume["filled"]
    for name in found:  # every second voxel of 3 mm an axis
        assert 0.9 < counts[name] / (volume[name] / 6**3) < 1.1, name
    assert counts["given"] < counts["threshold"] < counts["filled"]


def test_a_rounding_error_of_the_spacing_moves_no_voxel():
    hu = torch.from_numpy(bad_scans.chest()[0][::-1, ::-1].astype(np.float32))[None]
    masks = [threshold_lung_mask(hu, np.array((6.6, 6.6, 5.0)) * (1 + off)) for off in (-1e-7, 0, 1e-7)]
    assert masks[1].sum() > 1000
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[2], masks[1])
