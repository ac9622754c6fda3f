# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Read a cohort CSV, check it whole, and divide it into training, validation and test scans."""

from __future__ import annotations

import csv
import hashlib
import logging
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from bundle.errors import InputError

__all__ = ["IMAGE_SUFFIXES", "patient_digest", "patient_of", "read_cohort", "read_table", "single_scan"]

IMAGE_SUFFIXES = (".nii", ".nii.gz", ".nrrd", ".mha", ".mhd")
MASK_COLUMNS = ("lung_mask", "gt_mask", "confounder_mask")
SPLITS = ("train", "val", "test")
ON_FAULT = ("fail", "skip", "row")
KINDS = ("numeric", "categorical")

_CONTRACT = ("patient_id", "image", "time", "event", *MASK_COLUMNS, "split", "fold")
_HEADER_LINE = 1
_ID_BYTES = 200  # names of files may have 255, and more is added to an id
_log = logging.getLogger(__name__)


def patient_digest(patient_id: str) -> str:
    """Short digest under which `settings.json` remembers a training patient without naming them.

    It hides ids from a reader, not from somebody who tries all ids that there may be.
    """
    return hashlib.sha256(patient_id.encode()).hexdigest()[:16]


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
    """Read the cohort and check every row, so that all there is to mend is said at once.

    Args:
        path: CSV in UTF-8, one row a scan. Columns `patient_id`, `image`; `time` (months) and `event` (1 died,
            0 censored); optional `lung_mask`, `gt_mask`, `confounder_mask`, `split` (train, val or test), `fold`
            (integer). Paths are absolute or relative to the CSV. Any other column is clinical. A patient may have
            several scans, which must then be other images in the same split and fold.
        need_outcome: whether `time`, `event` and at least one event must be there (not so in inference).
        clinical: clinical columns to take and the kind of each, "numeric" or "categorical".
        need_clinical: whether these columns must be there; if not, all values of one that isn't are missing.
        tmax: last month of the model; every time must be below it. None: not checked.
        check_files: whether images and masks must exist and have a suffix that can be read.
        on_fault: what to do about a scan whose files are at fault: "fail" (raise), "skip" (leave it out with a
            warning) or "row" (keep it, with the sentence in `record["fault"]`). Faults of the table always raise.

    Returns:
        For each scan a dict with `patient_id`, `image` and, where given, masks (absolute paths), `time` (float),
        `event` (int), `split`, `fold` (int), and `covariates` if clinical columns are named: for each a float or,
        if categorical, a string; None where missing. All outputs name a scan by its `patient_id`, so that of a patient
        with several scans the second is `<patient_id>_2`, and so on in the order of the rows; see :func:`patient_of`.

    Raises:
        InputError: listing each fault as ``row N, column X: what (expected ...)``; N is the line in the file, the
            header being line 1.
    """
    if on_fault not in ON_FAULT:
        raise InputError(f"on_fault is '{on_fault}' (expected one of {', '.join(ON_FAULT)})")
    clinical = clinical or {}
    if clinical and not (isinstance(clinical, Mapping) and all(kind in KINDS for kind in clinical.values())):
        example = '{"age": "numeric", "sex": "categorical"}'
        raise InputError(f"clinical is {clinical} (expected each column with its kind, such as {example})")
    path = Path(path)
    header, rows = read_table(path)
    faults = _header_faults(header, need_outcome, clinical, need_clinical)
    if not rows:
        faults.append(f"row {_HEADER_LINE + 1}: the table has no rows (expected one row a scan)")

    records: list[dict] = []
    scan_faults: list[str] = []
    scans_of: dict[str, list[tuple[int, dict]]] = {}
    spelling: dict[str, tuple[int, str]] = {}
    part_of: dict[str, tuple[int, dict]] = {}
    for line, values in rows:
        if len(values) != len(header):
            faults.append(f"row {line}: {len(values)} values (expected {len(header)}, as in the header)")
            continue
        row = dict(zip(header, (value.strip() for value in values)))
        record, wrong = _check_row(row, need_outcome, clinical, tmax)
        patient = row.get("patient_id", "")
        # Files are named after ids, and some file systems take names for the same that differ by case or Unicode form.
        first, known = spelling.setdefault(unicodedata.normalize("NFC", patient).casefold(), (line, patient))
        if patient != known:
            alike = f"{patient!r} is {known!r} of row {first} in another case or Unicode form"
            wrong.append(f"column patient_id: {alike} (expected one spelling)")
        for column in ("image", *MASK_COLUMNS):
            if row.get(column):
                record[column] = os.path.abspath(path.parent / os.path.expanduser(row[column]))
        if "image" in record:
            first, other = part_of.setdefault(record["image"], (line, record))
            if patient != other.get("patient_id"):
                wrong += _part_faults(record, first, other, "image", "an image in one part")
        if record.get("patient_id"):
            others = scans_of.setdefault(record["patient_id"], [])
            wrong += _repetition_faults(record, others)
            others.append((line, record))
        faults += [f"row {line}, {what}" for what in wrong]
        if check_files:
            of_files = [
                f"row {line}, column {column}: {what}"
                for column in ("image", *MASK_COLUMNS)
                if column in record and (what := _file_fault(record[column], folder=column == "image"))
            ]
            scan_faults += of_files
            if of_files:
                record["fault"] = "; ".join(of_files)
        records.append(record)

    faults += _name_scans(scans_of)
    if need_outcome and not faults and not any(record["event"] for record in records):
        faults.append("column event: no row has event 1 (expected at least one death)")
    if on_fault == "fail":
        faults += scan_faults
    if faults:
        count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise InputError(f"{path} has {count}:\n" + "\n".join(f"  {fault}" for fault in faults))

    if on_fault == "skip":
        for record in records:
            if "fault" in record:
                _log.warning("patient %s is left out: %s", record["patient_id"], record["fault"])
        records = [record for record in records if "fault" not in record]
        if not records or (need_outcome and not any(record["event"] for record in records)):
            raise InputError(f"{path}: no {'deaths' if records else 'scans'} remain once scans at fault are left out")
    return records


def patient_of(record: Mapping) -> str:
    """Whose scan a record is: the `patient_id` of the table, of which the record's own is one scan."""
    return record.get("patient", record["patient_id"])


def single_scan(image: str | os.PathLike) -> list[dict]:
    """A cohort of one scan without an outcome: an image file or a DICOM folder, named after itself.

    Raises:
        InputError: the image is missing or has a suffix that can't be read.
    """
    path = os.path.abspath(os.path.expanduser(image))
    if fault := _file_fault(path, folder=True):
        raise InputError(f"image: {fault}")
    name = Path(path).name
    suffix = next((s for s in sorted(IMAGE_SUFFIXES, key=len, reverse=True) if name.lower().endswith(s)), "")
    stem = name if os.path.isdir(path) or not suffix else name[: -len(suffix)]
    patient = re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_")
    return [{"patient_id": patient or "scan", "image": path}]


def read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and (line in the file, values) of each row that is not blank."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, values) for values in reader]
    except OSError as error:
        raise InputError(f"cohort {path}: {error.strerror or error} (expected a CSV file)") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"cohort {path}: not a CSV in UTF-8 ({error})") from error
    lines = [(line, values) for line, values in lines if any(value.strip() for value in values)]
    if not lines:
        raise InputError(f"cohort {path}: the file is empty (expected a header with patient_id, image, time, event)")
    return [name.strip() for name in lines[0][1]], lines[1:]


def _header_faults(
    header: list[str], need_outcome: bool, clinical: Mapping[str, str], need_clinical: bool
) -> list[str]:
    where = f"row {_HEADER_LINE}, column"
    count = Counter(header)
    faults = [f"{where} {name!r}: there are {count[name]} (expected 1)" for name in count if count[name] > 1]
    needed = ["patient_id", "image"] + (["time", "event"] if need_outcome else [])
    faults += [f"{where} {name}: missing (found: {', '.join(header)})" for name in needed if name not in header]
    if not need_outcome and ("time" in header) != ("event" in header):
        faults.append(f"{where} time, event: only one is there (expected both or neither)")
    for name in clinical:
        if name in _CONTRACT:
            faults.append(f"{where} {name}: not a clinical column (expected another one than {', '.join(_CONTRACT)})")
        elif name not in header and need_clinical:
            others = ", ".join(column for column in header if column not in _CONTRACT) or "none"
            faults.append(f"{where} {name}: named as clinical but missing (expected one of the table's: {others})")
    return faults


def _check_row(
    row: dict[str, str], need_outcome: bool, clinical: Mapping[str, str], tmax: float | None
) -> tuple[dict, list[str]]:
    """The record of a row, and what is wrong in it, each starting with its column."""
    record: dict = {}
    wrong: list[str] = []

    def parse(column: str, convert: Callable[[str], object], expected: str) -> object:
        try:
            return convert(row[column])
        except ValueError:
            wrong.append(f"column {column}: {repr(row[column]) if row[column] else 'empty'} (expected {expected})")
            return None

    if "patient_id" in row:
        expected = f"a name of up to {_ID_BYTES} bytes without / \\ .. or control characters, as files are named after it"
        record["patient_id"] = parse("patient_id", _patient_id, expected)
    if row.get("image") == "":
        wrong.append("column image: empty (expected a file or a DICOM folder)")
    if "time" in row and "event" in row and (need_outcome or row["time"] or row["event"]):
        record["time"] = parse("time", _months, "months as a number > 0")
        record["event"] = parse("event", _zero_or_one, "1 died or 0 censored")
        if tmax is not None and record["time"] is not None and record["time"] >= tmax:
            wrong.append(f"column time: {row['time']} (expected less than tmax, which is {tmax:g})")
    if "split" in row:
        record["split"] = parse("split", _split, "train, val or test")
    if "fold" in row:
        record["fold"] = parse("fold", _integer, "an integer")
    if clinical:
        expected = "a number, or nothing if missing, in a numeric column"
        record["covariates"] = {
            column: parse(column, _number if kind == "numeric" else _category, expected) if row.get(column) else None
            for column, kind in clinical.items()
        }
    return record, wrong


def _repetition_faults(record: dict, others: list[tuple[int, dict]]) -> list[str]:
    """What is wrong with another scan of a patient, given the (row, record) of those before it."""
    wrong = []
    for line, other in others:
        if record.get("image") == other.get("image"):
            what = f"{record['patient_id']!r} is in row {line} too, with the same image (expected one row a scan)"
            wrong.append(f"column patient_id: {what}")
            break
    if others:
        wrong += _part_faults(record, *others[0], "patient", "all scans of a patient in one")
    return wrong


def _part_faults(record: dict, line: int, other: dict, same: str, expected: str) -> list[str]:
    """What is wrong if a row and the one of `line`, which have the same patient or image, are in other splits or folds."""
    return [
        f"column {column}: {record.get(column)}, but {other.get(column)} for the same {same} in row {line} (expected {expected})"
        for column in ("split", "fold")
        if record.get(column) != other.get(column)
    ]


def _name_scans(scans_of: dict[str, list[tuple[int, dict]]]) -> list[str]:
    """Give the scans of a patient who has several names of their own, by which files can be called; faults in them."""
    faults = []
    for patient, scans in scans_of.items():
        for number, (line, record) in enumerate(scans, 1):
            if len(scans) > 1:
                record["patient"] = patient
            if number > 1:
                record["patient_id"] = f"{patient}_{number}"
            if number > 1 and record["patient_id"] in scans_of:
                taken = f"scan {number} of {patient!r} is to be named {record['patient_id']!r}, which is another patient"
                faults.append(f"row {line}, column patient_id: {taken} (expected names that differ)")
    return faults


def _patient_id(text: str) -> str:
    too_long = len(text.encode()) > _ID_BYTES
    if not text or too_long or ".." in text or text == "." or any(c in "/\\" or not c.isprintable() for c in text):
        raise ValueError
    return text


def _months(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError
    return value


def _zero_or_one(text: str) -> int:
    value = float(text)
    if value not in (0, 1):
        raise ValueError
    return int(value)


def _split(text: str) -> str:
    if text not in SPLITS:
        raise ValueError
    return text


def _integer(text: str) -> int:
    value = float(text)
    if not value.is_integer():
        raise ValueError
    return int(value)


def _number(text: str) -> float | None:
    value = float(text)
    if math.isinf(value):
        raise ValueError
    return None if math.isnan(value) else value


def _category(text: str) -> str | None:
    """Numbers in one spelling: a program that knows no missing integers writes 1 as 1.0."""
    try:
        value = float(text)
    except ValueError:
        return text
    return None if math.isnan(value) else f"{value:.15g}"


def _file_fault(path: str, folder: bool) -> str | None:
    """What is wrong with a path, before reading it; `folder`: it may be a DICOM folder."""
    expected = f"one of {' '.join(IMAGE_SUFFIXES)}{' or a DICOM folder' if folder else ''}"
    if os.path.isdir(path):
        return None if folder else f"{path} is a folder (expected {expected})"
    if not os.path.exists(path):
        what = "is a symbolic link that leads nowhere" if os.path.islink(path) else "does not exist"
        return f"{path} {what} (expected {expected})"
    if not path.lower().endswith(IMAGE_SUFFIXES):
        return f"{path} has the suffix '{Path(path).suffix}' (expected {expected})"
    return None
