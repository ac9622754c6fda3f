# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Weights and arrays, looked at without loading them: the opcodes of pickles, the code of TorchScript, headers.

A pickle is a program. The ones that torch writes for a state dict name a few functions, those that
``torch.load(weights_only=True)`` allows; each opcode that names another, or hides what it names, is a finding.
"""

import ast
import io
import pickletools
import re
from collections.abc import Iterator

import numpy as np

from bundle.errors import InputError
from bundle.sharing.source import ZipSource

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of torch.save before its zip: torch/serialization.py
MAX_PICKLE = 64 << 20  # bytes
MAX_HEADER = 1 << 16  # bytes of an array's header
_STORAGE = r"torch(\.cuda)?\.(\w+Storage|\w+Tensor)|torch\.(Size|Tensor|device|q?u?int\d+|b?float\d+\w*|bool|complex\d+)"
_REBUILD = r"torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|qtensor|sparse_tensor|device_tensor_from_\w+)"
_OTHER = r"torch\.storage\.(Un)?[tT]ypedStorage|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout"
_PLAIN = r"collections\.(OrderedDict|Counter)|torch\.bfloat16|_codecs\.encode|builtins\.(set|bytearray|complex)"
STATE_DICT = re.compile("|".join([_STORAGE, _REBUILD, _OTHER, _PLAIN]))
TORCHSCRIPT = re.compile(r"__torch__\.[\w.]+|torch\.jit\._pickle\.\w+|" + STATE_DICT.pattern)
_CODE = re.compile(r"code/.*\.py")
_TORCH_FILES = re.compile(
    r"data\.pkl|byteorder|version|\.format_version|\.storage_alignment|\.data/(serialization_id|version)|data/\d+"
)
_SCRIPT_FILES = re.compile(_TORCH_FILES.pattern + r"|code/.*\.(py|debug_pkl)|constants\.pkl|constants/\d+|extra/[\w./]+")
# What TorchScript has that reads or writes files, or runs what isn't in the archive.
BAD_TORCH = set("from_file save load load_library".split())
OPERATORS = {"prim", "aten", "quantized", "prepacked"}  # namespaces


def pickle_faults(data: bytes, allowed: re.Pattern = STATE_DICT, legacy: bool = False) -> Iterator[str]:
    """What is wrong with a pickle, or with several in a row.

    Args:
        data: the pickles; behind the fifth of a legacy file of torch the tensors lie as they are.
        allowed: the full names that it may use.
        legacy: whether it may be such a file.
    """
    stream, count, first = io.BytesIO(data), 0, None
    while stream.tell() < len(data):
        if count == 5 and legacy and first == LEGACY_MAGIC:
            return
        if stream.tell() > MAX_PICKLE:
            yield f"pickles of more than {MAX_PICKLE >> 20} MiB"
            return
        seen = _Names(allowed)
        try:
            for opcode, value, _ in pickletools.genops(stream):
                first = value if first is None and isinstance(value, int) and opcode.name.startswith("LONG") else first
                yield from seen.take(opcode, value)
        except Exception as e:  # pickletools raises whatever the bytes lead to
            yield f"a pickle that can't be read to its end ({type(e).__name__})"
            return
        count += 1
        if count > 5:
            yield "more pickles in a row than torch writes"
            return


class _Names:
    """Follows the texts on a pickle's stack, so that the names made of them are known."""

    def __init__(self, allowed: re.Pattern) -> None:
        self.allowed = allowed
        self.memo: dict[int, str | None] = {}
        self.pushed: list[str | None] = []

    def take(self, opcode: pickletools.OpcodeInfo, value: object) -> Iterator[str]:
        name = opcode.name
        if name in ("GLOBAL", "INST"):
            yield from self.check(str(value).replace(" ", ".", 1))
            self.pushed.append(None)
        elif name == "STACK_GLOBAL":
            module, attribute = ([None, None] + self.pushed)[-2:]
            if module is None or attribute is None:
                yield "a pickle that hides what it calls"
            else:
                yield from self.check(f"{module}.{attribute}")
            self.pushed.append(None)
        elif name.startswith("EXT"):
            yield "a pickle that calls by a registered number"
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.pushed[-1] if self.pushed else None
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[int(str(value))] = self.pushed[-1] if self.pushed else None
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.pushed.append(self.memo.get(int(str(value))))
        elif name not in ("PROTO", "FRAME"):
            self.pushed.append(value if isinstance(value, str) and "UNICODE" in name or "STRING" in name else None)
        del self.pushed[:-2]

    def check(self, name: str) -> Iterator[str]:
        if not self.allowed.fullmatch(name):
            yield f"a pickle that calls {name}"


def weights_faults(name: str, data: bytes, read: list[str]) -> Iterator[str]:
    """What is wrong with a weights file: torch's zip, TorchScript, or the legacy format.

    Args:
        name, data: the file.
        read: takes a line on what it is.
    """
    if data[257:262] == b"ustar":
        yield "a tar archive, which torch.load unpickles"
    elif data[:2] == b"PK":
        yield from _zip_faults(name, data, read)
    else:
        read.append(f"{name}: a pickle")
        yield from pickle_faults(data, legacy=True)


def _zip_faults(name: str, data: bytes, read: list[str]) -> Iterator[str]:
    try:
        archive = ZipSource(data, name)
    except InputError as e:
        yield str(e)
        return
    yield from (f"{found.key}: {found.what}" if found.key else found.what for found in archive.findings)
    inside = {}
    for info in archive.infos.values():
        base, _, short = info.filename.partition("/")
        inside[short] = info
    if len({info.filename.partition("/")[0] for info in archive.infos.values()}) != 1:
        yield "an archive that torch.save doesn't write: it has several folders"
        return
    script = "constants.pkl" in inside or any(_CODE.fullmatch(short) for short in inside)
    known = _SCRIPT_FILES if script else _TORCH_FILES
    yield from (f"{short}, which torch.save doesn't write" for short in inside if not known.fullmatch(short))
    if "data.pkl" not in inside:
        yield "an archive without data.pkl"
    operators: set[str] = set()
    for short, info in inside.items():
        if not short.endswith((".pkl", ".debug_pkl", ".py")):
            continue
        try:
            content = archive.read(info.filename.removeprefix(archive.base))
        except InputError as e:
            yield str(e)
            continue
        if short.endswith(".py"):
            yield from (f"{short}: {what}" for what in _script_faults(content, operators))
        else:
            yield from (f"{short}: {what}" for what in pickle_faults(content, TORCHSCRIPT if script else STATE_DICT))
    code = sum(1 for short in inside if _CODE.fullmatch(short))
    tensors = sum(1 for short in inside if re.fullmatch(r"data/\d+|constants/\d+", short))
    kind = (
        f"TorchScript, {code} files of code, operators {', '.join(sorted(operators)) or 'none'}"
        if script
        else "a state dict"
    )
    read.append(f"{name}: {kind}, {tensors} tensors")


def _script_faults(code: bytes, operators: set[str]) -> Iterator[str]:
    """What is wrong with a code file of TorchScript; takes down the operators that it calls."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        yield f"code that can't be read ({type(e).__name__})"
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield "it imports"
        if not isinstance(node, ast.Attribute):
            continue
        chain = ast.unparse(node).split(".")
        if chain[0] == "torch" and len(chain) == 2:
            operators.add(chain[1])
            if chain[1] in BAD_TORCH:
                yield f"it calls torch.{chain[1]}"
        elif chain[0] == "ops" and len(chain) == 3:
            operators.add(f"{chain[1]}::{chain[2]}")
            if chain[1] not in OPERATORS or chain[2] in BAD_TORCH:
                yield f"it calls the operator {chain[1]}::{chain[2]}"


def array_faults(data: bytes) -> Iterator[str]:
    """What is wrong with a .npy file: an array of Python objects holds a pickle."""
    size = int.from_bytes(data[8:10] if data[6:7] == b"\x01" else data[8:12], "little")
    start = 10 if data[6:7] == b"\x01" else 12
    if data[:6] != b"\x93NUMPY" or size > MAX_HEADER:
        yield "it is no array of numpy that can be read"
        return
    try:
        header = ast.literal_eval(data[start : start + size].decode("latin1").strip())
        holds_objects = np.lib.format.descr_to_dtype(header["descr"]).hasobject
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, MemoryError):
        yield "its header can't be read"
        return
    if holds_objects:
        yield "an array of Python objects, which numpy unpickles"


def arrays_faults(name: str, data: bytes) -> Iterator[str]:
    """What is wrong with a .npz file, a zip of arrays."""
    try:
        archive = ZipSource(data, name)
        yield from (str(found) for found in archive.findings)
        for each in archive.names():
            yield from (f"{each}: {what}" for what in array_faults(archive.read(each)))
    except InputError as e:
        yield str(e)
