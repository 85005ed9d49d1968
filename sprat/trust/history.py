"""What the entries of a road's ledger say together, and which of them do not fit.

road       the root: first entry, once; ledgers from before it have none, and are ``old``
run        a run is finished; the same run again only after it was set aside
set-aside  a run's folder was renamed to ``to``, or (``to`` is null) was gone when the run was made again
files      the digest of a file or folder of the road that belongs to no run: recipe, corpus, report
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from sprat.trust.ledger import FILES, ROOT, RUN, SET_ASIDE


@dataclass
class History:
    """The state that a ledger's entries lead to.

    Attributes:
        root: hash of the first entry.
        old: written before ledgers had a root; then set-aside folders, recipe, corpus and report are not bound.
        runs: body of the entry of each finished run that was not set aside since, by its folder.
        aside: body of the entry of each folder that was set aside, by its name now.
        files: digest of each file or folder that belongs to no run, by its path.
        again: runs that were gone when they were made again.
        faults: what no road writes, one sentence each.
    """

    root: str = ""
    old: bool = False
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    aside: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    again: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, entries: list[dict[str, Any]]) -> History:
        """Read ``entries`` (see ``Ledger.entries``) in order."""
        found = cls()
        found.old = bool(entries) and entries[0]["kind"] != ROOT
        found.root = str(entries[0]["hash"]) if entries else ""
        for number, entry in enumerate(entries):
            try:
                fault = found._take(entry["kind"], entry["body"], number)
            except (KeyError, TypeError, ValueError, AttributeError):
                fault = "is not what a road writes"
            if fault:
                found.faults.append(f"entry {number} {fault}")
        return found

    def _take(self, kind: str, body: dict[str, Any], number: int) -> str:
        """Move on by one entry; returns its fault, if it has one."""
        if kind == ROOT:
            return "" if number == 0 else "is a second root"
        if kind == RUN:
            name = inside(body["run"])
            twice = name in self.runs
            self.runs[name] = body
            return f"replaces the finished run {name!r}, which was not set aside" if twice else ""
        if kind == SET_ASIDE:
            return self._set_aside(inside(body["run"]), body)
        if kind == FILES:
            self.files[inside(body["path"])] = str(body["digest"])
            return ""
        return f"is of no kind that a road writes: {kind!r}"

    def _set_aside(self, name: str, body: dict[str, Any]) -> str:
        """The run ``name`` was renamed, or was gone."""
        was_finished = self.runs.pop(name, None) is not None
        # A report in the run's folder went with it, and is under the digest of the set-aside folder.
        self.files = {path: known for path, known in self.files.items() if not path.startswith(f"{name}/")}
        if body["to"] is None:
            self.again.add(name)
            return ""
        to = inside(body["to"])
        before = self.aside.get(to)
        self.aside[to] = {**body, "finished": was_finished or bool(before and before["finished"])}
        other = before is not None and before.get("digest") != body.get("digest")
        return f"sets aside to {to!r}, where another run lies" if other else ""

    def missing(self) -> list[str]:
        """Runs that were gone and were not made again."""
        return sorted(self.again - self.runs.keys())


def inside(name: Any) -> str:
    """``name`` if it is the plain path of something in the road's folder.

    Raises:
        ValueError: it is no such path.
    """
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or path.as_posix() != name or "\0" in name:
        raise ValueError(f"not a path in the road: {name!r}")
    return str(name)
