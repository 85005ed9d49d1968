"""An append-only list of what was done, chained by hash: no entry can change without all later ones.

One line of canonical JSON per entry: ``{"body":…,"hash":…,"index":…,"kind":…,"prev":…,"time":…}``.
``hash`` is the SHA-256 of the line without it, ``prev`` the hash of the line before (64 zeros for the
first). Because the JSON must be canonical to the byte, a flipped bit anywhere is seen. A chain alone
cannot show that its last entries were cut off; ``verify`` sees that, since each run must have its entry.

A line without its newline was never acknowledged (the process died in the write): the next append
cuts it off and goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sprat.errors import TrustError
from sprat.trust import atomic, digest

_FIRST = "0" * 64


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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._alone():
            lines = self._mend()
            prev, index = _FIRST, len(lines)
            if lines:
                fault = _fault(lines[-1])
                if fault:
                    raise TrustError(
                        f"the ledger's last entry {fault}", where=f"{self.path}:{index}", todo="see verify"
                    )
                prev = json.loads(lines[-1])["hash"]
            entry = {"index": index, "kind": kind, "time": now(), "prev": prev, "body": body}
            entry["hash"] = digest.value(entry)
            atomic.append_line(self.path, digest.canonical(entry))
        return entry

    def entries(self) -> list[dict[str, Any]]:
        """All acknowledged entries that can be read, in order; damage is told by ``check``."""
        return [json.loads(line) for line in self._read()[0] if not _fault(line)]

    def check(self) -> list[str]:
        """The faults of the chain, one sentence each; empty when it holds."""
        if not self.path.is_file():
            return [f"there is no ledger at {self.path.name}"]
        lines, torn = self._read()
        faults = []
        prev = _FIRST
        for index, line in enumerate(lines):
            fault = _fault(line)
            if fault:
                faults.append(f"line {index + 1} {fault}")
                prev = ""
                continue
            entry = json.loads(line)
            if entry["index"] != index:
                faults.append(f"line {index + 1} says that it is entry {entry['index']}")
            if prev and entry["prev"] != prev:
                faults.append(f"line {index + 1} does not follow from the line before it")
            prev = entry["hash"]
        if torn:
            faults.append("the last line is torn (its write was cut off)")
        return faults

    def _read(self) -> tuple[list[str], bytes]:
        """The whole lines as text, and the unfinished tail."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return [], b""
        # Latin-1 keeps one character per byte, and unlike UTF-8 it cannot fail on damage.
        *lines, torn = content.split(b"\n")
        return [line.decode("latin-1") for line in lines], torn

    def _mend(self) -> list[str]:
        """Cut off an unfinished tail; returns the whole lines."""
        lines, torn = self._read()
        if torn:
            os.truncate(self.path, self.path.stat().st_size - len(torn))
        return lines

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with open(self.path, "ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _fault(line: str) -> str:
    """What is wrong with this line by itself, or an empty string."""
    try:
        entry = json.loads(line)
        claimed = entry.pop("hash")
        if claimed != digest.value(entry):
            return "does not match its own hash"
        whole = {**entry, "hash": claimed}
        if set(whole) != {"index", "kind", "time", "prev", "body", "hash"} or digest.canonical(whole) != line:
            return "is not written as an entry is"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "cannot be read"
    return ""
