"""An append-only list of what was done, chained by hash: no entry can change without all later ones.

One line of canonical JSON per entry: ``{"body":…,"hash":…,"index":…,"kind":…,"prev":…,"time":…}``.
``hash`` is the SHA-256 of the line without it, ``prev`` the hash of the line before (64 zeros for the
first). Because the JSON must be canonical to the byte, a flipped bit anywhere is seen.

A pipeline's ledger is the ``ledger.jsonl`` of its folder, and is found there and nowhere else. Its first entry, the
root, holds a number drawn at random; every run writes the root's hash into its ``run.json``, so that a run of
one pipeline cannot be entered in the ledger of another. What the entries mean is in ``history``.

A chain alone cannot show that its last entries were cut off with the files they speak of, or that all of it
was written anew. For that someone must have kept its ``head_hash``: see SECURITY.md.

A line without its newline was never acknowledged (the process died in the write): the next append
cuts it off and goes on. To append, only the last line is read, however long the ledger is.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sprat.errors import TrustError
from sprat.files import atomic, digest
from sprat.files.json import canonical_json
from sprat.files.regular_file import open_regular_file, read_bytes

LEDGER_NAME = "ledger.jsonl"
KIND_ROOT, KIND_RUN, KIND_SET_ASIDE, KIND_FILE = "road", "run", "set-aside", "files"
_NO_PREVIOUS_HASH = "0" * 64
_FORMAT_VERSION = 2
_BLOCK_BYTES = 4096


class Ledger:
    """The ledger in the file at ``path`` (made by the first ``append``)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        """Add an entry and return it, once it is on the disk. Safe among processes.

        Raises:
            TrustError: the last line is damaged, so nothing can be chained to it.
            MachineError: the disk is full; the ledger is as it was.
        """
        with self._locked():
            return self._append(kind, body)

    def root_hash(self) -> str:
        """The hash of the first entry, by which runs know their ledger; an empty ledger is given its root.

        Raises:
            TrustError: the first entry is damaged.
        """
        with self._locked():
            if not self._truncate_torn_line():
                return str(self._append(KIND_ROOT, {"format": _FORMAT_VERSION, "nonce": secrets.token_hex(16)})["hash"])
            with open(self.path, "rb") as stream:
                line = stream.readline().rstrip(b"\n").decode("latin-1")
        if error := _line_error(line):
            raise TrustError(f"the ledger's first entry {error}", where=f"{self.path}:1", todo="see verify")
        return str(json.loads(line)["hash"])

    def head_hash(self) -> str:
        """The hash of the last entry that can be read: who keeps it elsewhere sees whatever changes later."""
        return next((str(json.loads(line)["hash"]) for line in reversed(self._read()[0]) if not _line_error(line)), "")

    def add_file(self, path: Path) -> None:
        """Enter the digest of a file or folder of the pipeline that belongs to no run, unless it is entered already.

        Raises:
            TrustError: it is not there or cannot be digested.
        """
        name = path.resolve().relative_to(self.path.parent.resolve()).as_posix()
        path_digest = digest.of_path(path)
        known_entry = self.last_entry("path", name)
        if known_entry is None or known_entry["body"].get("digest") != path_digest:
            self.append(KIND_FILE, {"path": name, "digest": path_digest})

    def last_entry(self, key: str, value: str) -> dict[str, Any] | None:
        """The last entry whose body has ``value`` under ``key``; only lines that hold such a pair are parsed."""
        pair = f"{json.dumps(key)}:{json.dumps(value)}".encode()
        content = read_bytes(self.path)
        end = content.rfind(b"\n") + 1
        while (position := content.rfind(pair, 0, end)) >= 0:
            end = content.rfind(b"\n", 0, position) + 1
            line = content[end : content.index(b"\n", position)].decode("latin-1")
            if not _line_error(line):
                entry: dict[str, Any] = json.loads(line)
                if isinstance(entry["body"], dict) and entry["body"].get(key) == value:
                    return entry
        return None

    def entries(self) -> list[dict[str, Any]]:
        """All acknowledged entries that can be read, in order; damage is told by ``find_errors``."""
        return [json.loads(line) for line in self._read()[0] if not _line_error(line)]

    def find_errors(self) -> list[str]:
        """The faults of the chain, one sentence each; empty when it holds."""
        if not self.path.is_file():
            return [f"there is no ledger at {self.path.name}"]
        lines, torn = self._read()
        errors = []
        prev = _NO_PREVIOUS_HASH
        for index, line in enumerate(lines):
            if error := _line_error(line):
                errors.append(f"line {index + 1} {error}")
                prev = ""
                continue
            entry = json.loads(line)
            if entry["index"] != index:
                errors.append(f"line {index + 1} says that it is entry {entry['index']}")
            if prev and entry["prev"] != prev:
                errors.append(f"line {index + 1} does not follow from the line before it")
            prev = entry["hash"]
        if torn:
            errors.append("the last line is torn (its write was cut off)")
        return errors

    def _append(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        """``append``, for who holds the lock."""
        last, prev, index = self._truncate_torn_line(), _NO_PREVIOUS_HASH, 0
        if last:
            if error := _line_error(last):
                raise TrustError(f"the ledger's last entry {error}", where=str(self.path), todo="see verify")
            last_entry = json.loads(last)
            prev, index = last_entry["hash"], last_entry["index"] + 1
        entry = {"index": index, "kind": kind, "time": utc_now(), "prev": prev, "body": body}
        entry["hash"] = digest.of_json(entry)
        atomic.append_line(self.path, canonical_json(entry))
        return entry

    def _read(self) -> tuple[list[str], bytes]:
        """The whole lines as text, and the unfinished tail."""
        # Latin-1 keeps one character per byte, and unlike UTF-8 it cannot fail on damage.
        *lines, torn = read_bytes(self.path).split(b"\n")
        return [line.decode("latin-1") for line in lines], torn

    def _truncate_torn_line(self) -> str:
        """Cut off an unfinished tail; returns the last whole line, empty where there is none. Reads the end only."""
        with open(self.path, "rb+") as stream:
            position = size = stream.seek(0, os.SEEK_END)
            tail = b""
            # Until the tail holds the end of the last whole line and that of the line before it.
            while position and tail.count(b"\n") < 2:
                step = min(position, max(_BLOCK_BYTES, len(tail)))
                position = stream.seek(position - step)
                tail = stream.read(step) + tail
            complete, newline, torn = tail.rpartition(b"\n")
            if torn:
                stream.truncate(size - len(torn))
            return complete.rpartition(b"\n")[2].decode("latin-1") if newline else ""

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            open_regular_file(self.path).close()
        with open(self.path, "ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def find_ledger_above(folder: Path) -> Ledger | None:
    """The ledger of the pipeline that ``folder`` lies in: the nearest ``ledger.jsonl`` in a folder above it."""
    paths = (parent / LEDGER_NAME for parent in folder.resolve().parents)
    return next((Ledger(path) for path in paths if path.is_file()), None)


def find_ledger(folder: Path) -> Ledger | None:
    """The ledger that answers for ``folder``, a pipeline or a run of one; None where there is none."""
    if not (folder / "run.json").is_file():
        return Ledger(folder / LEDGER_NAME) if (folder / LEDGER_NAME).is_file() else None
    return find_ledger_above(folder)


def utc_now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _line_error(line: str) -> str:
    """What is wrong with this line by itself, or an empty string."""
    try:
        entry = json.loads(line)
        claimed = entry.pop("hash")
        if claimed != digest.of_json(entry):
            return "does not match its own hash"
        fields = {"index", "kind", "time", "prev", "body"}
        if set(entry) != fields or canonical_json({**entry, "hash": claimed}) != line:
            return "is not written as an entry is"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "cannot be read"
    return ""
