# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Take the files out of ZIP archives, which strangers send: bounded, and under names of our own."""

import os
import zipfile
import zlib
from collections.abc import Iterable

from bundle.errors import InputError

_SUFFIX = ".zip"
_MOST_BYTES = 2**32  # of all files: twice the largest scan that is read, with 16 bits a voxel
_MOST_LISTED = 2**24  # bytes of an archive's list of files, which is held in memory: some 100 000 files
_CHUNK_BYTES = 2**20


def is_archive(path: str | os.PathLike) -> bool:
    """Whether a file is called a ZIP archive."""
    return os.fspath(path).lower().endswith(_SUFFIX) and os.path.isfile(path)


def unzip(archives: Iterable[str | os.PathLike], folder: str, where: str) -> None:
    """Write the files of archives to a folder, numbered; folders, links and what they are called are dropped.

    Args:
        where: what to call the archives in messages.

    Raises:
        InputError: an archive is damaged, encrypted, compressed by another method than deflate, or too large.
    """
    count, room = 0, _MOST_BYTES
    try:
        for archive in archives:  # all count together
            with open(archive, "rb") as file, _open(file, where) as zipped:
                for member in zipped.infolist():
                    if member.is_dir():
                        continue
                    if member.flag_bits & 1:
                        raise InputError(f"{where}: the ZIP archive is encrypted (expected one without a password)")
                    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # these bound their memory
                        raise InputError(f"{where}: the ZIP archive is compressed by another method (expected deflate)")
                    count += 1
                    room = _write(zipped, member, os.path.join(folder, f"{count:06}"), room)
                    if room < 0:
                        most = f"{_MOST_BYTES / 2**30:g} GiB"
                        raise InputError(f"{where}: the ZIP archive holds more than {most} (expected a patient's scans)")
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{where}: the ZIP archive cannot be unpacked, {error.strerror} (expected a whole one)") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        # What these say may hold the name of a file, and that a patient's.
        raise InputError(f"{where}: the ZIP archive is truncated or damaged (expected a whole one)") from error


def _open(file, where: str) -> zipfile.ZipFile:
    """An archive whose list of files is short enough to be read."""
    end = zipfile._EndRecData(file)  # the record that ZipFile itself goes by
    if end and end[zipfile._ECD_SIZE] > _MOST_LISTED:
        raise InputError(f"{where}: the ZIP archive lists too many files (expected the scans of one patient)")
    return zipfile.ZipFile(file)


def _write(zipped: zipfile.ZipFile, member: zipfile.ZipInfo, path: str, room: int) -> int:
    """Write one file if it fits; how many bytes may still come, negative if it doesn't."""
    with zipped.open(member) as source, open(path, "xb") as target:
        while room >= 0 and (data := source.read(_CHUNK_BYTES)):
            room -= len(data)
            if room >= 0:
                target.write(data)
    return room
