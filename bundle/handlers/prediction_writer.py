# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""What inference leaves: heat maps in the scans' own space, their pictures, predictions, curves and a report."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor

from bundle.data.datasets import ScanStream
from bundle.errors import InputError
from bundle.explain import mask_to_scan_space
from bundle.report import failed_section, patient_section, write_report
from bundle.report.pictures import heat_figure, png
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


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary name of the same suffix beside `path`, then rename."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise InputError(f"could not write {path}: {e.strerror}.") from e


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

    Expects the output of :class:`~bundle.explain.maps.MapToHeatd` and :class:`~bundle.explain.maps.HeatToScand`, and
    in the batch ``patient_id``, ``image`` (HU scaled to [0, 1]), ``lung``, ``lung_mask_source`` and ``notes``.

    Args:
        output_dir: folder for `predictions.csv`, `survival_curves.csv`, `report.html`, and `maps/` with a NIfTI and a
            picture of each scan, and the lung mask that was used, unless that is "none".
        stream: the dataset, which knows the scans that failed.
        settings: of the weights, shown in the report.
        horizon: of the heat, months.
        hu_window: HU that are 0 and 1 in the image.
    """

    def __init__(
        self, output_dir: str, stream: ScanStream, settings: dict, horizon: int, hu_window: tuple[float, float]
    ) -> None:
        self.output_dir = Path(output_dir)
        self.stream = stream
        self.settings = settings
        self.horizon = horizon
        self.hu_window = hu_window
        self.rows: dict[str, dict] = {}
        self.curves: dict[str, np.ndarray] = {}
        self.sections: dict[str, str] = {}
        self.imputed = {r["patient_id"]: r["imputed"] for r in stream.data if "imputed" in r}

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def start(self, engine: Engine) -> None:
        (self.output_dir / "maps").mkdir(parents=True, exist_ok=True)

    def add(self, engine: Engine) -> None:
        for scan, output in zip(engine.state.batch, engine.state.output):
            patient_id, pmf = scan["patient_id"], output["pmf"].cpu()
            message = "; ".join(filter(None, [self.imputed.get(patient_id), scan.get("notes")]))
            row = prediction_row(patient_id, pmf) | {"message": message}
            heat = output["scan_heat"].cpu()
            write_heat(self.output_dir / "maps" / f"{patient_id}_heat.nii.gz", heat, heat.affine)
            if scan["lung_mask_source"] != "none":
                write_lung(self.output_dir / "maps" / f"{patient_id}_lung.nii.gz", scan["lung"], scan["image"])
            self.rows[patient_id] = row
            self.curves[patient_id] = survival_curve(pmf).numpy()
            low, high = self.hu_window
            hu = np.asarray(scan["image"][0]) * (high - low) + low
            spacing = tuple(float(mm) for mm in scan["image"].pixdim)
            picture = png(heat_figure(hu, np.asarray(output["heat"].cpu()[0]), spacing, self.horizon))
            write_atomically(self.output_dir / "maps" / f"{patient_id}_heat.png", lambda p: p.write_bytes(picture))
            self.sections[patient_id] = patient_section(
                {
                    "patient_id": patient_id,
                    "picture": picture,
                    "pmf": pmf.numpy(),
                    "risk": float(heat.sum()),
                    "horizon": self.horizon,
                    "row": row,
                    "lung_mask_source": scan["lung_mask_source"],
                }
            )
            logger.info(
                f"{patient_id}: median {row['median_months']:.1f} months, "
                f"P(death by {self.horizon} months) {float(heat.sum()):.2f}, lung mask: {scan['lung_mask_source']}."
            )

    def finish(self, engine: Engine) -> None:
        for patient_id, message in self.stream.faults:
            self.rows[patient_id] = failed_row(patient_id, message)
            self.sections[patient_id] = failed_section(patient_id, message)
        order = [r["patient_id"] for r in self.stream.data]
        rows = [self.rows[p] for p in order]
        columns = list(prediction_row("", torch.ones(2) / 2))
        table = pd.DataFrame(rows, columns=columns)
        months = next((len(c) for c in self.curves.values()), 0)
        curves = pd.DataFrame(
            [[p, *self.curves[p]] for p in order if p in self.curves],
            columns=["patient_id", *(f"survival_{t}m" for t in range(1, months + 1))],
        )
        write_atomically(self.output_dir / "predictions.csv", lambda p: table.to_csv(p, index=False, float_format="%.5g"))
        write_atomically(
            self.output_dir / "survival_curves.csv", lambda p: curves.to_csv(p, index=False, float_format="%.5g")
        )
        write_report(self.output_dir / "report.html", [self.sections[p] for p in order], rows, self.settings)
        logger.info(f"report: {self.output_dir / 'report.html'}")
