# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What inference leaves: heat maps in the scans' own space, their pictures, predictions, curves and a report."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import monai
import nibabel as nib
import numpy as np
import pandas as pd
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor

from bundle.data.fingerprint import code_digest, content_digest, describe, describe_scan
from bundle.data.stream import ScanStream
from bundle.explain.cubelets import Cubelets, cohort_sheet
from bundle.explain.volumes import Explanations
from bundle.files import file_sha256, remove_leftovers, write_atomically, write_json
from bundle.grids import mask_on_grid
from bundle.handlers import failed_scans
from bundle.maps.scan_space import interpolated
from bundle.metrics.verdict import doubtful, in_words
from bundle.reading.zipped import is_archive
from bundle.report import ScanViews, write_cohort_page, write_scan_report
from bundle.report.dicom import About, write_dicom
from bundle.report.pictures import heat_figure, write_png
from bundle.report.slicer import write_segmentation
from bundle.report.viewer import times
from bundle.run.outcomes import against_outcomes
from bundle.survival.calibration import LEVELS
from bundle.survival.readout import death_by, mean_months, quantile_months, survival_curve

__all__ = ["DoneScans", "PredictionWriter", "ScanFiles", "prediction_row", "write_heat"]

logger = logging.getLogger(__name__)

METADATA = Path(__file__).parents[2] / "configs" / "metadata.json"
VERSION = json.loads(METADATA.read_text())["version"] if METADATA.is_file() else "of unknown version"
DEATH_BY = (12, 24, 36, 60)  # months
MASKS = ("gt_mask", "confounder_mask")  # that a report shows where they are given


def prediction_row(
    patient_id: str,
    pmf: torch.Tensor,
    familiarity: float | None = None,
    last_death: float | None = None,
    interval_levels: Sequence[float] = LEVELS,
) -> dict:
    """One row of `predictions.csv` from P(T = 1..tmax months), (tmax,); `risk` grows with danger.

    The 95 % interval lies between `interval_levels` of P(T <= t), from :func:`~bundle.survival.calibration.interval_levels`.
    Beyond the `last_death` of the training (months) nothing is known: an upper bound that lies there becomes tmax, and the
    lower one is that of the third level.
    """
    pmf = pmf[None]
    numbers = {"median_months": quantile_months(pmf, 0.5), "mean_months": mean_months(pmf)}
    lower, upper, lower_if_open = (quantile_months(pmf, level) for level in interval_levels)
    if last_death is not None and upper > last_death:
        lower, upper = lower_if_open, torch.tensor(float(pmf.shape[1]))
    numbers |= {"lower_months": lower, "upper_months": upper}
    numbers |= {"risk": -numbers["mean_months"]} | {f"death_{months}m": death_by(pmf, months) for months in DEATH_BY}
    known = {"patient_id": patient_id, "status": "ok", "message": ""}
    return known | {name: number.item() for name, number in numbers.items()} | {"familiarity": familiarity}


COLUMNS = list(prediction_row("", torch.ones(2) / 2))  # of predictions.csv


def write_heat(path: Path, heat: torch.Tensor, affine: torch.Tensor) -> None:
    """Write heat (1, D, H, W) as NIfTI with the scan's affine (RAS, mm)."""
    _write_nifti(path, np.asarray(heat[0], dtype=np.float32), affine)


def _write_nifti(path: Path, voxels: np.ndarray, affine: torch.Tensor) -> None:
    image = nib.Nifti1Image(voxels, np.asarray(affine, dtype=np.float64))
    image.header.set_xyzt_units("mm")
    write_atomically(path, image.to_filename)


def maps_on_grid(
    files: list[Path], patient_id: str, affine: np.ndarray, shape: tuple[int, ...]
) -> dict[str, tuple[np.ndarray, str]]:
    """By name, the maps `<patient_id>_<name>.nii.gz` of one number a voxel on another grid, each with what to say of it."""
    maps = {}
    for path in files:
        if path.name.endswith(".nii.gz") and (found := nib.load(path)).get_data_dtype() == np.float32:
            voxels = found.get_fdata(dtype=np.float32)
            said = "" if np.isfinite(voxels).all() else "(0 where it is no number)"
            voxels = torch.from_numpy(np.nan_to_num(voxels))[None]
            name = path.name.removeprefix(f"{patient_id}_").removesuffix(".nii.gz")
            maps[name] = np.asarray(interpolated(MetaTensor(voxels, affine=found.affine), affine, shape)[0]), said
    return maps


def source_in_words(meta: dict, series: str | None) -> str:
    """What a scan was read from, by the metadata of its image.

    Example::

        >>> source_in_words({"filename_or_obj": "a.nii.gz", "spatial_shape": (512, 512, 30),
        ...                  "original_affine": np.diag([0.7, 0.7, 8.0, 1.0])}, None)
        'a .nii.gz file of 512 × 512 × 30 voxels, 0.7 × 0.7 × 8 mm'
    """
    path = str(meta["filename_or_obj"])
    suffixes = Path(path.lower()).suffixes
    what = f"a {''.join(suffixes[-2:] if suffixes[-1:] == ['.gz'] else suffixes[-1:])} file"
    if is_archive(path) or Path(path).is_dir():
        what = f"the DICOM series {series}" if series else "DICOM slices"
    spacing = np.linalg.norm(np.asarray(meta["original_affine"])[:3, :3], axis=0)
    return f"{what} of {times(meta['spatial_shape'])} voxels, {times(spacing)} mm"


class ScanFiles(NamedTuple):
    """The files of one scan."""

    heat: Path
    picture: Path
    lung: Path
    report: Path

    @classmethod
    def of(cls, output_dir: Path, patient_id: str) -> ScanFiles:
        names = ("heat.nii.gz", "heat.png", "lung.nii.gz")
        maps = (output_dir / "maps" / f"{patient_id}_{name}" for name in names)
        return cls(*maps, output_dir / "reports" / f"{patient_id}.html")

    def write(self, scan: dict, output: dict, hu_window: tuple[float, float], horizon: int, doubt: str = "") -> list[Path]:
        """Write the maps of a scan, the lung mask only if one was used; returns those that were written.

        A `doubt` about the weights stands on the face of the picture.
        """
        heat, image = output["scan_heat"].cpu(), scan["image"]
        write_heat(self.heat, heat, heat.affine)
        low, high = hu_window
        hu = np.asarray(image[0]) * (high - low) + low
        spacing = tuple(float(mm) for mm in image.pixdim)
        write_png(self.picture, heat_figure(hu, np.asarray(output["heat"].cpu()[0]), spacing, horizon, doubt))
        if scan["lung_mask_source"] == "none":
            return [self.heat, self.picture]
        affine = image.meta["original_affine"]  # of the file that the image was loaded from, as the heat is
        _write_nifti(self.lung, mask_on_grid(scan["lung_mask"], affine, image.meta["spatial_shape"]), affine)
        return [self.heat, self.picture, self.lung]


class DoneScans:
    """The scans that are done in a folder: a record `done/<patient_id>.json` of each, written when its files are there.

    A record holds what tables and report say of the scan, the SHA-256 of its files, and a key of all that its map depends
    on: weights, options, code, content of the scan. A scan whose record or whose files don't fit is not done.

    Args:
        output_dir: of the run.
        options: all that the maps depend on besides the scans, as JSON can hold it.
    """

    def __init__(self, output_dir: Path, options: list) -> None:
        self.output_dir = output_dir
        self.options = options

    def _path(self, patient_id: str) -> Path:
        return self.output_dir / "done" / f"{patient_id}.json"

    def key(self, scan: dict) -> str:
        """What the map of a scan depends on, as SHA-256."""
        masks = [content_digest(scan[name]) for name in MASKS if name in scan]
        content = [self.options, describe_scan(scan), masks, scan.get("clinical"), scan.get("imputed")]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def __contains__(self, scan: dict) -> bool:
        try:
            done = self.read(scan["patient_id"])
            files = {self.output_dir / name: sha256 for name, sha256 in done["files"].items()}
            return all(file_sha256(f) == sha256 for f, sha256 in files.items()) and done["key"] == self.key(scan)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, torn, or a scan that is gone
            return False

    def read(self, patient_id: str) -> dict:
        return json.loads(self._path(patient_id).read_text())

    def write(self, scan: dict, files: list[Path], content: dict[str, Any]) -> None:
        """Write the record of a scan: its files, and a content with its `key`."""
        digests = {f.relative_to(self.output_dir).as_posix(): file_sha256(f) for f in files}
        write_json(self._path(scan["patient_id"]), {**content, "files": digests})

    def remove(self, patient_id: str) -> None:
        """Delete what an earlier run left of a scan that is done anew, or that has failed since."""
        shutil.rmtree(self.output_dir / "dicom" / patient_id, ignore_errors=True)
        paths = [self._path(patient_id), *ScanFiles.of(self.output_dir, patient_id)]
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # no record, or a torn one
            paths += [self.output_dir / "maps" / Path(name).name for name in self.read(patient_id)["files"]]
        for path in paths:
            path.unlink(missing_ok=True)


class PredictionWriter:
    """Ignite handler that writes the files of an inference run as its scans come; a bad scan becomes a row that says why.

    A run into the same folder passes over the scans that are done (:class:`DoneScans`), so that it goes on where it was
    stopped; failed scans are tried again.

    Expects the output of :class:`~bundle.maps.MapToHeatd` and :class:`~bundle.maps.HeatToScand`, and in the batch
    ``patient_id``, ``image`` (HU scaled to [0, 1]), ``lung``, ``lung_mask``, ``lung_mask_source`` and ``notes``.

    Args:
        output_dir: folder for `predictions.csv`, `survival_curves.csv`, `cohort.html`, `report.html`, `done/`, `reports/`
            with a page of each scan, `cubelets.png` of a cohort's where they are asked for, and `maps/` with its NIfTI, its
            picture, and the lung mask that was used, unless that is "none".
        stream: the dataset, which knows the scans that failed, and is told which are done.
        settings: of the weights, shown in the report.
        horizon: of the heat, months.
        hu_window: HU that are 0 and 1 in the image.
        options: all else that a map depends on: preprocessing and inferer.
        explanations: that `maps/` gets as well.
        dicom_out: whether scans that are DICOM get their maps as DICOM, in `dicom/<patient_id>/`.
        nrrd_out: whether `maps/` gets regions and lung for 3D Slicer.
        cell: of the finished map, in voxels.
    """

    def __init__(
        self,
        output_dir: str,
        stream: ScanStream,
        settings: dict,
        horizon: int,
        hu_window: tuple[float, float],
        options: dict | None = None,
        explanations: Explanations | None = None,
        dicom_out: bool = False,
        nrrd_out: bool = False,
        cell: int = 1,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.dicom_out, self.nrrd_out, self.cell = dicom_out, nrrd_out, cell
        self.explanations = explanations
        self.stream = stream
        self.settings = settings
        self.horizon = horizon
        self.hu_window = hu_window
        explained = explanations.options if explanations and explanations.chosen else None
        more = [name for name, wanted in (("dicom", dicom_out), ("nrrd", nrrd_out)) if wanted]
        described = describe([hu_window, options, stream.transform, *filter(None, [explained, more])])
        self.done = DoneScans(self.output_dir, [settings, horizon, described, code_digest("**/*.py", "report/templates/*")])
        weights = settings.get("weights_sha256", "")
        self.weights = weights if isinstance(weights, str) else ", ".join(weights)
        self.scans = {record["patient_id"]: record for record in stream.data}
        outcomes = settings.get("outcomes", {})
        self.known = {name: outcomes[name] for name in ("last_death", "interval_levels") if name in outcomes}
        learnt = settings.get("learnt")  # older weights have no verdict
        said = in_words(learnt) if learnt else ""
        self.doubt, self.verdict = (said, "") if learnt and doubtful(learnt) else ("", said)

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def start(self, engine: Engine | None) -> None:
        """Make the folders, and tell the stream which scans are done."""
        for folder in (self.output_dir, *(self.output_dir / name for name in ("maps", "done", "reports"))):
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
        self.stream.done = {name for name, scan in self.scans.items() if not scan.get("fault") and scan in self.done}
        if self.stream.done:
            logger.info(f"{len(self.stream.done)} of {len(self.stream.data)} scans are done already in {self.output_dir}.")

    def add(self, engine: Engine) -> None:
        """Write the files of a batch's scans, and last their records."""
        for scan, output in zip(engine.state.batch, engine.state.output):  # no output of a scan without a prediction
            patient_id, pmf = scan["patient_id"], output["pmf"].cpu()
            self.done.remove(patient_id)
            files = ScanFiles.of(self.output_dir, patient_id).write(scan, output, self.hu_window, self.horizon, self.doubt)
            explained = self.explanations.write(self.output_dir, scan, output) if self.explanations else []
            files += self.others(scan, output)
            said = [self.doubt, self.scans[patient_id].get("imputed"), scan.get("notes"), self.verdict]
            message = "; ".join(filter(None, said))
            familiarity = float(scan["familiarity"]) if "familiarity" in scan else None
            row = prediction_row(patient_id, pmf, familiarity, **self.known) | {"message": message}
            found = {"key": self.done.key(self.scans[patient_id]), "row": row, "pmf": pmf.tolist()}
            found |= {"risk": float(output["scan_heat"].cpu().sum()), "lung_mask_source": scan["lung_mask_source"]}
            report = self.report(scan, output, found, explained)
            self.done.write(self.scans[patient_id], [*files, *explained, report], found)
            logger.info(
                f"{patient_id}: median {found['row']['median_months']:.1f} months, "
                f"P(death by {self.horizon} months) {found['risk']:.2f}, lung mask: {scan['lung_mask_source']}."
            )

    def others(self, scan: dict, output: dict) -> list[Path]:
        """Write what other programs want of a scan; what they can't have is added to its notes."""
        patient_id, files = scan["patient_id"], []
        if self.nrrd_out:
            files += write_segmentation(self.output_dir / "maps" / f"{patient_id}_segments.seg.nrrd", scan, output)
        if self.dicom_out:
            record = self.scans[patient_id]
            about = About(self.done.key(record), self.horizon, self.cell, self.doubt, VERSION, self.weights)
            folder = self.output_dir / "dicom" / patient_id
            written, notes = write_dicom(folder, scan, output, record.get("series"), about)
            scan["notes"] = "; ".join(filter(None, [scan.get("notes"), *notes]))
            files += written
        return files

    def finish(self, engine: Engine | None) -> None:
        """Write the tables and the report about all scans, those of earlier runs among them."""
        failed = {row["patient_id"]: row for row in failed_scans(self.stream)}
        for patient_id in failed:
            self.done.remove(patient_id)
        done = {patient_id: self.done.read(patient_id) for patient_id in self.scans if patient_id not in failed}
        rows = [done[name]["row"] if name in done else failed[name] for name in self.scans]
        curves = {name: survival_curve(torch.tensor(found["pmf"])).tolist() for name, found in done.items()}
        curves = pd.DataFrame.from_dict(curves, orient="index").rename(columns=lambda month: f"survival_{month + 1}m")
        curves = curves.rename_axis("patient_id").reset_index()
        for name, table in {"predictions": pd.DataFrame(rows, columns=COLUMNS), "survival_curves": curves}.items():
            path = self.output_dir / f"{name}.csv"
            write_atomically(path, lambda p, table=table: table.to_csv(p, index=False, float_format="%.5g"))
        self.draw_cubelets(done)
        found = [(self.scans[name], record["pmf"]) for name, record in done.items()]
        write_cohort_page(self.output_dir, rows, self.settings, against_outcomes(found, self.settings))
        logger.info(f"report: {self.output_dir / 'report.html'}; all scans: {self.output_dir / 'cohort.html'}")

    def draw_cubelets(self, done: dict[str, dict]) -> None:
        """Draw `cubelets.png` of the scans that have them, by their records; none of one scan alone."""
        files = {name: f"maps/{name}_cubelets.npz" for name, found in done.items()}
        files = {name: self.output_dir / file for name, file in files.items() if file in done[name]["files"]}
        picture = self.output_dir / "cubelets.png"
        if len(files) > 1:
            write_png(picture, cohort_sheet({name: Cubelets.load(file) for name, file in files.items()}))
        else:
            picture.unlink(missing_ok=True)

    def report(self, scan: dict, output: dict, found: dict, explained: list[Path]) -> Path:
        """Write the report of one scan, with its maps among the files of explanations; returns its path."""
        files = ScanFiles.of(self.output_dir, scan["patient_id"])
        heat, image, (low, high) = output["heat"].cpu(), scan["image"], self.hu_window
        affine = np.asarray(heat.affine, dtype=float)
        density = np.asarray(heat[0]) / (abs(np.linalg.det(affine[:3, :3])) / 1000)
        hu, lung, source = (
            np.asarray(image[0]) * (high - low) + low,
            np.asarray(scan["lung"][0]) > 0,
            found["lung_mask_source"],
        )
        others = [path for path in explained if path != files.heat]
        overlays = {"heat": (density, "per mL")} | maps_on_grid(others, scan["patient_id"], affine, hu.shape)
        masks = {name: mask_on_grid(scan[name], affine, hu.shape) > 0 for name in MASKS if name in scan}
        views = ScanViews(hu, lung, source != "none", affine, overlays, masks)
        provenance = {"Survival Map": VERSION, "MONAI": monai.__version__, "torch": torch.__version__}
        provenance |= {"weights, SHA-256": self.weights}
        provenance |= {"heat map, SHA-256": file_sha256(files.heat)}
        provenance |= {"scan, options and code, SHA-256": found["key"]}
        notes = [self.scans[scan["patient_id"]].get("imputed"), *(scan.get("notes") or "").split("; ")]
        about = {"risk": found["risk"], "horizon": self.horizon, "hu_window": self.hu_window, "lung_mask_source": source}
        about |= {"read": source_in_words(image.meta, self.scans[scan["patient_id"]].get("series"))}
        about |= {"notes": [*filter(None, notes)], "picture": files.picture.read_bytes(), "provenance": provenance}
        write_scan_report(files.report, found["row"], np.array(found["pmf"]), views, about, self.settings)
        return files.report
