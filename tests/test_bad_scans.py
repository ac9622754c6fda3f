# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The corpus of bad scans through inference in one run, and the checks of files that come before reading."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from types import SimpleNamespace

import itk
import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bundle.errors import InputError
from bundle.reading import scan_file
from bundle.reading.scan_file import check_scan_file
from bundle.transforms import LoadCTd

from . import bad_scans
from .bad_scans import block, by_itk, nifti
from .commands import run
from .dicom_files import write_series

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
    pages = [page.read_text() for page in (ran.output / "cohort.html", *(ran.output / "reports").iterdir())]
    for text in (ran.log, *pages, ran.predictions.to_csv()):
        assert "SECRET" not in text


def test_memory_stays_bounded(ran):
    if not ran.peak:
        pytest.skip("needs /proc")
    assert ran.peak < PEAK_MEMORY


def test_tables_after_public_reports_are_read_or_refused_in_words(tmp_path):
    said = {name: bad_scans.csv_message(content, tmp_path) for name, content in bad_scans.CSVS.items()}
    assert all("Error" not in text and len(text) < 700 for text in said.values())
    assert sum(text == "read" for text in said.values()) == 8


REFUSED = {  # what is said, by kind; all others are read, and right
    "DICOM: 12 bits in the upper part of 16": "HighBit is not BitsStored - 1",
    "DICOM: MONOCHROME1, which ITK inverts": "MONOCHROME1",
    "DICOM: a palette that is missing, which ended the process": "PALETTE COLOR",
    "DICOM: values that are not HU (RescaleType)": "RescaleType MGML, not HU",
    "DICOM: 114 slices missing amid the scan": "114 slices missing",
    "NIfTI: no voxel size": "pixdim",
    "NIfTI: a pointer of Git LFS": "git lfs pull",
    "NRRD: sizes in micrometres": "space units are microns",
    "NRRD: no voxel size": "no voxel size",
    "NRRD: bzip2": "encoding is bzip2",
    "MetaImage: no voxel size": "ElementSpacing is missing",
    "MetaImage: sizes in micrometres": "DistanceUnits are um",
    "a lung mask that was interpolated": "off whole numbers",
    "a lung mask of probabilities": "off whole numbers",
}
NOTED = {
    "DICOM: two scans in one series, slices in turn": "16 slices of this series left out (another acquisition)",
    "NIfTI: sizes in micrometres": "converted to mm",
    "NIfTI: sizes in metres": "converted to mm",
    "NIfTI: sizes in mm that are said to be micrometres": "taken for mm",
    "a lung mask of 117 organs": "117 labels or more",
}


@pytest.mark.parametrize("name", bad_scans.REPORTS)
def test_scans_after_public_reports_are_right_or_refused_with_the_reason(tmp_path, name):
    found, said = bad_scans.read_report(name, tmp_path)
    assert REFUSED.get(name, NOTED.get(name, "read")) in said and (found is None) == (name in REFUSED)
    if found is not None:
        assert bool(found["notes"]) == (name in NOTED)
        image = nib.as_closest_canonical(nib.Nifti1Image(found["image"][0].float().numpy(), found["image"].affine.numpy()))
        right = nib.as_closest_canonical(nib.Nifti1Image(block().clip(-1024).astype(np.float32), bad_scans.SCAN))
        np.testing.assert_array_equal(image.get_fdata(), right.get_fdata())
        np.testing.assert_allclose(image.affine, right.affine, atol=0.01)


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


@pytest.mark.slow
def test_the_same_scan_in_every_format_gives_the_same_months(tmp_path, root, monkeypatch):
    """To the last digit that is written, and with the same notes."""
    monkeypatch.chdir(root)
    values, affine = bad_scans.chest()
    spacing, origin = np.diag(affine)[:3] * [-1, -1, 1], affine[:3, 3] * [-1, -1, 1]  # as DICOM and ITK have them, LPS
    image = itk.image_from_array(np.ascontiguousarray(values.T))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    paths = [nifti(tmp_path, values, affine, "a.nii")]
    paths.append(bad_scans.followed_by(nifti(tmp_path, values, affine, "b.nii.gz"), b"# copied by a script"))
    for name, compression in (("c.nrrd", True), ("d.mha", False), ("e.mhd", True)):
        itk.imwrite(image, str(tmp_path / name), compression=compression)
        paths.append(tmp_path / name)
    paths.append(Path(write_series(tmp_path / "series", values, spacing, origin)))
    rows = [f"{path.name},{path}" for path in paths]
    (tmp_path / "cohort.csv").write_text("\n".join(["patient_id,image", *rows]) + "\n")
    out = tmp_path / "out"
    run("configs/inference.json", cohort=str(tmp_path / "cohort.csv"), output_dir=str(out), shifts=1, refine=False)
    table = pd.read_csv(out / "predictions.csv", index_col="patient_id", dtype=str)
    assert len(table) == len(paths) and (table.status == "ok").all()
    assert (table == table.iloc[0]).all(axis=None), table.T


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
    header = ("NRRD0004", "type: short", "dimension: 3", "sizes: 3 3 3", "spacings: 1 1 1", "encoding: ascii", "", "")
    text.write_text("\n".join(header) + "-1000 " * 27)
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


@pytest.mark.parametrize("junk", [b"a", b"xxxx", b"\x1f", b"\x1f\x8b damaged", bytes(9000), b"# copied by a script\n"])
def test_bytes_after_a_gzip_stream_are_not_part_of_it(tmp_path, junk):
    path = nifti(tmp_path)
    path.write_bytes(path.read_bytes() + junk)
    np.testing.assert_array_equal(LoadCTd()({"image": str(path)})["image"][0].numpy(), block().clip(-1024))
    path.write_bytes(path.read_bytes()[: -len(junk) - 6] + junk)  # but they don't stand for its end
    with pytest.raises(InputError, match="truncated|damaged"):
        LoadCTd()({"image": str(path)})


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_voxels_of_a_nifti_are_what_nibabel_reads(tmp_path, name):
    rng = np.random.default_rng(0)
    for dtype, header in (
        (np.uint8, {"scl_slope": 8, "scl_inter": -1024}),
        (">i2", {"scl_slope": 0, "scl_inter": 5}),
        (np.uint16, {"scl_slope": 1, "scl_inter": -1024.5}),
        (np.float64, {}),
        (np.int16, {"vox_offset": 353}),  # of an odd number of bytes
    ):
        values = rng.integers(0, 200, (5, 4, 3)).astype(dtype)
        path = nifti(tmp_path, values, name=name, **header)
        if "vox_offset" in header:
            data = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
            data = data[:352] + b"\0" + data[352:]
            path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        image, reference = LoadCTd(hounsfield=False)({"image": str(path)})["image"], nib.load(path)
        np.testing.assert_array_equal(image[0].numpy(), reference.get_fdata().astype(np.float32))
        np.testing.assert_array_equal(image.affine, reference.affine)


def test_an_intercept_that_is_no_number_is_none(tmp_path):
    out = LoadCTd()({"image": str(nifti(tmp_path, scl_slope=1, scl_inter=np.nan))})
    np.testing.assert_array_equal(out["image"][0].numpy(), block().clip(-1024))
    assert "scl_inter is no number" in out["notes"]


def test_a_leading_axis_of_one_is_dropped(tmp_path):
    out = LoadCTd()({"image": str(nifti(tmp_path, block()[None]))})
    np.testing.assert_array_equal(out["image"][0].numpy(), block().clip(-1024))
    assert "leading axis of 1" in out["notes"] and np.allclose(out["image"].affine, bad_scans.SCAN)


def test_voxel_sizes_that_contradict_each_other_are_refused(tmp_path):
    path = nifti(tmp_path)
    for factor, pixdim in ((0.85, "1.7 x 1.7 x 2.55"), (1.15, "2.3 x 2.3 x 3.45")):
        sizes = np.array([2, 2, 3]) * factor
        path = nifti(tmp_path, pixdim=[1, *sizes, 1, 1, 1, 1])
        with pytest.raises(InputError, match=f"its voxels are {pixdim} mm by pixdim, 2 x 2 x 3 mm by the sform"):
            LoadCTd()({"image": str(path)})
    rounded = LoadCTd()({"image": str(nifti(tmp_path, pixdim=[1, 2.004, 1.996, 3, 1, 1, 1, 1]))})
    assert np.array_equal(rounded["image"].affine, bad_scans.SCAN) and rounded["notes"] == ""
    tilted = np.diag([2.0, 2, 3, 1])
    tilted[1, 2] = 1.5
    for slices in (3, np.hypot(3, 1.5)):  # between planes, or along the table
        LoadCTd()({"image": str(nifti(tmp_path, affine=tilted, pixdim=[1, 2, 2, slices, 1, 1, 1, 1]))})


@pytest.mark.parametrize(
    ("moved", "says"),
    [
        (np.diag([1.0, 1, 1, 1]), ""),
        (np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 60], [0, 0, 0, 1]]), "up to 60 mm apart; the sform was taken"),
        (np.diag([-1.0, 1, 1, 1]), "mm apart and mirror images; the sform was taken"),
    ],
)
def test_sform_and_qform_that_disagree_are_noted(tmp_path, moved, says):
    image = nib.Nifti1Image(block(), bad_scans.SCAN)
    image.set_sform(bad_scans.SCAN, 1)
    image.set_qform(moved @ bad_scans.SCAN, 2)
    nib.save(image, tmp_path / "scan.nii.gz")
    out = LoadCTd()({"image": str(tmp_path / "scan.nii.gz")})
    assert np.array_equal(out["image"].affine, bad_scans.SCAN)
    assert says in out["notes"] and bool(says) == bool(out["notes"])


@pytest.mark.parametrize(
    ("name", "sentences", "guess"),
    [
        ("scan.nrrd", ["space: left-posterior-superior", "space directions: (2,0,0) (0,2,0) (0,0,3)"], False),
        ("scan.nrrd", ["space: RAS", "space directions: (2,0,0) (0,2,0) (0,0,3)"], False),
        ("scan.nrrd", ["space: scanner-xyz", "space directions: (2,0,0) (0,2,0) (0,0,3)"], True),
        ("scan.nrrd", ["spacings: 2 2 3"], True),
        ("scan.mha", ["TransformMatrix = 1 0 0 0 1 0 0 0 1", "ElementSpacing = 2 2 3"], False),
        ("scan.mha", ["ElementSpacing = 2 2 3"], True),
    ],
)
def test_a_header_without_sides_is_noted(tmp_path, name, sentences, guess):
    start = ["NRRD0004", "type: short", "dimension: 3", "sizes: 24 20 16", "endian: little", "encoding: raw"]
    end = ["", ""]
    if name == "scan.mha":
        start = ["ObjectType = Image", "NDims = 3", "BinaryData = True", "BinaryDataByteOrderMSB = False"]
        end = ["DimSize = 24 20 16", "ElementType = MET_SHORT", "ElementDataFile = LOCAL", ""]
    data = "\n".join([*start, *sentences, *end]).encode() + block().tobytes(order="F")
    out = LoadCTd()({"image": str(bad_scans.raw(tmp_path, name, data))})
    np.testing.assert_array_equal(out["image"][0].numpy(), block().clip(-1024))
    assert ("left and right are a guess" in out["notes"]) == guess and bool(out["notes"]) == guess
    assert np.allclose(abs(np.diag(out["image"].affine)), [2, 2, 3, 1])


def test_a_tilted_gantry_is_no_shear(tmp_path):
    def load(degrees: float) -> None:
        affine = np.diag([2.0, 2, 3, 1])
        affine[1:3, 2] = 3 * np.sin(np.radians(degrees)), 3 * np.cos(np.radians(degrees))
        LoadCTd()({"image": str(nifti(tmp_path, affine=affine))})

    load(30)
    with pytest.raises(InputError, match="sheared by 35 degrees"):
        load(35)
