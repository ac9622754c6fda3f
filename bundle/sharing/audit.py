# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""Look at a bundle before it is trusted: nothing of it is run, imported or unpickled.

`monai.bundle run` does what a config says: it calls what `_target_` names and evaluates what starts with `$`. The audit
takes a list of what is known to be harmless, and reports all else.
"""

import ast
import configparser
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

import bundle
from bundle.errors import InputError
from bundle.run.config import flat
from bundle.sharing.expressions import Configs, short
from bundle.sharing.manifest import MANIFEST, SIGNATURE, manifest_faults, signature_faults
from bundle.sharing.source import Finding, FolderSource, ZipSource, name_faults, open_source
from bundle.sharing.weights import array_faults, arrays_faults, weights_faults

HOME = Path(bundle.__file__).resolve().parents[1]  # of this copy, with which a bundle's Python files are compared
MAX_TEXT = 16 << 20  # bytes
MAX_FILE = 2 << 30  # bytes of weights, arrays and scans
MAX_LEAVES = 200_000  # values of a config
MAX_DEPTH = 100
MAX_VOLUME = 2 << 30  # bytes of a compressed scan, unpacked
CONFIGS = (".json", ".yaml", ".yml")
TEXTS = (".md", ".txt", ".csv", ".cff", ".sig", ".rst")
PLAIN_NAMES = ("LICENSE", "NOTICE", "CITATION", "LICENSE-CC-BY-4.0")
LOGGING = (".conf", ".ini", ".cfg")
WEIGHTS = (".pt", ".pth", ".ts", ".ckpt", ".bin", ".pkl", ".pickle", ".th", ".p", ".joblib")
DATA = (".npy", ".csv", ".nii.gz", ".nii")
LARGE = (*WEIGHTS, ".npy", ".npz", ".nii", ".nii.gz")
IMAGES = {".png": b"\x89PNG", ".jpg": b"\xff\xd8\xff", ".jpeg": b"\xff\xd8\xff", ".gif": b"GIF8"}
CODE = (".py", ".html", ".css", ".js", ".gz", ".sh", ".toml")  # harmless only if it is what this copy has, too
LOG_CLASSES = ("StreamHandler", "NullHandler", "FileHandler", "logging.StreamHandler", "logging.Formatter", "Formatter")
_LOG_SECTION = re.compile(r"DEFAULT|loggers|handlers|formatters|(logger|handler|formatter)_.*")
LOG_ARGS = {ast.Expression, ast.Tuple, ast.List, ast.Dict, ast.Constant, ast.Load}
SCHEMAS = "https://github.com/Project-MONAI/"  # verify_metadata downloads the schema that the metadata name
SHAPE_NODES = (ast.Expression, ast.BinOp, ast.Constant, ast.Name, ast.Load, ast.Add, ast.Sub, ast.Mult, ast.Pow)
SHAPE_NODES += (ast.FloorDiv, ast.Div)
DOWNLOADS = ("path", "url", "hash_val", "hash_type")
_REQUIREMENT = re.compile(
    r"[A-Za-z0-9][\w.\-]*(\[[\w,\- ]+\])?\s*([=<>!~]=?=?[\w.*+,<>=!~ ]+)?(#.*)?|-r requirements[\w\-]*\.txt"
)


@dataclass
class Audit:
    """What an audit found.

    Attributes:
        findings: reasons not to trust the bundle.
        read: what was looked at.
        notes: what could not be, and what a reader should know.
    """

    name: str
    findings: list[Finding] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, file: str, key: str, what: str) -> None:
        self.findings.append(Finding(file, key, what))

    def text(self) -> str:
        """The findings, then what was looked at, and a verdict."""
        lines = [str(finding) for finding in self.findings] + [f"looked at: {line}" for line in self.read]
        lines += [f"note: {line}" for line in self.notes]
        count = len(self.findings)
        verdict = f"{count} finding{'s' * (count != 1)}; don't run it before each is explained" if count else "nothing found"
        return "\n".join([*lines, f"{self.name}: {verdict}."])


def audit(path: str | Path, key: str | Path | None = None) -> Audit:
    """Look at a bundle.

    Args:
        path: zip or folder.
        key: file of the public ed25519 key (PEM) by which it must be signed.

    Raises:
        InputError: there is no bundle to read, or no key.
    """
    path = Path(path)
    if path.is_dir() and path.resolve() == HOME:
        raise InputError(f"{path} holds the audit itself, which can't judge its own folder; run it from a copy you trust.")
    return audit_source(open_source(path), path.name or str(path), None if key is None else Path(key))


def verify(path: str | Path, key: str | Path) -> Audit:
    """Check a bundle's hashes and its signature, and nothing else; arguments and errors as of :func:`audit`."""
    source = open_source(Path(path))
    report = Audit(Path(path).name, list(source.findings))
    _audit_whole(source, source.names(), Path(key), report)
    if MANIFEST not in source.names():
        report.add(MANIFEST, "", "it is missing")
    return report


def audit_source(source: ZipSource | FolderSource, name: str, key: Path | None = None) -> Audit:
    """Look at the files of a bundle; see :func:`audit`."""
    report = Audit(name, list(source.findings))
    names = source.names()
    if not any(PurePosixPath(each).parent.name == "configs" and each.endswith(CONFIGS) for each in names):
        if not report.findings:
            raise InputError(f"{name} is no bundle: it has no folder configs with a config (json or yaml).")
    configs: dict[str, Any] = {}
    for each in names:
        try:
            if source.size(each) > (MAX_FILE if each.lower().endswith(LARGE) else MAX_TEXT):
                raise InputError("it is larger than files of its kind are")
            _audit_file(each, source.read(each), report, configs)
        except InputError as e:
            report.add(each, "", str(e))
    for finding in Configs({name: _without_record(name, content) for name, content in configs.items()}).findings():
        report.add(*finding)
    for file, content in configs.items():
        _audit_content(file, content, names, report)
    report.read.append(f"{len(configs)} configs and tables (json, yaml), {len(names)} files in all")
    _audit_whole(source, names, key, report)
    return report


def _without_record(name: str, content: Any) -> Any:
    """`models/settings.json` records the config of its training, which nothing reads as a config."""
    record = name == "models/settings.json" and isinstance(content, dict)
    return {key: value for key, value in content.items() if key != "training"} if record else content


def _audit_whole(source: ZipSource | FolderSource, names: list[str], key: Path | None, report: Audit) -> None:
    """Hashes and signature."""
    if MANIFEST in names:
        for finding in manifest_faults(names, source.read):
            report.add(*finding)
        report.read.append("the SHA-256 of each file in manifest.json")
    else:
        report.notes.append("there is no manifest.json: nothing shows that the files are whole")
    if key is not None:
        manifest, signature = (source.read(n) if n in names else None for n in (MANIFEST, SIGNATURE))
        for finding in signature_faults(manifest, signature, key):
            report.add(*finding)
        report.read.append(f"the signature, with {key.name}")
    elif SIGNATURE in names:
        report.notes.append("it is signed; the signature was not checked (give --key with the packer's public key)")


def _audit_file(name: str, data: bytes, report: Audit, configs: dict[str, Any]) -> None:
    """One file, by what its name says that it is; a name that says nothing is a finding."""
    path = PurePosixPath(name)
    suffix = path.suffix.lower()
    if any(part.startswith(".") for part in path.parts):
        report.add(name, "", "it is hidden")
    if suffix in WEIGHTS:
        faults = weights_faults(name, data, report.read)
    elif suffix in (".npy", ".npz"):
        faults = array_faults(data) if suffix == ".npy" else arrays_faults(name, data)
    elif suffix in IMAGES:
        faults = iter(()) if data.startswith(IMAGES[suffix]) else iter(["it is no picture"])
    elif name.lower().endswith((".nii", ".nii.gz")):
        faults = _volume_faults(name, data)
    elif suffix in CODE:
        faults = _code_faults(name, data)
    elif suffix in (*CONFIGS, *TEXTS, *LOGGING) or path.name in PLAIN_NAMES:
        faults = _text_faults(name, suffix, data, configs)
    else:
        faults = iter([f"a kind of file that the audit doesn't know ({suffix or 'no suffix'})"])
    for what in faults:
        found_key, _, rest = what.partition("\t")
        report.add(name, found_key if rest else "", rest or what)


def _code_faults(name: str, data: bytes) -> Iterator[str]:
    """Python, templates, scripts, and what pip runs: they must be those of this copy, byte for byte."""
    own = HOME / name
    if not own.is_file():
        yield "code of the bundle's own, which a run may import"
    elif own.read_bytes() != data:
        yield "code that differs from this copy's"


def _volume_faults(name: str, data: bytes) -> Iterator[str]:
    """A NIfTI, alone or compressed."""
    if name.lower().endswith(".gz"):
        size, head = 0, b""
        try:
            with gzip.open(io.BytesIO(data)) as f:
                while block := f.read(1 << 20):
                    head, size = head or block, size + len(block)
                    if size > MAX_VOLUME:
                        yield f"it unpacks to more than {MAX_VOLUME >> 30} GiB"
                        return
        except (OSError, EOFError, zlib.error):
            yield "it can't be unpacked"
            return
        data = head
    if data[344:348] not in (b"n+1\0", b"ni1\0") and data[4:8] != b"n+2\0":
        yield "it is no NIfTI"


def _text_faults(name: str, suffix: str, data: bytes, configs: dict[str, Any]) -> Iterator[str]:
    """A text, which is also parsed where programs parse it; JSON and YAML go into `configs`."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        yield "it is no text in UTF-8"
        return
    if "\0" in text:
        yield "a text with a zero byte"
    if suffix in CONFIGS:
        yield from _parse(name, suffix, text, configs)
    elif suffix in LOGGING:
        yield from logging_faults(text)
    elif PurePosixPath(name).name.startswith("requirements"):
        lines = [line.strip() for line in text.splitlines()]
        plain = [not line or line.startswith("#") or _REQUIREMENT.fullmatch(line) for line in lines]
        yield from (f"{line}\tnot a package of the usual index" for line, good in zip(lines, plain) if not good)


class _UniqueLoader(yaml.SafeLoader):
    """Of keys that appear twice, programs take one or the other."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        return _unique([(self.construct_object(key, deep=True), value) for key, value in node.value]) and (
            super().construct_mapping(node, deep)
        )


def _unique(pairs: list[tuple[Any, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key appears twice")
    return found


def _parse(name: str, suffix: str, text: str, configs: dict[str, Any]) -> Iterator[str]:
    try:
        if suffix == ".json":
            content = json.loads(text, object_pairs_hook=_unique)
        else:
            content = yaml.load(text, _UniqueLoader)
        keys = [key for key, _ in islice(flat(content), MAX_LEAVES + 1)]  # aliases of YAML can make many of few
        if len(keys) > MAX_LEAVES or any(key.count("#") > MAX_DEPTH for key in keys):
            raise ValueError(f"it has more than {MAX_LEAVES} values, or is more than {MAX_DEPTH} deep")
        configs[name] = content
    except (ValueError, TypeError, yaml.YAMLError, RecursionError, MemoryError) as e:
        yield f"it can't be read: {short(e)}"


def logging_faults(text: str) -> Iterator[str]:
    """What is wrong with a config of Python's logging, which evaluates `class`, `args` and `kwargs`; key, tab, fault."""
    parser = configparser.RawConfigParser()
    try:
        parser.read_string(text)
    except configparser.Error as e:
        yield f"it can't be read: {short(e)}"
        return
    for section in (parser.default_section, *parser.sections()):
        if not _LOG_SECTION.fullmatch(section):
            yield f"{section}\tnot a part of a config of logging, which other programs may read"
        for name, value in parser[section].items():
            if "%(" in value and name not in ("format", "datefmt", "style"):
                yield f"{section}.{name}\t{short(value)} is put together from other values, and evaluated"
            if name == "class" and value.strip() not in LOG_CLASSES and not section.startswith("logger"):
                yield f"{section}.class\t{short(value)} is called, which is not on the list"
            if name in ("args", "kwargs", "defaults"):
                yield from (f"{section}.{name}\t{what}" for what in _argument_faults(value))


def _argument_faults(value: str) -> Iterator[str]:
    try:
        tree = ast.parse(value.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        yield f"{short(value)} can't be read"
        return
    streams = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n) in ("sys.stdout", "sys.stderr")]
    fine = {id(node) for stream in streams for node in ast.walk(stream)}
    for node in ast.walk(tree):
        if type(node) not in LOG_ARGS and id(node) not in fine:
            yield f"{short(value)} is more than values, and is evaluated"
            return
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and list(name_faults(node.value)):
            yield f"{short(node.value)} is a file outside of the bundle"


def _audit_content(name: str, content: Any, names: list[str], report: Audit) -> None:
    """What MONAI does with files of a certain name."""
    file = PurePosixPath(name).name
    if file.startswith("large_files") or isinstance(content, dict) and "large_files" in content:
        for key, what in download_faults(content, names):
            report.add(name, key, what)
        report.notes.append(f"what {name} downloads was not looked at: audit again once it is there")
    for key, what in shape_faults(content):
        report.add(name, key, what)
    if isinstance(content, dict) and "schema" in content and "network_data_format" in content:
        if not str(content["schema"]).startswith(SCHEMAS):
            report.add(
                name, "schema", f"{short(content['schema'])} is downloaded by verify_metadata (expected {SCHEMAS}...)"
            )
    if file == "metadata.json":
        needs = content.get("required_packages_version") or {} if isinstance(content, dict) else None
        if not isinstance(needs, dict) or not all(isinstance(each, str) for pair in needs.items() for each in pair):
            report.add(name, "", "it is no metadata: expected keys, and required_packages_version with a version a package")
        elif not all(re.fullmatch(r"[\w.\-]+", package) for package in needs):
            report.add(name, "required_packages_version", "it has what is no name of a package")
    if file == "settings.json" and isinstance(content, dict) and "weights_sha256" in content:
        report.read.append(f"{name}: weights with SHA-256 {short(content['weights_sha256'])[:12]}...")


def download_faults(content: Any, names: list[str]) -> Iterator[tuple[str, str]]:
    """Key and fault of what `large_files.yml` would download, and where to."""
    files = content.get("large_files") if isinstance(content, dict) else None
    if not isinstance(files, list) or not all(isinstance(each, dict) for each in files):
        yield "large_files", "it is no list of files"
        return
    there = {name.lower() for name in names}
    for number, each in enumerate(files):
        key = f"large_files#{number}"
        path, url, digest = (str(each.get(k) or "") for k in ("path", "url", "hash_val"))
        yield from ((f"{key}#path", f"{short(path)}: {what}") for what in name_faults(path))
        if PurePosixPath(path).as_posix().lower() in there or not path.lower().endswith((*WEIGHTS, *DATA)):
            yield f"{key}#path", f"{short(path)} would replace a file, or is neither weights nor data"
        if not url.startswith("https://"):
            yield f"{key}#url", f"{short(url)} (expected https)"
        if not re.fullmatch(r"[0-9a-fA-F]{32,128}", digest):
            yield f"{key}#hash_val", "the download is not checked: it has no hash"
        if unknown := sorted(map(str, each.keys() - set(DOWNLOADS))):
            yield key, f"{', '.join(unknown)} would be handed to the download"


def shape_faults(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Key and fault of the shapes in metadata, whose texts MONAI evaluates: ``"32 * n"``, ``"2**p"``."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for name, value in items:
        place = f"{key}#{name}" if key else str(name)
        if name != "spatial_shape":
            yield from shape_faults(value, place)
            continue
        for each in value if isinstance(value, list) else [value]:
            plain = isinstance(each, (int, float)) or each is None or each == "*" or str(each)[:1] in ("$", "@", "%")
            if not plain and not _is_shape(each):
                yield place, f"{short(each)} is evaluated (expected numbers, n and p)"


def _is_shape(text: Any) -> bool:
    if not isinstance(text, str) or len(text) > 40:
        return False
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    powers = [node for node in nodes if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)]
    small = all(isinstance(node.right, ast.Name) or getattr(node.right, "value", 99) in range(8) for node in powers)
    numbers = [node.value for node in nodes if isinstance(node, ast.Constant)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    plain = all(type(n) is int and n < 10_000 for n in numbers) and names <= {"n", "p"}
    return small and plain and len(powers) < 2 and all(isinstance(node, SHAPE_NODES) for node in nodes)
