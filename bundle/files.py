# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all, and that show when they have been damaged."""

import contextlib
import hashlib
import io
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bundle.errors import InputError

_TEMPORARY = f".tmp-{socket.gethostname()}-"
_MARK = b"sha256:"
_TRAILER = len(_MARK) + 64


class DamagedFile(Exception):
    """A file's content is not what was written: torn, or with flipped bits."""


def write_atomically(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary name of the same suffix beside `path`, flush to disk, rename.

    A kill, a loss of power or an error of `write` leaves the old file or the new one. The folder is made.

    Raises:
        InputError: the disk is full, or the folder can't be written.
    """
    path = Path(path)
    # A thread writes one file at a time; the end of its name keeps the suffix, and the whole within what a name may have.
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{threading.get_ident()}-{path.name[-20:]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(e, OSError):
            raise
        raise InputError(f"{path} can't be written: {e.strerror}; expected a folder with room to write.") from e
    with contextlib.suppress(OSError):  # not every file system can flush a folder
        _flush(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a file of text in UTF-8, by :func:`write_atomically`."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: str | Path) -> None:
    """Delete the temporary files that killed processes of this machine left in a folder."""
    for path in Path(folder).glob(f"{_TEMPORARY}*"):
        pid = path.name.removeprefix(_TEMPORARY).partition("-")[0]
        if pid.isdecimal() and not _runs(int(pid)):
            path.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    """Whether a process runs, and is no zombie."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or no Linux
        return True


def save_checked(content: Any, path: str | Path) -> None:
    """`torch.save`, atomically, with the file's SHA-256 behind it, which `torch.load` passes over."""

    def write(temporary: Path) -> None:
        buffer = io.BytesIO()
        torch.save(content, buffer)
        trailer = _MARK + hashlib.sha256(buffer.getbuffer()).hexdigest().encode()
        temporary.write_bytes(buffer.getvalue() + trailer)

    write_atomically(path, write)


def load_checked(path: str | Path) -> Any:
    """What :func:`save_checked` wrote, on the CPU; nothing but tensors and plain values is unpickled.

    Raises:
        DamagedFile: the checksum is wrong or missing.
    """
    data = memoryview(Path(path).read_bytes())
    body, trailer = data[:-_TRAILER], data[-_TRAILER:]
    if bytes(trailer) != _MARK + hashlib.sha256(body).hexdigest().encode():
        raise DamagedFile(f"{path} is damaged: its checksum is wrong or missing")
    return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")
