# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""CSV tables whose faults are told by row and column, all at once: by `csv`, as pandas drops the number of a row's line."""

import csv
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bundle.errors import InputError

MASK_COLUMNS = ("lung_mask", "gt_mask", "confounder_mask")  # of a cohort: files beside the image
MISSING = ("", "na", "n/a", "nan", "none", "null", "not collected", "unknown")  # words for a value that is not there

_ID_BYTES = 200  # names of files may have 255, and more is added to an id
VALID_ID = f"a name of up to {_ID_BYTES} bytes without / \\ .. or control characters, as files are named after it"


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

    def fault(self, column: str, what: str) -> None:
        """Note what is wrong in a column."""
        self.faults.append(f"row {self.line}, column {column}: {what}")

    def parse(self, column: str, convert: Callable[[str], object], expected: str) -> object:
        """What `convert` makes of a cell. Where it raises ValueError, None, and a fault is noted."""
        text = self.cells[column]
        try:
            return convert(text)
        except ValueError:
            self.fault(column, f"{repr(text) if text else 'empty'} (expected {expected})")
            return None


def read_table(path: str | os.PathLike) -> tuple[list[str], list[Row]]:
    """The header of a CSV in UTF-8, and each row that is not blank; one of the wrong length has a fault and no cells.

    Raises:
        InputError: the file is missing, empty or no CSV in UTF-8.
    """
    path = str(path)  # a number on a command line names a file, too
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, [value.strip() for value in values]) for values in reader]
    except OSError as error:
        raise InputError(f"table {path}: {error.strerror or error} (expected a CSV file)") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"table {path}: not a CSV in UTF-8 ({error})") from error
    lines = [(line, values) for line, values in lines if any(values)]
    if not lines:
        raise InputError(f"table {path}: the file is empty (expected a header, such as patient_id,image,time,event)")
    header = lines[0][1]
    rows = []
    for line, values in lines[1:]:
        fault = f"row {line}: {len(values)} values (expected {len(header)}, as in the header)"
        fits = len(values) == len(header)
        rows.append(Row(line, dict(zip(header, values)) if fits else {}, [] if fits else [fault]))
    return header, rows


def raise_faults(path: str | os.PathLike, faults: Sequence[str]) -> None:
    """Raise an :class:`InputError` that lists the faults of a table, if there are any."""
    if faults:
        count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise InputError(f"{path} has {count}:\n" + "\n".join(f"  {fault}" for fault in faults))


def finite(text: str) -> float:
    """A number that is neither NaN nor infinite."""
    if not math.isfinite(value := float(text)):
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
    return text
