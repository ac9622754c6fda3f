# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Share a trained model, and look at one before it is trusted.

    python -m scripts.share audit FILE_OR_FOLDER     look at a bundle; nothing of it is run, imported or unpickled

Run it from a copy that you trust, never from the folder of a bundle that you don't.
"""

import argparse
import logging
import sys
from pathlib import Path

from bundle.errors import InputError


def run_audit(args: argparse.Namespace) -> int:
    from bundle.sharing.audit import audit

    report = audit(args.bundle, args.key)
    print(report.text())
    return 1 if report.findings else 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m scripts.share", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(required=True, metavar="COMMAND")
    look = commands.add_parser("audit", help="look at a bundle: exit code 0 nothing found, 1 findings, 2 unreadable")
    look.add_argument("bundle", type=Path, metavar="FILE_OR_FOLDER")
    look.add_argument("--key", type=Path, metavar="PEM", help="public ed25519 key of the packer")
    look.set_defaults(run=run_audit)
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
