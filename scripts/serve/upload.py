# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""An upload, from the connection to a file: counted as it comes, and under names of our own."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import HTTPException, Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

FIELD = b"dicom"  # as in ARK, the server of Sybil: https://github.com/reginabarzilaygroup/ark
MOST_FILES = 10_000
MOST_SECONDS = 1800  # of an upload
LINGER_SECONDS = 2
EXPECTED = f"expected NIfTI, a ZIP of DICOM files, or DICOM files, as form field {FIELD.decode()}"

_SUFFIXES = {b"\x1f\x8b": ".nii.gz", b"PK\x03\x04": ".zip", b"\x5c\x01\0\0": ".nii", b"\0\0\x01\x5c": ".nii"}
_SUFFIXES |= {b"\x1c\x02\0\0": ".nii", b"\0\0\x02\x1c": ".nii"}  # NIfTI-1 and 2 begin with the size of their header

logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it quotes what it can't parse


class Form:
    """The parser of a multipart form (RFC 7578) that writes its files to a folder, numbered.

    Args:
        content_type: header of the request.
        folder: to write to.

    Raises:
        HTTPException: 415, it is no such form.
    """

    def __init__(self, content_type: str | None, folder: Path) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise HTTPException(415, f"the upload is no multipart form ({EXPECTED})")
        self.folder, self.paths, self.file, self.whole = folder, [], None, False
        self.header, self.value, self.disposition = b"", b"", b""
        names = ("part_begin", "header_field", "header_value", "header_end", "headers_finished", "part_data", "part_end")
        callbacks = {f"on_{name}": getattr(self, f"_{name}") for name in (*names, "end")}
        self.parser = MultipartParser(options[b"boundary"], callbacks)

    def write(self, chunk: bytes) -> None:
        """Take the next bytes of the body.

        Raises:
            HTTPException: 400, they are no form.
        """
        try:
            self.parser.write(chunk)
        except FormParserError as error:
            raise HTTPException(400, f"the form of the upload is damaged ({EXPECTED})") from error

    def close(self) -> None:
        if self.file:
            self.file.close()

    def _part_begin(self) -> None:
        self.header = self.value = self.disposition = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self.header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self.value += data[start:end]

    def _header_end(self) -> None:
        if self.header.lower() == b"content-disposition":
            self.disposition = self.value
        self.header = self.value = b""

    def _headers_finished(self) -> None:
        options = parse_options_header(self.disposition.decode("latin-1"))[1]
        if options.get(b"name") == FIELD and b"filename" in options:
            if len(self.paths) == MOST_FILES:
                raise HTTPException(413, f"the upload has more than {MOST_FILES} files (expected one scan)")
            self.paths.append(self.folder / f"{len(self.paths):06}")
            self.file = open(self.paths[-1], "xb")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self.file:  # what other fields say is passed over
            self.file.write(data[start:end])

    def _part_end(self) -> None:
        self.close()
        self.file = None

    def _end(self) -> None:
        self.whole = True


async def receive(request: Request, folder: Path, name: str, most: int) -> tuple[Path, int]:
    """Write an upload to a folder.

    Args:
        name: for the scan; a suffix is put behind it by what it holds.
        most: bytes.

    Returns:
        the scan, a file or a folder of DICOM files, and the bytes that came.

    Raises:
        HTTPException: 400 not a whole form with a file in it; 408 too slow; 413 too large; 415 not a scan.
        starlette.requests.ClientDisconnect: the connection was lost.
    """
    stream = request.stream()
    try:
        if int(request.headers.get("content-length") or 0) > most:
            raise _too_large(most)
        place = folder / name
        place.mkdir(mode=0o700)
        with contextlib.closing(Form(request.headers.get("content-type"), place)) as form:
            size = 0
            async with asyncio.timeout(MOST_SECONDS):
                async for chunk in stream:
                    size += len(chunk)
                    if size > most:
                        raise _too_large(most)
                    await asyncio.to_thread(form.write, chunk)
        if not form.whole:
            raise HTTPException(400, "the upload ends before its form does (expected a whole one)")
        return _scan_of(form.paths, place), size
    except TimeoutError as error:
        raise HTTPException(408, f"the upload took longer than {MOST_SECONDS} s") from error
    except HTTPException:
        await drain(stream)
        raise


async def drain(stream: AsyncIterator[bytes]) -> None:
    """Let go by what a client still sends, for a moment: many read no answer before they have sent all."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(LINGER_SECONDS):
            async for _ in stream:
                pass


def _too_large(most: int) -> HTTPException:
    return HTTPException(413, f"the upload is too large (expected at most {most / 2**20:g} MiB)")


def _scan_of(paths: list[Path], place: Path) -> Path:
    """The scan among uploaded files: the one file beside `place`, called by what it is, or `place` itself."""
    if not paths:
        raise HTTPException(400, f"the upload holds no file ({EXPECTED})")
    with open(paths[0], "rb") as file:
        start = file.read(132)
    suffix = next((suffix for magic, suffix in _SUFFIXES.items() if start.startswith(magic)), None)
    if len(paths) > 1 and suffix:
        raise HTTPException(415, f"the upload holds {len(paths)} files, not all of them DICOM ({EXPECTED})")
    if len(paths) == 1 and suffix:
        return paths[0].rename(place.with_name(f"{place.name}{suffix}"))
    if len(paths) == 1 and start[128:] != b"DICM":
        raise HTTPException(415, f"the upload is {'no scan' if start else 'empty'} ({EXPECTED})")
    return place
