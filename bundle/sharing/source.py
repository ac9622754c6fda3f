# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""The files of a bundle as they are, in a folder or a zip: read without trusting a name, a size or a header."""

import io
import os
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from bundle.errors import InputError

MAX_FILES = 10_000
MAX_BYTES = 4 << 30  # of all files, unpacked
MAX_RATIO = 200  # unpacked to packed, of a file above MAX_RATIO_FROM
MAX_RATIO_FROM = 1 << 20
_LOCAL = struct.Struct("<4s5H3I2H")  # a file's header in a zip, in front of its name: APPNOTE.TXT 4.3.7
_NAME_FIELD = 0x7075  # Info-ZIP's Unicode path
_END = 22  # bytes of a zip's last record, without a comment


@dataclass(frozen=True)
class Finding:
    """One reason not to trust a bundle: in which file, at which key of it, and what."""

    file: str
    key: str
    what: str

    def __str__(self) -> str:
        text = f"{self.file}{f' · {self.key}' if self.key else ''}: {self.what}"
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)  # or a terminal obeys it


def name_faults(name: str) -> Iterator[str]:
    """What is wrong with the name of a file in a bundle."""
    parts = PurePosixPath(name).parts
    if name.startswith(("/", "\\")) or name[1:2] == ":" or ".." in parts or "\\" in name:
        yield "its name leads out of the bundle"
    if any(unicodedata.category(c)[0] == "C" for c in name) or len(name) > 255:
        yield "its name has a character that can't be seen, or is longer than 255"
    if any(part != part.rstrip(" .") for part in parts if part != ".."):
        yield "its name ends in a dot or a space, which some systems drop"


class ZipSource:
    """The files of a zip that was looked through; `findings` says what is wrong with the zip itself.

    Args:
        data: the zip.
        name: for findings.

    Raises:
        InputError: it is no zip.
    """

    def __init__(self, data: bytes, name: str) -> None:
        try:
            self.zip = zipfile.ZipFile(io.BytesIO(data))
            infos = [info for info in self.zip.infolist() if not info.is_dir()]
        except (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError, EOFError, UnicodeError) as e:
            raise InputError(f"{name} is no zip that can be read: {e}.") from e
        self.findings = [Finding(name, "", what) for what in _layout_faults(data, self.zip)]
        self.findings += [Finding(name, i.filename, what) for i in self.zip.infolist() for what in _entry_faults(i, data)]
        seen: set[str] = set()
        for info in infos:
            same = unicodedata.normalize("NFKC", info.filename).casefold()
            if same in seen:
                self.findings.append(Finding(name, info.filename, "two files have this name"))
            seen.add(same)
        self.infos = {info.filename: info for info in infos}
        if len(infos) > MAX_FILES or sum(info.file_size for info in infos) > MAX_BYTES:
            self.findings.append(Finding(name, "", f"more than {MAX_FILES} files or {MAX_BYTES >> 30} GiB in all"))
            self.infos = {}
        self.base = _base_folder(list(self.infos))

    def names(self) -> list[str]:
        return sorted(name.removeprefix(self.base) for name in self.infos)

    def size(self, name: str) -> int:
        """Bytes of a file, unpacked."""
        return self.infos[self.base + name].file_size

    def read(self, name: str) -> bytes:
        """A file's content, which is never more than its header says.

        Raises:
            InputError: the zip is damaged here.
        """
        info = self.infos[self.base + name]
        try:
            with self.zip.open(info) as f:
                data = f.read(info.file_size + 1)
        except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, OSError, EOFError) as e:
            raise InputError(f"{name} can't be read from the zip: {e}.") from e
        if len(data) != info.file_size:
            raise InputError(f"{name} has another size than the zip says.")
        return data


def _layout_faults(data: bytes, archive: zipfile.ZipFile) -> Iterator[str]:
    """What would let two programs see different files in one zip."""
    if data[-_END : -_END + 4] != b"PK\x05\x06" or archive.comment:
        yield "it goes on behind the end of the zip"
    if archive.infolist() and (data[:4] != b"PK\x03\x04" or min(i.header_offset for i in archive.infolist()) != 0):
        yield "it has something in front of the zip"
    end = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        if info.header_offset < end:
            yield f"{info.filename} overlaps another file: a zip bomb"
            return
        end = info.header_offset + _LOCAL.size + len(info.filename) + info.compress_size


def _entry_faults(info: zipfile.ZipInfo, data: bytes) -> Iterator[str]:
    """What is wrong with one file of a zip."""
    yield from name_faults(info.orig_filename.rstrip("/"))
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        yield "it is a link or a special file"
    if info.flag_bits & 0x41:
        yield "it is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        yield "it is packed in an unusual way"
    if info.file_size > MAX_RATIO_FROM and info.file_size > MAX_RATIO * info.compress_size:
        yield f"it unpacks to more than {MAX_RATIO} times its size: a zip bomb"
    header = data[info.header_offset : info.header_offset + _LOCAL.size]
    if len(header) < _LOCAL.size or header[:4] != b"PK\x03\x04":
        yield "its header is missing"
        return
    fields = _LOCAL.unpack(header)
    start = info.header_offset + _LOCAL.size
    name = data[start : start + fields[9]].decode("utf-8" if fields[2] & 0x800 else "cp437", "replace")
    local = data[start + fields[9] : start + fields[9] + fields[10]]
    if any(_NAME_FIELD in _extra_fields(extra) for extra in (info.extra, local)):
        yield "it has a second name, which some programs take"
    if name != info.orig_filename or fields[3] != info.compress_type or (fields[2] ^ info.flag_bits) & 0x41:
        yield "the zip's two headers for it differ"


def _extra_fields(extra: bytes) -> list[int]:
    """Numbers of the fields behind a file's name in a zip: APPNOTE.TXT 4.5."""
    found = []
    while len(extra) >= 4:
        number, size = struct.unpack("<2H", extra[:4])
        found.append(number)
        extra = extra[4 + size :]
    return found


class FolderSource:
    """The files of a folder; `findings` says what is wrong with the folder itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.findings: list[Finding] = []
        self.paths: dict[str, Path] = {}
        total = 0
        for root, folders, files in os.walk(folder):
            for name in sorted(folders + files):
                path = Path(root, name)
                short = path.relative_to(folder).as_posix()
                mode = path.lstat().st_mode
                faults = list(name_faults(short))
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    faults.append("it is a link or a special file")
                elif stat.S_ISREG(mode):
                    self.paths[short] = path
                    total += path.lstat().st_size
                self.findings += [Finding(short, "", what) for what in faults]
            if len(self.paths) > MAX_FILES or total > MAX_BYTES:
                self.findings.append(Finding(".", "", f"more than {MAX_FILES} files or {MAX_BYTES >> 30} GiB in all"))
                self.paths = {}
                break

    def names(self) -> list[str]:
        return sorted(self.paths)

    def size(self, name: str) -> int:
        return self.paths[name].lstat().st_size

    def read(self, name: str) -> bytes:
        try:
            return self.paths[name].read_bytes()
        except OSError as e:
            raise InputError(f"{name} can't be read: {e.strerror}.") from e


def _base_folder(names: list[str]) -> str:
    """The one folder that everything in a zip lies in, as those of the model zoo, or nothing."""
    base = names[0].partition("/")[0] + "/" if names else ""
    whole = all(name.startswith(base) for name in names) and any(name.startswith(f"{base}configs/") for name in names)
    return base if whole else ""


def open_source(path: Path) -> ZipSource | FolderSource:
    """The files of a bundle.

    Raises:
        InputError: there is neither a folder nor a zip.
    """
    if path.is_dir():
        return FolderSource(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} has more than {MAX_BYTES >> 30} GiB.")
        data = path.read_bytes()
    except OSError as e:
        raise InputError(f"{path} can't be read: {e.strerror} (expected a zip or a folder).") from e
    return ZipSource(data, path.name)
