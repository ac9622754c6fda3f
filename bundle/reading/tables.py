# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""CSV tables whose faults are told by row and column, all at once: by `csv`, as pandas drops the number of a row's line."""

import csv
import io
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from bundle.errors import InputError

_log = logging.getLogger(__name__)

MASK_COLUMNS = ("lung_mask", "gt_mask", "confounder_mask")  # of a cohort: files beside the image
MOST_MONTHS = 360  # of follow-up; more are days, perhaps
# Words for a value that is not there, in lower case; "none" is none of them: no treatment, perhaps.
MISSING = ("na", "n/a", "#n/a", "<na>", "nan", "-nan", "null", "unknown", "missing", "-", "--", "\u2013", "\u2014", ".", "?")
MISSING += ("not available", "[not available]", "not collected", "not recorded", "not reported")
_EVENT = {"dead": 1, "deceased": 1, "died": 1, "alive": 0, "living": 0, "censored": 0, "true": 1, "false": 0}
_EVENT |= {"1:deceased": 1, "0:living": 0}  # as cBioPortal has them
# First bytes of files that are often taken for a CSV.
_FORMATS = {b"PK\3\4": "an Excel workbook or another zip", b"\xd0\xcf\x11\xe0": "an Excel workbook", b"\x1f\x8b": "gzip"}
_FORMATS |= {b"PAR1": "Parquet", b"%PDF": "a PDF", b"<": "a web page or XML"}
_FORMATS |= {b"version https://git-lfs": "a pointer of Git LFS, which fetches the file by: git lfs pull"}
_INVISIBLE = "\ufeff\u200b\u200e\u200f\u2060"  # that str.strip() leaves
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_SAVE = 'a CSV in UTF-8; in a spreadsheet, "Save as", "CSV UTF-8"'

_ID_BYTES = 200  # names of files may have 255, and more is added to an id
VALID_ID = f"a name of up to {_ID_BYTES} bytes without / \\ .. or control characters, as files are named after it"
VALID_ID += ", and no 1.2E+11 or #REF! of a spreadsheet"
SPREADSHEET = re.compile(r"#(REF|VALUE|DIV/0|NUM|NULL|NAME)[!?]")  # what a spreadsheet writes for a formula that fails
_LONG_NUMBER = re.compile(r"\d(\.\d+)?E\+\d+")  # and for a long number, so that many become the same


@dataclass
class Row:
    """One row of a table, and the faults found in it.

    Example::

        >>> row = Row(3, {"time": "soon"})
        >>> row.parse("time", positive, "months as a number > 0")
        >>> row.faults
        ["row 3, column time: 'soon' (expected months as a number > 0)"]
    """

    line: int  # of the file, where the header is line 1
    cells: dict[str, str]
    faults: list[str] = field(default_factory=list)
    words: dict[str, str] = field(default_factory=dict)  # of MISSING, where the file has one; the cell is empty

    def fault(self, column: str, what: str) -> None:
        """Note what is wrong in a column."""
        self.faults.append(f"row {self.line}, column {column}: {what}")

    def parse(self, column: str, convert: Callable[[str], object], expected: str) -> object:
        """What `convert` makes of a cell. Where it raises ValueError, None, and a fault is noted."""
        text = self.cells[column]
        try:
            return convert(text)
        except ValueError:
            found = text or self.words.get(column)
            self.fault(column, f"{repr(found) if found else 'empty'} (expected {expected})")
            return None


def read_table(path: str | os.PathLike) -> tuple[list[str], list[Row]]:
    """The header of a CSV, and each row that is not blank; one of the wrong length has a fault and no cells.

    A word of :data:`MISSING` is an empty cell; see :func:`log_missing`. Columns at the end without a name and without
    a value, as spreadsheets leave them, are dropped.

    Raises:
        InputError: the file is missing, empty or no CSV in UTF-8 (or UTF-16 with its mark).
    """
    path = str(path)  # a number on a command line names a file, too
    lines = [(first, last, values) for first, last, values in _lines(path) if any(values)]
    if lines and [value.lower() for value in lines[0][2]] == ["sep=", ""]:  # Excel's word for: separated by commas
        del lines[0]
    if not lines:
        raise InputError(f"table {path}: the file is empty (expected a header, such as patient_id,image,time,event)")
    width = max(i + 1 for _, _, values in lines for i, value in enumerate(values) if value)
    first, _, header = lines[0]
    if len(header) == 1:
        for separator, name in _SEPARATORS.items():
            if separator in header[0]:
                raise InputError(f"table {path}: its columns are separated by {name} (expected commas)")
        if width > 1:
            raise InputError(f"table {path}: row {first} is {header[0]!r} alone (expected the header of {width} columns)")
    header = header[:width]
    return header, [_row(header, *line) for line in lines[1:]]


def log_missing(path: str | os.PathLike, rows: Sequence[Row]) -> None:
    """Log which words of a table, and how many, are taken for a value that is not there."""
    words = Counter(word for row in rows for word in row.words.values())
    if words:
        _log.info(f"{path}: cells taken as missing: {', '.join(f'{count} {word!r}' for word, count in words.items())}.")


def _row(header: Sequence[str], first: int, last: int, values: list[str]) -> Row:
    if any(values[len(header) :]) or len(values) < len(header):
        where = f"row {first}" if first == last else f'rows {first} to {last}, which a quote (") joins'
        return Row(first, {}, [f"{where}: {len(values)} values (expected {len(header)}, as in the header)"])
    cells = dict(zip(header, values))
    words = {column: text for column, text in cells.items() if text.lower() in MISSING}
    return Row(first, cells | dict.fromkeys(words, ""), words=words)


def _lines(path: str) -> Iterator[tuple[int, int, list[str]]]:
    """First and last line in the file, and the values, of each row of a CSV."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise InputError(f"table {path}: {error.strerror or error} (expected a CSV file)") from error
    for start, name in _FORMATS.items():
        if data.lstrip().startswith(start):
            raise InputError(f"table {path}: it is {name} (expected {_SAVE})")
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"table {path}: row {line} is not in UTF-8 ({error.reason}; expected {_SAVE})") from error
    if "\0" in text:
        raise InputError(f"table {path}: it holds characters of code 0 (expected {_SAVE})")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    first = 1
    try:
        for values in reader:
            yield first, reader.line_num, [value.strip().strip(_INVISIBLE).strip() for value in values]
            first = reader.line_num + 1
    except csv.Error as error:
        what = f'a quote (") that begins in row {first} is not closed, or not doubled within a value ({error})'
        raise InputError(f"table {path}: {what}") from error


def raise_faults(path: str | os.PathLike, faults: Sequence[str], advice: str = "") -> None:
    """Raise an :class:`InputError` that lists the faults of a table, and then the advice, if there are any faults."""
    if faults:
        count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise InputError(f"{path} has {count}:\n" + "\n".join(f"  {fault}" for fault in faults) + advice)


def finite(text: str) -> float:
    """A number that is neither NaN nor infinite; 9_9, which is one in Python, is none."""
    if "_" in text or not math.isfinite(value := float(text)):
        raise ValueError(text)
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    if (value := finite(text)) <= 0:
        raise ValueError(text)
    return value


def valid_id(text: str) -> str:
    """A patient's name after which files can be named, as :data:`VALID_ID` says."""
    too_long = len(text.encode()) > _ID_BYTES
    if not text or too_long or ".." in text or text == "." or any(c in "/\\" or not c.isprintable() for c in text):
        raise ValueError(text)
    if SPREADSHEET.fullmatch(text) or _LONG_NUMBER.fullmatch(text):
        raise ValueError(text)
    return text


def died(text: str) -> int:
    """An event, 1 or 0, as a number or a word: dead, alive, true, false, ..."""
    return (0, 1).index(finite(text) if (known := _EVENT.get(text.lower())) is None else known)
