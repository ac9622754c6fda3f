# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The cache: found by content, never stale, made again when damaged, small, and the same for training either way."""

from __future__ import annotations

import os
import re
import shutil

import numpy as np
import pytest
import torch
from monai.transforms import Compose, CropForegroundd, Flipd, Orientationd, ScaleIntensityRanged, SelectItemsd, Spacingd

from bundle.data import read_cohort
from bundle.data.cache import CODE, ScanCache, fill_caches
from bundle.data.fingerprint import content_digest
from bundle.errors import InputError
from bundle.files import load_checked
from bundle.transforms import LoadCTd, LungMaskd, RandOrigind
from scripts import preprocess

from .commands import TRAIN, train
from .conftest import write_scan


def transforms(spacing=3.0, low=-1000.0, method="none", weights=None, pad=0):
    return Compose(
        [
            LoadCTd(mask_keys="lung_mask"),
            Orientationd("image", axcodes="RAS", labels=None),
            Spacingd("image", (spacing,) * 3, mode="bilinear"),
            LungMaskd(method=method, weights=weights),
            ScaleIntensityRanged("image", low, 200.0, 0.0, 1.0, clip=True),
            CropForegroundd(["image", "lung"], source_key="lung", margin=1, allow_smaller=True),
            SelectItemsd(["patient_id", "image", "lung", "lung_mask_source", "time", "event"], allow_missing_keys=True),
            *([RandOrigind(["image", "lung"], max_pad=pad)] if pad else []),
        ]
    )


@pytest.fixture
def record(tmp_path):
    rng = np.random.default_rng(0)
    write_scan(tmp_path / "scan.nii.gz", rng.uniform(-1100, 300, (12, 10, 8)))
    mask = np.zeros((12, 10, 8))
    mask[2:9, 3:8, 1:7] = 1
    write_scan(tmp_path / "lung.nii.gz", mask)
    files = {"image": str(tmp_path / "scan.nii.gz"), "lung_mask": str(tmp_path / "lung.nii.gz")}
    return {"patient_id": "p", **files, "time": 12.0, "event": 1}


def cache(record, tmp_path, **settings):
    return ScanCache([record], transforms(**settings), tmp_path / "cache")


def test_what_is_read_is_the_scan_to_a_hundredth_of_a_hounsfield_unit(record, tmp_path):
    dataset = cache(record, tmp_path, method="given")
    exact = transforms(method="given")(dict(record))
    for item in (dataset[0], dataset[0], cache(record, tmp_path, method="given")[0]):  # made, found, found by another
        assert float((item["image"] - exact["image"].as_tensor()).abs().max()) <= 1 / 131070 + 1e-7
        assert torch.equal(item["lung"], exact["lung"].as_tensor()) and 0 < item["lung"].mean() < 1
        assert item["image"].dtype == item["lung"].dtype == torch.float32
        assert {k: item[k] for k in ("patient_id", "time", "event")} == {"patient_id": "p", "time": 12.0, "event": 1}
        assert item["lung_mask_source"] == exact["lung_mask_source"]
        assert torch.equal(item["image"], dataset[0]["image"])
    (file,) = (tmp_path / "cache").iterdir()
    assert torch.load(file, weights_only=True)["image"].dtype == torch.uint16
    assert file.stat().st_size < 3 * exact["image"].numel() + 4000


def test_a_copied_or_touched_scan_is_found_and_a_changed_one_is_not(record, tmp_path, monkeypatch):
    dataset = cache(record, tmp_path)
    assert dataset.fill() == 1
    os.utime(record["image"], (0, 0))
    copied = {**record, "image": shutil.copy(record["image"], tmp_path / "copy.nii.gz"), "patient_id": "q", "time": 3.0}
    for same in (record, copied):
        again = cache(same, tmp_path)
        assert again.fill() == 0
        assert again[0]["patient_id"] == same["patient_id"] and again[0]["time"] == same["time"]
    # Other content, of the same size and date.
    stat = os.stat(record["image"])
    data = bytearray(open(record["image"], "rb").read())
    data[-1] ^= 1
    open(record["image"], "wb").write(data)
    os.utime(record["image"], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache(record, tmp_path).file(record) != dataset.file(copied)


@pytest.mark.parametrize("change", [{"spacing": 4.0}, {"low": -900.0}, {"method": "given"}])
def test_a_changed_setting_reads_no_stale_file(change, record, tmp_path):
    old = cache(record, tmp_path)[0]
    changed = cache(record, tmp_path, **change)
    assert changed.fill() == 1
    new = changed[0]
    exact = transforms(**change)(dict(record))
    assert float((new["image"] - exact["image"].as_tensor()).abs().max()) < 1e-5
    assert new["image"].shape != old["image"].shape or not torch.equal(new["image"], old["image"])


def test_the_key_knows_weights_by_content_and_other_transforms_but_not_random_ones(record, tmp_path):
    weights = [tmp_path / f"w{i}.pth" for i in range(3)]
    for path, content in zip(weights, (b"a", b"a", b"b")):
        path.write_bytes(content)
    keys = [cache(record, tmp_path, method="auto", weights=str(path)).key(record) for path in weights]
    assert keys[0] == keys[1] != keys[2]
    plain = cache(record, tmp_path)
    assert cache(record, tmp_path, pad=2).key(record) == plain.key(record)
    more = Compose([*transforms().transforms, Flipd("image", spatial_axis=0)])
    assert ScanCache([record], more, str(tmp_path / "cache")).key(record) != plain.key(record)
    assert plain.key({**record, "series": "1.2.3"}) != plain.key(record)


def test_the_code_of_all_that_is_cached_is_part_of_the_key(root):
    named = {f for pattern in CODE for f in (root / "bundle").glob(pattern)}
    imported = [re.findall(r"^from bundle\.(data|reading)\.(\w+) import", f.read_text(), re.MULTILINE) for f in named]
    assert {root / "bundle" / package / f"{name}.py" for found in imported for package, name in found} <= named
    assert root / "bundle" / "transforms" / "load.py" in named


def test_slices_and_detached_headers_count_with_their_data(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for i in range(3):
            (tmp_path / folder / f"{folder}{i}.dcm").write_bytes(bytes([i]))
    assert content_digest(str(tmp_path / "a")) == content_digest(str(tmp_path / "b"))
    before = content_digest(str(tmp_path / "a"))
    (tmp_path / "a" / "a2.dcm").unlink()
    assert content_digest(str(tmp_path / "a")) != before
    header, data = tmp_path / "s.mhd", tmp_path / "s.raw"
    for name in ("s.raw", "LIST"):
        header.write_text(f"NDims = 3\nElementDataFile = {name}\n")
        data.write_bytes(b"1")
        before = content_digest(str(header))
        data.write_bytes(b"22")
        assert content_digest(str(header)) != before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_file_is_made_again(damage, record, tmp_path):
    dataset = cache(record, tmp_path)
    good, file = dataset[0], dataset.file(record)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes({"truncated": content[: len(content) // 2], "flipped": bytes(content), "empty": b""}[damage])
    for again in (dataset, cache(record, tmp_path)):
        assert torch.equal(again[0]["image"], good["image"]) and torch.equal(again[0]["lung"], good["lung"])
    load_checked(file)


def test_only_scaled_images_and_binary_lungs_can_be_cached(record, tmp_path):
    unscaled = Compose([t for t in transforms().transforms if not isinstance(t, ScaleIntensityRanged)])
    with pytest.raises(ValueError, match=r"scaled to \[0, 1\]"):
        ScanCache([record], unscaled, str(tmp_path / "cache"))[0]
    assert not list((tmp_path / "cache").iterdir())


def test_what_no_check_foresaw_is_the_fault_of_one_scan(record, tmp_path, monkeypatch):
    def surprise(self, record):
        raise ZeroDivisionError("of a new kind")

    monkeypatch.setattr(ScanCache, "preprocess", surprise)
    dataset = cache(record, tmp_path)
    with pytest.raises(InputError, match="patient p: ZeroDivisionError while reading or preprocessing: of a new kind"):
        dataset.fill()
    dataset.on_fault = "skip"
    with pytest.raises(InputError, match="none of the 1 scans of a part of the cohort can be used"):
        fill_caches(dataset)


def test_many_processes_make_the_same_files_as_one_and_tell_bad_scans(tiny_cohort, tmp_path):
    args = ["--cohort", str(tiny_cohort), "--config_file", *TRAIN]
    for name, jobs in (("one", "1"), ("two", "2")):
        preprocess.main([*args, "--cache_dir", str(tmp_path / name), "--jobs", jobs])
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert len(one) == 16 and one == two
    (tmp_path / "bad.nii.gz").write_bytes(b"no scan")
    records = [*read_cohort(str(tiny_cohort))[:3], {"patient_id": "bad", "image": str(tmp_path / "bad.nii.gz")}]
    says = r"^1 of 4 scans can't be used:\n  patient bad, image .*bad.nii.gz.*\nThe others are ready: .*--on_fault skip"
    with pytest.raises(InputError, match=says):
        ScanCache(records, transforms(), str(tmp_path / "three")).fill(jobs=2)
    dataset = ScanCache(records, transforms(), str(tmp_path / "three"), on_fault="skip")
    assert dataset.fill(jobs=2) == 0 and len(dataset.data) == 3  # the good ones were kept


def test_bad_scans_of_all_parts_are_told_together_and_a_mistake_in_every_scan_at_once(tiny_cohort, tmp_path, monkeypatch):
    (tmp_path / "bad.nii.gz").write_bytes(b"no scan")
    good, bad = read_cohort(str(tiny_cohort))[:2], {"image": str(tmp_path / "bad.nii.gz")}
    parts = [[good[i], {"patient_id": name, **bad}] for i, name in enumerate(("one", "two"))]
    datasets = [ScanCache(records, transforms(), str(tmp_path / "cache")) for records in parts]
    with pytest.raises(InputError, match=r"(?s)2 of 4 scans can't be used:.*patient one, .*patient two, "):
        fill_caches(*datasets)
    looked = []
    monkeypatch.setattr(ScanCache, "_check", lambda self, record: looked.append(1) or ("", False, "patient x: not HU"))
    with pytest.raises(InputError, match="none of the first 20 scans can be used; the first: patient x: not HU"):
        ScanCache(good * 100, transforms(), str(tmp_path / "cache"), on_fault="skip").fill()
    assert len(looked) == 20


def test_training_does_no_work_that_preprocessing_has_done_and_ends_in_the_same_bits(
    tiny_cohort, tmp_path, trained, capsys, monkeypatch
):
    args = ["--cohort", str(tiny_cohort), "--config_file", *TRAIN, "--cache_dir", str(tmp_path / "cache")]
    preprocess.main(args)
    assert "16 preprocessed" in capsys.readouterr().out
    preprocess.main(args)
    assert "0 preprocessed" in (out := capsys.readouterr().out) and "16 there already" in out

    def never(self, record):
        raise AssertionError("preprocessed again")

    monkeypatch.setattr(ScanCache, "preprocess", never)
    model = train(tiny_cohort, tmp_path / "run", cache_dir=str(tmp_path / "cache"))
    assert model.read_bytes() == trained.read_bytes()
    with pytest.raises(InputError, match="preprocessed again"):
        preprocess.main([*args, "--spacing", "[4, 4, 4]"])
    for override, says in (
        (["--spacin", "2"], "--spacin is no key"),
        (["--config_file", "nope.json"], "--config_file nope.json: no such file"),
    ):
        with pytest.raises(InputError, match=says):
            preprocess.main([*args, *override])
