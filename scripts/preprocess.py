# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Preprocess a cohort once, in parallel, into a cache that trainings read with no further work.

    python -m scripts.preprocess --cohort C.csv --cache_dir cache --jobs 2
    python -m monai.bundle run --config_file configs/train.json --cohort C.csv --cache_dir cache --ckpt_dir run

A second run goes on where the first was stopped. Any other --key value overrides a key of the config, as in training
(--spacing 2). A training with other preprocessing, or other scans, makes its own files in the same folder.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from tqdm import tqdm

from bundle.data import ScanCache, read_cohort
from bundle.errors import InputError
from bundle.run.config import check_config
from bundle.run.start import begin, make_folder
from scripts.jobs import literal, options_of


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
    begin()
    cache = cache_of(args, {key: literal(text) for key, text in options_of(rest).items()})
    made = cache.fill(args.jobs if args.jobs > 1 else 0, partial(tqdm, desc="preprocessing", unit="scan"))
    print(f"{len(cache.data)} scans in {cache.cache_dir}: {made} preprocessed, {len(cache.data) - made} there already.")


if __name__ == "__main__":
    main()
