# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The maps of a DICOM series as DICOM, on its own slices and in its own study, for the tools of a hospital.

The parametric maps hold the numbers, the segmentations what can be outlined, and the pictures (a secondary capture of each
slice) what a viewer shows that knows neither. The same series, weights and options give the same files: UIDs are hashes, and
dates are the study's. Standard: DICOM PS3.3, A.75 (Parametric Map), A.51 (Segmentation), A.8.1 (Secondary Capture).
"""

import hashlib
import logging
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import highdicom as hd
import numpy as np
import pydicom
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from monai.data import MetaTensor
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian, LegacyConvertedEnhancedCTImageStorage, generate_uid
from pydicom.valuerep import DA, DS, TM

from bundle.errors import InputError
from bundle.files import write_atomically
from bundle.grids import mask_on_grid
from bundle.maps.heat import spread
from bundle.maps.scan_space import on_scan_grid, to_scan_space
from bundle.reading.dicom import is_dicom, read_source
from bundle.reading.series import Series, plural
from bundle.report.pictures import LUNG_WINDOW, heat_colours
from bundle.report.regions import EVEN, LUNG_COLOUR, fault_of, segments

NAME = "Survival Map"
# Of the source's header; all else that is written is our own.
_TEXTS = ("PatientID", "PatientName", "StudyInstanceUID", "StudyID", "AccessionNumber", "ReferringPhysicianName")
_OTHERS = ("SpecificCharacterSet", "StudyDescription")
_OTHERS += ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
_CHECKED = {"PatientBirthDate": DA, "StudyDate": DA, "StudyTime": TM}
_KEYWORDS = (*_TEXTS, *_OTHERS, *_CHECKED, "PatientSex", "SOPClassUID")
_ENHANCED = (EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
_NUMBERS = {"heat": 9001, "location": 9002, "regions": 9003, "lung": 9004, "pictures": 9005}  # of series
_PER_ML, _MONTH = Code("/mL", "UCUM", "per milliliter"), Code("mo", "UCUM", "month")
_CONCEPT = Code("309825002", "SCT", "Spatial and Relational Concept")
_ANATOMY = Code("91723000", "SCT", "Anatomical Structure")
_REGION = Code("heat", "99SURVIVALMAP", "Region with much of the predicted risk")  # no standard code means it
_LUNG = Code("39607008", "SCT", "Lung")
_LEARNED = Code("123110", "DCM", "Artificial Intelligence")
_SOURCE = Code("121322", "DCM", "Source image for image processing operation")
_TILTED = "tilted gantry: 3D Slicer (dcmqi) takes the frames of a DICOM map for a block and shears it, give it the NIfTI"
_LEAST_COLUMNS, _LEGEND_ROWS = 512, 96  # of a picture, for its text

logging.getLogger("highdicom").setLevel(logging.ERROR)  # its warnings hold patients' names


class About(NamedTuple):
    """What the maps of a scan come from."""

    key: str  # SHA-256 of scan, weights, options and code
    horizon: int  # months of the heat
    cell: int  # of the finished map, in voxels
    doubt: str  # why the maps may mean nothing
    version: str  # of this software
    weights: str  # SHA-256, of an ensemble several


def write_dicom(folder: Path, scan: dict, output: dict, series: str | None, about: About) -> tuple[list[Path], list[str]]:
    """Write the maps of a scan to a folder.

    Args:
        scan: of a decollated batch, as :class:`~bundle.transforms.LoadCTd` read it.
        output: its ``heat`` and ``pred``, as :class:`~bundle.maps.MapToHeatd` has them.
        series: SeriesInstanceUID of the scan, if the user named one.

    Returns:
        the files; notes on what could not be written or drawn.

    Raises:
        InputError: the disk is full, or the folder can't be written.
    """
    path = str(scan["image"].meta["filename_or_obj"])
    if not is_dicom(path):
        return [], ["no DICOM was written, the scan is no DICOM series"]
    try:
        read = read_source(path, "its slices", series, _KEYWORDS)
    except InputError as error:  # they have changed since the scan was read
        return [], [f"no DICOM was written, {error}"]
    try:
        with _unchecked():
            source = Source(*read)
            if source.fault:
                return [], [f"no DICOM was written, {source.fault}"]
            writer = _Writer(folder, source, about)
            notes = writer.write(scan, output)
    except InputError:
        raise
    except Exception as error:  # headers may hold anything, and what a library says of it may be the patient's name
        shutil.rmtree(folder, ignore_errors=True)
        return [], [f"no DICOM was written, {type(error).__name__} at the slices' headers (expected those of a CT)"]
    return writer.files, notes


@contextmanager
def _unchecked() -> Iterator[None]:
    """What the study holds goes back to it as it is, whether it keeps to the standard or not, and no log repeats it."""
    with warnings.catch_warnings(), pydicom.config.disable_value_validation():
        warnings.simplefilter("ignore")
        yield


class Source:
    """The slices of a scan, to which its maps go back, as highdicom wants to see them.

    Args:
        series, hu, header: as :func:`~bundle.reading.dicom.read_source` gives them.
    """

    def __init__(self, series: Series, hu: np.ndarray, header: Dataset) -> None:
        self.hu, self.shape, self.tilted = hu, series.shape, series.tilted
        self.affine = np.asarray(series.affine, dtype=np.float32).astype(float)  # as the scan itself is read
        self.slices, head = [place[0] for place in series.places], series.head
        self.multi_frame = header.get("SOPClassUID") in _ENHANCED
        # Frames of an enhanced object are not always in the order of their places.
        self.order = sorted(range(len(self.slices)), key=lambda k: self.slices[k].frame if self.multi_frame else k)
        same = all(s.orientation == head.orientation for s in self.slices)
        self.orientation = head.orientation if same else np.concatenate(series.rows_and_columns)
        self.spacing, self.thickness = head.spacing, head.thickness or float(np.linalg.norm(series.step))
        self.shared = Dataset()
        for keyword in _TEXTS + _OTHERS:
            if keyword in header or keyword in _TEXTS:
                setattr(self.shared, keyword, header.get(keyword) or "")
        for keyword, kind in _CHECKED.items():
            setattr(self.shared, keyword, _valid(kind, header.get(keyword)))
        sex = str(header.get("PatientSex") or "").strip().upper()
        self.shared.PatientSex = sex if sex in ("M", "F", "O") else ""
        self.shared.SOPClassUID, self.shared.SeriesInstanceUID = header.SOPClassUID, series.uid
        self.shared.FrameOfReferenceUID, self.shared.Modality = head.frame_of_reference, "CT"
        self.shared.Rows, self.shared.Columns = head.rows, head.columns

    @property
    def fault(self) -> str:
        """Why nothing can refer to these slices; empty if it can."""
        places = {"StudyInstanceUID": "study", "SeriesInstanceUID": "series", "FrameOfReferenceUID": "frame_of_reference"}
        for keyword, name in places.items():
            found = {getattr(s, name) for s in self.slices} - {""}
            if len(found) != 1 or not all(getattr(s, name) for s in self.slices):
                return f"its slices have {len(found) or 'no'} {keyword} (expected one)"
        if len({(s.uid, s.frame) for s in self.slices}) < len(self.slices) or not all(s.uid for s in self.slices):
            return "its slices share SOPInstanceUIDs or have none (expected each its own)"
        files, frames = len({s.path for s in self.slices}), self.slices[0].frames
        if self.multi_frame and (files > 1 or frames != len(self.slices)):
            return f"it is {len(self.slices)} of {plural(frames, 'frame')} in {plural(files, 'file')} (expected all in one)"
        if not self.multi_frame and frames > 1:
            return "its frames are in an object of another kind than Enhanced CT"
        return ""

    def header(self, k: int) -> Dataset:
        """What the slice at a place says of itself."""
        image = Dataset()
        image.update(self.shared)
        image.SOPInstanceUID = self.slices[k].uid
        image.ImagePositionPatient = _decimals(self.slices[k].position)
        image.ImageOrientationPatient, image.PixelSpacing = _decimals(self.orientation), _decimals(self.spacing)
        image.SliceThickness = _decimals([self.thickness])[0]
        return image

    def headers(self) -> list[Dataset]:
        """One for each slice, or one for all frames of an enhanced object."""
        headers = [self.header(k) for k in self.order]
        if not self.multi_frame:
            return headers
        whole, groups, frames = headers[0], Dataset(), []
        groups.PlaneOrientationSequence = [_part(whole, "ImageOrientationPatient")]
        groups.PixelMeasuresSequence = [_part(whole, "PixelSpacing", "SliceThickness")]
        for header in headers:
            frame = Dataset()
            frame.PlanePositionSequence = [_part(header, "ImagePositionPatient")]
            frames.append(frame)
        whole.SharedFunctionalGroupsSequence, whole.PerFrameFunctionalGroupsSequence = [groups], frames
        whole.NumberOfFrames = len(frames)
        return [whole]

    def frames(self, volume: np.ndarray) -> np.ndarray:
        """A volume (D, H, W) of columns, rows and places as frames (N, rows, columns) in the order of :meth:`headers`."""
        return np.ascontiguousarray(volume.transpose(2, 1, 0)[self.order])


class _Writer:
    """Writes the objects of one scan."""

    def __init__(self, folder: Path, source: Source, about: About) -> None:
        self.folder, self.source, self.about = folder, source, about
        self.headers = source.headers()
        self.files: list[Path] = []
        self.content = about.key

    def write(self, scan: dict, output: dict) -> list[str]:
        """Write all objects; returns notes on those that can't be."""
        source, image, heat = self.source, scan["image"], output["heat"].cpu()
        affine, hu = np.asarray(image.affine, dtype=float), np.asarray(image[0])
        lung, masked = np.asarray(scan["lung"][0]) > 0, scan["lung_mask_source"] != "none"
        density = np.asarray(heat[0]) / _ml(affine)
        # Another machine may compute other numbers of the same scan: then these are other objects.
        numbers = hashlib.sha256(self.about.key.encode())
        for volume in (density, output["pred"].cpu()):
            numbers.update(np.ascontiguousarray(volume))
        self.content = numbers.hexdigest()
        notes = [_TILTED] * self.source.tilted
        months = self._location(scan, output)
        if np.isfinite(months).all():
            inside = months[months > 0] if (months > 0).any() else months
            self._map("location", months, _MONTH, (float(inside.min()), float(inside.max())), "months, 0 outside the lung")
        else:
            notes.append("no months in DICOM, the location has values that are no numbers")
        del months  # of a large CT a quarter of a gigabyte
        ranks, names, colours = segments(density, hu, lung, affine, masked)
        if names:
            ranks = mask_on_grid(MetaTensor(ranks[None], affine=affine), source.affine, source.shape)
            self._segments("regions", ranks, names, colours, (_CONCEPT, _REGION), NAME)
        if masked:
            mask = mask_on_grid(scan["lung_mask"], source.affine, source.shape)
            how = f"{NAME}, lung mask: {scan['lung_mask_source']}"
            self._segments("lung", mask, ["Lung"], [LUNG_COLOUR], (_ANATOMY, _LUNG), how)
        per_ml = np.asarray(to_scan_space(heat, source.affine, source.shape, scan["lung"])[0])
        per_ml /= _ml(source.affine)
        if np.isfinite(per_ml).all():
            most = max(float(per_ml.max()), EVEN * float(density[lung].mean()))  # an even map isn't stretched
            meaning = f"share of the risk of death within {self.about.horizon} months"
            self._map("heat", per_ml, _PER_ML, (0.0, most), meaning)
        if fault := fault_of(density, lung):
            notes.append(f"no heat is drawn in the DICOM pictures, {fault}")
        self._pictures(per_ml, fault)
        return notes

    def _location(self, scan: dict, output: dict) -> np.ndarray:
        """Months on the source's grid (D, H, W), 0 outside the lung."""
        image, lung = scan["image"], torch.as_tensor(scan["lung"]).as_subclass(torch.Tensor).cpu()
        cells, size = torch.as_tensor(output["pred"]).as_subclass(torch.Tensor)[:1].cpu(), tuple(image.shape[1:])
        cell = 1 if tuple(cells.shape[1:]) == size else self.about.cell
        months = spread(cells[None], cell, size, lung[None])[0]
        on_source = on_scan_grid(MetaTensor(months, affine=image.affine), self.source.affine, self.source.shape, lung)
        return np.asarray(on_source[0])

    def _uid(self, *what: Any) -> str:
        return generate_uid(entropy_srcs=[self.content, *map(str, what)])

    def _common(self, kind: str, title: str, number: int = 1) -> dict[str, Any]:
        """What highdicom asks of every object."""
        weights = self.about.weights or "unknown"
        return {
            "series_instance_uid": self._uid(kind),
            "series_number": _NUMBERS[kind],
            "series_description": f"{NAME}: {title}",
            "sop_instance_uid": self._uid(kind, number),
            "instance_number": number,
            "manufacturer": NAME,
            "manufacturer_model_name": NAME,
            "software_versions": self.about.version,
            "device_serial_number": weights if len(weights) <= 64 else hashlib.sha256(weights.encode()).hexdigest(),
            "transfer_syntax_uid": ExplicitVRLittleEndian,
        }

    def _map(self, kind: str, volume: np.ndarray, unit: Code, window: tuple[float, float], meaning: str) -> None:
        low, high = window
        title = f"{kind}, {unit.meaning}" if kind == "heat" else "location in months"
        mapping = hd.pm.RealWorldValueMapping(
            lut_label=kind, lut_explanation=meaning, unit=unit, value_range=(float(volume.min()), float(volume.max())),
            slope=1, intercept=0,
        )  # fmt: skip
        shown = hd.VOILUTTransformation((low + high) / 2, high - low or 1.0, voi_lut_function="LINEAR_EXACT")
        made = hd.pm.ParametricMap(
            self.headers, self.source.frames(volume.astype(np.float32, copy=False)), real_world_value_mappings=[mapping],
            voi_lut_transformations=[shown], contains_recognizable_visual_features=False, content_label=kind.upper(),
            content_description=f"Research use only: {meaning}"[:64], **self._common(kind, title),
        )  # fmt: skip
        anatomy = Dataset()
        anatomy.FrameLaterality, anatomy.AnatomicRegionSequence = "B", [hd.sr.CodedConcept.from_code(_LUNG)]
        made.SharedFunctionalGroupsSequence[0].FrameAnatomySequence = [anatomy]  # dcmqi reads no map without it
        _reverse(made)
        self._save(made, kind, f"{kind}.dcm")

    def _segments(
        self, kind: str, labels: np.ndarray, names: list[str], colours: list[tuple], codes: tuple[Code, Code], how: str
    ) -> None:
        algorithm = hd.AlgorithmIdentificationSequence(how, _LEARNED, self.about.version)
        described = [
            hd.seg.SegmentDescription(
                number, name, *codes, "AUTOMATIC", algorithm,
                display_color=hd.color.CIELabColor.from_rgb(*(255 * c for c in colour)),
            )
            for number, (name, colour) in enumerate(zip(names, colours), 1)
        ]  # fmt: skip
        made = hd.seg.Segmentation(
            self.headers, self.source.frames(labels), "BINARY", described, content_label=kind.upper(),
            content_description="Research use only.",
            **self._common(kind, "lung mask" if kind == "lung" else "regions with most risk"),
        )  # fmt: skip
        self._save(made, kind, f"{kind}.dcm")

    def _pictures(self, heat: np.ndarray, fault: str) -> None:
        """A colour picture of each slice, with a legend below it; columns may be added at the right for the text."""
        source, about = self.source, self.about
        row, column = np.reshape(source.orientation, (2, 3))
        letters = hd.spatial.get_closest_patient_orientation(np.stack([row, column, np.cross(row, column)], 1))
        most = 0.0 if fault else float(heat.max())
        columns, rows, _ = source.shape
        width = max(columns, _LEAST_COLUMNS)
        doubts = [f"No heat is drawn: {fault}."] * bool(fault)
        doubts += [f"Don't rely on this map: {about.doubt}."] * bool(about.doubt)
        below = legend(width, most, about.horizon, doubts)
        for k in range(len(source.slices)):
            picture = np.zeros((rows + len(below), width, 3), np.uint8)
            picture[:rows, :columns] = heat_over_ct(source.hu[:, :, k].T, heat[:, :, k].T, most)
            picture[rows:] = below
            header = source.header(k)
            made = hd.sc.SCImage.from_ref_dataset(
                header, picture, "RGB", 8, "PATIENT", pixel_spacing=source.spacing,
                patient_orientation=[letter.value for letter in letters[:2]],
                **self._common("pictures", f"heat over CT, {about.horizon} months", k + 1),
            )  # fmt: skip
            # The picture's first pixel is the slice's: viewers scroll them together.
            for keyword in ("FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient", "SliceThickness"):
                setattr(made, keyword, header[keyword].value)
            made.PositionReferenceIndicator, made.BodyPartExamined = "", "CHEST"
            for keyword in _OTHERS:
                if keyword in header:
                    setattr(made, keyword, header[keyword].value)
            made.BurnedInAnnotation = made.RecognizableVisualFeatures = "NO"  # no text of the patient
            made.DerivationDescription = "Research use only. Heat over CT, lung window, legend below"
            made.SourceImageSequence = [self._reference(k)]
            self._save(made, "pictures", f"pictures/{k + 1:04}.dcm")

    def _reference(self, k: int) -> Dataset:
        """To the slice at a place."""
        reference = Dataset()
        reference.ReferencedSOPClassUID = self.source.shared.SOPClassUID
        reference.ReferencedSOPInstanceUID = self.source.slices[k].uid
        if self.source.multi_frame:
            reference.ReferencedFrameNumber = self.source.slices[k].frame + 1
        reference.PurposeOfReferenceCodeSequence = [hd.sr.CodedConcept.from_code(_SOURCE)]
        return reference

    def _save(self, made: Dataset, kind: str, name: str) -> None:
        """Write an object without what tells one run from the next: the present time, and random UIDs."""
        made.ContentDate = self.source.shared.StudyDate or "19000101"
        made.ContentTime = self.source.shared.StudyTime or "000000"
        for keyword in ("InstanceCreationDate", "InstanceCreationTime", "DateOfSecondaryCapture", "TimeOfSecondaryCapture"):
            if keyword in made:
                delattr(made, keyword)
        if made.get("ContentLabel"):
            made.ContentCreatorName = ""
        for equipment in made.ContributingEquipmentSequence:
            del equipment.ContributionDateTime
        for item in (*made.get("DimensionOrganizationSequence", []), *made.get("DimensionIndexSequence", [])):
            item.DimensionOrganizationUID = self._uid(kind, "dimensions")
        path = self.folder / name
        write_atomically(path, lambda temporary: made.save_as(temporary, enforce_file_format=True))
        self.files.append(path)


def heat_over_ct(hu: np.ndarray, heat: np.ndarray, most: float) -> np.ndarray:
    """Heat over a slice in the lung window, (rows, columns, 3), 0 to 255. `most` has the last colour; 0 draws no heat."""
    low, high = LUNG_WINDOW
    grey = ((hu - low) / (high - low)).clip(0, 1)[..., None]
    if most <= 0:
        return np.rint(255 * grey).astype(np.uint8).repeat(3, 2)
    colours = heat_colours()[np.rint(255 * (heat / most).clip(0, 1)).astype(int)]
    opacity = colours[..., 3:]
    return np.rint(255 * (grey * (1 - opacity) + colours[..., :3] * opacity)).astype(np.uint8)


def legend(width: int, most: float, horizon: int, doubts: Iterable[str]) -> np.ndarray:
    """What stands below every picture, (rows, width, 3) of 0 to 255: for what use, the colours' heat, and doubts."""
    scale = width / _LEAST_COLUMNS
    figure = Figure(figsize=(width / 100, _LEGEND_ROWS * scale / 100), dpi=100, facecolor="black")
    canvas = FigureCanvasAgg(figure)
    size = 6.5 * scale
    use = f"{NAME}. RESEARCH USE ONLY, not for diagnosis or treatment."
    figure.text(0.01, 0.97, use, color="white", size=size, va="top")
    if most > 0:
        axes = figure.add_axes((0.02, 0.62, 0.3, 0.12), facecolor="0.3")  # grey as lung is
        axes.imshow(np.arange(256)[None], cmap=ListedColormap(heat_colours()), aspect="auto", extent=(0, most, 0, 1))
        axes.set(yticks=[], xticks=[0, most / 2, most], xticklabels=[f"{x:.2g}" for x in (0, most / 2, most)])
        axes.tick_params(colors="white", labelsize=0.8 * size, length=2 * scale, pad=scale)
        what = f"share of the {horizon}-month risk of death per mL"
        figure.text(0.35, 0.68, what, color="white", size=size, va="center")
    figure.text(0.01, 0.35, "\n".join(doubts), color="#ffb000", size=0.85 * size, va="top", wrap=True)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _ml(affine: np.ndarray) -> float:
    """Volume of a voxel."""
    return float(abs(np.linalg.det(np.asarray(affine, dtype=float)[:3, :3]))) / 1000


def _reverse(made: hd.pm.ParametricMap) -> None:
    """Put the frames of a map in the order of their places along the slices' normal.

    dcmqi, by which 3D Slicer reads maps, takes that order for granted, and mirrors the map in highdicom's, the reverse.
    """
    frames = list(reversed(made.PerFrameFunctionalGroupsSequence))
    for number, frame in enumerate(frames, 1):
        frame.FrameContentSequence[0].DimensionIndexValues = number
    made.PerFrameFunctionalGroupsSequence = frames
    pixels = np.frombuffer(made.FloatPixelData, "<f4").reshape(len(frames), -1)
    made.FloatPixelData = pixels[::-1].tobytes()


def _part(header: Dataset, *keywords: str) -> Dataset:
    part = Dataset()
    for keyword in keywords:
        part.add(header[keyword])
    return part


def _decimals(numbers: Iterable[float]) -> list[DS]:
    """Numbers in the 16 characters that DICOM gives them."""
    return [DS(float(number), auto_format=True) for number in numbers]


def _valid(kind: type, value: Any) -> str:
    """A date or a time; empty if it is none."""
    try:
        return str(kind(str(value))) if value else ""
    except ValueError:
        return ""
