# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Preprocess a cohort once, in parallel, into a cache that trainings read with no further work.

    python -m scripts.preprocess --cohort C.csv --cache_dir cache --jobs 2
    python -m monai.bundle run --config_file configs/train.json --cohort C.csv --cache_dir cache --ckpt_dir run

A second run goes on where the first was stopped. Any other --key value overrides a key of the config, as in training
(--spacing 2). A training with other preprocessing, or other scans, makes its own files in the same folder.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from tqdm import tqdm

from bundle.data import ScanCache, read_cohort
from bundle.errors import InputError
from bundle.run.config import check_config
from bundle.run.start import begin, make_folder
from scripts.jobs import literal

SAMPLE = 3  # scans on which reading is timed


def cache_of(args: argparse.Namespace, overrides: dict[str, Any]) -> ScanCache:
    """The cache of a training with these configs, of all scans of the cohort."""
    for file in args.config_file:
        if not Path(file).is_file():
            raise InputError(f"--config_file {file}: no such file (expected a config of training, as configs/train.json)")
    parser = ConfigParser()
    parser.read_config(args.config_file)
    parser.update(overrides)
    check_config(parser, args.config_file[0])
    parser.get_parsed_content("preprocessing_settings")  # checks them, before a transform is built with them
    records = read_cohort(args.cohort, need_outcome=False, on_fault=args.on_fault)
    transform = parser.get_parsed_content("validate#preprocessing")
    return ScanCache(records, transform, make_folder(args.cache_dir), args.on_fault)


def report(cache: ScanCache, made: int, seconds: float) -> str:
    """What the cache holds and what it saves, measured: bytes of all files, seconds on the first scans."""
    records, sample = cache.data, cache.data[:SAMPLE]
    paths = {Path(record[key]) for record in records for key in ("image", "lung_mask") if key in record}
    files = {file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()}
    source, cached = (sum(f.stat().st_size for f in of) / 1e6 for of in (files, {cache.file(r) for r in records}))
    start = time.perf_counter()
    voxels = sum(cache[i]["image"].numel() for i in range(len(records)))
    hit = (time.perf_counter() - start) / len(records)
    start = time.perf_counter()
    for record in sample:
        cache.preprocess(record)
    miss = (time.perf_counter() - start) / len(sample)
    return (
        f"{len(records)} scans in {cache.cache_dir}: {made} preprocessed in {seconds:.1f} s, "
        f"{len(records) - made} there already.\n"
        f"On disk {cached:.1f} MB; the sources have {source:.1f} MB, image and lung in float32 would have "
        f"{8 * voxels / 1e6:.1f} MB.\n"
        f"Reading a scan takes {hit:.3f} s from the cache and {miss:.3f} s from its source (mean of {len(sample)}), so "
        f"an epoch saves {(miss - hit) * len(records):.1f} s."
    )


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        prog="python -m scripts.preprocess", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--cohort", required=True, metavar="CSV", help="scans to preprocess; times and events are not needed")
    p.add_argument("--cache_dir", required=True, metavar="DIR", help="folder of the cache")
    p.add_argument("--jobs", type=int, default=1, metavar="N", help="processes that share the work (default 1)")
    p.add_argument("--config_file", nargs="+", default=["configs/train.json"], help="as in training (default: train.json)")
    p.add_argument("--on_fault", choices=("fail", "skip"), default="fail", help="skip leaves out bad scans (default: fail)")
    args, rest = p.parse_known_args(argv)
    if len(rest) % 2 or not all(key.startswith("--") for key in rest[::2]):
        p.error(f"expected --key value, got {' '.join(rest)}")
    begin()
    cache = cache_of(args, {key[2:]: literal(text) for key, text in zip(rest[::2], rest[1::2])})
    start = time.perf_counter()
    made = cache.fill(args.jobs if args.jobs > 1 else 0, partial(tqdm, desc="preprocessing", unit="scan"))
    print(report(cache, made, time.perf_counter() - start))


if __name__ == "__main__":
    main()
