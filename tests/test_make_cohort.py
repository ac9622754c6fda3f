# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Cohorts from trees of the same structure as the public data sets."""

from __future__ import annotations

import os
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

from bundle.data.cohort import read_cohort
from bundle.reading.layouts import tidy
from bundle.transforms import LoadCTd
from scripts.make_cohort import main

from .conftest import write_scan
from .dicom_files import ct_slices, write_slices

SPACING, ORIGIN, SHAPE = (4.0, 4.0, 5.0), (-64.0, -60.0, 200.0), (32, 30, 16)
CENTRE, RADIUS = np.array([10.0, 5.0, 240.0]), 22.0  # LPS, mm


def distances() -> np.ndarray:
    """From each voxel's centre to the tumour's, mm."""
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    return np.linalg.norm(index * SPACING + ORIGIN - CENTRE, axis=-1)


def ct(patient: str, seed: int = 0) -> list[Dataset]:
    values = np.random.default_rng(seed).normal(-900, 20, SHAPE)
    values[distances() < RADIUS] = 40
    return ct_slices(values.round(), SPACING, ORIGIN, PatientID=patient, SeriesDescription="thorax")


def circles(radius: float) -> list[np.ndarray]:
    """The polygons of a sphere around the tumour's centre, one a slice, (points, 3)."""
    angle = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    polygons = []
    for z in ORIGIN[2] + SPACING[2] * np.arange(SHAPE[2]):
        if (square := radius**2 - (z - CENTRE[2]) ** 2) > 0:
            x, y = CENTRE[:2, None] + np.sqrt(square) * np.stack([np.cos(angle), np.sin(angle)])
            polygons.append(np.stack([x, y, np.full_like(x, z)], 1))
    return polygons


def rtstruct(slices: list[Dataset], regions: dict[str, list[np.ndarray]]) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.file_meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, RTStructureSetStorage
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = RTStructureSetStorage, generate_uid(), "RTSTRUCT"
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.PatientID, ds.SeriesInstanceUID, ds.InstanceNumber = slices[0].PatientID, generate_uid(), 1
    series, study, frame = Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = slices[0].SeriesInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = slices[0].FrameOfReferenceUID, [study]
    ds.ReferencedFrameOfReferenceSequence = [frame]
    ds.StructureSetROISequence, ds.ROIContourSequence = [], []
    for number, (name, polygons) in enumerate(regions.items(), start=1):
        roi, drawn = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, roi.ReferencedFrameOfReferenceUID = number, name, slices[0].FrameOfReferenceUID
        drawn.ReferencedROINumber, drawn.ContourSequence = number, []
        for polygon in polygons:
            contour = Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(polygon)
            contour.ContourData = [f"{v:.4f}" for v in polygon.ravel()]
            drawn.ContourSequence.append(contour)
        ds.StructureSetROISequence.append(roi)
        ds.ROIContourSequence.append(drawn)
    return ds


def seg(slices: list[Dataset], mask: np.ndarray, label: str) -> Dataset:
    segment = highdicom.seg.SegmentDescription(
        1, label, codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Neoplasm, "MANUAL"
    )
    return highdicom.seg.Segmentation(
        slices, mask.transpose(2, 1, 0).astype(np.uint8), "BINARY", [segment], generate_uid(), 2, generate_uid(), 1,
        "maker", "model", "1", "7",
    )  # fmt: skip


def write(folder: Path, ds: Dataset) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(folder / "1-1.dcm", ds, enforce_file_format=True)


@pytest.fixture
def lung1(tmp_path) -> Path:
    """NSCLC-Radiomics as TCIA's downloader leaves it: one patient with RTSTRUCT, one with SEG, one with neither."""
    root = tmp_path / "NSCLC-Radiomics"
    for n, patient in enumerate(("LUNG1-001", "LUNG1-002", "LUNG1-003")):
        study = root / patient / "09-18-2008-StudyID-NA-69331"
        slices = ct(patient, n)
        write_slices(study / "0.000000-NA-82046", slices)
        if n == 0:
            lungs = [np.array([[-40.0, -40, 240], [40, -40, 240], [40, 40, 240]])]
            write(study / "0.000000-NA-42155", rtstruct(slices, {"Lung-Left": lungs, "GTV-1": circles(RADIUS)}))
        if n == 1:
            write(study / "300.000000-Segmentation-9.554", seg(slices, distances() < RADIUS, "GTV-1"))
    (tmp_path / "NSCLC Radiomics Lung1.clinical.csv").write_text(
        "PatientID,age,clinical.T.Stage,Clinical.N.Stage,Clinical.M.Stage,Overall.Stage,Histology,gender,Survival.time,"
        "deadstatus.event\n"
        "LUNG1-001,78.7515,2,3,0,IIIb,large cell,male,2165,1\n"
        "LUNG1-002,83.8001,2,0,0,I,squamous cell carcinoma,male,155,1\n"
        "LUNG1-003,NA,2,3,0,NA,,female,256,0\n"
    )
    return tmp_path


def arguments(folder: Path, layout: str = "lung1", images: str = "NSCLC-Radiomics", **more: str) -> list[str]:
    table = more.pop("table", next((p.name for p in folder.glob("*.csv") if "clinical" in p.name), "table.csv"))
    given = {
        "layout": layout,
        "images": folder / images,
        "clinical": folder / table,
        "out": folder / "out" / "cohort.csv",
    }
    return [text for key, value in (given | more).items() for text in (f"--{key}", str(value))]


def refusal(args: list[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(args)
    return str(caught.value.code)


def test_lung1(lung1, caplog, capsys):
    main(arguments(lung1))
    assert "3 scans, 2 with gt_mask, 0 left out" in capsys.readouterr().out
    assert "patient LUNG1-003: no region GTV-1 (found: none), so no gt_mask" in caplog.text
    table = pd.read_csv(lung1 / "out" / "cohort.csv")
    assert (
        list(table.columns)
        == (
            "patient_id image gt_mask time event age clinical_t_stage clinical_n_stage clinical_m_stage overall_stage "
            "histology sex"
        ).split()
    )
    np.testing.assert_allclose(table.time, np.array([2165, 155, 256]) / (365.25 / 12), rtol=1e-5)
    assert table.event.tolist() == [1, 1, 0] and table.sex.tolist() == ["male", "male", "female"]
    assert np.isnan(table.age[2]) and table.overall_stage.isna().tolist() == [False, False, True]

    clinical = {"age": "numeric", "sex": "categorical"}
    records = read_cohort(lung1 / "out" / "cohort.csv", clinical=clinical)
    truth = distances() < RADIUS
    for record in records:
        scan = LoadCTd()(record)  # checks that the mask is on the grid of the CT
        if record["patient_id"] == "LUNG1-003":
            continue
        mask = scan["gt_mask"][0].numpy() > 0
        assert 2 * (mask & truth).sum() / (mask.sum() + truth.sum()) > (0.97 if "001" in record["patient_id"] else 0.9999)
        assert mask.sum() * np.prod(SPACING) == pytest.approx(4 / 3 * np.pi * RADIUS**3, rel=0.03)
        assert (scan["image"][0].numpy()[mask] > 0).mean() > 0.97
    assert not list((lung1 / "out").rglob(".*"))


def test_masks_are_made_once(lung1):
    main(arguments(lung1))
    cohort = lung1 / "out" / "cohort.csv"
    masks = sorted((lung1 / "out" / "masks").iterdir())
    assert [m.name for m in masks] == ["LUNG1-001_gtv_1.nii.gz", "LUNG1-002_gtv_1.nii.gz"]
    text = cohort.read_text()
    for mask in masks:
        os.utime(mask, (1, 1))
    masks[1].write_bytes(masks[1].read_bytes()[:100])  # as a killed copy leaves it
    main(arguments(lung1))
    assert masks[0].stat().st_mtime == 1 and masks[1].stat().st_mtime > 1
    assert cohort.read_text() == text and nib.load(masks[1]).get_fdata().any()


def test_every_fault_is_told_at_once(lung1):
    table = next(lung1.glob("*.csv"))
    good = table.read_text()
    table.write_text(good.replace(",155,1", ",-5,maybe").replace("LUNG1-003", "LUNG1-009"))
    message = refusal(arguments(lung1))
    assert "has 3 faults" in message
    assert "row 3, column Survival.time: '-5' (expected days as a number > 0, less than 30 years)" in message
    assert "row 3, column deadstatus.event: 'maybe' (expected 1 died or 0 censored)" in message
    assert "row 4: patient LUNG1-009: no scan in" in message
    assert not (lung1 / "out" / "cohort.csv").exists()

    table.write_text(good.replace("LUNG1-003", "LUNG1-002"))
    assert "row 4, column PatientID: LUNG1-002 is in row 3 too" in refusal(arguments(lung1))
    table.write_text(good.replace("Survival.time", "days").replace("age", "time"))
    message = refusal(arguments(lung1))
    assert (
        "row 1, column Survival.time: missing (found: PatientID, time, " in message
        and "column time: would be named" in message
    )
    assert "no such folder" in refusal(arguments(lung1, images="elsewhere"))


def test_scans_at_fault_can_be_left_out(lung1, caplog, capsys):
    ct_folder = next((lung1 / "NSCLC-Radiomics" / "LUNG1-002").rglob("*82046"))
    sorted(ct_folder.iterdir())[4].unlink()
    message = refusal(arguments(lung1))
    assert "row 3: patient LUNG1-002: CT, 'thorax'" in message and "1 slice missing" in message
    assert message.endswith("The same command with --on_fault skip goes on without these scans.")
    main(arguments(lung1, on_fault="skip"))
    assert (
        "left out: row 3: patient LUNG1-002" in caplog.text
        and "2 scans, 1 with gt_mask, 1 left out" in capsys.readouterr().out
    )
    assert pd.read_csv(lung1 / "out" / "cohort.csv").patient_id.tolist() == ["LUNG1-001", "LUNG1-003"]


def test_regions_that_do_not_fit(lung1, caplog):
    path = next((lung1 / "NSCLC-Radiomics" / "LUNG1-001").rglob("*42155")) / "1-1.dcm"
    good = pydicom.dcmread(path)

    def fault(change) -> str:
        ds = pydicom.dcmread(path)
        change(ds)
        pydicom.dcmwrite(path, ds)
        message = refusal(arguments(lung1))
        pydicom.dcmwrite(path, good)
        return message

    def between(ds):
        for contour in ds.ROIContourSequence[1].ContourSequence:
            contour.ContourData = [v + 2.5 if n % 3 == 2 else v for n, v in enumerate(map(float, contour.ContourData))]

    assert "a contour of GTV-1 lies off the CT's slices" in fault(between)
    assert "covers no voxel" in fault(lambda ds: setattr(ds.ROIContourSequence[1], "ContourSequence", []))

    def elsewhere(ds):
        for roi in ds.StructureSetROISequence:
            roi.ReferencedFrameOfReferenceUID = generate_uid() if roi.ROINumber == 1 else "1.2.3"
        ds.FrameOfReferenceUID = "1.2.3"

    assert "another frame of reference" in fault(elsewhere)
    assert "row 2: patient LUNG1-001: the RTSTRUCT or SEG for" in fault(lambda ds: delattr(ds, "StructureSetROISequence"))
    assert "is malformed" in fault(lambda ds: delattr(ds, "ROIContourSequence"))
    assert "is malformed: cannot reshape" in fault(
        lambda ds: setattr(ds.ROIContourSequence[1].ContourSequence[0], "ContourData", [1.0, 2.0, 3.0, 4.0])
    )
    # A region of another name isn't the tumour.
    main(arguments(lung1, region="gtv 2"))
    assert "LUNG1-001: no region gtv 2 (found: GTV-1, Lung-Left)" in caplog.text


def test_a_polygon_within_another_is_a_hole(lung1):
    path = next((lung1 / "NSCLC-Radiomics" / "LUNG1-001").rglob("*42155")) / "1-1.dcm"
    slices = [pydicom.dcmread(p) for p in next((lung1 / "NSCLC-Radiomics" / "LUNG1-001").rglob("*82046")).iterdir()]
    pydicom.dcmwrite(path, rtstruct(slices, {"GTV-1": circles(RADIUS) + circles(10.0)}), enforce_file_format=True)
    main(arguments(lung1))
    mask = nib.load(lung1 / "out" / "masks" / "LUNG1-001_gtv_1.nii.gz").get_fdata() > 0
    shell = (distances() < RADIUS) & (distances() > 10.0)
    assert 2 * (mask & shell).sum() / (mask.sum() + shell.sum()) > 0.97


def test_the_ct_that_was_drawn_on_is_taken(lung1):
    """A planning CT beside a contrast CT that would be chosen on its own."""
    study = next((lung1 / "NSCLC-Radiomics" / "LUNG1-001").iterdir())
    slices = ct_slices(
        np.full((*SHAPE[:2], 32), -900), (4, 4, 2.5), ORIGIN, PatientID="LUNG1-001", SeriesDescription="thorax"
    )
    write_slices(study / "1.000000-fine", slices)
    main(arguments(lung1))
    image = pd.read_csv(lung1 / "out" / "cohort.csv").image[0]
    assert image.endswith("82046") and LoadCTd()({"image": image})["image"].shape == (1, *SHAPE)
    # In one folder with it, the other would be read.
    for path in (study / "1.000000-fine").iterdir():
        path.rename(Path(image) / path.name)
    assert "expected a folder of its own" in refusal(arguments(lung1))


def test_osic(tmp_path, capsys):
    patients = ("ID00007637202177411956430", "ID00009637202177434476278")
    for n, patient in enumerate(patients):
        write_slices(tmp_path / "train" / patient, ct(patient, n))
    table = tmp_path / "table.csv"
    table.write_text(
        "Patient,Weeks,FVC,Percent,Age,Sex,SmokingStatus\n"
        f"{patients[0]},-4,2315,58.25,79,Male,Ex-smoker\n{patients[0]},5,2214,55.71,79,Male,Ex-smoker\n"
        f"{patients[1]},8,3660,85.28,69,Male,Never smoked\n{patients[1]},9,3610,84.11,69,Male,Never smoked\n"
        f"{patients[1]},8,3700,86.00,69,Male,Never smoked\n"  # the data set repeats weeks
    )
    main(arguments(tmp_path, "osic", "train"))
    assert "2 scans, 0 with gt_mask" in capsys.readouterr().out
    cohort = pd.read_csv(tmp_path / "out" / "cohort.csv")
    assert list(cohort.columns) == "patient_id image weeks fvc_ml fvc_percent age sex smoking".split()
    assert cohort.weeks.tolist() == [-4, 8] and cohort.fvc_ml.tolist() == [2315, 3660]
    kinds = {"fvc_percent": "numeric", "smoking": "categorical"}
    (first, _) = read_cohort(tmp_path / "out" / "cohort.csv", need_outcome=False, clinical=kinds)
    assert first["covariates"] == {"fvc_percent": 58.25, "smoking": "Ex-smoker"} and "time" not in first
    assert LoadCTd()(first)["image"].shape == (1, *SHAPE)

    lines = table.read_text().splitlines()
    outcome = ["time,event", "14.5,dead", "14.5,dead", "60,alive", "60,alive", "60,alive"]
    table.write_text("\n".join(f"{line},{more}" for line, more in zip(lines, outcome)) + "\n")
    main(arguments(tmp_path, "osic", "train"))
    records = read_cohort(tmp_path / "out" / "cohort.csv")
    assert [(r["time"], r["event"]) for r in records] == [(14.5, 1), (60.0, 0)]
    table.write_text(table.read_text().replace(",-4,", ",soon,"))
    assert "row 2, column Weeks: 'soon' (expected a number)" in refusal(arguments(tmp_path, "osic", "train"))


def test_flat(tmp_path):
    for name in ("images/a", "images/b", "masks/a_gt", "masks/a_lung_mask", "masks/b_confounder"):
        (tmp_path / "scans" / name).parent.mkdir(parents=True, exist_ok=True)
        write_scan(tmp_path / "scans" / f"{name}.nii.gz", np.full((4, 4, 4), -900))
    write_slices(tmp_path / "scans" / "c", ct("any"))
    table = tmp_path / "table.csv"
    table.write_text("id,Years survived,Died,SmokingPack.Years\na,1.5,1,20\nb,2,0,\nc,0.25,1,NA\n")
    names = {"patient_column": "id", "time_column": "Years survived", "event_column": "Died", "time_unit": "years"}
    main(arguments(tmp_path, "flat", "scans", **names))
    records = read_cohort(tmp_path / "out" / "cohort.csv", clinical={"smoking_pack_years": "numeric"})
    assert [r["time"] for r in records] == [18, 24, 3]
    assert [sorted(r.keys() & {"lung_mask", "gt_mask", "confounder_mask"}) for r in records] == [
        ["gt_mask", "lung_mask"], ["confounder_mask"], [],
    ]  # fmt: skip
    assert records[2]["image"] == str(tmp_path / "scans" / "c")

    write_scan(tmp_path / "scans" / "a.nii", np.zeros((4, 4, 4)))
    assert "row 2: patient a: 2 files could be image" in refusal(arguments(tmp_path, "flat", "scans", **names))


def test_folders_in_another_case_are_found_and_lost_zeros_are_guessed_at(tmp_path):
    scans, table = tmp_path / "scans", tmp_path / "table.csv"
    write_slices(scans / "lung1-001", ct("any"))
    write_scan(scans / "00123.nii.gz", np.full((4, 4, 4), -900))
    table.write_text("patient_id,time,event\nLUNG1-001,5,yes\n123,900,1\n")
    message = refusal(arguments(tmp_path, "flat", "scans"))
    assert "row 2, column event: 'yes'" in message and "row 3, column time: '900' (expected months" in message
    assert "row 3: patient 123: no scan in" in message and "00123.nii.gz is there: a spreadsheet may have taken" in message
    table.write_text("patient_id,time,event\nLUNG1-001,5,True\n00123,90,0\n")
    main(arguments(tmp_path, "flat", "scans"))
    assert read_cohort(tmp_path / "out" / "cohort.csv")[0]["image"] == str(scans / "lung1-001")
    (scans / "Lung1-001").mkdir()
    assert "2 folders differ in case alone: Lung1-001, lung1-001" in refusal(arguments(tmp_path, "flat", "scans"))


@pytest.mark.parametrize(
    "column, name",
    [
        ("clinical.T.Stage", "clinical_t_stage"),
        ("SmokingStatus", "smoking_status"),
        ("FVC", "fvc"),
        (" % of  DLCO ", "of_dlco"),
    ],
)
def test_tidy(column, name):
    assert tidy(column) == name
