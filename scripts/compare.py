# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Compare maps and months: the same scans by two models, or two scans of one patient.

    python -m scripts.compare runs/one_model runs/other_model --out runs/compare
    python -m scripts.compare runs/out/maps/P1_heat.nii.gz runs/out/maps/P1_2_heat.nii.gz --out runs/compare

A and B are output folders of inference, of which scans of one name are compared (or the only one of each), or heat maps of
one scan each. Leaves compare.html, compare.csv with a row a pair, and pictures/. Nothing is registered: maps on another
grid are brought to A's by their affines. Exit code 1 if a pair could not be compared.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from monai.data import MetaTensor
from monai.transforms import Orientation
from tqdm import tqdm

from bundle.errors import InputError, scan_fault
from bundle.files import write_atomically
from bundle.grids import mask_on_grid
from bundle.maps.scan_space import interpolated
from bundle.metrics.agreement import dice, rank_correlation
from bundle.report.compare import difference_figure, write_compare_page
from bundle.report.pictures import write_png
from bundle.report.regions import HOT, fault_of
from bundle.report.viewer import block_means, blocks_of
from bundle.transforms import LoadCTd

SUFFIX = "_heat.nii.gz"
MONTHS = ("median", "lower", "upper")
NUMBERS = ["rank_correlation", "region_dice", "lung_dice", "difference_months", "risk_a", "risk_b"]
COLUMNS = ["patient_id", "patient_id_b", "status", "message", *NUMBERS]
COLUMNS += [f"{name}_{side}" for side in "ab" for name in MONTHS]


class Mapped(NamedTuple):
    """A scan with its map."""

    name: str
    heat: Path
    months: dict[str, float]  # median, lower and upper; empty where no predictions.csv tells

    @classmethod
    def of(cls, heat: Path, table: pd.DataFrame) -> "Mapped":
        name = heat.name.removesuffix(SUFFIX)
        row = table.loc[name] if name in table.index else {}
        return cls(name, heat, {m: float(row[f"{m}_months"]) for m in MONTHS if f"{m}_months" in row})

    def read(self) -> dict:
        """The map in RAS, `heat`, (1, D, H, W), and its `lung_mask` if there is one."""
        lung = self.heat.with_name(f"{self.name}_lung.nii.gz")
        record = {"patient_id": self.name, "heat": str(self.heat)} | ({"lung_mask": str(lung)} if lung.is_file() else {})
        found = LoadCTd(keys=("heat",), mask_keys=("lung_mask",), hounsfield=False)(record)
        return {key: Orientation("RAS", labels=None)(found[key]) for key in ("heat", "lung_mask") if key in found}


def mapped_scans(path: Path) -> list[Mapped]:
    """The maps of an output folder of inference, or the one of a file.

    Raises:
        InputError: there is none.
    """
    if path.is_file() and path.name.endswith(SUFFIX):
        maps, folder = [path], path.parent.parent
    else:
        maps, folder = sorted((path / "maps").glob(f"*{SUFFIX}")), path
    if not maps:
        raise InputError(f"{path}: no heat maps (expected an output folder of inference, or a file NAME{SUFFIX})")
    table = pd.DataFrame()
    if (predictions := folder / "predictions.csv").is_file():
        table = pd.read_csv(predictions, dtype={"patient_id": str}, keep_default_na=False, na_values=[""])
        table = table.set_index("patient_id")
    return [Mapped.of(heat, table) for heat in maps]


def pairs_of(a: list[Mapped], b: list[Mapped]) -> tuple[list[tuple[Mapped, Mapped]], list[str]]:
    """Which maps to compare, and what to say of it: those of one name, or the only two.

    Raises:
        InputError: there are several, and none of one name.
    """
    named = {each.name: each for each in b}
    both = [(each, named[each.name]) for each in a if each.name in named]
    if not both and len(a) == len(b) == 1:
        return [(a[0], b[0])], []
    if not both:
        raise InputError(
            f"none of {len(a)} scans of A is among {len(b)} of B by name (expected scans of one name, or one each)"
        )
    alone = [(side, len(of) - len(both)) for side, of in (("A", a), ("B", b)) if len(of) > len(both)]
    return both, [f"{n} {'scan is' if n == 1 else 'scans are'} in {side} alone, and not compared." for side, n in alone]


def compare(a: Mapped, b: Mapped, picture: Path) -> dict[str, Any]:
    """The row of `compare.csv` of a pair; draws its picture.

    Raises:
        InputError: a map can't be read, or the lungs lie apart.
    """
    first, other, notes = a.read(), b.read(), []
    affine, shape = first["heat"].affine.numpy(), first["heat"].shape[1:]
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if other["heat"].shape[1:] != shape or not np.allclose(other["heat"].affine, affine, rtol=1e-3, atol=1e-3):
        notes.append("grids differ: B was brought to A's by the affines, without registration")
    if not ("lung_mask" in first and "lung_mask" in other):
        notes.append("no lung mask of both: where there is heat counts as lung")
    blocks = blocks_of(shape, spacing)
    (heat_a, lung_a), (heat_b, lung_b) = (_on_blocks(found, affine, shape, blocks) for found in (first, other))
    common = lung_a & lung_b
    if not common.any():
        where = [np.round(_centre(found)).astype(int).tolist() for found in (first, other)]
        raise InputError(
            f"patient {a.name}: the lungs of A and B nowhere overlap, their centres lie at {where[0]} and {where[1]} mm "
            "(expected two maps of one patient in one frame of reference)"
        )
    correlation = rank_correlation(heat_a, heat_b, common)
    if correlation is None:
        notes.append("a map is constant in the lung: no rank correlation")
    maps = (("A", heat_a, lung_a), ("B", heat_b, lung_b))
    faults = [f"{side}: {fault}" for side, *found in maps if (fault := fault_of(*found))]
    notes += [f"no regions to compare, {fault}" for fault in faults]
    regions = None if faults else dice(heat_a >= HOT * heat_a.max(), heat_b >= HOT * heat_b.max())
    write_png(picture, difference_figure(heat_a, heat_b, lung_a | lung_b, spacing * blocks), dpi=70)
    months = {f"{name}_{side}": of.months.get(name) for side, of in (("a", a), ("b", b)) for name in MONTHS}
    known = None not in (months["median_a"], months["median_b"])
    return {
        "patient_id": a.name, "patient_id_b": b.name, "status": "ok", "message": "; ".join(notes),
        "rank_correlation": correlation, "region_dice": regions, "lung_dice": dice(lung_a, lung_b),
        "difference_months": months["median_b"] - months["median_a"] if known else None,
        "risk_a": float(first["heat"].sum()), "risk_b": float(other["heat"].sum()), **months,
    }  # fmt: skip


def _on_blocks(found: dict, affine: np.ndarray, shape: tuple, blocks: tuple) -> tuple[np.ndarray, np.ndarray]:
    """Heat per mL and lung of a map on blocks of voxels of a grid."""
    heat: MetaTensor = found["heat"]
    density = heat / (abs(np.linalg.det(heat.affine[:3, :3])) / 1000)
    density = block_means(np.asarray(interpolated(density, affine, shape)[0]), blocks)
    if "lung_mask" not in found:
        return density, density > 0
    return density, block_means(mask_on_grid(found["lung_mask"], affine, shape), blocks) >= 0.5


def _centre(found: dict) -> np.ndarray:
    """Of the lung, mm (RAS)."""
    lung = found.get("lung_mask", found["heat"])
    at = np.argwhere(np.asarray(lung[0]) > 0)
    middle = at.mean(0) if len(at) else np.array(lung.shape[1:]) / 2
    return lung.affine.numpy()[:3, :3] @ middle + lung.affine.numpy()[:3, 3]


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        prog="python -m scripts.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("a", type=Path, metavar="A", help="output folder of inference, or a heat map")
    p.add_argument("b", type=Path, metavar="B", help="the same of the other model, or of the other scan")
    p.add_argument("--out", type=Path, default=Path("runs/compare"), metavar="DIR", help="default runs/compare")
    args = p.parse_args(argv)
    try:
        pairs, said = pairs_of(mapped_scans(args.a), mapped_scans(args.b))
        rows = []
        for a, b in tqdm(pairs, desc="comparing", unit="pair"):
            try:
                rows.append(compare(a, b, args.out / "pictures" / f"{a.name}.png"))
            except Exception as error:  # one pair's failure must not end the run
                unknown = dict.fromkeys(COLUMNS) | {"patient_id": a.name, "patient_id_b": b.name}
                rows.append(unknown | {"status": "failed", "message": scan_fault(a.name, error)})
        table = pd.DataFrame(rows, columns=COLUMNS)
        write_atomically(args.out / "compare.csv", lambda path: table.to_csv(path, index=False, float_format="%.5g"))
        other = "" if all(a.name == b.name for a, b in pairs) else f"; B is the scan {pairs[0][1].name}"
        write_compare_page(args.out, rows, [f"A: {args.a}. B: {args.b}{other}.", *said])
        print(f"{args.out / 'compare.html'} ({len(pairs)} pairs)", *said, sep="\n")
        failed = [row["message"] for row in rows if row["status"] == "failed"]
        if failed:
            raise InputError(f"{len(failed)} of {len(rows)} pairs failed, the others are done; the first: {failed[0]}")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
