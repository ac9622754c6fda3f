# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Read a cohort CSV and check it whole, before anything runs."""

import contextlib
import hashlib
import logging
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from bundle.errors import InputError
from bundle.reading.scan_file import IMAGE_SUFFIXES, scan_stem
from bundle.reading.tables import (
    MASK_COLUMNS,
    MOST_MONTHS,
    SPREADSHEET,
    VALID_ID,
    Row,
    died,
    finite,
    log_missing,
    positive,
    raise_faults,
    read_table,
    valid_id,
)
from bundle.reading.zipped import is_archive

SPLITS = ("train", "val", "test")
_CONTRACT = ("patient_id", "image", "time", "event", *MASK_COLUMNS, "split", "fold", "site", "simulated")
_log = logging.getLogger(__name__)

Scan = tuple[Row, dict]  # a row, and the record that is made of it


def patient_digest(patient_id: str) -> str:
    """Short digest of a training patient's id, for `settings.json`; somebody who tries all ids can still find it."""
    return hashlib.sha256(patient_id.encode()).hexdigest()[:16]


def patient_of(record: Mapping) -> str:
    """Whose scan a record is: the `patient_id` of the table."""
    return record.get("patient", record["patient_id"])


def read_cohort(
    path: str | os.PathLike,
    *,
    need_outcome: bool = True,
    clinical: Mapping[str, str] | None = None,
    need_clinical: bool = True,
    tmax: float | None = None,
    check_files: bool = True,
    on_fault: str = "fail",
) -> list[dict]:
    """Read a cohort and check every row, so that all faults are told at once.

    Args:
        path: CSV in UTF-8, one row a scan. Columns `patient_id`, `image`, `time` (months) and `event` (1 died, 0
            censored); optional `lung_mask`, `gt_mask`, `confounder_mask`, `split` (train, val or test), `fold`
            (integer), `site` (hospital or scanner) and `simulated` (1 where the survival time is made up). Any other
            column is clinical. Paths are absolute or relative to the CSV.
        need_outcome: whether `time`, `event` and at least one death must be there; if not, a row has both only where
            they are valid.
        clinical: clinical columns to take and the kind of each, "numeric" or "categorical".
        need_clinical: whether these columns must be there. If not, all values of one that isn't are missing.
        tmax: last month of the model, if every time must be below it; else the limit is :data:`MOST_MONTHS`.
        check_files: whether images and masks must exist and have a suffix that can be read.
        on_fault: of a scan whose files are at fault: "fail" (raise), "skip" (leave it out with a warning) or "row" (keep
            it, with the sentence in `record["fault"]`). Faults of the table always raise.

    Returns:
        For each scan a dict with the columns above (absolute paths) where the table has them, and `covariates` if
        clinical columns are named: a float or a string each, None where missing. The second scan of patient P7 has the
        `patient_id` P7_2, by which its outputs are named; see :func:`patient_of`.

    Raises:
        InputError: each fault as ``row N, column X: what (expected ...)``; N is the line in the file.
    """
    clinical = {} if clinical is None else clinical
    _check_options(clinical, tmax, on_fault)
    header, rows = read_table(path)
    log_missing(path, rows)
    faults = _header_faults(header, need_outcome, clinical, need_clinical)
    if not rows:
        faults.append("row 2: the table has no rows (expected one row a scan)")
    folder = Path(str(path)).parent
    scans = [(row, _record(row, folder, need_outcome, clinical, tmax)) for row in rows if row.cells]
    _compare_ids_and_images(scans)
    _compare_scans_of_patients(scans)
    if need_clinical:
        _compare_categories(scans)
    faults += [fault for row in rows for fault in row.faults]
    records = [record for _, record in scans]
    if need_outcome and not faults and not any(record["event"] for record in records):
        faults.append("column event: no row has event 1 (expected at least one death)")
    scan_faults = _check_files(scans) if check_files else []
    skippable = need_outcome and not faults and not all("fault" in record for record in records)
    advice = "\nThe same command with --on_fault skip goes on without these scans." if skippable else ""
    raise_faults(path, faults + (scan_faults if on_fault == "fail" else []), advice)
    return _without_faults(records, path, need_outcome) if on_fault == "skip" else records


def longest_follow_up(path: str | os.PathLike) -> float:
    """The last time of a cohort CSV that can be one, months; 0 for none: :func:`read_cohort` tells of faults."""
    longest = 0.0
    for row in read_table(path)[1]:
        with contextlib.suppress(ValueError):
            longest = max(longest, time if (time := positive(row.cells.get("time", ""))) < MOST_MONTHS else 0)
    return longest


def single_scan(image: str | os.PathLike) -> list[dict]:
    """A cohort of one scan without an outcome: an image file or a DICOM folder that exists, named after itself."""
    path = os.path.abspath(os.path.expanduser(str(image)))
    if fault := _file_fault(path, folder=True):
        raise InputError(f"image: {fault}")
    name = os.path.basename(path)
    stem = name if os.path.isdir(path) else scan_stem(name) or Path(name).stem
    patient = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_")
    return [{"patient_id": patient or "scan", "image": path}]


def _check_options(clinical: Mapping[str, str], tmax: float | None, on_fault: str) -> None:
    if on_fault not in ("fail", "skip", "row"):
        raise InputError(f"on_fault is '{on_fault}' (expected one of fail, skip, row)")
    if not isinstance(clinical, Mapping) or not all(kind in ("numeric", "categorical") for kind in clinical.values()):
        example = '{"age": "numeric", "sex": "categorical"}'
        raise InputError(f"clinical is {clinical} (expected each column with its kind, such as {example})")
    if not isinstance(tmax, (int, float, type(None))):
        raise InputError(f"tmax is {tmax!r} (expected a number of months)")


def _header_faults(header: Sequence[str], need_outcome: bool, clinical: Mapping[str, str], need_clinical: bool) -> list[str]:
    where = "row 1, column"
    faults = [f"{where} {name!r}: there are {n} (expected 1)" for name, n in Counter(header).items() if n > 1]
    needed = ["patient_id", "image"] + (["time", "event"] if need_outcome else [])
    faults += [f"{where} {name}: missing (found: {', '.join(header)})" for name in needed if name not in header]
    for name in clinical:
        if name in _CONTRACT:
            faults.append(f"{where} {name}: not a clinical column (expected another one than {', '.join(_CONTRACT)})")
        elif name not in header and need_clinical:
            others = ", ".join(column for column in header if column not in _CONTRACT) or "none"
            faults.append(f"{where} {name}: named as clinical but missing (expected one of the table's: {others})")
    return faults


def _record(row: Row, folder: Path, need_outcome: bool, clinical: Mapping[str, str], tmax: float | None) -> dict:
    """The record of a row; what is wrong in it is noted in the row."""
    cells = row.cells
    record: dict = {}
    if "patient_id" in cells:
        record["patient_id"] = row.parse("patient_id", valid_id, VALID_ID)
    if cells.get("image") == "":
        row.fault("image", f"{row.words.get('image', 'empty')} (expected a file or a DICOM folder)")
    for column in ("image", *MASK_COLUMNS):
        if cells.get(column):
            record[column] = _absolute(cells[column], folder)
    if not need_outcome:
        record |= _outcome(cells)
    elif {"time", "event"} <= cells.keys():
        record["time"] = row.parse("time", positive, "months as a number > 0")
        record["event"] = row.parse("event", died, "1 died or 0 censored")
        if record["time"] is not None and record["time"] >= (tmax or MOST_MONTHS):
            limit = f"{MOST_MONTHS}" if tmax is None else f"tmax, which is {tmax:g}; --tmax sets another"
            row.fault("time", f"{cells['time']} (expected months, less than {limit})")
    if "split" in cells:
        record["split"] = row.parse("split", lambda text: SPLITS[SPLITS.index(text.lower())], "train, val or test")
    if "fold" in cells:
        record["fold"] = row.parse("fold", _integer, "an integer")
    if cells.get("site"):
        record["site"] = cells["site"]
    if cells.get("simulated") and row.parse("simulated", ("0", "1").index, "1 or 0, or nothing"):
        record["simulated"] = True
    if clinical:
        convert = {
            "numeric": (finite, "a number, or nothing if missing, in a numeric column"),
            "categorical": (_category, "a category, or nothing if missing"),
        }
        record["covariates"] = {
            column: row.parse(column, *convert[kind]) if cells.get(column) else None for column, kind in clinical.items()
        }
    return record


def _outcome(cells: Mapping[str, str]) -> dict:
    """Time and event of a row that need not have them, if both are valid."""
    with contextlib.suppress(ValueError):
        found = {"time": positive(cells.get("time", "")), "event": died(cells.get("event", ""))}
        return found if found["time"] < MOST_MONTHS else {}
    return {}


def _absolute(path: str, folder: Path) -> str:
    """A path as Windows may have written it, in quotes or with backslashes, or as it is."""
    path = path.strip('"')
    found = os.path.abspath(folder / os.path.expanduser(path))
    return found if os.path.exists(found) or "\\" not in path else _absolute(path.replace("\\", "/"), folder)


def _compare_ids_and_images(scans: Sequence[Scan]) -> None:
    """Note ids that differ by spelling alone, and images of several patients in different parts."""
    by_spelling: dict[str, Row] = {}
    by_number: dict[str, str] = {}
    by_image: dict[str, Scan] = {}
    for row, record in scans:
        patient = row.cells.get("patient_id", "")
        # Files are named after ids, and some file systems take names for the same that differ by case or Unicode form.
        first = by_spelling.setdefault(unicodedata.normalize("NFC", patient).casefold(), row)
        if patient != (known := first.cells.get("patient_id", "")):
            alike = f"{patient!r} is {known!r} of row {first.line} in another case or Unicode form"
            row.fault("patient_id", f"{alike} (expected one spelling)")
        same = by_number.setdefault(patient.lstrip("0"), patient)
        if patient != same and patient.isdecimal():
            _log.warning("patients %s and %s differ by zeros alone: they are taken for two", same, patient)
        if "image" in record:
            other = by_image.setdefault(record["image"], (row, record))
            if patient != (owner := other[0].cells.get("patient_id", "")):
                _log.warning("patients %s and %s have one image; a random split may put it in two parts", owner, patient)
                _compare_parts((row, record), other, "image", "an image in one part")


def _compare_scans_of_patients(scans: Sequence[Scan]) -> None:
    """Note what is wrong between the scans of a patient, and name all but the first `<patient_id>_2`, `_3`, ..."""
    scans_of: dict[str, list[Scan]] = defaultdict(list)
    for row, record in scans:
        if record.get("patient_id"):
            scans_of[record["patient_id"]].append((row, record))
    for patient, group in scans_of.items():
        for number, (row, record) in enumerate(group[1:], start=2):
            if same := [other.line for other, its in group[: number - 1] if its.get("image") == record.get("image")]:
                twice = f"{patient!r} is in row {same[0]} too, with the same image"
                row.fault("patient_id", f"{twice} (expected one row a scan)")
            _compare_parts((row, record), group[0], "patient", "all scans of a patient in one")
            if record.get("event") != group[0][1].get("event"):
                _log.warning("patient %s: event differs between rows %d and %d", patient, group[0][0].line, row.line)
            name = f"{patient}_{number}"
            if name in scans_of:
                taken = f"scan {number} of {patient!r} is to be named {name!r}, which is another patient"
                row.fault("patient_id", f"{taken} (expected names that differ)")
            record |= {"patient_id": name, "patient": patient}
            group[0][1]["patient"] = patient


def _compare_categories(scans: Sequence[Scan]) -> None:
    """Note categories that differ by case alone: Male and male would be two."""
    first: dict[tuple[str, str], tuple[str, int]] = {}
    for row, record in scans:
        for column, value in record.get("covariates", {}).items():
            if isinstance(value, str):
                known, line = first.setdefault((column, value.casefold()), (value, row.line))
                if value != known:
                    row.fault(column, f"{value!r} is {known!r} of row {line} in another case (expected one spelling)")


def _compare_parts(scan: Scan, other: Scan, same: str, expected: str) -> None:
    """Note where two scans with the same patient or image are in another split or fold."""
    (row, record), (first, its) = scan, other
    for column in ("split", "fold"):
        if record.get(column) != its.get(column):
            differ = f"{record.get(column)}, but {its.get(column)} for the same {same} in row {first.line}"
            row.fault(column, f"{differ} (expected {expected})")


def _check_files(scans: Sequence[Scan]) -> list[str]:
    """What is wrong with images and masks; the record of a scan keeps its own faults."""
    faults: list[str] = []
    for row, record in scans:
        for column in ("image", *MASK_COLUMNS):
            if column in record and (what := _file_fault(record[column], folder=column == "image")):
                faults.append(f"row {row.line}, column {column}: {what}")
                record["fault"] = "; ".join(filter(None, [record.get("fault"), faults[-1]]))
    return faults


def _without_faults(records: Sequence[dict], path: str | os.PathLike, need_outcome: bool) -> list[dict]:
    good = []
    for record in records:
        if "fault" in record:
            _log.warning("patient %s is left out: %s", record["patient_id"], record["fault"])
        else:
            good.append(record)
    if len(good) < len(records):
        _log.warning("%d of %d scans are left out", len(records) - len(good), len(records))
    if not good or (need_outcome and not any(record["event"] for record in good)):
        raise InputError(f"{path}: no {'deaths' if good else 'scans'} remain once scans at fault are left out")
    return good


def _file_fault(path: str, folder: bool) -> str | None:
    """What is wrong with a path, before reading it; `folder`: it may be a DICOM folder."""
    expected = f"one of {' '.join(IMAGE_SUFFIXES)}{' or a DICOM folder' if folder else ''}"
    if os.path.isdir(path):
        return None if folder else f"{path} is a folder (expected {expected})"
    if not os.path.exists(path):
        what = "is a symbolic link that leads nowhere" if os.path.islink(path) else "does not exist"
        return f"{path} {what} (expected {expected})"
    if not scan_stem(path) and not (folder and is_archive(path)):
        return f"{path} has the suffix '{Path(path).suffix}' (expected {expected})"
    return None


def _integer(text: str) -> int:
    if not (value := finite(text)).is_integer():
        raise ValueError(text)
    return int(value)


def _category(text: str) -> str:
    """Numbers in one spelling: some programs write 1 as 1.0."""
    if SPREADSHEET.fullmatch(text):
        raise ValueError(text)
    try:
        return f"{finite(text):.15g}"
    except ValueError:
        return text
