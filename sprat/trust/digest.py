"""SHA-256 of files, folders and JSON values: the names by which runs know their inputs and outputs.

A folder's digest is the SHA-256 of its listing, one ``<sha256>  <relative path>`` line per file in
the order of the paths. Times, modes and empty folders do not count, so a copy has the same digest.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sprat.errors import TrustError


def data(content: bytes) -> str:
    """SHA-256 (hex) of ``content``."""
    return hashlib.sha256(content).hexdigest()


def canonical(value: Any) -> str:
    """The one JSON text of ``value``: sorted keys, no spaces.

    >>> canonical({"b": 1, "a": [True, None]})
    '{"a":[true,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def value(content: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of ``content``."""
    return data(canonical(content).encode())


def file(path: str | Path) -> str:
    """SHA-256 (hex) of the file at ``path``.

    Raises:
        TrustError: there is no such file.
    """
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise TrustError("cannot digest a file that is not there", where=str(path), todo="make it again") from None


def files(folder: str | Path) -> dict[str, str]:
    """SHA-256 of each file under ``folder`` by its relative path with forward slashes, in sorted order.

    Raises:
        TrustError: the folder is missing, or holds a link (a link proves nothing about its target).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TrustError("cannot digest a folder that is not there", where=str(folder), todo="make it again")
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise TrustError("a digested folder may hold no links", where=str(path), todo="copy the file in its place")
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = file(path)
    return dict(sorted(found.items()))


def listing(found: dict[str, str]) -> str:
    """The digest of a folder whose files have the digests ``found`` (see ``files``)."""
    return data("".join(f"{found[name]}  {name}\n" for name in sorted(found)).encode())


def tree(folder: str | Path) -> str:
    """SHA-256 (hex) of all files under ``folder``, names included.

    Raises:
        TrustError: see ``files``.
    """
    return listing(files(folder))
