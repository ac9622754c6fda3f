# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""From a tree of scans and a clinical table, as public data sets come, to the rows of a cohort CSV."""

import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError

from bundle.errors import InputError
from bundle.files import write_atomically
from bundle.reading.contours import read_region, referenced_series, region_names, region_numbers
from bundle.reading.dicom import choose_series, list_series
from bundle.reading.scan_file import scan_stem
from bundle.reading.series import Series
from bundle.reading.tables import (
    MASK_COLUMNS,
    MOST_MONTHS,
    VALID_ID,
    Row,
    died,
    finite,
    log_missing,
    positive,
    read_table,
    valid_id,
)

_log = logging.getLogger(__name__)

UNITS = {"days": 12 / 365.25, "weeks": 7 * 12 / 365.25, "months": 1.0, "years": 12.0}  # in months
_REGIONS = ("RTSTRUCT", "SEG")  # in this order, as SEG are often made from RTSTRUCT


@dataclass(frozen=True)
class Layout:
    """How a data set names the columns of its table."""

    patient: str  # who has a folder or files of that name
    time: str  # to death or last contact
    event: str  # 1 died, 0 censored
    unit: str  # of `time`, one of UNITS
    visit: str | None = None  # time of a visit from the CT on, if each has a row; the nearest to 0 is taken
    outcome: bool = False  # whether time and event must be there; a table without them makes a cohort for inference
    names: Mapping[str, str] = field(default_factory=dict)  # of clinical columns, where another than tidy's is wanted


LAYOUTS = {
    "lung1": Layout("PatientID", "Survival.time", "deadstatus.event", "days", outcome=True, names={"gender": "sex"}),
    "osic": Layout(
        "Patient", "time", "event", "months", visit="Weeks",
        names={"FVC": "fvc_ml", "Percent": "fvc_percent", "SmokingStatus": "smoking"},
    ),
    "flat": Layout("patient_id", "time", "event", "months"),
}  # fmt: skip


def read_clinical(path: str | os.PathLike, layout: Layout) -> tuple[dict[int, dict[str, str]], list[str]]:
    """The rows of a clinical table (CSV in UTF-8) as the cohort has them, without the scans' files.

    Returns:
        rows by line of the file, each with `patient_id`, `time` (months) and `event` if the table has them, and its
        other columns under tidy names, empty where missing; faults, each ``row N, column X: what (expected ...)``.
    """
    header, table = read_table(path)
    log_missing(path, table)
    with_outcome = layout.outcome or layout.time in header or layout.event in header
    names, faults = _new_names(header, layout, with_outcome)
    if faults:
        return {}, faults
    rows: dict[int, dict[str, str]] = {}
    taken: dict[str, tuple[float, int]] = {}  # of each patient: how far the visit is from the CT, and its line
    for row in table:
        if not row.cells:
            continue
        found = _cohort_row(row, layout, names, with_outcome)
        patient = found["patient_id"]
        from_ct = row.parse(layout.visit, finite, "a number") if layout.visit else 0.0
        distance = math.inf if from_ct is None else abs(from_ct)
        if patient in taken and not layout.visit:
            row.fault(layout.patient, f"{patient} is in row {taken[patient][1]} too (expected one row each)")
        elif patient and (patient not in taken or distance < taken[patient][0]):
            if patient in taken:
                del rows[taken[patient][1]]
            taken[patient] = distance, row.line
            rows[row.line] = found
    faults = [fault for row in table for fault in row.faults]
    if not table:
        faults.append("row 2: the table has no rows (expected one row a patient)")
    return rows, faults


def _new_names(header: Sequence[str], layout: Layout, with_outcome: bool) -> tuple[dict[str, str], list[str]]:
    needed = [layout.patient, *filter(None, [layout.visit]), *([layout.time, layout.event] if with_outcome else [])]
    faults = [f"row 1, column {c}: missing (found: {', '.join(header)})" for c in needed if c not in header]
    taken = {layout.patient, layout.time, layout.event}
    names = {c: layout.names.get(c, tidy(c)) for c in header if c not in taken}
    counts = Counter([*names.values(), "", "patient_id", "image", "time", "event", *MASK_COLUMNS])
    for column, name in names.items():
        if counts[name] > 1:
            faults.append(f"row 1, column {column}: would be named {name!r} (expected a name of its own)")
    return names, faults


def _cohort_row(row: Row, layout: Layout, names: Mapping[str, str], with_outcome: bool) -> dict[str, str]:
    """A row as the cohort has it; what is wrong in it is noted in the row."""
    found = {"patient_id": row.parse(layout.patient, valid_id, VALID_ID)}
    if with_outcome:
        expected = f"{layout.unit} as a number > 0, less than {MOST_MONTHS // 12} years"
        found["time"] = row.parse(layout.time, lambda text: _months(text, UNITS[layout.unit]), expected)
        found["event"] = row.parse(layout.event, lambda text: str(died(text)), "1 died or 0 censored")
    return found | {names[c]: text for c, text in row.cells.items() if c in names}


def _months(text: str, unit: float) -> str:
    if (months := positive(text) * unit) >= MOST_MONTHS:
        raise ValueError(text)
    return f"{months:.6g}"


def scan_row(patient: str, images: Path, masks: Path, region: str | None) -> dict[str, str]:
    """The files of one patient: `image`, and masks where there are any.

    A folder named after the patient, in any case, holds DICOM: the chest CT among its series, or the one that the region
    was drawn on. Else a file of that name is the scan, and `<patient>_lung`, `_gt`, `_confounder` are masks, there or in
    folders within.

    Args:
        images: folder of the data set.
        masks: folder to write the mask of `region` to; one that is there and fits isn't made again.
        region: what causes death, as RTSTRUCT or SEG name it (GTV-1), if it is looked for.

    Raises:
        InputError: nothing or too much is found; no chest CT; the region doesn't fit the CT.
    """
    folder = _folder(patient, images)
    if folder is None:
        return _files(patient, images)
    stacks = list_series(folder)
    with _malformed(patient, region):
        drawings = sorted((s.modality, s.path) for stack in stacks for s in stack.slices if s.modality in _REGIONS)
        regions = [pydicom.dcmread(path) for _, path in drawings if region]
        drawn = next((d for d in regions if region_numbers(d, region)), None)
    uid = referenced_series(drawn) if drawn else None
    series = choose_series(stacks, f"patient {patient}", uid if any(s.uid == uid for s in stacks) else None)
    row = {"image": str(_folder_of(series, stacks, patient))}
    if drawn:
        path = masks / f"{patient}_{tidy(region)}.nii.gz"
        if not _fits(path, series):
            with _malformed(patient, region):
                mask = read_region(drawn, region, series)
            write_atomically(path, mask.to_filename)
        row["gt_mask"] = str(path)
    elif region:
        found = ", ".join(sorted({name for d in regions for name in region_names(d).values()})) or "none"
        _log.warning("patient %s: no region %s (found: %s), so no gt_mask", patient, region, found)
    return row


@contextmanager
def _malformed(patient: str, region: str | None) -> Iterator[None]:
    """A malformed RTSTRUCT or SEG is the fault of one patient."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, InvalidDicomError) as error:
        what = f"the RTSTRUCT or SEG for {region} is malformed: {error} (expected contours or segments of the region)"
        raise InputError(f"patient {patient}: {what}") from error


def tidy(name: str) -> str:
    """A column's name in lower case with underscores: clinical.T.Stage becomes clinical_t_stage."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    return re.sub(r"[^0-9a-z]+", "_", name.lower()).strip("_")


def _folder(patient: str, images: Path) -> Path | None:
    """The folder named after a patient, in another case only where none has the very name."""
    if (images / patient).is_dir():
        return images / patient
    found = [p for p in images.iterdir() if p.name.casefold() == patient.casefold() and p.is_dir()]
    if len(found) > 1:
        listed = ", ".join(sorted(p.name for p in found))
        raise InputError(f"patient {patient}: {len(found)} folders differ in case alone: {listed} (expected one)")
    return found[0] if found else None


def _files(patient: str, images: Path) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    wanted = {patient.lower(): "image"}
    for column in MASK_COLUMNS:
        wanted |= {f"{patient}_{column}".lower(): column, f"{patient}_{column.removesuffix('_mask')}".lower(): column}
    for root, _, names in os.walk(images):
        for name in names:
            if column := wanted.get((scan_stem(name) or "").lower()):
                found.setdefault(column, []).append(os.path.join(root, name))
    for column, paths in found.items():
        if len(paths) > 1:
            listed = ", ".join(sorted(paths))
            raise InputError(f"patient {patient}: {len(paths)} files could be {column}: {listed} (expected one)")
    if "image" not in found:
        bare = patient.lstrip("0")
        alike = sorted(p.name for p in images.iterdir() if (scan_stem(p.name) or p.name).lstrip("0") == bare)
        hint = f"; {alike[0]} is there: a spreadsheet may have taken the zeros from the table" if alike else ""
        raise InputError(f"patient {patient}: no scan in {images} (expected a folder or a file of that name{hint})")
    return {column: paths[0] for column, paths in found.items()}


def _folder_of(series: Series, stacks: Sequence[Series], patient: str) -> Path:
    """The folder that a series lies in; what else is there must not be chosen before it when the folder is read."""
    folder = Path(os.path.commonpath([os.path.dirname(s.path) for s in series.slices]))
    inside = [s for s in stacks if any(Path(one.path).is_relative_to(folder) for one in s.slices)]
    if len(inside) > 1 and choose_series(inside, f"patient {patient}") != series:
        raise InputError(
            f"patient {patient}: the region was drawn on {series}, which shares {folder} with a series that would be "
            "chosen before it (expected a folder of its own)"
        )
    return folder


def _fits(path: Path, series: Series) -> bool:
    try:
        mask = nib.load(path)
        return series.tilted or (mask.shape == series.shape and np.allclose(mask.affine, series.affine, atol=1e-3))
    except (OSError, nib.filebasedimages.ImageFileError):
        return False
