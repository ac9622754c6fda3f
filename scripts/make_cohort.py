# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Turn a tree of scans and a clinical table into a checked cohort CSV."""

from __future__ import annotations

import argparse
import csv
import io
import logging
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from bundle.data.cohort import read_cohort
from bundle.errors import InputError
from bundle.files import write_atomically
from bundle.reading.layouts import LAYOUTS, UNITS, Layout, read_clinical, scan_row

_log = logging.getLogger(__name__)

WHAT = """\
layout
 lung1  NSCLC-Radiomics: DIR/LUNG1-001/<study>/<series>/*.dcm with CT and RTSTRUCT or SEG; its table of survival in
        days. The region GTV-1 becomes gt_mask, a NIfTI on the CT's grid.
 osic   OSIC pulmonary fibrosis: DIR/<Patient>/*.dcm; its table of visits, of which the one nearest to the CT is
        taken. It has no survival: without columns time (months) and event the cohort is for inference.
 flat   DIR/<patient_id>.nii.gz (or .nii .nrrd .mha .mhd) with masks <patient_id>_lung, _gt, _confounder, in DIR or
        folders within; or DIR/<patient_id>/ with DICOM. Table with patient_id, and time (months) and event if known.

All other columns go into the cohort under tidy names. What was done is kept: a second run makes only what is missing.
"""


def make_cohort(layout: Layout, images: Path, table: Path, out: Path, region: str | None, on_fault: str) -> None:
    """Write the cohort CSV, which is there only when every row is right, and `masks/` beside it.

    Args:
        layout: how table and tree name things.
        images: folder of the scans.
        table: clinical CSV.
        out: cohort CSV to write.
        region: that becomes `gt_mask`.
        on_fault: "fail" stops at scans at fault, once all have been looked at; "skip" leaves them out.

    Raises:
        InputError: listing every fault with the table's row.
    """
    if not images.is_dir():
        raise InputError(f"--images {images}: no such folder (expected the folder of the scans)")
    rows, faults = read_clinical(table, layout)
    scan_faults: list[str] = []
    cohort: list[dict[str, str]] = []
    masks = out.parent / "masks"
    with logging_redirect_tqdm():
        for line, row in tqdm(rows.items(), desc="scans", unit="scan", disable=not rows):
            try:
                files = scan_row(row["patient_id"], images.absolute(), masks.absolute(), region)
            except InputError as error:
                scan_faults.append(f"row {line}: {error}")
                continue
            cohort.append({"patient_id": row["patient_id"], **files, **row})
    if on_fault == "skip":
        for fault in scan_faults:
            _log.warning("left out: %s", fault)
    else:
        faults += scan_faults
    if faults:
        count = "a fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise InputError(f"{table} has {count}:\n" + "\n".join(f"  {fault}" for fault in faults))
    if not cohort:
        raise InputError(f"{table}: no scans remain once scans at fault are left out")
    known = {row["patient_id"] for row in rows.values()}
    strangers = sorted(p.name for p in images.iterdir() if p.is_dir() and p.name not in known) if layout.outcome else []
    if strangers:
        more = ", ..." if len(strangers) > 5 else ""
        _log.warning("%d folders have no row in the table: %s%s", len(strangers), ", ".join(strangers[:5]), more)

    columns = list(dict.fromkeys(column for row in cohort for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(cohort)

    def write(temporary: Path) -> None:
        temporary.write_text(text.getvalue(), encoding="utf-8")
        read_cohort(temporary, need_outcome="time" in columns)

    write_atomically(out, write)
    masked = sum("gt_mask" in row for row in cohort)
    print(f"{out}: {len(cohort)} scans, {masked} with gt_mask, {len(scan_faults)} left out")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m scripts.make_cohort",
        description="Turn a tree of scans and a clinical table into a checked cohort CSV.",
        epilog=WHAT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--layout", required=True, choices=LAYOUTS, help="see below")
    p.add_argument("--images", required=True, type=Path, metavar="DIR", help="folder of the scans")
    p.add_argument("--clinical", required=True, type=Path, metavar="CSV", help="clinical table")
    p.add_argument("--out", required=True, type=Path, metavar="CSV", help="cohort to write; masks/ goes beside it")
    p.add_argument(
        "--region", default="GTV-1", help="what RTSTRUCT or SEG call the cause of death (lung1; default GTV-1)"
    )
    p.add_argument("--on_fault", default="fail", choices=("fail", "skip"), help="skip leaves out scans at fault")
    for name in ("patient", "time", "event"):
        p.add_argument(f"--{name}_column", metavar="NAME", help="where the table has another name than the layout's")
    p.add_argument("--time_unit", choices=UNITS, help="where it has another unit than the layout's")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    given = {
        "patient": args.patient_column,
        "time": args.time_column,
        "event": args.event_column,
        "unit": args.time_unit,
    }
    layout = replace(LAYOUTS[args.layout], **{key: value for key, value in given.items() if value})
    region = args.region if args.layout == "lung1" else None
    try:
        make_cohort(layout, args.images, args.clinical, args.out, region, args.on_fault)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
