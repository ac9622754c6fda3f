# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Put known disease into real chest CTs: images, masks of what kills and of what only looks like it, and cohort.csv."""

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.transforms import Compose, CropForegroundd, Orientationd, Spacingd
from torch.utils.data import DataLoader
from tqdm import tqdm

import bundle.fast_gzip  # noqa: F401  (equal volumes are equal files)
from bundle.data import read_cohort
from bundle.errors import InputError
from bundle.files import write_atomically, write_json, write_text
from bundle.phantoms.implants import DISEASES, Anatomy, ImplantParams, make_implant, options, outcomes
from bundle.transforms import LoadCTd, LungMaskd, QualityGated

MASKS = ("lung_mask", "gt_mask", "confounder_mask")
COLUMNS = ("patient_id", "image", *MASKS, "time", "event", "simulated")
COLUMNS += ("share", "base", "true_time", "split", "anatomy", "site")
MARGIN_MM = 30.0  # around the lungs, of what is kept of a scan

WHAT = """\
disease       what is drawn into the lung                                    default radius, contrast, effect
 fibrosis     reticulation and ground glass under the pleura, at most 28 mm deep
 ground_glass a haze through which vessels stay visible
 nodules      solid balls
 emphysema    holes that run together, more often at the top
 texture      mottling that leaves the mean density as it is
"""
for _name, _kind in DISEASES.items():
    _numbers = f"{_kind.radius[0]}-{_kind.radius[1]} mm, {_kind.contrast[0]} to {_kind.contrast[1]} HU, {_kind.effect:g}"
    WHAT = "\n".join(f"{line:<78} {_numbers}" if line.startswith(f" {_name} ") else line for line in WHAT.split("\n"))
WHAT += """
Which scans can teach what: those of a test anatomy are never trained on, and the C-index of the column share, on the
split test, is the best that any method can reach there. Backgrounds should be free of the disease that is put in.

example
  python -m scripts.make_implants --backgrounds demo/anatomies.csv --disease fibrosis --num 160 --seed 0 --out runs/implants
"""


def prepare(record: dict, spacing: float, out: Path) -> None:
    """Write an anatomy as it is implanted into: RAS, cubic voxels, cropped to the lungs; with its lung mask."""
    image, lung = anatomy_files(out, record["patient_id"])
    if image.is_file() and lung.is_file():
        return
    keys = ["image"] + ["lung_mask"] * ("lung_mask" in record)
    steps = Compose(
        [
            LoadCTd(mask_keys=keys[1:]),
            Orientationd(keys=keys, axcodes="RAS", labels=None),
            Spacingd(keys=keys, pixdim=(spacing,) * 3, mode=["bilinear", "nearest"][: len(keys)]),
            LungMaskd(method="auto"),  # the given one, else by threshold
            QualityGated(),
            CropForegroundd(
                keys=["image", "lung"], source_key="lung", margin=round(MARGIN_MM / spacing), allow_smaller=True
            ),
        ]
    )
    done = steps({key: record[key] for key in ("patient_id", *keys)})
    affine = done["image"].affine.numpy()
    write_volume(image, np.round(done["image"][0].numpy()).astype(np.int16), affine)
    write_volume(lung, done["lung"][0].numpy().astype(np.uint8), affine)


def anatomy_files(out: Path, name: str) -> tuple[Path, Path]:
    return out / "anatomies" / f"{name}.nii.gz", out / "anatomies" / f"{name}_lung.nii.gz"


@lru_cache(maxsize=4)
def read_anatomy(out: Path, name: str) -> tuple[Anatomy, np.ndarray]:
    """A prepared anatomy and its affine."""
    image, lung = (nib.load(path) for path in anatomy_files(out, name))
    spacing = float(image.header.get_zooms()[0])
    return Anatomy(np.asarray(image.dataobj), np.asarray(lung.dataobj) > 0, spacing), image.affine


def write_volume(path: Path, volume: np.ndarray, affine: np.ndarray) -> None:
    """Write a NIfTI, whole or not at all."""
    write_atomically(path, nib.Nifti1Image(volume, affine).to_filename)


def plan(names: Sequence[str], args: argparse.Namespace) -> list[dict]:
    """Which anatomy each scan has, what it is for, and whether it is diseased.

    Test scans come from the test anatomies, all others from the rest, each anatomy as often as any other; of the latter a
    share validates. The diseased are spread evenly over the scans of either part.

    Raises:
        InputError: a test anatomy that there isn't, or none left to train on.
    """
    rng = np.random.default_rng([args.seed, 2])
    if args.test_anatomies is None:
        test = [str(name) for name in rng.permutation(names)[: round(len(names) / 3)]] if len(names) > 1 else []
    else:
        test = [] if args.test_anatomies == ["none"] else args.test_anatomies
    if unknown := sorted(set(test) - set(names)):
        raise InputError(f"test_anatomies has {', '.join(unknown)}; expected some of {', '.join(names)}, or none.")
    train = [name for name in names if name not in test]
    if not train:
        raise InputError(f"all {len(names)} anatomies are test_anatomies; expected at least one to train on.")
    tested = min(round(args.num * args.test_share), args.num - 1) if test else 0
    scans = []
    for part, anatomies, number in (("train", train, args.num - tested), ("test", test, tested)):
        order = rng.permutation(anatomies)
        sick = rng.permutation(number) < round(args.diseased * number)
        validates = rng.permutation(number) < round(args.val_share * number) if part == "train" else np.zeros(number, bool)
        for k in range(number):
            split = "val" if validates[k] else part
            scans.append({"anatomy": str(order[k % len(order)]), "split": split, "diseased": bool(sick[k])})
    return scans


def write_scan(out: Path, scans: list[dict], seed: int, params: ImplantParams, index: int) -> dict[str, str]:
    """Draw and write one scan and its masks; its row without the outcome. One that is there already is left as it is."""
    patient_id = f"{params.disease}_seed{seed}_{index:04d}"
    record = out / "scans" / f"{patient_id}.json"
    if record.is_file():
        return json.loads(record.read_text())
    scan = scans[index]
    anatomy, affine = read_anatomy(out, scan["anatomy"])
    try:
        implant = make_implant(anatomy, np.random.default_rng([seed, index]), scan["diseased"], params)
    except InputError as e:
        raise InputError(f"anatomy {scan['anatomy']}: {e}") from e
    row = {"patient_id": patient_id, "image": f"images/{patient_id}.nii.gz"}
    write_volume(out / row["image"], implant.image, affine)
    for name, mask in zip(MASKS, (implant.lung, implant.gt, implant.confounder)):
        row[name] = f"masks/{patient_id}_{name.removesuffix('_mask')}.nii.gz"
        write_volume(out / row[name], mask.astype(np.uint8), affine)
    row |= {"share": f"{implant.share:.6g}", "split": scan["split"], "anatomy": scan["anatomy"], "site": scan["anatomy"]}
    write_json(record, row)  # last: what it names is there
    return row


def write_cohort(out: Path, args: argparse.Namespace, params: ImplantParams) -> None:
    """Write anatomies, then scans, then cohort.csv, which is there only when everything else is.

    Raises:
        InputError: the backgrounds are at fault; the folder can't be written or holds another cohort.
    """
    backgrounds = {record["patient_id"]: record for record in read_cohort(args.backgrounds, need_outcome=False)}
    scans = plan(list(backgrounds), args)
    wanted = {name: getattr(args, name) for name in ("num", "seed", "spacing", "test_anatomies", "test_share", "val_share")}
    wanted |= {"backgrounds": list(backgrounds), **json.loads(json.dumps(asdict(params)))}
    record = out / "implants.json"
    if record.is_file() and not args.overwrite:
        found = json.loads(record.read_text())
        if found != wanted:
            changed = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
            raise InputError(f"{out} holds other implants ({', '.join(changed)} differ); give --overwrite or another --out.")
        if (out / "cohort.csv").is_file():
            print(f"{out / 'cohort.csv'} is there already, with these very parameters.")
            return
    try:
        (out / "cohort.csv").unlink(missing_ok=True)
        if args.overwrite:
            for path in [*out.glob("scans/*.json"), *out.glob("anatomies/*.nii.gz")]:
                path.unlink()
        out.mkdir(parents=True, exist_ok=True)
        write_json(record, wanted)
        used = [backgrounds[name] for name in dict.fromkeys(scan["anatomy"] for scan in scans)]
        workers = args.jobs if args.jobs > 1 else 0
        ready = DataLoader(
            used, batch_size=None, collate_fn=partial(prepare, spacing=args.spacing, out=out), num_workers=workers
        )
        list(tqdm(ready, desc="anatomies", unit="scan"))
        scan = partial(write_scan, out, scans, args.seed, params)
        # One anatomy after the other, which is then read once.
        order = sorted(range(args.num), key=lambda index: scans[index]["anatomy"])
        made = DataLoader(order, batch_size=None, collate_fn=scan, num_workers=workers)
        rows = sorted(tqdm(made, desc="implants", unit="scan"), key=lambda row: row["patient_id"])
        for row, time, event, true in zip(rows, *outcomes([float(row["share"]) for row in rows], args.seed, params)):
            row |= {"time": f"{time:.4g}", "event": str(event), "simulated": "1"}
            row |= {"base": f"{params.base:g}", "true_time": f"{true:.4g}"}
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        draw_picture(args.picture or out / "implants.png", out, rows)
        write_text(out / "cohort.csv", text.getvalue())
    except OSError as e:
        raise InputError(f"can't write implants to {out}: {e.strerror}.") from e
    died, ill = sum(row["event"] == "1" for row in rows), sum(float(row["share"]) > 0 for row in rows)
    print(f"{len(rows)} scans of {len(used)} anatomies: {ill} diseased, {died} died.\n{out / 'cohort.csv'}")


def draw_picture(path: Path, out: Path, rows: Sequence[dict], number: int = 6) -> None:
    """A sheet of diseased scans of several anatomies: axial above, coronal below; red kills, blue is harmless."""
    from matplotlib.figure import Figure

    from bundle.report.pictures import LUNG_WINDOW, plane, write_png

    worst = sorted(rows, key=lambda row: -float(row["share"]))
    first = {row["anatomy"]: row for row in reversed(worst)}.values()
    chosen = sorted(first, key=lambda row: -float(row["share"]))[:number]
    chosen += [row for row in worst if row not in chosen][: number - len(chosen)]
    figure = Figure(figsize=(2.4 * len(chosen), 9.6), layout="constrained", facecolor="black")
    for column, row in zip(figure.subplots(4, len(chosen), squeeze=False).T, chosen):
        image, gt, confounder = (
            np.asarray(nib.load(out / row[key]).dataobj) for key in ("image", "gt_mask", "confounder_mask")
        )
        mask = gt if gt.any() else confounder
        for place, (ax, bare) in zip((2, 2, 1, 1), zip(column, (True, False, True, False))):
            k = int(mask.sum(tuple(i for i in range(3) if i != place)).argmax()) if mask.any() else image.shape[place] // 2
            ax.imshow(plane(image, place, k), cmap="gray", vmin=LUNG_WINDOW[0], vmax=LUNG_WINDOW[1])
            for outline, colour in ((confounder, "deepskyblue"), (gt, "red")):
                if not bare and np.take(outline, k, place).any():
                    ax.contour(plane(outline, place, k), [0.5], colors=colour, linewidths=0.8)
            ax.set_axis_off()
        what = f"{'died' if row['event'] == '1' else 'censored'} at {float(row['time']):.0f} months"
        column[0].set_title(f"{row['anatomy']}\n{float(row['share']):.1%} of the lung\n{what}", fontsize=8, color="white")
    write_png(path, figure)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m scripts.make_implants",
        description="Put known disease into real chest CTs: a table, images, masks of lung, cause and look-alikes.",
        epilog=WHAT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "--backgrounds", type=Path, metavar="CSV", help="real scans: patient_id, image and, if there is one, lung_mask"
    )
    p.add_argument("--num", type=int, default=160, help="number of scans in all (default 160)")
    p.add_argument("--seed", type=int, default=0, help="fixes every voxel, whatever --jobs is (default 0)")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder to write to; a run that was stopped goes on there")
    p.add_argument(
        "--test_anatomies",
        nargs="+",
        metavar="ID",
        help="patient_ids to test on only, or none (default a third, drawn by the seed)",
    )
    p.add_argument("--test_share", type=float, default=0.25, help="share of the scans that these are given (default 0.25)")
    p.add_argument("--val_share", type=float, default=0.15, help="share of the other scans to validate on (default 0.15)")
    p.add_argument("--spacing", type=float, default=3.0, help="mm, of the cubic voxels written (default 3)")
    p.add_argument("--jobs", type=int, default=1, help="processes that share the work (default 1)")
    p.add_argument("--overwrite", action="store_true", help="replace a cohort of other parameters")
    p.add_argument("--picture", type=Path, metavar="PNG", help="sheet of some scans (default DIR/implants.png)")
    ranges = {"count": int, "radius": float, "contrast": float}
    for name, default, text in options():
        if name == "lookalikes":
            p.add_argument("--lookalikes", nargs="+", metavar="KIND", help=f"{text} (default nodules emphysema fibrosis)")
            continue
        pair = name in ranges or isinstance(default, tuple)
        kind = ranges.get(name) or type(default[0] if pair else 0.0 if default is None else default)
        unset = "by the window" if name == "censoring" else "by the disease"
        shown = unset if default is None else " ".join(map(str, default)) if pair else default
        choices = list(DISEASES) if name == "disease" else None
        metavar = ("LEAST", "MOST") if pair else None
        p.add_argument(
            f"--{name}",
            type=kind,
            nargs=2 if pair else None,
            default=default,
            choices=choices,
            metavar=metavar,
            help=f"{text} (default {shown})",
        )
    return p


def params_of(args: argparse.Namespace) -> ImplantParams:
    """What a command line says of the implants; :class:`InputError` where it can't be."""
    given = {name: getattr(args, name) for name, _, _ in options()}
    given["lookalikes"] = [] if args.lookalikes == ["none"] else args.lookalikes
    return ImplantParams(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    try:
        if args.backgrounds is None or args.out is None:
            raise InputError("--backgrounds and --out are needed; --help tells what there is.")
        if args.num < 2:
            raise InputError(f"num is {args.num}; expected at least 2 scans.")
        for name in ("test_share", "val_share"):
            if not 0 <= getattr(args, name) < 1:
                raise InputError(f"{name} is {getattr(args, name)}; expected a share from 0 to below 1.")
        if not 0.5 <= args.spacing <= 10:
            raise InputError(f"spacing is {args.spacing}; expected 0.5 to 10 mm.")
        write_cohort(args.out, args, params_of(args))
    except InputError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
