# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""From a tree of scans and a clinical table, as public data sets come, to the rows of a cohort CSV."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError

from bundle.data.cohort import IMAGE_SUFFIXES, MASK_COLUMNS, read_table
from bundle.errors import InputError
from bundle.files import write_atomically
from bundle.reading.contours import read_region, referenced_series, region_names, region_numbers
from bundle.reading.dicom import Series, choose_series, list_series

__all__ = ["LAYOUTS", "UNITS", "Layout", "read_clinical", "scan_row"]

_log = logging.getLogger(__name__)

UNITS = {"days": 12 / 365.25, "weeks": 7 * 12 / 365.25, "months": 1.0, "years": 12.0}  # in months
_MISSING = ("", "na", "n/a", "nan", "none", "null", "not collected", "unknown")
_EVENT = {"1": 1, "0": 0, "dead": 1, "deceased": 1, "died": 1, "alive": 0, "censored": 0, "true": 1, "false": 0}


@dataclass(frozen=True)
class Layout:
    """How a data set names things.

    Args:
        patient: column of the table with the patient, who has a folder or files of that name.
        time: column with the time to death or last contact.
        event: column with 1 died, 0 censored.
        unit: of `time`, one of UNITS.
        visit: column with the time of a visit from the CT on, if each has a row; the nearest to 0 is taken.
        outcome: whether time and event must be there; if not, a table without them makes a cohort for inference.
        names: of clinical columns, where another than :func:`tidy`'s is wanted.
    """

    patient: str
    time: str
    event: str
    unit: str
    visit: str | None = None
    outcome: bool = False
    names: Mapping[str, str] = field(default_factory=dict)


LAYOUTS = {
    "lung1": Layout("PatientID", "Survival.time", "deadstatus.event", "days", outcome=True, names={"gender": "sex"}),
    "osic": Layout(
        "Patient", "time", "event", "months", visit="Weeks",
        names={"FVC": "fvc_ml", "Percent": "fvc_percent", "SmokingStatus": "smoking"},
    ),
    "flat": Layout("patient_id", "time", "event", "months"),
}  # fmt: skip


def read_clinical(path: str | os.PathLike, layout: Layout) -> tuple[dict[int, dict[str, str]], list[str]]:
    """The rows of a clinical table as the cohort has them, without the scans' files.

    Args:
        path: CSV in UTF-8.
        layout: names of its columns.

    Returns:
        rows by line of the file, each with `patient_id`, `time` (months) and `event` if the table has them, and its
        other columns under tidy names, empty where missing; faults, each ``row N, column X: what (expected ...)``.
    """
    header, lines = read_table(Path(path))
    needed = [layout.patient, *filter(None, [layout.visit])]
    if layout.outcome or layout.time in header or layout.event in header:
        needed += [layout.time, layout.event]
    faults = [f"row 1, column {c}: missing (found: {', '.join(header)})" for c in needed if c not in header]
    taken = {layout.patient, layout.time, layout.event}
    names = {c: layout.names.get(c, tidy(c)) for c in header if c not in taken}
    for column, name in names.items():
        if name in ("patient_id", "image", "time", "event", *MASK_COLUMNS, "") or list(names.values()).count(name) > 1:
            faults.append(f"row 1, column {column}: would be named {name!r} (expected a name of its own)")
    if faults:
        return {}, faults

    rows: dict[int, dict[str, str]] = {}
    first: dict[str, int] = {}
    visits: dict[int, float] = {}
    for line, values in lines:
        if len(values) != len(header):
            faults.append(f"row {line}: {len(values)} values (expected {len(header)}, as in the header)")
            continue
        given = {c: "" if v.strip().lower() in _MISSING else v.strip() for c, v in zip(header, values)}
        row = {"patient_id": given[layout.patient]}
        checks: list[tuple[str, str, Callable[[str], str], str]] = []
        if layout.time in needed:
            checks.append(
                ("time", layout.time, lambda text: _months(text, layout.unit), f"{layout.unit} as a number > 0")
            )
            checks.append(("event", layout.event, _event, "1 died or 0 censored"))
        if layout.visit:
            checks.append(("visit", layout.visit, lambda text: f"{_finite(text):g}", "a number"))
        for name, column, convert, expected in checks:
            try:
                row[name] = convert(given[column])
            except ValueError:
                faults.append(f"row {line}, column {column}: {given[column] or 'empty'} (expected {expected})")
        if layout.visit and "visit" in row:
            visits[line] = abs(float(row.pop("visit")))
        row |= {names[c]: v for c, v in given.items() if c in names}

        patient = row["patient_id"]
        if not re.fullmatch(r"[^/\\\x00-\x1f]+", patient) or ".." in patient:
            faults.append(f"row {line}, column {layout.patient}: {patient!r} (expected a name without / \\ ..)")
            continue
        if (earlier := first.get(patient)) is None:
            first[patient] = line
            rows[line] = row
        elif not layout.visit:
            faults.append(
                f"row {line}, column {layout.patient}: {patient} is in row {earlier} too (expected one row each)"
            )
        elif visits.get(line, math.inf) < visits.get(earlier, math.inf):
            del rows[earlier]
            first[patient] = line
            rows[line] = row
    if not rows and not faults:
        faults.append("row 2: the table has no rows (expected one row a patient)")
    return rows, faults


def scan_row(patient: str, images: Path, masks: Path, region: str | None) -> dict[str, str]:
    """The files of one patient: `image`, and masks where there are any.

    A folder named after the patient holds DICOM: the chest CT among its series, or the one that the region was drawn
    on. Else a file of that name is the scan, and `<patient>_lung`, `_gt`, `_confounder` are masks, there or in folders
    within.

    Args:
        patient: as in the table.
        images: folder of the data set.
        masks: folder to write the mask of `region` to; one that is there and fits isn't made again.
        region: what causes death, as RTSTRUCT or SEG name it (GTV-1); None: not looked for.

    Raises:
        InputError: nothing or too much is found; no chest CT; the region doesn't fit the CT.
    """
    folder = images / patient
    if not folder.is_dir():
        return _files(patient, images)
    stacks = list_series(folder)
    with _malformed(patient, region):
        drawn = _drawn(stacks, region) if region else None
    series = _drawn_on(drawn, stacks, patient) if drawn else choose_series(stacks, f"patient {patient}")
    row = {"image": str(_folder_of(series, stacks, patient))}
    if drawn:
        path = masks / f"{patient}_{tidy(region)}.nii.gz"
        if not _fits(path, series):
            with _malformed(patient, region):
                mask = read_region(drawn, region, series)
            _write_mask(path, mask)
        row["gt_mask"] = str(path)
    elif region:
        found = sorted({name for s in _region_files(stacks) for name in region_names(s).values()})
        _log.warning("patient %s: no region %s (found: %s), so no gt_mask", patient, region, ", ".join(found) or "none")
    return row


@contextmanager
def _malformed(patient: str, region: str | None) -> Iterator[None]:
    """An RTSTRUCT or SEG that lacks what it must have, or has something else, is the fault of one patient."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, InvalidDicomError) as error:
        what = f"the RTSTRUCT or SEG for {region} is malformed: {error} (expected contours or segments of the region)"
        raise InputError(f"patient {patient}: {what}") from error


def tidy(name: str) -> str:
    """A column's name in lower case with underscores."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    return re.sub(r"[^0-9a-z]+", "_", name.lower()).strip("_")


def _files(patient: str, images: Path) -> dict[str, str]:
    """The scan and masks that are single files."""
    found: dict[str, list[str]] = {}
    wanted = {patient.lower(): "image"}
    for column in MASK_COLUMNS:
        wanted |= {f"{patient}_{column}".lower(): column, f"{patient}_{column.removesuffix('_mask')}".lower(): column}
    for root, _, names in os.walk(images):
        for name in names:
            suffix = next((s for s in (".nii.gz", *IMAGE_SUFFIXES) if name.lower().endswith(s)), None)
            column = wanted.get(name[: -len(suffix)].lower()) if suffix else None
            if column:
                found.setdefault(column, []).append(os.path.join(root, name))
    for column, paths in found.items():
        if len(paths) > 1:
            raise InputError(
                f"patient {patient}: {len(paths)} files could be {column}: {', '.join(sorted(paths))} (expected one)"
            )
    if "image" not in found:
        raise InputError(f"patient {patient}: no scan in {images} (expected a folder or a file of that name)")
    return {column: paths[0] for column, paths in found.items()}


def _region_files(stacks: Iterable[Series]) -> list[pydicom.Dataset]:
    """RTSTRUCT first, from which SEG are often made."""
    files = [(s.modality, one.path) for s in stacks if s.modality in ("RTSTRUCT", "SEG") for one in s.slices]
    return [pydicom.dcmread(path) for _, path in sorted(files)]


def _drawn(stacks: Sequence[Series], region: str) -> pydicom.Dataset | None:
    """The first RTSTRUCT or SEG that has the region."""
    return next((d for d in _region_files(stacks) if region_numbers(d, region)), None)


def _drawn_on(drawn: pydicom.Dataset, stacks: Sequence[Series], patient: str) -> Series:
    """The CT that a region was drawn on, or the one to choose if it doesn't say or isn't there."""
    uid = referenced_series(drawn)
    if not any(s.uid == uid for s in stacks):
        uid = None
    return choose_series(stacks, f"patient {patient}", uid)


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
    """Whether a mask made earlier is on the grid of the series."""
    try:
        mask = nib.load(path)
        return series.tilted or (mask.shape == series.shape and np.allclose(mask.affine, series.affine, atol=1e-3))
    except (OSError, nib.filebasedimages.ImageFileError):
        return False


def _write_mask(path: Path, mask: nib.Nifti1Image) -> None:
    write_atomically(path, lambda temporary: nib.save(mask, temporary))


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _months(text: str, unit: str) -> str:
    value = _finite(text) * UNITS[unit]
    if value <= 0:
        raise ValueError
    return f"{value:.6g}"


def _event(text: str) -> str:
    try:
        return str({1.0: 1, 0.0: 0}[float(text)])
    except (ValueError, KeyError):
        pass
    try:
        return str(_EVENT[text.lower()])
    except KeyError as error:
        raise ValueError from error
