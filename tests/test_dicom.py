# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import logging
import os
import re
import shutil
import tempfile
import zipfile
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)
from scipy import ndimage

from bundle.data.fingerprint import content_digest
from bundle.errors import InputError
from bundle.reading import zipped
from bundle.reading.dicom import choose_series, list_series, read_dicom, straighten
from bundle.reading.series import Series, sharp_kernel
from bundle.reading.slices import without_name
from bundle.run.scans import scans_to_infer
from bundle.transforms import LoadCTd

from . import bad_scans
from .dicom_files import ct_slices, enhanced, gdcm_frame, set_pixels, write_series, write_slices

SPACING, ORIGIN = (2.0, 2.0, 10.0), (-12.0, -10.0, 100.0)


def chest(slices: int = 24, seed: int = 0, shape: tuple[int, int] = (12, 10)) -> np.ndarray:
    """Air, and in it a block of soft tissue; 240 mm long."""
    values = np.random.default_rng(seed).normal(-900, 20, (*shape, slices)).round()
    values[3:6, 3:6, slices // 4 : slices // 2] += 940
    return values.astype(np.int16)


def add(folder, name: str, values: np.ndarray | None = None, spacing=SPACING, spoil=lambda slices: None, **tags) -> str:
    """A series in a folder within; its UID."""
    uid = generate_uid()
    values = chest() if values is None else values
    write_series(folder / name, values, spacing, ORIGIN, spoil, SeriesInstanceUID=uid, SeriesDescription=name, **tags)
    return uid


def find_series(folder, where: str, uid: str | None = None) -> Series:
    return choose_series(list_series(folder), where, uid)


def refusal(folder, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        read_dicom(folder, "patient P7", **kwargs)
    message = str(caught.value)
    assert message.startswith("patient P7: ") and "\n" not in message and "Secret" not in message
    return message


@pytest.fixture(scope="module")
def hospital(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """What a hospital sends, one study with everything in it, in nested folders; and the UID of each series."""
    folder = tmp_path_factory.mktemp("hospital")
    coronal = {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}

    def along_y(slices):
        for k, ds in enumerate(slices):
            ds.ImagePositionPatient = [0, 10.0 * k, 0]

    short = chest(4)
    series = {
        "soft": add(folder, "deep/er/soft", ConvolutionKernel="B31f"),
        "lung": add(folder, "lung", ConvolutionKernel="B70f"),
        "thick": add(folder, "thick", chest(12), (2.0, 2.0, 20.0), ConvolutionKernel="B31f"),
        "scout": add(folder, "scout", chest(3), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        "bolus": add(folder, "bolus", short),
        "coronal": add(folder, "coronal", spoil=along_y, **coronal),
        "reformat": add(folder, "reformat", ImageType=["DERIVED", "SECONDARY", "MPR"], ConvolutionKernel="B31f"),
        "abdomen": add(folder, "abdomen", BodyPartExamined="ABDOMEN", ConvolutionKernel="B31f"),
        "PET": add(folder, "pet", Modality="PT"),
    }
    (folder / "report.pdf").write_bytes(b"%PDF-1.4")
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    (folder / "cut.dcm").write_bytes(b"\0" * 128 + b"DICM\x02\0")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder)
    return folder, series


def test_the_chest_ct_is_chosen_among_all_that_is_there(hospital, caplog):
    caplog.set_level(logging.INFO)
    folder, series = hospital
    chosen = find_series(folder, "patient P7")
    assert chosen.uid == series["soft"]
    for name, why in {
        "lung": "sharp kernel, not soft kernel",
        "thick": "20 mm apart, not 10 mm apart",
        "scout": "a localiser",
        "bolus": "40 mm long, not 240 mm long",
        "coronal": "coronal, not axial",
        "reformat": "derived, not original",
        "abdomen": "other body part, not no body part",
        "PET": "modality PT, not CT",
    }.items():
        line = next(r.message for r in caplog.records if series[name] in r.message)
        assert line.endswith(f"left: {why}"), line
    (line,) = (r.message for r in caplog.records if series["soft"] in r.message)
    assert (
        "CT, 'deep/er/soft', kernel B31f, 24 slices, 10 mm thick, axial, 12 x 10" in line and "taken (axial, 240 mm" in line
    )
    assert "Secret" not in caplog.text


def test_the_patients_name_is_not_shown_where_a_description_holds_it(tmp_path):
    add(tmp_path, "Thorax SECRET, name 1.0")
    (series,) = list_series(tmp_path)
    assert "'Thorax ***, *** 1.0'" in str(series)


def test_a_series_can_be_named(hospital):
    folder, series = hospital
    assert find_series(folder, "here", series["lung"]).uid == series["lung"]
    assert "modality PT, not CT" in refusal(folder, uid=series["PET"])
    assert "there is no DICOM series 1.2.3 (found: " in refusal(folder, uid="1.2.3")

    (record,) = scans_to_infer(str(folder), None, {}, series["thick"])
    image = LoadCTd()(record)["image"]
    np.testing.assert_array_equal(image[0].numpy(), chest(12))
    for image, cohort in ((None, "cohort.csv"), (str(folder / "report.pdf"), None)):
        with pytest.raises(InputError, match="give the folder as --image"):
            scans_to_infer(image, cohort, {}, series["thick"])


def test_a_coronal_series_is_read_where_there_is_no_axial_one(tmp_path):
    values = chest()

    def along_y(slices):
        for k, ds in enumerate(slices):
            ds.ImagePositionPatient = [0, 10.0 * k, 0]

    add(tmp_path, "coronal", values, spoil=along_y, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    array, affine, _ = read_dicom(tmp_path, "here")
    np.testing.assert_array_equal(array, values)
    assert nib.aff2axcodes(affine) == ("L", "I", "P")


@pytest.mark.parametrize(
    "kernel, sharp",
    [("B31f", False), ("Br40d\\3", False), ("B70f", True), ("I31f", False), ("Bl57", True), ("STANDARD", False)]
    + [("LUNG", True), ("BONEPLUS", True), ("FC08", False), ("FC52", True), ("B", False), ("L", True), ("", None)],
)
def test_kernels(kernel, sharp):
    assert sharp_kernel(kernel) is sharp


def test_nothing_but_what_cannot_be_used(tmp_path):
    assert "no DICOM series" in refusal(tmp_path)
    add(tmp_path, "pet", Modality="PT")
    add(tmp_path, "scout", chest(3), ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    for _ in range(2):
        add(tmp_path, "one", chest(1))
    message = refusal(tmp_path)
    assert "no CT volume" in message
    assert "2 series: 1 slice (expected at least 3)" in message and "1 series: a localiser" in message


# --- slices that do not make a volume ------------------------------------------------------------------------------


def test_missing_slices_are_refused_with_the_place(tmp_path):
    def lose(slices):
        del slices[5:7], slices[15]  # z = 150, 160 and 270 mm

    uid = add(tmp_path, "gap", spoil=lose)
    message = refusal(tmp_path)
    assert "3 slices missing between 140.0 and 170.0 mm, 260.0 and 280.0 mm" in message and "one every 10 mm" in message
    # A whole series as long is taken instead; by name it is still refused.
    whole = add(tmp_path, "whole", ConvolutionKernel="B70f")
    assert find_series(tmp_path, "here").uid == whole
    assert "missing" in refusal(tmp_path, uid=uid)


def test_a_short_whole_series_does_not_stand_in_for_a_long_one(tmp_path):
    add(tmp_path, "gap", spoil=lambda slices: slices.pop(5))
    add(tmp_path, "short", chest(5))
    assert "1 slice missing" in refusal(tmp_path)


def unevenly(slices):
    for k, ds in enumerate(slices[12:], start=12):
        ds.ImagePositionPatient[2] = 100 + 120 + 3 * (k - 12)


def bent(slices):
    for ds in slices[12:]:
        ds.ImagePositionPatient[0] += 8


def compressed(slices):
    for ds in slices:
        ds.compress(RLELossless, generate_instance_uid=False)


def enlarged(slices):
    compressed(slices)
    for ds in slices:
        ds.Rows = ds.Columns = 65535


def tilted(degrees: float):
    def spoil(slices):
        for n, ds in enumerate(slices):
            ds.ImageOrientationPatient = [1, 0, 0, 0, np.cos(np.radians(degrees)), -np.sin(np.radians(degrees))]
            ds.ImagePositionPatient = [0.0, 0.0, 3.0 * n]

    return spoil


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (unevenly, "slices are 3 to 10 mm apart"),
        (bent, "off a straight line"),
        (enlarged, "65535 x 65535 pixels (expected Columns and Rows of 1 to 4096)"),
        (lambda slices: setattr(slices[3], "PatientID", "P9"), "patients"),
        (lambda slices: [delattr(ds, "ImagePositionPatient") for ds in slices], "ImagePositionPatient is missing"),
        (lambda slices: [delattr(ds, "ImageOrientationPatient") for ds in slices], "ImageOrientationPatient is missing"),
        (lambda slices: [delattr(ds, "PixelSpacing") for ds in slices], "PixelSpacing is missing"),
        (lambda slices: [setattr(ds, "PixelSpacing", [0, 0]) for ds in slices], "PixelSpacing is missing or not valid"),
        (
            lambda slices: [setattr(ds, "ImageOrientationPatient", [1, 0, 0, 1, 0, 0]) for ds in slices],
            "ImageOrientationPatient is missing or not valid",
        ),
        *((tilted(n), f"advances at {n:.0f} degrees to the slices' normal") for n in (45.0, 80.0, 90.0)),
        (tilted(45.0), "(expected at most 31, a tilted gantry)"),
    ],
)
def test_slices_that_make_no_volume_are_refused(tmp_path, spoil, says):
    add(tmp_path, "spoilt", spoil=spoil)
    assert says in refusal(tmp_path)


def test_two_thicknesses_in_one_series_are_two_volumes(tmp_path):
    fine, coarse = ct_slices(chest(48), (2, 2, 5), ORIGIN), ct_slices(chest(24, seed=1), SPACING, ORIGIN)
    for ds in coarse:
        ds.SeriesInstanceUID = fine[0].SeriesInstanceUID
    write_slices(tmp_path, fine + coarse)
    assert sorted(len(s.slices) for s in list_series(tmp_path)) == [24, 48]
    array, _, notes = read_dicom(tmp_path, "here")
    np.testing.assert_array_equal(array, chest(48))
    assert notes == ["24 slices of this series left out (another slice thickness)"]


def test_two_acquisitions_at_the_same_places_are_two_volumes(tmp_path):
    def two(slices):
        slices += ct_slices(chest(seed=1), SPACING, ORIGIN, SeriesInstanceUID=slices[0].SeriesInstanceUID)
        for k, ds in enumerate(slices):
            ds.AcquisitionNumber = 1 + (k >= 24)

    add(tmp_path, "phases", spoil=two)
    assert [len(s.slices) for s in list_series(tmp_path)] == [24, 24]
    assert any(np.array_equal(read_dicom(tmp_path, "here")[0], chest(seed=k)) for k in (0, 1))


def test_mixed_thickness_on_one_grid_is_noted(tmp_path):
    def thicker(slices):
        for ds in slices[::2]:
            ds.SliceThickness = 12

    add(tmp_path, "mixed", spoil=thicker)
    # Every other slice alone is even too, but the whole is a volume already.
    array, _, notes = read_dicom(tmp_path, "here")
    assert array.shape[2] == 24 and notes == ["slice thickness varies within the series"]


def test_repeated_slices(tmp_path):
    add(tmp_path, "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    array, _, notes = read_dicom(tmp_path, "here")
    np.testing.assert_array_equal(array, chest())
    assert notes == ["24 slices repeated another and left out"]

    def differ(slices):
        slices.append(pydicom.dcmread(min((tmp_path / "whole").iterdir())))  # the first slice, at the place of the eighth
        slices[-1].SeriesInstanceUID = slices[0].SeriesInstanceUID
        slices[-1].ImagePositionPatient = slices[7].ImagePositionPatient
        slices[-1].FrameOfReferenceUID = slices[7].FrameOfReferenceUID

    add(tmp_path / "b", "differ", spoil=differ)
    assert "2 different slices are at one position, 170.0 mm" in refusal(tmp_path / "b")


def test_one_sop_instance_uid_for_all(tmp_path):
    def same(slices):
        for ds in slices:
            ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = slices[0].SOPInstanceUID

    add(tmp_path, "same", spoil=same)
    array, _, notes = read_dicom(tmp_path, "here")
    np.testing.assert_array_equal(array, chest())
    assert notes == ["several slices share one SOPInstanceUID; their positions were used"]


def test_two_patients(tmp_path):
    add(tmp_path, "one")
    other = add(tmp_path, "two", PatientID="P8")
    message = refusal(tmp_path)
    assert "several patients" in message and "P8" not in message
    assert find_series(tmp_path, "here", other).uid == other


@pytest.mark.parametrize(
    ("spoil", "cut", "says"),
    [(compressed, 800, "truncated or damaged"), (lambda slices: None, 2200, "1 of 6 files truncated")],
)
def test_a_cut_file_is_refused(tmp_path, spoil, cut, says):
    add(tmp_path, "cut", chest(6, shape=(40, 36)), spoil=spoil)
    path = sorted((tmp_path / "cut").iterdir())[3]
    path.write_bytes(path.read_bytes()[:-cut])
    assert says in refusal(tmp_path)


@pytest.mark.parametrize("suffix", [".dcm", ""])
def test_files_without_a_preamble(tmp_path, suffix):
    add(tmp_path, "old")
    for path in list((tmp_path / "old").iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[content.index(b"\x08\x00\x08\x00CS") :])  # from ImageType on
        path.rename(path.with_suffix(suffix))
    (tmp_path / "text.dcm").write_text("no DICOM at all, whatever its name says " * 20)
    np.testing.assert_array_equal(read_dicom(tmp_path, "here")[0], chest())


# --- pixels --------------------------------------------------------------------------------------------------------


def test_each_slice_has_its_own_slope_and_intercept(tmp_path):
    values = chest()

    def rescale(slices):
        for k, ds in enumerate(slices):
            set_pixels(ds, values[:, :, k], slope=(1, 0.5, 2.0)[k % 3], intercept=(-1024, -2048, -1500)[k % 3])

    add(tmp_path, "slopes", values, spoil=rescale)
    assert np.abs(read_dicom(tmp_path, "here")[0] - values).max() <= 1  # slope 2 keeps even values only


PLAIN = {
    "implicit": ImplicitVRLittleEndian,
    "explicit": ExplicitVRLittleEndian,
    "big endian": ExplicitVRBigEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
}
KINDS = [*PLAIN, "JPEG", "JPEG2000", "JPEG-LS", "RLE", "enhanced", "enhanced RLE", "enhanced single frames", "zip"]


def write_as(kind: str, folder: Path, slices: list[pydicom.Dataset], scratch: Path) -> str:
    """Slices as a transfer syntax, an enhanced object or a ZIP archive; the path to read."""
    if kind == "zip":
        return shutil.make_archive(str(folder), "zip", write_slices(scratch / "unzipped", slices))
    if kind == "enhanced single frames":
        slices = [enhanced([ds]) for ds in slices]
    elif kind.startswith("enhanced"):
        slices = [enhanced(slices[1::2] + slices[::2])]  # frames in no order
    for ds in slices:
        if kind in PLAIN:
            ds.file_meta.TransferSyntaxUID = PLAIN[kind]
            if kind == "big endian":
                ds.PixelData = np.frombuffer(ds.PixelData, np.uint16).byteswap().tobytes()
        elif kind in ("JPEG", "JPEG2000"):
            frame, syntax = gdcm_frame(ds, getattr(itk.GDCMImageIOEnums, f"Compression_{kind}"), scratch)
            ds.PixelData = encapsulate([frame])
            ds["PixelData"].is_undefined_length = True
            ds.file_meta.TransferSyntaxUID = syntax
        elif kind not in ("enhanced", "enhanced single frames"):
            ds.compress(JPEGLSLossless if kind == "JPEG-LS" else RLELossless, generate_instance_uid=False)
    return write_slices(folder, slices)


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_store_a_series_reads_the_same(tmp_path, kind):
    values = chest(6, shape=(40, 36))
    path = write_as(kind, tmp_path / "series", ct_slices(values, SPACING, ORIGIN), tmp_path)
    image = LoadCTd()({"patient_id": "P7", "image": path})["image"]
    np.testing.assert_array_equal(image[0].numpy(), values)
    expected = np.diag([-2.0, -2, 10, 1])
    expected[:3, 3] = np.array(ORIGIN) * [-1, -1, 1]
    np.testing.assert_array_equal(image.affine, expected)


@pytest.mark.slow
def test_every_way_to_store_a_series_gives_the_same_months(tmp_path):
    """To the last digit, and those of the NIfTI."""
    hu, _ = bad_scans.chest()
    hu = hu.astype(np.int16).clip(-1024)
    nib.Nifti1Image(hu, np.diag([-6.6, -6.6, 5, 1])).to_filename(tmp_path / "scan.nii.gz")
    rows = ["patient_id,image", "nifti,scan.nii.gz"]
    for kind in KINDS:
        slices = ct_slices(hu, (6.6, 6.6, 5.0), (0, 0, 0))
        rows.append(f"{kind.replace(' ', '_')},{write_as(kind, tmp_path / kind.replace(' ', '_'), slices, tmp_path)}")
    (tmp_path / "cohort.csv").write_text("\n".join(rows))
    predictions, code, log, _ = bad_scans.infer(tmp_path / "cohort.csv", tmp_path / "output")
    assert code == 0, log
    for column in predictions.columns.drop(["patient_id", "message"]):
        assert predictions[column].nunique() == 1, predictions[["patient_id", column]]


# --- headers with noise, and what is left out -----------------------------------------------------------------------


def turn(angles):
    """Orientation noise: slice k is turned by angles(k), radians."""

    def spoil(slices):
        for k, ds in enumerate(slices):
            ds.ImageOrientationPatient = [1, angles(k), 0, -angles(k), 1, 0]

    return spoil


def each(keyword: str, value):
    """A tag of its own for each slice."""
    return lambda slices: [setattr(ds, keyword, value(k)) for k, ds in enumerate(slices)]


def other_positions(slices):
    for k, ds in enumerate(slices):  # 0.625 mm, written to 0.1 mm
        ds.ImagePositionPatient = [*ORIGIN[:2], round(100 + 0.625 * k, 1)]


@pytest.mark.parametrize(
    ("spoil", "notes"),
    [
        (turn(lambda k: 4.999e-4 if k % 2 else 5.001e-4), []),
        (turn(lambda k: 4.999e-4 if k < 3 else 5.001e-4), []),
        (turn(lambda k: 1e-6 * np.sin(k)), []),
        (
            turn(lambda k: 0 if k % 3 else 8e-4),
            ["the slices' orientation varies by 0.046 degrees, the median was taken"],
        ),
        (each("PixelSpacing", lambda k: [2.0005 + (-1) ** k * 1e-7] * 2), []),
        (each("ConvolutionKernel", lambda k: ["Br40d", str(2 + k % 2)]), ["the kernel varies within the series"]),
        (each("ConvolutionKernel", lambda k: "B31f" if k % 2 else ""), ["the kernel varies within the series"]),
        (other_positions, []),
        (lambda slices: [delattr(ds, "Modality") for ds in slices], []),
    ],
)
def test_noise_in_headers_does_not_tear_a_series(tmp_path, spoil, notes):
    add(tmp_path, "noisy", spoil=spoil)
    array, affine, found = read_dicom(tmp_path, "here")
    np.testing.assert_array_equal(array, chest())
    assert found == notes
    if spoil is other_positions:
        assert affine[2, 2] == pytest.approx(0.625, abs=0.1 / 23)


def screen_save(slices):
    slices.append(copy.deepcopy(slices[0]))
    slices[-1].ImageType = ["DERIVED", "SECONDARY", "SCREEN SAVE"]
    del slices[-1].ImagePositionPatient


def derived(slices):
    slices.append(copy.deepcopy(slices[7]))
    slices[-1].ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    slices[-1].PixelData = bytes(len(slices[-1].PixelData))


def two_kernels(slices):
    for ds in list(slices):
        ds.ConvolutionKernel = "B31f"
        slices.append(copy.deepcopy(ds))
        slices[-1].ConvolutionKernel = "B70f"


def turned_end(slices):
    turn(lambda k: 0 if k < 20 else 0.01)(slices)


@pytest.mark.parametrize(
    ("spoil", "note"),
    [
        (screen_save, "1 slice of this series left out (ImagePositionPatient is missing or not valid)"),
        (derived, "1 slice of this series left out (another ImageType)"),
        (two_kernels, "24 slices of this series left out (another kernel)"),
        (turned_end, "4 slices of this series left out (another orientation or pixel size)"),
    ],
)
def test_slices_that_are_left_out_are_counted(tmp_path, spoil, note):
    add(tmp_path, "mixed", spoil=spoil)
    array, _, notes = read_dicom(tmp_path, "here")
    np.testing.assert_array_equal(array, chest()[:, :, : array.shape[2]])
    assert array.shape[2] == (20 if spoil is turned_end else 24) and notes == [note]


def test_slices_without_a_common_series_are_grouped_and_it_is_said(tmp_path):
    series = tmp_path / "own"
    add(series, "one", spoil=each("SeriesInstanceUID", lambda k: generate_uid()))
    array, _, notes = read_dicom(series, "here")
    np.testing.assert_array_equal(array, chest())
    assert notes == ["24 SeriesInstanceUIDs, taken as one series by study, orientation and position"]
    add(tmp_path / "none", "one", spoil=lambda slices: [delattr(ds, "StudyInstanceUID") for ds in slices])
    for path in (tmp_path / "none" / "one").iterdir():
        ds = pydicom.dcmread(path)
        del ds.SeriesInstanceUID
        ds.save_as(path)
    assert read_dicom(tmp_path / "none", "here")[2] == [
        "no SeriesInstanceUID, taken as one series by study, orientation and position"
    ]
    # Slices of several studies are none.
    add(tmp_path / "many", "one", spoil=lambda slices: [setattr(ds, k, generate_uid()) for ds in slices for k in (
        "SeriesInstanceUID", "StudyInstanceUID")])  # fmt: skip
    assert "24 series: 1 slice (expected at least 3)" in refusal(tmp_path / "many")


def test_which_of_several_series_is_in_the_notes(tmp_path):
    add(tmp_path, "native")
    add(tmp_path, "contrast", chest(seed=1))
    add(tmp_path, "thick", chest(12), (2.0, 2.0, 20.0))
    notes = read_dicom(tmp_path, "here")[2]
    assert len(notes) == 2
    assert notes[0].startswith("3 CT series are there, taken: CT, '") and notes[1].startswith("as good: CT, '")
    assert "'native'" in " ".join(notes) and "'contrast'" in " ".join(notes) and "thick'" not in " ".join(notes)
    uid = add(tmp_path, "more", spoil=lambda slices: slices.pop(3), ConvolutionKernel="B31f")
    passed = read_dicom(tmp_path, "here")[2][2]
    assert passed.startswith("passed over: CT, 'more'") and uid in passed and "1 slice missing" in passed


def test_patients_with_blank_ids(tmp_path):
    for name in ("one", "two"):
        add(tmp_path, name, PatientID="")
    assert "2 studies, and PatientID is blank: that they are of one patient is a guess" in read_dicom(tmp_path, "here")[2]
    add(tmp_path, "three", PatientID="", PatientName="Other^Secret")
    assert "several patients" in refusal(tmp_path)


@pytest.mark.parametrize("tag", ["RescaleSlope", "RescaleIntercept"])
def test_slices_without_their_rescale_tags_are_refused_with_the_count(tmp_path, tag):
    add(tmp_path, "some", spoil=lambda slices: [delattr(ds, tag) for ds in slices[5:9]])
    assert f"{tag} is missing or not valid in 4 of 24 slices (expected in all)" in refusal(tmp_path)


def test_frames_with_different_slopes_are_refused(tmp_path):
    whole = enhanced(ct_slices(chest(), SPACING, ORIGIN))
    values = whole.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence[0]
    del whole.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    for k, frame in enumerate(whole.PerFrameFunctionalGroupsSequence):
        frame.PixelValueTransformationSequence = [copy.deepcopy(values)]
        frame.PixelValueTransformationSequence[0].RescaleSlope = 1 + k % 2
    write_slices(tmp_path, [whole])
    assert "RescaleSlope differs between frames" in refusal(tmp_path)
    del whole.PerFrameFunctionalGroupsSequence
    write_slices(tmp_path / "b", [whole])
    assert "a multi-frame object with no place" in refusal(tmp_path / "b")


@pytest.mark.parametrize(("value", "tag"), [(-10240, None), (31743, 32767), (-5000, -5000 + 1024)])
def test_padding_is_air(tmp_path, value, tag):
    """As the extended CT scale has it, without a word; or where PixelPaddingValue names it."""
    values = chest()
    padded = values.astype(int)
    padded[:2] = value

    def pad(slices):
        for k, ds in enumerate(slices):
            ds.PixelRepresentation, ds.RescaleIntercept = 1, -1024
            pixels = (padded[:, :, k].T + 1024).astype(np.int16)
            ds.PixelData = pixels.tobytes()
            if tag is not None:
                ds.PixelPaddingValue = tag

    folder = tmp_path / "padded"
    add(folder, "padded", spoil=pad)
    out = LoadCTd()({"patient_id": "P7", "image": str(folder)})
    expected = np.where(padded == value, -1024, values)
    np.testing.assert_array_equal(out["image"][0].numpy(), expected)
    assert out["notes"] == ("voxels of -10240 HU taken as padding" if tag is None else "")


# --- folders of links, archives -------------------------------------------------------------------------------------


def test_folders_that_are_links_are_read_once(tmp_path):
    add(tmp_path / "real", "one")
    links = tmp_path / "links"
    links.mkdir()
    (links / "series").symlink_to(tmp_path / "real")
    (links / "again").symlink_to(tmp_path / "real")
    (links / "self").symlink_to(links)
    array, _, notes = read_dicom(links, "here")
    np.testing.assert_array_equal(array, chest())
    assert not notes
    # What is cached of the folder follows its content, too.
    before = content_digest(str(links))
    next((tmp_path / "real" / "one").iterdir()).unlink()
    assert content_digest(str(links)) != before


@pytest.fixture
def scratch(tmp_path, monkeypatch) -> Path:
    """Where temporary files go."""
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def archive(tmp_path, names=lambda path: path.name, **kwargs) -> Path:
    add(tmp_path / "source", "one")
    (tmp_path / "study").mkdir()
    with zipfile.ZipFile(tmp_path / "study" / "export.ZIP", "w", **kwargs) as made:
        for path in (tmp_path / "source" / "one").iterdir():
            made.write(path, names(path))
    return tmp_path / "study" / "export.ZIP"


def test_an_archive_of_a_series_is_read_and_nothing_stays(tmp_path, scratch):
    path = archive(tmp_path, names=lambda path: f"../../{path.name}")
    for place in (path, path.parent):
        np.testing.assert_array_equal(read_dicom(place, "here")[0], chest())
    assert not list(scratch.iterdir()) and not list(tmp_path.glob("*.dcm"))
    (record,) = scans_to_infer(
        str(path), None, {}, pydicom.dcmread(next((tmp_path / "source/one").iterdir())).SeriesInstanceUID
    )
    assert record["patient_id"] == "export" and LoadCTd()(record)["image"].shape == (1, 12, 10, 24)


def test_archives_that_a_stranger_made(tmp_path, scratch, monkeypatch):
    path = archive(tmp_path, compression=zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    monkeypatch.setattr(zipped, "_MOST_BYTES", 10_000)
    assert "the ZIP archive holds more than" in refusal(path)
    monkeypatch.setattr(zipped, "_MOST_BYTES", 2**32)
    monkeypatch.setattr(zipped, "_MOST_LISTED", 100)
    assert "lists too many files" in refusal(path)
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    path.write_bytes(content[:-200])
    assert "the ZIP archive is truncated or damaged" in refusal(path)
    path.write_bytes(content[:300] + bytes(20) + content[320:])
    assert "the ZIP archive is truncated or damaged" in refusal(path)
    flagged = bytearray(content)
    flagged[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(flagged)
    assert "encrypted" in refusal(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as other:
        other.writestr("a.dcm", "x")
    assert "compressed by another method (expected deflate)" in refusal(path)
    assert not list(scratch.iterdir())


def test_a_deflated_file_that_inflates_beyond_its_pixels_is_refused(tmp_path):
    add(tmp_path, "bomb", spoil=lambda slices: [
        setattr(ds.file_meta, "TransferSyntaxUID", DeflatedExplicitVRLittleEndian) for ds in slices
    ])  # fmt: skip
    path = next((tmp_path / "bomb").iterdir())
    ds = pydicom.dcmread(path)
    ds.PixelData = bytes(2**25)
    ds.save_as(path)
    assert path.stat().st_size < 2**17
    assert "1 of 24 files truncated, or longer than said" in refusal(tmp_path)


# --- gantry tilt ---------------------------------------------------------------------------------------------------


def test_a_tilted_gantry_is_straightened(tmp_path):
    tilt = np.radians(20.0)
    shape, spacing = (40, 50, 40), np.array([2.0, 2.0, 3.0])
    column = np.array([0, np.cos(tilt), -np.sin(tilt)])
    origin, centre, radius = np.array([-40.0, -50, 0]), np.array([0.0, 0, 50]), 18.0  # LPS
    i, j, k = np.meshgrid(*map(np.arange, shape), indexing="ij")
    points = origin + i[..., None] * [2.0, 0, 0] + j[..., None] * 2 * column + k[..., None] * [0, 0, 3.0]
    ball = np.linalg.norm(points - centre, axis=-1) < radius
    values = np.where(ball, 40, -900)

    add(tmp_path, "tilted", values, spacing, spoil=lambda slices: [
        setattr(ds, "ImagePositionPatient", [*origin[:2], 3.0 * n]) for n, ds in enumerate(slices)
    ], ImageOrientationPatient=[1, 0, 0, *column])  # fmt: skip
    array, affine, notes = read_dicom(tmp_path, "here")
    assert notes == ["gantry tilt of 20.0 degrees straightened by resampling"]
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), spacing, atol=1e-6)
    found = array > -430
    assert found.sum() * spacing.prod() == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.03)
    middle = affine[:3, :3] @ ndimage.center_of_mass(found) + affine[:3, 3]
    np.testing.assert_allclose(middle, centre * [-1, -1, 1], atol=0.5)
    assert found.sum((1, 2)).max() * 6 == pytest.approx(np.pi * radius**2, rel=0.05)  # round in the other planes too
    # Masks go the same way.
    series = find_series(tmp_path, "here")
    mask = straighten(ball, series.affine, mode="nearest", outside=0.0)
    assert mask.shape[1:] == array.shape and set(np.unique(mask)) == {0, 1}
    overlap = 2 * (found & (mask[0].numpy() > 0)).sum() / (found.sum() + mask.sum().item())
    assert overlap > 0.95


@pytest.mark.parametrize("text", ["DOE_JOHN_CHEST", "Chest Doe2020", "john^DOE", "doe"])
def test_words_of_the_name_are_hidden_whatever_stands_beside_them(text):
    found = without_name(text, "Doe^John")
    assert "***" in found and not re.search("doe|john", found, re.IGNORECASE)
    assert without_name("Doebler, Johnson", "Doe^John") == "Doebler, Johnson"


def test_a_real_series_reads_as_itk_reads_it(shared_data):
    folder = shared_data / "dicom_lungpetctdx_A0002_B40f"
    array, affine, notes = read_dicom(folder, "here")
    names = itk.GDCMSeriesFileNames.New()
    names.SetDirectory(str(folder))
    image = itk.imread(names.GetFileNames(names.GetSeriesUIDs()[0]))
    np.testing.assert_array_equal(array, itk.array_from_image(image).T)
    np.testing.assert_allclose(affine[:3, 3], np.array(image.GetOrigin()) * [-1, -1, 1])
    np.testing.assert_allclose(np.diag(affine)[:3], np.array(image.GetSpacing()) * [-1, -1, 1], rtol=1e-5)
    assert "no CT volume among the DICOM files, 4 series: 1 slice" in refusal(
        shared_data / "dicom_covid_ny_sbu_single_slices"
    )
