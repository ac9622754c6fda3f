# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Maps go back to a DICOM series: same places, same study, same files each time; regions for 3D Slicer."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shutil
import subprocess
from pathlib import Path

import highdicom as hd
import itk
import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
import slicerio
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd, Spacingd
from pydicom.uid import generate_uid
from scipy import ndimage

from bundle.errors import InputError
from bundle.report.dicom import About, legend, write_dicom
from bundle.report.pictures import LUNG_WINDOW
from bundle.report.slicer import write_segmentation
from bundle.run.scans import scans_to_infer
from bundle.transforms import LoadCTd
from scripts import make_phantoms

from .commands import run
from .dicom_files import ct_slices, enhanced, write_slices

SHAPE = (20, 24, 16)  # columns, rows, slices
PIXEL = (3.0, 2.5)  # mm between columns, between rows
STEP = 4.0  # mm
ABOUT = About("0" * 64, 60, 1, "", "1.2.3", "ab" * 32)
IDS = ("StudyInstanceUID", "PatientID", "FrameOfReferenceUID")
TILT = np.radians(18.0)
AXIAL, SAGITTAL = (1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1)
TILTED = (1, 0, 0, 0, np.cos(TILT), -np.sin(TILT))
KINDS = {"axial": (AXIAL, (0, 0, STEP)), "sagittal": (SAGITTAL, (STEP, 0, 0)), "tilted": (TILTED, (0, 0, STEP))}
KINDS |= {"feet first": ((-1, 0, 0, 0, 1, 0), (0, 0, -STEP))}
KINDS |= {"oblique": ((0.8, 0.6, 0, -0.6, 0.8, 0), (0, 0, STEP))}
ORIGIN = np.array([-31.25, -40.5, 7.75])  # of the first slice, LPS mm


def series(kind: str, **tags) -> list[pydicom.Dataset]:
    """A CT of air with a soft block; its slices in the order of their places."""
    orientation, step = KINDS[kind]
    values = np.random.default_rng(0).normal(-880, 20, SHAPE).round()
    values[3:9, 5:8, 2:9] = 40
    slices = ct_slices(values, (*PIXEL, STEP), ORIGIN, ImageOrientationPatient=list(orientation), **tags)
    for k, ds in enumerate(slices):
        ds.ImagePositionPatient = [round(float(x), 6) for x in ORIGIN + k * np.array(step)]
        ds.StudyID, ds.StudyDate, ds.StudyTime = "7", "20250102", "101112"
    return slices


def places(ds: pydicom.Dataset, position, orientation, spacing) -> np.ndarray:
    """LPS mm of each pixel, (rows, columns, 3), as PS3.3 C.7.6.2 says."""
    row, column = np.reshape(np.array(orientation, float), (2, 3))
    r, c = np.mgrid[: ds.Rows, : ds.Columns]
    return np.array(position, float) + c[..., None] * float(spacing[1]) * row + r[..., None] * float(spacing[0]) * column


def frames(ds: pydicom.Dataset) -> list[np.ndarray]:
    """Places of each frame's pixels."""
    shared = ds.SharedFunctionalGroupsSequence[0]
    orientation = shared.PlaneOrientationSequence[0].ImageOrientationPatient
    spacing = shared.PixelMeasuresSequence[0].PixelSpacing
    positions = [f.PlanePositionSequence[0].ImagePositionPatient for f in ds.PerFrameFunctionalGroupsSequence]
    return [places(ds, position, orientation, spacing) for position in positions]


def source_places(slices: list[pydicom.Dataset]) -> dict[str, np.ndarray]:
    return {
        ds.SOPInstanceUID: places(ds, ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing) for ds in slices
    }


def sources(ds: pydicom.Dataset) -> list[str]:
    """The slice that each frame was made of."""
    per_frame = ds.PerFrameFunctionalGroupsSequence
    return [f.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID for f in per_frame]


def mm(image: MetaTensor) -> np.ndarray:
    """LPS mm of each voxel, (D, H, W, 3)."""
    index = np.stack(np.meshgrid(*map(np.arange, image.shape[1:]), indexing="ij"), -1)
    return nib.affines.apply_affine(np.diag([-1, -1, 1, 1]) @ np.asarray(image.affine), index)


def risk(points: np.ndarray) -> np.ndarray:
    """Heat that tells every direction apart and is kept by linear interpolation."""
    return 1.0 + (points - ORIGIN) @ [0.011, 0.005, 0.003]


def scan_of(path: str, heat=risk, spacing=(3.0, 3.0, 3.0)) -> tuple[dict, dict]:
    """A scan as inference has it, and an output whose heat is a function of LPS mm; all of it is lung."""
    steps = Compose([LoadCTd(mask_keys=()), Orientationd(keys="image", axcodes="RAS", labels=None)])
    scan = steps({"patient_id": "P7", "image": path})
    if spacing is not None:
        scan = Spacingd(keys="image", pixdim=spacing)(scan)
    scan["lung"] = scan["lung_mask"] = MetaTensor(torch.ones(scan["image"].shape), affine=scan["image"].affine)
    scan["lung_mask_source"] = "given"
    values = torch.from_numpy(heat(mm(scan["image"]))).float()[None]
    pred = torch.stack([10 * values[0], torch.ones(values.shape[1:])])
    return scan, {"heat": MetaTensor(values * 1e-3, affine=scan["image"].affine), "pred": pred}


def centre(kind: str) -> np.ndarray:
    """LPS mm of a place in a series of that kind, off its middle."""
    orientation, step = KINDS[kind]
    row, column = np.reshape(orientation, (2, 3))
    return ORIGIN + 8 * PIXEL[0] * row + 13 * PIXEL[1] * column + 7 * np.array(step)


def ball(kind: str):
    """Heat of a soft ball there."""
    return lambda points: np.exp(-((np.linalg.norm(points - centre(kind), axis=-1) / 7.0) ** 2))


def written(folder: Path, kind: str, heat=risk, about=ABOUT, **tags):
    """The slices of a series, and what is written of it."""
    slices = series(kind, **tags)
    scan, output = scan_of(write_slices(folder / "in", slices), heat)
    files, notes = write_dicom(folder / "out", scan, output, None, about)
    return slices, scan, output, {path.relative_to(folder / "out").as_posix(): path for path in files}, notes


@pytest.mark.parametrize("kind", KINDS)
def test_maps_lie_on_their_slices_with_the_numbers_of_their_places(kind, tmp_path):
    slices, scan, output, files, notes = written(tmp_path, kind)
    assert notes[0].startswith("tilted gantry: ") == (kind == "tilted")
    assert notes[-1].startswith("no heat is drawn in the DICOM pictures, the map is nearly even")
    known = source_places(slices)
    for name, unit in (("heat", "/mL"), ("location", "mo")):
        ds = pydicom.dcmread(files[f"{name}.dcm"])
        assert ds.SOPClassUID == pydicom.uid.ParametricMapStorage and len(sources(ds)) == len(set(sources(ds))) == SHAPE[2]
        for where, uid in zip(frames(ds), sources(ds)):
            np.testing.assert_allclose(where, known[uid], atol=0.01)
        values = hd.Image.from_dataset(ds).get_frames(apply_real_world_transform=True)
        expected = risk(np.stack(frames(ds)))
        inside = values > 0
        assert inside.mean() > 0.8  # outside is what the scan's own grid doesn't reach
        # The border of that grid is a fade to 0.
        inside[:, [0, 1, -2, -1]] = inside[:, :, [0, 1, -2, -1]] = inside[[0, 1, -2, -1]] = False
        ratio = values[inside] / expected[inside]
        assert ratio.std() < 2e-3 * ratio.mean()
        if name == "location":
            assert ratio.mean() == pytest.approx(10, rel=2e-3)
        else:
            pixel = PIXEL[0] * PIXEL[1] * STEP * (np.cos(TILT) if kind == "tilted" else 1) / 1000
            assert float(values.sum()) * pixel == pytest.approx(float(output["heat"].sum()), rel=1e-4)
        mapped = ds.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0]
        assert mapped.MeasurementUnitsCodeSequence[0].CodeValue == unit


@pytest.mark.parametrize("kind", KINDS)
def test_segments_lie_where_the_heat_is(kind, tmp_path):
    _, scan, _, files, notes = written(tmp_path, kind, ball(kind))
    assert len(notes) == (kind == "tilted")
    ds = hd.seg.segread(files["regions.dcm"])
    assert ds.number_of_segments == 1
    assert ds.SegmentSequence[0].SegmentLabel.startswith("Heat 1: ")
    drawn = np.stack(frames(ds))[ds.pixel_array.reshape(-1, SHAPE[1], SHAPE[0]) > 0]
    np.testing.assert_allclose(drawn.mean(0), centre(kind), atol=1.5)
    assert (
        np.linalg.norm(drawn - centre(kind), axis=1).max() < 7.0 * np.sqrt(np.log(4)) + 3 * np.sqrt(3) / 2 + 0.5
    )  # a voxel's half
    lung = hd.seg.segread(files["lung.dcm"])
    assert lung.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "Lung"
    assert lung.pixel_array.mean() > 0.9


def test_pictures_are_the_slices_in_the_lung_window_with_heat(tmp_path):
    slices, _, _, files, _ = written(tmp_path, "tilted", ball("tilted"))
    known, seen = source_places(slices), set()
    for name in [name for name in files if name.startswith("pictures/")]:
        ds = pydicom.dcmread(files[name])
        uid = ds.SourceImageSequence[0].ReferencedSOPInstanceUID
        seen.add(uid)
        source = next(s for s in slices if s.SOPInstanceUID == uid)
        where = places(ds, ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing)
        np.testing.assert_allclose(where[: SHAPE[1], : SHAPE[0]], known[uid], atol=0.01)
        pixels = ds.pixel_array[: SHAPE[1], : SHAPE[0]].astype(int)
        far = np.linalg.norm(known[uid] - centre("tilted"), axis=-1)
        hu = source.pixel_array.astype(float) - 1024
        grey = np.clip((hu - LUNG_WINDOW[0]) / (LUNG_WINDOW[1] - LUNG_WINDOW[0]), 0, 1) * 255
        assert np.abs(pixels[far > 25] - grey[far > 25][:, None]).max() <= 1
        if far.min() < 3:
            red, green, blue = pixels[np.unravel_index(far.argmin(), far.shape)]
            assert red > green > blue + 80  # yellow
        below = ds.pixel_array[SHAPE[1] :]
        assert below.shape == (96, 512, 3) and (below > 200).any()  # text
    assert seen == set(known)


def test_the_legend_says_what_it_is_for_and_why_to_doubt():
    plain, doubted, empty = (
        legend(512, *given) for given in ((0.1, 60, []), (0.1, 60, ["it is not sure that " * 12]), (0.0, 60, []))
    )
    assert plain.shape == (96, 512, 3)
    amber = (doubted.astype(int) - plain)[..., 0] > 100
    assert amber[:, :256].any() and amber[:, 256:].any()
    assert not amber[:, 508:].any() and not amber[94:].any()  # all of it is there
    yellow = (plain[..., 0] > 200) & (plain[..., 2] < 100)
    assert yellow.any() and not ((empty[..., 0] > 200) & (empty[..., 2] < 100)).any()  # no colours where there is no heat


def test_an_even_map_and_one_of_no_numbers_are_not_drawn(tmp_path):
    def even(points):
        return np.ones(points.shape[:-1])

    def broken(points):
        return np.where(points[..., 0] > 0, np.nan, ball("axial")(points))

    for heat, said, maps in ((even, "nearly even", {"heat.dcm", "location.dcm"}), (broken, "are no numbers", set())):
        folder = tmp_path / said
        _, _, _, files, notes = written(folder, "axial", heat)
        assert said in notes[-1]
        assert {"heat.dcm", "location.dcm", "regions.dcm"} & set(files) == maps
        pixels = [pydicom.dcmread(p).pixel_array[: SHAPE[1], : SHAPE[0]] for n, p in files.items() if "pictures" in n]
        assert len(pixels) == SHAPE[2] and all((p[..., 0] == p[..., 2]).all() for p in pixels)  # grey
        if maps:  # and its window leaves it dark
            ds = pydicom.dcmread(files["heat.dcm"])
            window = ds.SharedFunctionalGroupsSequence[0].FrameVOILUTSequence[0]
            assert ds.pixel_array.max() <= 0.55 * (float(window.WindowCenter) + float(window.WindowWidth) / 2)


def test_the_same_scan_gives_the_same_files_and_another_gives_other_uids(tmp_path):
    slices = series("axial")
    folder = write_slices(tmp_path / "in", slices)
    shutil.copytree(folder, tmp_path / "moved")
    scan, output = scan_of(folder, ball("axial"))
    digests, ids = [], []
    other = {**output, "heat": output["heat"] * 1.001}
    for n, (path, out, about) in enumerate(
        [(folder, output, ABOUT), (tmp_path / "moved", output, ABOUT), (folder, other, ABOUT),
         (folder, output, ABOUT._replace(key="1" * 64, weights="ab, " * 64))]
    ):  # fmt: skip
        scan["image"].meta["filename_or_obj"] = str(path)
        files, _ = write_dicom(tmp_path / str(n), scan, out, None, about)
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
        read = [pydicom.dcmread(file, stop_before_pixels=True) for file in files]
        ids.append({ds.SOPInstanceUID for ds in read})
        assert len(ids[-1]) == len(files) and len({ds.SeriesInstanceUID for ds in read}) == 5
        for ds in read:
            assert all(ds[key].value == slices[0][key].value for key in IDS)
            assert ds.SeriesInstanceUID != slices[0].SeriesInstanceUID
    assert digests[0] == digests[1]
    assert not (ids[0] & ids[2]) and not (ids[0] & ids[3])


def test_an_enhanced_object_gets_maps_of_its_frames(tmp_path):
    slices = series("axial")
    frames_in = [slices[k] for k in np.random.default_rng(1).permutation(SHAPE[2])]  # not in the order of their places
    folder = write_slices(tmp_path / "in", [enhanced(frames_in)])
    scan, output = scan_of(folder, ball("axial"))
    files, notes = write_dicom(tmp_path / "out", scan, output, None, ABOUT)
    assert notes == []
    ds = pydicom.dcmread(tmp_path / "out" / "heat.dcm")
    values = np.stack([ball("axial")(where) for where in frames(ds)])
    assert np.corrcoef(values.ravel(), ds.pixel_array.ravel())[0, 1] > 0.98
    for frame, where in zip(ds.PerFrameFunctionalGroupsSequence, frames(ds)):
        number = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber
        assert where[0, 0].tolist() == pytest.approx(
            [float(x) for x in frames_in[number - 1].ImagePositionPatient], abs=0.01
        )
    for path in (tmp_path / "out" / "pictures").iterdir():
        picture = pydicom.dcmread(path, stop_before_pixels=True)
        source = frames_in[picture.SourceImageSequence[0].ReferencedFrameNumber - 1]
        assert picture.ImagePositionPatient == source.ImagePositionPatient


def dcmqi(name: str, path: Path, folder: Path) -> list[itk.Image]:
    """What a converter of dcmqi, which Slicer uses, reads of an object."""
    folder.mkdir()
    command = [shutil.which(name), "--inputDICOM", path, "--outputDirectory", folder, "--outputType", "nrrd"]
    done = subprocess.run(command, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and "ERROR" not in said.upper(), said
    return [itk.imread(str(found)) for found in sorted(folder.glob("*.nrrd"))]


@pytest.mark.skipif(shutil.which("paramap2itkimage") is None, reason="dcmqi is not installed (requirements-dev.txt)")
@pytest.mark.parametrize("kind", ["axial", "sagittal"])
def test_dcmqi_reads_the_same(kind, tmp_path):
    _, _, _, files, _ = written(tmp_path, kind, ball(kind))
    (heat,) = dcmqi("paramap2itkimage", files["heat.dcm"], tmp_path / "map")
    values = itk.array_from_image(heat)
    assert values.max() == pydicom.dcmread(files["heat.dcm"]).pixel_array.max()
    for image in (heat, *dcmqi("segimage2itkimage", files["regions.dcm"], tmp_path / "regions")):
        values = itk.array_from_image(image)  # slowest axis first
        middle = ndimage.center_of_mass(values > values.max() / 2)[::-1]
        offset = np.array(itk.spacing(image)) * middle
        found = np.array(itk.origin(image)) + itk.array_from_matrix(image.GetDirection()) @ offset
        np.testing.assert_allclose(found, centre(kind), atol=1.5)


def split(slices):
    for ds in slices:
        ds.SeriesInstanceUID = generate_uid()


def share(slices):
    for ds in slices:
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = slices[0].SOPInstanceUID


def unframed(slices):
    for ds in slices:
        del ds.FrameOfReferenceUID


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (split, "its slices have 16 SeriesInstanceUID (expected one)"),
        (unframed, "its slices have no FrameOfReferenceUID (expected one)"),
        (share, "its slices share SOPInstanceUIDs or have none (expected each its own)"),
    ],
)
def test_slices_that_nothing_can_refer_to_are_said_in_one_sentence(spoil, says, tmp_path, caplog):
    slices = series("axial")
    spoil(slices)
    scan, output = scan_of(write_slices(tmp_path / "in", slices), ball("axial"))
    files, (note,) = write_dicom(tmp_path / "out", scan, output, None, ABOUT)
    assert files == [] and note.startswith("no DICOM was written, ") and note.endswith(says) and "Secret" not in note
    assert not (tmp_path / "out").exists() and "Secret" not in caplog.text


def test_what_no_check_expected_costs_the_dicom_alone_and_names_nobody(tmp_path, monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise ValueError("Secret^Name is no value")

    scan, output = scan_of(write_slices(tmp_path / "in", series("axial")), ball("axial"))
    monkeypatch.setattr(hd.seg, "Segmentation", fails)
    files, (note,) = write_dicom(tmp_path / "out", scan, output, None, ABOUT)
    assert files == [] and not (tmp_path / "out").exists() and "Secret" not in caplog.text
    assert note == "no DICOM was written, ValueError at the slices' headers (expected those of a CT)"
    monkeypatch.undo()
    (tmp_path / "out").write_text("a file is in the way")
    with pytest.raises(InputError, match="can't be written"):
        write_dicom(tmp_path / "out", scan, output, None, ABOUT)
    shutil.rmtree(tmp_path / "in")
    (tmp_path / "in").mkdir()
    files, (note,) = write_dicom(tmp_path / "out", scan, output, None, ABOUT)
    assert files == [] and note.startswith("no DICOM was written, its slices: the folder holds no DICOM series")


def test_headers_of_a_hospital_go_back_as_they_are_and_nothing_more(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    name = "Sécret"  # one component, which libraries complain of
    slices = series("axial")
    with pydicom.config.disable_value_validation():
        for k, ds in enumerate(slices):
            ds.SpecificCharacterSet, ds.PatientName, ds.AccessionNumber = "ISO_IR 100", name, "A" * 20
            ds.PatientSex, ds.PatientBirthDate, ds.StudyID = "female", "around 1950", "S" * 20
            ds.PatientAddress, ds.OtherPatientIDs, ds.InstitutionName = "Main Street 1", "X99", "Hospital"
            ds.add_new(0x00091001, "LO", "private")
            ds.ImageOrientationPatient = [1, 1e-5 * k, 0, -1e-5 * k, 1, 0]  # noise
            del ds.ReferringPhysicianName, ds.StudyDate
        folder = write_slices(tmp_path / "in", slices)
    scan, output = scan_of(folder, ball("axial"))
    files, notes = write_dicom(tmp_path / "out", scan, output, None, ABOUT)
    assert notes == [] and len(files) == 4 + SHAPE[2]
    for path in files:
        ds = pydicom.dcmread(path)
        assert (str(ds.PatientName), ds.AccessionNumber, ds.StudyID) == (name, "A" * 20, "S" * 20)
        assert (ds.PatientSex, ds.PatientBirthDate, ds.StudyDate, ds.ReferringPhysicianName) == ("", "", "", "")
        assert b"Main Street" not in path.read_bytes() and b"X99" not in path.read_bytes() and 0x00091001 not in ds
        assert b"Hospital" not in path.read_bytes()
    assert name not in caplog.text


def test_slicer_gets_regions_and_lung_with_names_and_colours(tmp_path):
    scan, output = scan_of(write_slices(tmp_path / "in", series("tilted")), ball("tilted"))
    (path,) = write_segmentation(tmp_path / "P7_segments.seg.nrrd", scan, output)
    read = slicerio.read_segmentation(str(path))
    assert [s["name"][:7] for s in read["segments"]] == ["Heat 1:", "Lung"]
    assert [(s["layer"], s["labelValue"]) for s in read["segments"]] == [(0, 1), (1, 1)]
    assert len({tuple(s["color"]) for s in read["segments"]}) == 2
    inside = np.argwhere(read["voxels"][0] == 1)
    assert nib.affines.apply_affine(read["ijkToLPS"], inside).mean(0) == pytest.approx(centre("tilted"), abs=1.5)
    grid = np.diag([-1.0, -1, 1, 1]) @ np.asarray(scan["image"].meta["original_affine"])
    np.testing.assert_allclose(read["ijkToLPS"], grid, atol=1e-4)
    scan["lung_mask_source"] = "none"
    (path,) = write_segmentation(tmp_path / "3d.seg.nrrd", scan, output)  # one layer
    image = itk.imread(str(path), itk.UC)  # another reader of the format
    assert tuple(itk.size(image)) == tuple(scan["image"].meta["spatial_shape"])
    assert (itk.array_from_image(image) == 1).sum() == len(inside)
    assert write_segmentation(tmp_path / "none", scan, {"heat": output["heat"] * 0 + 1}) == []


def test_a_scan_that_is_no_dicom_is_refused_at_once(tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(b"")
    with pytest.raises(InputError, match="^--dicom_out true needs the slices of a DICOM series: give their folder or ZIP"):
        scans_to_infer(str(tmp_path / "scan.nii.gz"), None, {}, dicom_out=True)
    assert scans_to_infer(str(tmp_path), None, {}, dicom_out=True)


@pytest.fixture(scope="module")
def clinic(root, tmp_path_factory) -> Path:
    """A cohort of a DICOM folder, its ZIP and its NIfTI, and `out` with all that inference writes of it."""
    folder = tmp_path_factory.mktemp("clinic")
    make_phantoms.main(["--complexity", "9", "--num", "1", "--size", "48", "--out", str(folder / "chests")])
    table = pd.read_csv(folder / "chests" / "cohort.csv")
    chest = nib.load(folder / "chests" / table["image"][0])
    spacing = chest.header.get_zooms()
    values = np.asarray(chest.dataobj)[::-1, ::-1]  # RAS to LPS
    origin = -nib.affines.apply_affine(chest.affine, [values.shape[0] - 1, values.shape[1] - 1, 0]) * [1, 1, -1]
    slices = ct_slices(values, spacing, origin)
    write_slices(folder / "dicom", slices)
    shutil.make_archive(str(folder / "zipped"), "zip", folder / "dicom")
    nib.save(chest, folder / "scan.nii.gz")
    rows = ["patient_id,image", "A,dicom", "B,zipped.zip", "C,scan.nii.gz"]
    (folder / "c.csv").write_text("\n".join(rows) + "\n")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.chdir(root):
        run("configs/inference.json", cohort=str(folder / "c.csv"), output_dir=str(folder / "out"), shifts=1,
            dicom_out="true", nrrd_out=True)  # fmt: skip
    torch.set_num_threads(threads)
    return folder


def test_a_cohort_of_dicom_and_others(clinic):
    out = clinic / "out"
    table = pd.read_csv(out / "predictions.csv", index_col="patient_id")
    assert set(table["status"]) == {"ok"} and table["median_months"].nunique() == 1
    assert [("no DICOM was written, the scan is no DICOM series" in m) for m in table["message"]] == [False, False, True]
    assert sorted(p.name for p in (out / "dicom").iterdir()) == ["A", "B"]
    assert len(list((out / "maps").glob("*_segments.seg.nrrd"))) == 3
    heat, ds = nib.load(out / "maps" / "A_heat.nii.gz"), pydicom.dcmread(out / "dicom" / "A" / "heat.dcm")
    upwards = np.argsort([where[0, 0, 2] for where in frames(ds)])
    # Columns go to the left, rows to the back, as the NIfTI's axes do.
    axes = heat.affine[:3, :3] / np.linalg.norm(heat.affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes, np.diag([-1, -1, 1]), atol=1e-6)
    per_ml = heat.get_fdata() / (abs(np.linalg.det(heat.affine)) / 1000)
    np.testing.assert_allclose(ds.pixel_array[upwards].transpose(2, 1, 0), per_ml, rtol=1e-5, atol=1e-9)
    lung = nib.load(out / "maps" / "A_lung.nii.gz").get_fdata()
    segment = hd.seg.segread(out / "dicom" / "A" / "lung.dcm")
    assert segment.pixel_array.sum() == lung.sum() > 0
    uids = {pydicom.dcmread(p, stop_before_pixels=True).StudyInstanceUID for p in (out / "dicom").rglob("*.dcm")}
    assert len(uids) == 1
    assert not [p for p in out.rglob("*") if "Secret" in p.name or "P7" in p.name]  # the header's name and id


def test_a_run_with_other_options_leaves_no_old_dicom(clinic, root):
    out = clinic / "out"
    before = {p: p.stat().st_mtime_ns for p in (out / "dicom").rglob("*.dcm")}
    args = {"cohort": str(clinic / "c.csv"), "output_dir": str(out), "shifts": 1}
    run("configs/inference.json", **args, dicom_out=True, nrrd_out="true")
    assert before == {p: p.stat().st_mtime_ns for p in (out / "dicom").rglob("*.dcm")}  # done already
    next(iter(before)).write_bytes(b"torn")
    run("configs/inference.json", **args, dicom_out=True, nrrd_out=True)  # done again
    assert all(pydicom.dcmread(p).PatientID == "P7" for p in before)
    run("configs/inference.json", **args)
    assert not list((out / "dicom").rglob("*.dcm")) and not list(out.rglob("*.seg.nrrd"))


@pytest.mark.slow
def test_a_real_series(shared_data, tmp_path):
    folder = shared_data / "dicom_lungpetctdx_A0002_B40f"
    run("configs/inference.json", image=str(folder), output_dir=str(tmp_path), dicom_out=True, shifts=1)
    slices = [pydicom.dcmread(p, stop_before_pixels=True) for p in folder.glob("*.dcm")]
    known, out = source_places(slices), tmp_path / "dicom" / folder.name
    for name in ("heat", "location", "regions", "lung"):
        ds = pydicom.dcmread(out / f"{name}.dcm", stop_before_pixels=True)
        assert all(ds[key].value == slices[0][key].value for key in IDS)
        for where, uid in zip(frames(ds), sources(ds)):
            np.testing.assert_allclose(where, known[uid], atol=0.01)
    assert len(list((out / "pictures").iterdir())) == len(slices)
