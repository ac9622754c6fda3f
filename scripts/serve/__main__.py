# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Predict scans that are uploaded.

    python -m scripts.serve --ckpt runs/mine/model.pt

It prints the address of the upload page. Nothing is kept after delivery. It speaks HTTP without TLS: for other machines put
a proxy before it. Research use only, not for diagnosis or treatment. More in docs/serving.md.
"""

import argparse
import ipaddress
import json
import logging
import os
import secrets
import signal
import socket
import sys
from pathlib import Path

from bundle.errors import InputError

ROOT = Path(__file__).parents[2]
SHORTEST_TOKEN = 16
MOST_CONNECTIONS = 500


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m scripts.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--ckpt", default=str(ROOT / "models" / "model.pt"), metavar="FILE", help="weights (models/model.pt)")
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine alone)")
    p.add_argument("--port", type=int, default=8000, help="0 for any that is free (default: %(default)s)")
    p.add_argument("--token_file", type=Path, metavar="FILE", help="holds the token; without it one is made and printed")
    p.add_argument("--keep", type=Path, metavar="DIR", help="folder in which results stay; without it nothing does")
    p.add_argument("--max_upload_mib", type=positive, default=1024, metavar="N", help="of an upload (default: %(default)s)")
    p.add_argument("--max_jobs", type=int, default=20, metavar="N", help="that aren't done (default: %(default)s)")
    p.add_argument("--job_seconds", type=positive, default=300, metavar="N", help="of a job (default: %(default)s)")
    p.add_argument("--job_gib", type=positive, default=8, metavar="N", help="memory of a job (default: %(default)s)")
    p.add_argument("--expire_minutes", type=positive, default=15, metavar="N", help="of results (default: %(default)s)")
    return p


def positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise ValueError
    return number


def read_token(path: Path | None) -> str:
    """The token of a file, or a new one.

    Raises:
        InputError: the file can't be read, or its token is short, or can't stand in a header.
    """
    if path is None:
        return secrets.token_urlsafe(32)
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise InputError(f"--token_file {path} can't be read (expected a file with a token in ASCII).") from error
    if len(token) < SHORTEST_TOKEN or not token.isprintable() or " " in token:
        raise InputError(f"--token_file {path} holds no token (expected {SHORTEST_TOKEN} characters or more, no space).")
    return token


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; whoever lets other machines in is warned.

    Raises:
        InputError: the address can't be had.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address, family=family)
    except (OSError, OverflowError) as error:
        raise InputError(f"can't listen at {host}, port {port}: {error} (expected an address of this machine).") from error
    if not ipaddress.ip_address(address[0]).is_loopback:
        print(f"warning: every machine that reaches {host} can ask for the upload page, and without TLS what is sent can be "
              "read on the way. Put a proxy with TLS before it.", file=sys.stderr)  # fmt: skip
    return listening


def serve(args: argparse.Namespace) -> None:
    try:
        import uvicorn

        from scripts.serve.app import HEADERS, make_app
        from scripts.serve.jobs import Jobs, Limits, scratch
    except ImportError as error:
        raise InputError(f"{error.name} is missing: pip install -r requirements-serve.txt.") from error

    if not Path(args.ckpt).is_file():
        raise InputError(f"--ckpt {args.ckpt}: there is no such file (expected the model.pt of a training).")
    token = read_token(args.token_file)
    if args.keep:
        try:
            args.keep.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--keep {args.keep} can't be made: {error.strerror} (expected a folder).") from error
    limits = Limits(
        upload_bytes=int(args.max_upload_mib * 2**20), jobs=args.max_jobs, seconds=args.job_seconds,
        memory=int(args.job_gib * 2**30), expire_seconds=60 * args.expire_minutes,
    )  # fmt: skip
    version = json.loads((ROOT / "configs" / "metadata.json").read_text())["version"]
    with listen(args.host, args.port) as listening, scratch() as folder:
        os.environ["TMPDIR"] = str(folder)  # of the processes for jobs
        jobs = Jobs(str(Path(args.ckpt).absolute()), folder, limits, args.keep and args.keep.absolute())
        app = make_app(jobs, token, version, jobs.about())
        host = f"[{args.host}]" if ":" in args.host else args.host
        fragment = "" if args.token_file else f"#{token}"  # which browsers send to nobody
        print(f"Survival Map, for research use only: http://{host}:{listening.getsockname()[1]}/{fragment}", flush=True)
        config = uvicorn.Config(
            app, http="h11", ws="none", loop="asyncio", lifespan="on", headers=HEADERS, server_header=False,
            proxy_headers=False, access_log=False, log_config=None, limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=5,
        )  # fmt: skip
        uvicorn.Server(config).run([listening])


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # its tracebacks may tell of what was sent
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what is there is deleted
    try:
        serve(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
