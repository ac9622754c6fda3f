# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Write a cohort of phantoms: images, ground-truth masks and cohort.csv."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from bundle.errors import InputError
from bundle.files import write_atomically, write_json, write_text
from bundle.phantoms.chest import Chest
from bundle.phantoms.cohort import COMPLEXITIES, PhantomCohort, fibrosis_covariates, make_phantom
from bundle.phantoms.cubes import Phantom, PhantomParams

WHAT = """\
complexity  what those who die have (survivors are censored at 99 months)
 1  a bright sphere in the centre; the larger, the shorter the life
 2  1-3 bright spheres anywhere; time falls with their volume
 3  a honeycomb of hollow bubbles along the faces; time falls with the volume of the walls
 4  a corner sphere of the background's average brightness, without its noise
 5  spheres; a honeycomb is in everybody
 6  as 5, and a bright sphere in one corner of everybody
 7  1-5 spheres: more or larger ones, shorter life
 8  spheres of another texture, with the background's mean and variance
 9  a chest: fibrosis-like patches near the pleura; ground glass and nodules are harmless

10-13: everybody has 0-4 bright spheres, whose volume sets a hazard; times are drawn, about 30 % are censored at random
10  and a random half has a harmless honeycomb
11  two kinds of sphere, alike but for texture; one is three times as dangerous (gt_severe_mask)
12  faint spheres, brighter than the background by --contrast times its noise
13  and a random half has a honeycomb that protects (confounder_mask)
"""


def write_volume(path: Path, volume: np.ndarray, affine: np.ndarray) -> None:
    """Write a NIfTI, whole or not at all."""
    write_atomically(path, nib.Nifti1Image(volume, affine).to_filename)


def write_scan(out: Path, cohort: PhantomCohort, affine: np.ndarray, clinical: bool, index: int) -> dict[str, str]:
    """Draw and write one scan of the cohort and its masks; returns its row."""
    nib.openers.Opener.default_compresslevel = 1  # several times faster, hardly larger
    patient_id, phantom = cohort[index]
    row = {"patient_id": patient_id, "image": f"images/{patient_id}.nii.gz"}
    row |= {"time": f"{phantom.time:.4g}", "event": phantom.event}
    if phantom.true_risk is not None:
        row["true_risk"] = f"{phantom.true_risk:.4g}"
    write_volume(out / row["image"], phantom.image, affine)
    for name in ("lung_mask", "gt_mask", "confounder_mask", "gt_filled_mask", "gt_severe_mask"):
        mask = getattr(phantom, name)
        if mask is not None:
            row[name] = f"masks/{patient_id}_{name.removesuffix('_mask')}.nii.gz"
            write_volume(out / row[name], mask.astype(np.uint8), affine)
    if clinical:
        row |= fibrosis_covariates(phantom, cohort.seed, cohort.complexity, index)
    return row


def write_cohort(out: Path, args: argparse.Namespace, params: PhantomParams) -> None:
    """Write all scans, then cohort.csv, which is there only when everything else is.

    Raises:
        InputError: the folder can't be written or holds another cohort.
    """
    cohort = PhantomCohort(args.complexity, args.num, args.seed, args.feature_fraction, params)
    wanted = dict(complexity=args.complexity, num=args.num, seed=args.seed, spacing=args.spacing)
    wanted |= dict(feature_fraction=args.feature_fraction, **json.loads(json.dumps(asdict(params))))
    if args.clinical:
        wanted["clinical"] = True
    record = out / "phantoms.json"
    if record.is_file() and not args.overwrite:
        found = json.loads(record.read_text())
        if found != wanted:
            changed = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
            raise InputError(f"{out} holds other phantoms ({', '.join(changed)} differ); give --overwrite or another --out.")
        if (out / "cohort.csv").is_file():
            print(f"{out / 'cohort.csv'} is there already, with these very parameters.")
            return
    try:
        for folder in ("images", "masks"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        if not (record.is_file() and json.loads(record.read_text()) == wanted):
            (out / "cohort.csv").unlink(missing_ok=True)  # else it is right, if a run that outlived its parent has written it
        write_json(record, wanted)
        mm = Chest.FIELD / params.size if args.complexity == 9 else args.spacing
        affine = np.diag([mm, mm, mm, 1.0])
        affine[:3, 3] = -mm * (params.size - 1) / 2
        scan = partial(write_scan, out, cohort, affine, args.clinical)
        made = DataLoader(range(len(cohort)), batch_size=None, collate_fn=scan, num_workers=args.jobs if args.jobs > 1 else 0)
        rows = list(tqdm(made, desc="phantoms", unit="scan"))
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(out / "cohort.csv", text.getvalue())
    except OSError as e:
        raise InputError(f"can't write phantoms to {out}: {e.strerror}.") from e
    print(out / "cohort.csv")


def draw_picture(path: Path, seed: int, params: PhantomParams) -> None:
    """Two scans of each complexity, with causal (red) and confounder (blue) outlines; in 1 to 9 one dies."""
    from matplotlib.figure import Figure

    from bundle.report.pictures import write_png

    columns = -(-len(COMPLEXITIES) // 2)
    figure = Figure(figsize=(2 * columns, 9.2), layout="constrained")
    axes = figure.subplots(4, columns)
    for ax in axes.flat:
        ax.set_axis_off()
    for k, complexity in enumerate(COMPLEXITIES):
        column = axes[2 * (k // columns) :, k % columns]
        for ax, dies in zip(column, (True, False)):
            p = make_phantom(complexity, np.random.default_rng([seed, complexity, int(dies)]), dies, params)
            window = (-1100, 200) if complexity == 9 else (-820, -780) if complexity in (4, 8, 12) else (-900, 50)
            show(ax, p, window)
            ax.set_title(f"{complexity}: {'dies' if p.event else 'censored'} at {p.time:.0f} months", fontsize=9)
    write_png(path, figure)


def show(ax, phantom: Phantom, window: tuple[int, int]) -> None:
    """The slice with most of the lesion, or of the confounder, or the middle one, in a HU window."""
    mask = phantom.gt_mask if phantom.gt_mask.any() else phantom.confounder_mask
    k = int(mask.sum((0, 1)).argmax()) if mask is not None and mask.any() else phantom.image.shape[2] // 2
    ax.imshow(phantom.image[::-1, :, k].T, cmap="gray", vmin=window[0], vmax=window[1], origin="lower")
    for outline, colour in ((phantom.confounder_mask, "deepskyblue"), (phantom.gt_mask, "red")):
        if outline is not None and outline[:, :, k].any():
            ax.contour(outline[::-1, :, k].T, [0.5], colors=colour, linewidths=0.8)
    ax.set_axis_off()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m scripts.make_phantoms",
        description="Write a cohort of phantoms: DIR/cohort.csv, images, ground-truth masks.",
        epilog=WHAT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--complexity", type=int, help=f"1 to {COMPLEXITIES[-1]}, see below")
    p.add_argument("--num", type=int, default=64, help="number of scans (default 64)")
    p.add_argument("--seed", type=int, default=0, help="fixes every voxel (default 0)")
    p.add_argument("--out", type=Path, help="folder to write to")
    p.add_argument("--feature_fraction", type=float, default=0.5, help="share of those who die, in 1 to 9 (default 0.5)")
    p.add_argument("--spacing", type=float, default=3.0, help="mm (default 3; 9 spans 321 mm whatever its size)")
    p.add_argument("--clinical", action="store_true", help="add the columns of configs/clinical/fibrosis.json")
    p.add_argument("--jobs", type=int, default=1, help="processes that share the work (default 1)")
    p.add_argument("--overwrite", action="store_true", help="replace a cohort of other parameters")
    p.add_argument("--picture", type=Path, metavar="PNG", help="draw one scan of each complexity instead")
    for field in fields(PhantomParams):
        pair = isinstance(field.default, tuple)
        kind = type(field.default[0] if pair else field.default)
        text = f"(default {' '.join(map(str, field.default)) if pair else field.default})"
        p.add_argument(f"--{field.name}", type=kind, nargs=2 if pair else None, default=field.default, help=text)
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in fields(PhantomParams)}
    try:
        params = PhantomParams(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
        if args.picture:
            draw_picture(args.picture, args.seed, params)
            return
        if args.complexity is None or args.out is None:
            raise InputError("--complexity and --out are needed; --help tells what there is.")
        write_cohort(args.out, args, params)
    except InputError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
