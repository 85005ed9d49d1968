"""SHA-256 of files, folders and JSON values: the names by which runs know their inputs and outputs.

A folder's digest is the SHA-256 of its listing, one ``<sha256>  <relative path>`` line per file in
the order of the paths. Times, modes and empty folders do not count, so a copy has the same digest. A name
that would make two listings alike (one with a line end) is refused, and so is whatever is no plain file:
to read a pipe or a device may never end, and proves nothing.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from sprat.errors import TrustError
from sprat.files.json import canonical_json
from sprat.files.regular_file import open_regular_file


def of_bytes(content: bytes) -> str:
    """SHA-256 (hex) of ``content``."""
    return hashlib.sha256(content).hexdigest()


def of_json(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of ``value``."""
    return of_bytes(canonical_json(value).encode())


def of_file(path: str | Path) -> str:
    """SHA-256 (hex) of the file at ``path``.

    Raises:
        TrustError: there is no such file, or it is a pipe or a device.
    """
    try:
        with open_regular_file(path) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise TrustError("cannot digest a file that is not there", where=str(path), todo="make it again") from None


def of_files(folder: str | Path, *, follow: bool = False) -> dict[str, str]:
    """SHA-256 of each file under ``folder`` by its relative path with forward slashes, in sorted order.

    Args:
        follow: for a folder of the user's: a link to a file counts as that file; other links, pipes and devices,
            which nobody reads, are passed over, and a name that no listing can hold is written as JSON has it.

    Raises:
        TrustError: the folder is missing, or holds a link (a link proves nothing about its target), a pipe, a
            device, or a name with a line end or of bytes that are no UTF-8.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TrustError("cannot digest a folder that is not there", where=str(folder), todo="make it again")
    digests: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not follow:
            raise TrustError("a digested folder may hold no links", where=str(path), todo="copy the file in its place")
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            if "\n" in name or name != name.encode("utf-8", "replace").decode():
                if not follow:
                    raise TrustError("a file name that no listing can hold", where=repr(str(path)), todo="rename it")
                name = json.dumps(name)
            digests[name] = of_file(path)
        elif not follow and not path.is_dir():
            raise TrustError("not a plain file but a pipe or a device", where=str(path), todo="take it out")
    return dict(sorted(digests.items()))


def of_listing(digests: dict[str, str]) -> str:
    """The digest of a folder whose files have the digests ``digests`` (see ``of_files``)."""
    return of_bytes("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode())


def of_folder(folder: str | Path, *, follow: bool = False) -> str:
    """SHA-256 (hex) of all files under ``folder``, names included.

    Raises:
        TrustError: see ``of_files``.
    """
    return of_listing(of_files(folder, follow=follow))


def of_path(path: Path) -> str:
    """SHA-256 (hex) of the folder (see ``of_folder``) or file at ``path``."""
    return of_folder(path) if path.is_dir() else of_file(path)
