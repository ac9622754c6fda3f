# Copyright 2026 Survival Map contributors
# SPDX-License-Identifier: Apache-2.0
"""`manifest.json`: the SHA-256 of every file of a bundle, and the signature of its packer."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bundle.errors import InputError

MANIFEST = "manifest.json"
SIGNATURE = "manifest.json.sig"
FORMAT = 1


def manifest_of(files: dict[str, bytes]) -> bytes:
    """The manifest of the files of a bundle."""
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    return (json.dumps({"format": FORMAT, "files": digests}, indent=2) + "\n").encode()


def manifest_faults(names: Iterable[str], read: Callable[[str], bytes]) -> Iterator[tuple[str, str, str]]:
    """File, key and fault of what a bundle's files and its manifest don't agree on."""
    try:
        content = json.loads(read(MANIFEST))
        digests = content["files"]
        if not isinstance(digests, dict):
            raise TypeError("files is no table of digests by name")
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, this version reads {FORMAT}")
    except (ValueError, KeyError, TypeError, RecursionError, InputError) as e:
        yield MANIFEST, "", f"it can't be read: {e}"
        return
    there = set(names) - {MANIFEST, SIGNATURE}
    for name in sorted(there | digests.keys()):
        if name not in digests:
            yield name, "", "it is not in manifest.json"
        elif name not in there:
            yield name, "", "it is in manifest.json, but missing"
        else:
            try:
                digest = hashlib.sha256(read(name)).hexdigest()
            except InputError as e:
                digest = str(e)
            if digest != digests[name]:
                yield name, "", "its SHA-256 is not the one of manifest.json"


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise InputError("signatures need the package cryptography: pip install cryptography.") from None
    return ed25519


def _load_key(path: Path, private: bool) -> Any:
    ed25519 = _ed25519()
    from cryptography.hazmat.primitives import serialization

    kind = ed25519.Ed25519PrivateKey if private else ed25519.Ed25519PublicKey
    try:
        data = path.read_bytes()
        load = serialization.load_pem_private_key if private else serialization.load_pem_public_key
        key = load(data, password=None) if private else load(data)
    except OSError as e:
        raise InputError(f"{path} can't be read: {e.strerror} (expected a key).") from e
    except (ValueError, TypeError) as e:
        raise InputError(f"{path} is no {'private' if private else 'public'} key in PEM without a password.") from e
    if not isinstance(key, kind):
        raise InputError(f"{path} is no ed25519 key (make one: openssl genpkey -algorithm ed25519).")
    return key


def sign(manifest: bytes, key: Path) -> bytes:
    """The ed25519 signature of a manifest, as hexadecimal digits.

    Args:
        key: file of the private key in PEM, without a password.

    Raises:
        InputError: there is no such key, or the package cryptography is missing.
    """
    return _load_key(key, private=True).sign(manifest).hex().encode() + b"\n"


def signature_faults(manifest: bytes | None, signature: bytes | None, key: Path) -> Iterator[tuple[str, str, str]]:
    """File, key and fault of a bundle that was not signed, whole, by the owner of a public key (PEM).

    Raises:
        InputError: there is no such key, or the package cryptography is missing.
    """
    public = _load_key(key, private=False)
    from cryptography.exceptions import InvalidSignature

    if manifest is None or signature is None:
        yield SIGNATURE if manifest else MANIFEST, "", "the bundle is not signed"
        return
    try:
        public.verify(bytes.fromhex(signature.decode("ascii").strip()), manifest)
    except (InvalidSignature, ValueError):
        yield SIGNATURE, "", f"it is not the signature of the owner of {key.name}"
