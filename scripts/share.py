# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Share a trained model, and look at one before it is trusted.

    python -m scripts.share pack --ckpt_dir runs/mine --out survival_map.zip
    python -m scripts.share audit FILE_OR_FOLDER
    python -m scripts.share install survival_map.zip --out DIR
    python -m scripts.share try DIR

Run it from a copy that you trust, never from the folder of a bundle that you don't. Exit codes: 0 nothing found,
1 findings, or results that differ, 2 unreadable.
"""

import argparse
import logging
import sys
from pathlib import Path

from bundle.errors import InputError


def run_pack(args: argparse.Namespace) -> int:
    from bundle.sharing.pack import pack

    print("\n".join(pack(args.ckpt_dir, args.out, args.data, args.data_license, args.public_ids, args.key)))
    print(args.out)
    return 0


def run_audit(args: argparse.Namespace) -> int:
    from bundle.sharing.audit import audit

    report = audit(args.bundle, args.key)
    print(report.text())
    return 1 if report.findings else 0


def run_verify(args: argparse.Namespace) -> int:
    from bundle.sharing.audit import verify

    report = verify(args.bundle, args.key)
    print(report.text())
    return 1 if report.findings else 0


def run_install(args: argparse.Namespace) -> int:
    from bundle.sharing.install import install

    report = install(args.bundle, args.out, args.key)
    print(report.text())
    if not report.findings:
        print(f"{args.out} (try it: python -m scripts.share try {args.out})")
    return 1 if report.findings else 0


def run_try(args: argparse.Namespace) -> int:
    from bundle.sharing.trial import Differs, try_bundle

    try:
        print(f"{args.bundle}: {try_bundle(args.bundle)}.")
    except Differs as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m scripts.share", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str, key: str = "", needs_key: bool = False) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.set_defaults(run=run)
        if key:
            one.add_argument("--key", type=Path, metavar="PEM", required=needs_key, help=key)
        return one

    public = "public ed25519 key of the packer"
    make = command("pack", run_pack, "write a bundle of a run's model", "private ed25519 key to sign with")
    make.add_argument("--ckpt_dir", type=Path, required=True, metavar="DIR", help="folder of the run")
    make.add_argument("--out", type=Path, required=True, metavar="ZIP", help="bundle to write")
    make.add_argument("--data", default="", metavar="TEXT", help="what the training data are, for the model card")
    make.add_argument("--data_license", default="", metavar="TEXT", help="licence of the training data")
    make.add_argument("--public_ids", action="store_true", help="keep the hashes of patients' ids: they are public anyway")
    look = command("audit", run_audit, "look at a bundle; nothing of it is run, imported or unpickled", public)
    check = command("verify", run_verify, "check hashes and signature alone", public, needs_key=True)
    take = command("install", run_install, "audit a bundle and unpack it if nothing is found", public)
    for one in (look, check, take):
        one.add_argument("bundle", type=Path, metavar="FILE_OR_FOLDER")
    take.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    test = command("try", run_try, "run an installed bundle on its phantom, and compare with what its packer got")
    test.add_argument("bundle", type=Path, metavar="DIR")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        sys.exit(args.run(args))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
