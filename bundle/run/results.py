# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What inference leaves: heat maps in the scans' own space, their pictures, predictions, curves and a report."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor

from bundle.data.fingerprint import code_digest, describe, describe_scan
from bundle.data.cohort import MASK_COLUMNS
from bundle.data.stream import ScanStream
from bundle.files import file_sha256, remove_leftovers, write_atomically, write_json
from bundle.maps import mask_to_scan_space
from bundle.report import failed_section, patient_section, write_report
from bundle.report.pictures import heat_figure, write_png
from bundle.survival.readout import death_by, mean_months, quantile_months, survival_curve

__all__ = ["PredictionWriter", "prediction_row", "write_heat", "write_lung"]

logger = logging.getLogger(__name__)

DEATH_BY = (12, 24, 36, 60)


def prediction_row(patient_id: str, pmf: torch.Tensor) -> dict:
    """One row of `predictions.csv` from P(T = 1..tmax months), (tmax,); `risk` grows with danger."""
    pmf = pmf[None]
    row = {"patient_id": patient_id, "status": "ok", "message": "", "median_months": quantile_months(pmf, 0.5)}
    row["mean_months"] = mean_months(pmf)
    row["lower_months"], row["upper_months"] = quantile_months(pmf, 0.025), quantile_months(pmf, 0.975)
    row["risk"] = -row["mean_months"]
    for horizon in DEATH_BY:
        row[f"death_{horizon}m"] = death_by(pmf, horizon)
    return {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in row.items()}


def failed_row(patient_id: str, message: str) -> dict:
    """One row of `predictions.csv` for a scan without a prediction."""
    return {"patient_id": patient_id, "status": "failed", "message": message}


def write_heat(path: Path, heat: torch.Tensor, affine: torch.Tensor) -> None:
    """Write heat (1, D, H, W) as NIfTI with the scan's affine (RAS, mm)."""
    _write_nifti(path, np.asarray(heat[0], dtype=np.float32), affine)


def write_lung(path: Path, lung: MetaTensor, image: MetaTensor) -> None:
    """Write the mask (1, D, H, W) on the grid of the file that `image` was loaded from, as uint8 NIfTI."""
    affine = image.meta["original_affine"]
    _write_nifti(path, mask_to_scan_space(lung, affine, image.meta["spatial_shape"]), affine)


def _write_nifti(path: Path, voxels: np.ndarray, affine: torch.Tensor) -> None:
    image = nib.Nifti1Image(voxels, np.asarray(affine, dtype=np.float64))
    image.header.set_xyzt_units("mm")
    write_atomically(path, image.to_filename)


class PredictionWriter:
    """Write the files of an inference run as its scans come; a bad scan becomes a row that says why.

    When all files of a scan are there, `done/<patient_id>.json` is written, with what the tables and the report say of
    it and what the map depends on: weights, options, code, content of the scan. A run into the same folder passes over the
    scans whose record fits and whose map is whole, so that it goes on where it was stopped; failed scans are tried again.

    Expects the output of :class:`~bundle.maps.maps.MapToHeatd` and :class:`~bundle.maps.maps.HeatToScand`, and
    in the batch ``patient_id``, ``image`` (HU scaled to [0, 1]), ``lung``, ``lung_mask_source`` and ``notes``.

    Args:
        output_dir: folder for `predictions.csv`, `survival_curves.csv`, `report.html`, `done/`, and `maps/` with a NIfTI
            and a picture of each scan, and the lung mask that was used, unless that is "none".
        stream: the dataset, which knows the scans that failed, and is told which are done.
        settings: of the weights, shown in the report.
        horizon: of the heat, months.
        hu_window: HU that are 0 and 1 in the image.
        options: all else that a map depends on: preprocessing and inferer.
    """

    def __init__(
        self,
        output_dir: str,
        stream: ScanStream,
        settings: dict,
        horizon: int,
        hu_window: tuple[float, float],
        options: dict | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.stream = stream
        self.settings = settings
        self.horizon = horizon
        self.hu_window = hu_window
        self.options = [settings, horizon, describe([hu_window, options, stream.transform]), code_digest("**/*.py")]
        self.scans = {r["patient_id"]: r for r in stream.data}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def record(self, patient_id: str) -> Path:
        return self.output_dir / "done" / f"{patient_id}.json"

    def files(self, patient_id: str) -> list[Path]:
        """The heat, its picture, and the lung mask that was used, which needn't be there."""
        return [self.output_dir / "maps" / f"{patient_id}_{name}" for name in ("heat.nii.gz", "heat.png", "lung.nii.gz")]

    def without_folders(self, patient_id: str, fault: str) -> str:
        """A sentence that may be shared: folders can be named after patients, and those of this machine help nobody."""
        for path in (self.scans[patient_id].get(key) for key in ("image", *MASK_COLUMNS)):
            fault = fault.replace(path, os.path.basename(path)) if path else fault
        return fault

    def key(self, patient_id: str) -> str:
        """What the map of a scan depends on, as SHA-256."""
        scan = self.scans[patient_id]
        content = [self.options, describe_scan(scan), scan.get("clinical"), scan.get("imputed")]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def is_done(self, patient_id: str) -> bool:
        try:
            done = json.loads(self.record(patient_id).read_text())
            whole = all(file_sha256(self.output_dir / "maps" / name) == sha256 for name, sha256 in done["files"].items())
            return whole and done["key"] == self.key(patient_id)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, torn, or a scan that is gone
            return False

    def start(self, engine: Engine) -> None:
        for folder in (self.output_dir, self.output_dir / "maps", self.output_dir / "done"):
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
        self.stream.done = {p for p, scan in self.scans.items() if not scan.get("fault") and self.is_done(p)}
        if self.stream.done:
            logger.info(f"{len(self.stream.done)} of {len(self.stream.data)} scans are done already in {self.output_dir}.")

    def add(self, engine: Engine) -> None:
        for scan, output in zip(engine.state.batch, engine.state.output):
            patient_id, pmf = scan["patient_id"], output["pmf"].cpu()
            files = self.files(patient_id)
            message = "; ".join(filter(None, [self.scans[patient_id].get("imputed"), scan.get("notes")]))
            row = prediction_row(patient_id, pmf) | {"message": message}
            heat = output["scan_heat"].cpu()
            if scan["lung_mask_source"] == "none":
                files.pop()
            else:
                write_lung(files[2], scan["lung"], scan["image"])
            write_heat(files[0], heat, heat.affine)
            low, high = self.hu_window
            hu = np.asarray(scan["image"][0]) * (high - low) + low
            spacing = tuple(float(mm) for mm in scan["image"].pixdim)
            write_png(files[1], heat_figure(hu, np.asarray(output["heat"].cpu()[0]), spacing, self.horizon))
            done = {"key": self.key(patient_id), "files": {f.name: file_sha256(f) for f in files}, "row": row}
            done |= {"pmf": pmf.tolist(), "risk": float(heat.sum()), "lung_mask_source": scan["lung_mask_source"]}
            write_json(self.record(patient_id), done)
            logger.info(
                f"{patient_id}: median {row['median_months']:.1f} months, "
                f"P(death by {self.horizon} months) {done['risk']:.2f}, lung mask: {scan['lung_mask_source']}."
            )

    def finish(self, engine: Engine) -> None:
        faults = {patient_id: self.without_folders(patient_id, fault) for patient_id, fault in self.stream.faults}
        rows, curves, sections = [], [], []
        for patient_id in (r["patient_id"] for r in self.stream.data):
            if patient_id in faults:
                for old in [self.record(patient_id), *self.files(patient_id)]:  # of a run in which it didn't fail
                    old.unlink(missing_ok=True)
                rows.append(failed_row(patient_id, faults[patient_id]))
                sections.append(failed_section(patient_id, faults[patient_id]))
                continue
            done = json.loads(self.record(patient_id).read_text())
            pmf = torch.tensor(done["pmf"])
            rows.append(done["row"])
            curves.append([patient_id, *survival_curve(pmf).tolist()])
            patient = {"patient_id": patient_id, "picture": self.files(patient_id)[1].read_bytes(), "pmf": pmf.numpy()}
            patient |= {"risk": done["risk"], "horizon": self.horizon, "row": done["row"]}
            sections.append(patient_section({**patient, "lung_mask_source": done["lung_mask_source"]}))
        table = pd.DataFrame(rows, columns=list(prediction_row("", torch.ones(2) / 2)))
        months = max((len(curve) - 1 for curve in curves), default=0)
        columns = ["patient_id", *(f"survival_{t}m" for t in range(1, months + 1))]
        for name, content in {"predictions": table, "survival_curves": pd.DataFrame(curves, columns=columns)}.items():
            write_atomically(
                self.output_dir / f"{name}.csv", lambda p: content.to_csv(p, index=False, float_format="%.5g")
            )
        write_report(self.output_dir / "report.html", sections, rows, self.settings)
        logger.info(f"report: {self.output_dir / 'report.html'}")
