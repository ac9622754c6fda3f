# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Where is a patient hotter than the others: each heat map less the mean heat of the cohort at the same place.

A place is where a voxel lies in the box around both lungs, in sixteenths of its sides. **Nothing is registered**: lungs of
another form have other tissue at a place, so that only differences of some centimetres mean anything.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from tqdm import tqdm

from bundle.errors import InputError
from bundle.files import write_atomically

CELLS = 16  # an axis of the box
HEAT = "_heat.nii.gz"


class Placed(NamedTuple):
    """A heat map, its voxels by place.

    Attributes:
        heat: share of the risk of death by the horizon per mL, (M,), of the voxels in the lung.
        cell: of each, 0 to CELLS³ - 1.
        lung: (D, H, W).
        affine: of the map.
    """

    heat: np.ndarray
    cell: np.ndarray
    lung: np.ndarray
    affine: np.ndarray

    def mean(self) -> np.ndarray:
        """Mean heat of each cell, (CELLS³,); NaN where there is no lung."""
        count, total = (np.bincount(self.cell, weights, CELLS**3) for weights in (None, self.heat))
        return np.divide(total, count, where=count > 0, out=np.full(CELLS**3, np.nan))


def placed(file: Path) -> Placed:
    """A heat map as inference writes it, with the lung mask beside it; without one all is lung.

    Raises:
        InputError: the mask is on another grid than the map, or empty.
    """
    image, mask = nib.load(file), file.with_name(file.name.replace(HEAT, "_lung.nii.gz"))
    heat, lung = np.asarray(image.dataobj, np.float32), np.ones(image.shape, bool)
    if mask.is_file():
        lung = np.asarray(nib.load(mask).dataobj) > 0
    if lung.shape != heat.shape or not lung.any():
        raise InputError(f"{mask} is empty or of another shape than {file.name} (expected a lung mask on its grid).")
    index = np.argwhere(lung)
    # Towards right, front and head, whatever the order and direction of the file's axes.
    axes = nib.orientations.io_orientation(image.affine)
    start, size = index.min(0), np.ptp(index, 0) + 1
    share = (index - start + 0.5) / size
    share = np.where(axes[:, 1] < 0, 1 - share, share)[:, np.argsort(axes[:, 0])]
    cell = np.ravel_multi_index(tuple((share * CELLS).astype(int).T), (CELLS,) * 3)
    millilitres = abs(np.linalg.det(image.affine[:3, :3])) / 1000
    return Placed(heat[lung] / millilitres, cell, lung, image.affine)


def files_of(folder: Path) -> dict[str, Path]:
    """The heat maps of an output folder of inference, by patient.

    Raises:
        InputError: there are none.
    """
    found = {path.name.removesuffix(HEAT): path for path in sorted((folder / "maps").glob(f"*{HEAT}"))}
    if not found:
        raise InputError(f"{folder} has no maps/*{HEAT} (expected an output folder of inference).")
    return found


def write_differences(folder: Path, cohort: Path, out: Path) -> None:
    """Write `<patient_id>_heat_minus_cohort.nii.gz` of each scan; its own heat is no part of the mean."""
    files, others = files_of(folder), files_of(cohort)
    means = {name: placed(file).mean() for name, file in tqdm(others.items(), desc="mean", unit="scan")}
    if len(others) == 1 and set(others) <= set(files):
        raise InputError(f"{cohort} has one scan only (expected others to compare it with).")
    out.mkdir(parents=True, exist_ok=True)
    for name, file in tqdm(files.items(), desc="differences", unit="scan"):
        scan, rest = placed(file), np.array([mean for other, mean in means.items() if other != name])
        there = np.isfinite(rest)
        usual = np.where(there, rest, 0).sum(0) / np.maximum(there.sum(0), 1)
        volume = np.zeros(scan.lung.shape, np.float32)
        # A place where nobody else has lung has nothing to be compared with.
        volume[scan.lung] = np.where(there.any(0)[scan.cell], scan.heat - usual[scan.cell], 0)
        image = nib.Nifti1Image(volume, scan.affine)
        image.header.set_xyzt_units("mm")
        image.header["descrip"] = "heat less the cohort's mean at this place, per mL"
        write_atomically(out / f"{name}_heat_minus_cohort.nii.gz", image.to_filename)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m scripts.cohort_mean", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("folder", type=Path, help="output folder of inference")
    p.add_argument("--cohort", type=Path, metavar="DIR", help="of whose maps the mean is (default: the same folder)")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder to write to (default: FOLDER/maps)")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        write_differences(args.folder, args.cohort or args.folder, args.out or args.folder / "maps")
    except InputError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
