# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Write a cohort of phantoms: DIR/cohort.csv, images, ground-truth masks. A seed fixes every voxel."""

import argparse
import json
import sys
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from torch.utils.data import DataLoader
from tqdm import tqdm

from bundle.errors import InputError
from bundle.files import remove_leftovers, write_atomically, write_json, write_text
from bundle.phantoms import PHANTOMS, Phantom, PhantomCohort, PhantomParams, make_phantom

MASKS = ("lung_mask", "gt_mask", "confounder_mask", "gt_filled_mask", "gt_severe_mask")


def what_there_is() -> str:
    """The end of --help: every phantom, and how to ask for it."""
    lines = ["phantoms by number or name, and what those who die have (survivors are censored at 99 months):"]
    drawn = ["what everybody has; its volume sets a risk, by which times are drawn, and about 30 % are censored before:"]
    for name, kind in PHANTOMS.items():
        (drawn if kind.drawn_outcome else lines).append(f"  {kind.number:2} {name:26}{kind.text}")
    examples = [
        "examples:",
        "  python -m scripts.make_phantoms --phantom spheres-honeycomb-corner --num 64 --seed 0 --out phantoms",
        "  python -m scripts.make_phantoms --phantom chest --num 100 --size 96 --jobs 2 --out chests",
    ]
    return "\n".join([*lines, "", *drawn, "", *examples])


def write_scan(out: Path, cohort: PhantomCohort, affine: np.ndarray, clinical: bool, index: int) -> dict[str, str]:
    """Draw and write one scan of the cohort and its masks; returns its row."""
    nib.openers.Opener.default_compresslevel = 1  # several times faster, hardly larger
    patient_id, phantom = cohort[index]
    row = {"patient_id": patient_id, "image": f"images/{patient_id}.nii.gz"}
    row |= {"time": f"{phantom.time:.4g}", "event": phantom.event, "simulated": 1}
    if phantom.true_risk is not None:
        row["true_risk"] = f"{phantom.true_risk:.4g}"
    volumes = {"image": phantom.image}
    for name in MASKS:
        if (mask := getattr(phantom, name)) is not None:
            row[name] = f"masks/{patient_id}_{name.removesuffix('_mask')}.nii.gz"
            volumes[name] = mask.astype(np.uint8)
    for name, volume in volumes.items():
        write_atomically(out / row[name], nib.Nifti1Image(volume, affine).to_filename)
    return row | (cohort.covariates(index, phantom) if clinical else {})


def write_cohort(out: Path, cohort: PhantomCohort, spacing: float, clinical: bool, jobs: int, overwrite: bool) -> None:
    """Write all scans, then cohort.csv, which is there only when everything else is.

    Raises:
        InputError: the folder can't be written or holds another cohort.
    """
    kind, size = PHANTOMS[cohort.phantom], cohort.params.size
    wanted = {"complexity": kind.number, "num": cohort.num, "seed": cohort.seed, "spacing": spacing}
    wanted |= {"feature_fraction": cohort.feature_fraction, **json.loads(json.dumps(asdict(cohort.params)))}
    wanted |= {"clinical": True} if clinical else {}
    record, table = out / "phantoms.json", out / "cohort.csv"
    found = json.loads(record.read_text()) if record.is_file() else None
    if found is not None and not overwrite:
        if found != wanted:
            changed = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
            raise InputError(f"{out} holds other phantoms ({', '.join(changed)} differ); give --overwrite or another --out.")
        if table.is_file():
            print(f"{table} is there already, with these very parameters.")
            return
    try:
        for folder in ("images", "masks"):
            (out / folder).mkdir(parents=True, exist_ok=True)
            remove_leftovers(out / folder)
        if found != wanted:
            table.unlink(missing_ok=True)  # otherwise it is right: another run may just have written it
        write_json(record, wanted)
        mm = kind.body.FIELD / size if kind.body.FIELD else spacing
        affine = np.diag([mm, mm, mm, 1.0])
        affine[:3, 3] = -mm * (size - 1) / 2
        scan = partial(write_scan, out, cohort, affine, clinical)
        made = DataLoader(range(len(cohort)), batch_size=None, collate_fn=scan, num_workers=jobs if jobs > 1 else 0)
        rows = pd.DataFrame(tqdm(made, desc="phantoms", unit="scan"))
        write_text(table, rows.to_csv(index=False, lineterminator="\n"))
    except OSError as e:
        raise InputError(f"can't write phantoms to {out}: {e.strerror}.") from e
    print(table)


def draw_picture(path: Path, seed: int, params: PhantomParams) -> None:
    """Two scans of each phantom, one that dies above one that doesn't, with outlines of what kills and what is harmless."""
    from matplotlib.figure import Figure

    from bundle.report.pictures import write_png

    columns = -(-len(PHANTOMS) // 2)
    figure = Figure(figsize=(2 * columns, 9.2), layout="constrained")
    axes = figure.subplots(4, columns)
    for ax in axes.flat:
        ax.set_axis_off()
    for k, (name, kind) in enumerate(PHANTOMS.items()):
        for row, dies in enumerate((True, False)):
            scan = make_phantom(name, np.random.default_rng([seed, kind.number, int(dies)]), dies, params)
            ax = axes[2 * (k // columns) + row, k % columns]
            show(ax, scan, kind.window)
            ax.set_title(f"{name}\n{'dies' if scan.event else 'censored'} at {scan.time:.0f} months", fontsize=8)
    write_png(path, figure)


def show(ax, phantom: Phantom, window: tuple[int, int]) -> None:
    """The slice with most of the lesion, or of the confounder, or the middle one, in a HU window."""
    mask = phantom.gt_mask if phantom.gt_mask.any() else phantom.confounder_mask
    k = int(mask.sum((0, 1)).argmax()) if mask is not None and mask.any() else phantom.image.shape[2] // 2
    ax.imshow(phantom.image[::-1, :, k].T, cmap="gray", vmin=window[0], vmax=window[1], origin="lower")
    for outline, colour in ((phantom.confounder_mask, "deepskyblue"), (phantom.gt_mask, "red")):
        if outline is not None and outline[:, :, k].any():
            ax.contour(outline[::-1, :, k].T, [0.5], colors=colour, linewidths=0.8)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m scripts.make_phantoms",
        usage="%(prog)s --phantom NAME --out DIR [options]",
        description=__doc__,
        epilog=what_there_is(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--phantom", "--complexity", metavar="NAME", help="which one, by name or number: see below")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder to write to")
    p.add_argument("--num", type=int, default=64, help="number of scans (default 64)")
    p.add_argument("--seed", type=int, default=0, help="fixes every voxel (default 0)")
    p.add_argument("--feature_fraction", type=float, default=0.5, help="share of those who die, in 1 to 9 (default 0.5)")
    p.add_argument("--spacing", type=float, default=3.0, help="mm (default 3; a chest spans 321 mm whatever its size)")
    p.add_argument("--clinical", action="store_true", help="add the columns of configs/clinical/fibrosis.json")
    p.add_argument("--jobs", type=int, default=1, help="processes that share the work (default 1)")
    p.add_argument("--overwrite", action="store_true", help="replace a cohort of other parameters")
    p.add_argument("--picture", type=Path, metavar="PNG", help="draw two scans of each phantom instead")
    shapes = p.add_argument_group("shapes", "of structures, in voxels of a cube of 64; noise and brightness are of 40 HU")
    for field in fields(PhantomParams):
        pair = isinstance(field.default, tuple)
        values = field.default if pair else (field.default,)
        options = {"type": type(values[0]), "default": field.default, "help": f"(default {' '.join(map(str, values))})"}
        options |= {"nargs": 2, "metavar": ("LEAST", "MOST")} if pair else {"metavar": "N"}
        shapes.add_argument(f"--{field.name}", **options)
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in fields(PhantomParams)}
    try:
        params = PhantomParams(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
        if args.picture:
            draw_picture(args.picture, args.seed, params)
            return
        if args.phantom is None or args.out is None:
            raise InputError("--phantom and --out are needed; --help tells what there is.")
        if args.spacing <= 0:
            raise InputError(f"--spacing is {args.spacing}; expected more than 0 mm.")
        cohort = PhantomCohort(args.phantom, args.num, args.seed, args.feature_fraction, params)
        write_cohort(args.out, cohort, args.spacing, args.clinical, args.jobs, args.overwrite)
    except InputError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
