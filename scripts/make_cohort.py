# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Turn a tree of scans and a clinical table into a checked cohort CSV.

    python -m scripts.make_cohort --layout lung1 --images NSCLC-Radiomics --clinical table.csv --out cohort.csv

layouts
  lung1  NSCLC-Radiomics: DIR/LUNG1-001/<study>/<series>/*.dcm with CT and RTSTRUCT or SEG; its table of survival in
         days. The region GTV-1 becomes gt_mask, a NIfTI on the CT's grid.
  osic   OSIC pulmonary fibrosis: DIR/<Patient>/*.dcm; its table of visits, of which the one nearest to the CT is
         taken. It has no survival: without columns time (months) and event the cohort is for inference.
  flat   DIR/<patient_id>.nii.gz (or .nii .nrrd .mha .mhd) with masks <patient_id>_lung, _gt, _confounder, in DIR or
         folders within; or DIR/<patient_id>/ with DICOM. Table with patient_id, and time (months) and event if known.

All other columns go into the cohort under tidy names. A second run makes only the masks that are missing.
"""

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from bundle.data import read_cohort
from bundle.errors import InputError
from bundle.files import write_atomically
from bundle.reading.layouts import LAYOUTS, UNITS, Layout, read_clinical, scan_row
from bundle.reading.tables import raise_faults

_log = logging.getLogger(__name__)


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
    masks = out.parent / "masks"
    cohort, scan_faults = [], []
    with logging_redirect_tqdm():
        for line, row in tqdm(rows.items(), desc="scans", unit="scan", disable=not rows):
            try:
                files = scan_row(row["patient_id"], images.absolute(), masks.absolute(), region)
                cohort.append({"patient_id": row["patient_id"], **files, **row})
            except InputError as error:
                scan_faults.append(f"row {line}: {error}")
    if on_fault == "skip":
        for fault in scan_faults:
            _log.warning("left out: %s", fault)
    else:
        advice = "" if faults else "\nThe same command with --on_fault skip goes on without these scans."
        raise_faults(table, faults + scan_faults, advice)
    raise_faults(table, faults)
    if not cohort:
        raise InputError(f"{table}: no scans remain once scans at fault are left out")
    known = {row["patient_id"].casefold() for row in rows.values()}
    folders = [p.name for p in images.iterdir() if p.is_dir()] if layout.outcome else []
    strangers = sorted(name for name in folders if name.casefold() not in known)
    if strangers:
        more = ", ..." if len(strangers) > 5 else ""
        _log.warning("%d folders have no row in the table: %s%s", len(strangers), ", ".join(strangers[:5]), more)
    written = pd.DataFrame(cohort)

    def write(temporary: Path) -> None:
        written.to_csv(temporary, index=False)
        read_cohort(temporary, need_outcome="time" in written)

    write_atomically(out, write)
    masked = sum("gt_mask" in row for row in cohort)
    print(f"{out}: {len(cohort)} scans, {masked} with gt_mask, {len(scan_faults)} left out")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m scripts.make_cohort", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--layout", required=True, choices=LAYOUTS, help="see above")
    p.add_argument("--images", required=True, type=Path, metavar="DIR", help="folder of the scans")
    p.add_argument("--clinical", required=True, type=Path, metavar="CSV", help="clinical table")
    p.add_argument("--out", required=True, type=Path, metavar="CSV", help="cohort to write; masks/ goes beside it")
    p.add_argument("--region", default="GTV-1", help="what RTSTRUCT or SEG call the cause of death (lung1; default GTV-1)")
    p.add_argument("--on_fault", default="fail", choices=("fail", "skip"), help="skip leaves out scans at fault")
    for name in ("patient", "time", "event"):
        p.add_argument(f"--{name}_column", dest=name, metavar="NAME", help="if the table has another name than the layout's")
    p.add_argument("--time_unit", dest="unit", choices=UNITS, help="if it has another unit than the layout's")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    given = {name: value for name in ("patient", "time", "event", "unit") if (value := getattr(args, name))}
    layout = replace(LAYOUTS[args.layout], **given)
    region = args.region if args.layout == "lung1" else None
    try:
        make_cohort(layout, args.images, args.clinical, args.out, region, args.on_fault)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
