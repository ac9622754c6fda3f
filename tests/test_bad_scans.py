# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The corpus of bad scans through inference in one run, and the checks of files that come before reading."""

from __future__ import annotations

import gzip
import os
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from bundle.errors import InputError
from bundle.reading import scan_file
from bundle.reading.scan_file import check_scan_file
from bundle.transforms import LoadCTd

from . import bad_scans
from .bad_scans import block, by_itk, nifti

# MiB, the imports (about 600) included; the bombs of the corpus hold 4 and 8 GiB.
PEAK_MEMORY = 1536


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> SimpleNamespace:
    """The corpus and what inference made of it."""
    folder = tmp_path_factory.mktemp("bad")
    corpus = bad_scans.write_corpus(folder / "corpus")
    predictions, code, log, peak = bad_scans.infer(corpus, folder / "output")
    table = predictions.set_index("patient_id")
    return SimpleNamespace(
        corpus=corpus, output=folder / "output", predictions=predictions, table=table, code=code, log=log, peak=peak
    )


@pytest.mark.slow
def test_each_bad_scan_fails_alone_and_all_others_complete(ran):
    assert len(ran.table) == len(bad_scans.KINDS) and sum("good" not in name for name in bad_scans.KINDS) >= 40
    for name in bad_scans.KINDS:
        patient = bad_scans.patient_of(name)
        good = name.startswith("good")
        assert ran.table.loc[patient, "status"] == ("ok" if good else "failed"), name
        assert (ran.output / "maps" / f"{patient}_heat.nii.gz").exists() == good
    assert ran.code == 1 and "Traceback" not in ran.log
    assert "scans failed, the others are done" in ran.log and (ran.output / "report.html").exists()


def test_each_message_is_one_sentence_on_what_where_and_what_was_expected(ran):
    for patient, message in ran.table.message[ran.table.status == "failed"].items():
        assert message.startswith((f"patient {patient}", "row ")) and "expected" in message, message
        assert "\n" not in message and len(message.replace(str(ran.corpus.parent), "")) < 600, message
        for vague in ("Traceback", "Error", "0x", "cannot be read", "while reading or preprocessing"):
            assert vague not in message, message


def test_no_message_or_file_names_a_patient(ran):
    report = (ran.output / "report.html").read_text()
    for text in (ran.log, report, ran.predictions.to_csv()):
        assert "SECRET" not in text


def test_memory_stays_bounded(ran):
    if not ran.peak:
        pytest.skip("needs /proc")
    assert ran.peak < PEAK_MEMORY


def test_tables_after_public_reports_are_read_or_refused_in_words(tmp_path):
    said = {name: bad_scans.csv_message(content, tmp_path) for name, content in bad_scans.CSVS.items()}
    assert all("Error" not in text and len(text) < 700 for text in said.values())
    assert sum(text == "read" for text in said.values()) == 8


def test_the_page_is_what_the_code_says(ran):
    """If this fails: `python -m tests.bad_scans`, and read the difference."""
    assert bad_scans.page(ran.predictions, ran.corpus) == bad_scans.PAGE.read_text(encoding="utf-8")


def test_mirrored_scans_give_mirrored_maps(ran):
    """The same patient stored the other way round, and said so: the same heat at the same place in space."""
    maps = [
        nib.as_closest_canonical(nib.load(ran.output / "maps" / f"{bad_scans.patient_of(name)}_heat.nii.gz"))
        for name in ("good: NIfTI", "good: stored mirrored, with an affine that says so")
    ]
    np.testing.assert_allclose(maps[0].affine, maps[1].affine, atol=1e-3)
    a, b = (np.asarray(m.dataobj) for m in maps)
    np.testing.assert_allclose(a, b, atol=1e-3 * a.max())


# --- files ---------------------------------------------------------------------------------------------------------


def whole(folder, name: str, **options):
    """The block of soft tissue as a file of the suffix's format."""
    return nifti(folder, name=name) if "nii" in name else by_itk(folder, name, **options)


def test_whole_files_of_every_kind_pass(tmp_path):
    values = block()
    paths = [whole(tmp_path, name) for name in ("a.nii", "b.nii.gz")]
    one, two = nib.Nifti1Image, nib.Nifti2Image
    for name, kind, order in (("big.nii", one, ">"), ("two.nii.gz", two, "<"), ("both.nii", two, ">")):
        image = kind(values.astype(values.dtype.newbyteorder(order)), np.eye(4), kind.header_class(endianness=order))
        image.to_filename(tmp_path / name)
        paths.append(tmp_path / name)
    members = tmp_path / "members.nii.gz"  # as bgzip and pigz -i write it: many gzip streams one after the other
    data = (tmp_path / "a.nii").read_bytes()
    members.write_bytes(b"".join(gzip.compress(data[i : i + 1000]) for i in range(0, len(data), 1000)) + bytes(100))
    paths.append(members)
    for name in ("a.nrrd", "a.mha", "a.mhd"):
        paths += [whole(tmp_path, name), whole(tmp_path, f"z{name}", compressed=True)]
    text = tmp_path / "text.nrrd"
    text.write_text("NRRD0004\ntype: short\ndimension: 3\nsizes: 3 3 3\nencoding: ascii\n\n" + "-1000 " * 27)
    for path in (*paths, text):
        check_scan_file(path)
        assert LoadCTd(hounsfield=False)({"image": str(path)})["image"].shape[1:] == (
            (3, 3, 3) if path == text else (24, 20, 16) if "nii" in path.name else (16, 20, 24)
        ), path


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_no_flipped_bit_of_compressed_voxels_goes_unseen(tmp_path, suffix):
    path = whole(tmp_path, f"scan{suffix}", compressed=True)
    data = path.read_bytes()
    for place in np.linspace(0.1, 0.99, 12):
        path.write_bytes(data)
        bad_scans.flip_bit(path, int(place * len(data)))
        with pytest.raises(InputError, match="damaged|truncated|holds|header"):
            check_scan_file(path)


@pytest.mark.parametrize("name", ["scan.nii", "scan.nrrd", "scan.mha", "compressed.mha"])
def test_spoilt_headers_are_read_or_refused_but_never_crash(tmp_path, name):
    path = whole(tmp_path, name, compressed="compressed" in name)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        data = bytearray(content)
        for place in rng.integers(0, 300, rng.integers(1, 4)):
            data[place] = rng.choice([0, 255, *b" 09-\n", rng.integers(256)])
        path.write_bytes(data)
        try:
            LoadCTd()({"image": str(path)})
        except InputError:
            refused += 1
    assert 0 < refused < 60


def test_the_limit_is_on_what_the_header_claims(tmp_path, monkeypatch):
    path = nifti(tmp_path)
    monkeypatch.setattr(scan_file, "MOST_VOXELS", 24 * 20 * 16)
    check_scan_file(path)
    monkeypatch.setattr(scan_file, "MOST_VOXELS", 24 * 20 * 16 - 1)
    with pytest.raises(InputError, match="claims 24 x 20 x 16 voxels"):
        check_scan_file(path)


def test_an_unreadable_file_says_so(tmp_path):
    path = nifti(tmp_path)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(InputError, match="cannot be opened: Permission denied"):
        check_scan_file(path)


def test_the_affine_is_the_one_that_viewers_use(tmp_path):
    """An sform that pixdim contradicts still says where the scan is."""
    affine = np.array([[-2.0, 0, 0, 5], [0, 2, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]])
    path = nifti(tmp_path, affine=affine, name="scan.nii", pixdim=[1, 1, 1, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(nib.load(path).affine, affine)
    np.testing.assert_array_equal(LoadCTd()({"image": str(path)})["image"].affine, affine)


def test_a_tilted_gantry_is_no_shear(tmp_path):
    def load(degrees: float) -> None:
        affine = np.diag([2.0, 2, 3, 1])
        affine[1:3, 2] = 3 * np.sin(np.radians(degrees)), 3 * np.cos(np.radians(degrees))
        LoadCTd()({"image": str(nifti(tmp_path, affine=affine))})

    load(30)
    with pytest.raises(InputError, match="sheared by 35 degrees"):
        load(35)
