"""What the entries of a pipeline's ledger say together, and which of them do not fit.

road       the root (named so in the file): first entry, once; ledgers from before it have none, and are legacy
run        a run is finished; the same run again only after it was set aside
set-aside  a run's folder was renamed to ``to``, or (``to`` is null) was gone when the run was made again
files      the digest of a file or folder of the pipeline that belongs to no run: recipe, corpus, report
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from sprat.trust.ledger import KIND_FILE, KIND_ROOT, KIND_RUN, KIND_SET_ASIDE


@dataclass
class LedgerState:
    """The state that a ledger's entries lead to.

    Attributes:
        root: hash of the first entry.
        is_legacy: written before ledgers had a root; then set-aside folders, recipe, corpus and report are not bound.
        runs: body of the entry of each finished run that was not set aside since, by its folder.
        set_aside: body of the entry of each folder that was set aside, by its name now.
        files: digest of each file or folder that belongs to no run, by its path.
        deleted: runs that were gone when they were made again.
        errors: what no pipeline writes, one sentence each.
    """

    root: str = ""
    is_legacy: bool = False
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    set_aside: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)

    @classmethod
    def from_entries(cls, entries: list[dict[str, Any]]) -> LedgerState:
        """Read ``entries`` (see ``Ledger.entries``) in order."""
        state = cls()
        state.is_legacy = bool(entries) and entries[0]["kind"] != KIND_ROOT
        state.root = str(entries[0]["hash"]) if entries else ""
        for number, entry in enumerate(entries):
            try:
                error = state._apply(entry["kind"], entry["body"], number)
            except (KeyError, TypeError, ValueError, AttributeError):
                error = "is not what a road writes"
            if error:
                state.errors.append(f"entry {number} {error}")
        return state

    def _apply(self, kind: str, body: dict[str, Any], number: int) -> str:
        """Move on by one entry; returns its fault, if it has one."""
        if kind == KIND_ROOT:
            return "" if number == 0 else "is a second root"
        if kind == KIND_RUN:
            name = check_relative_path(body["run"])
            is_duplicate = name in self.runs
            self.runs[name] = body
            return f"replaces the finished run {name!r}, which was not set aside" if is_duplicate else ""
        if kind == KIND_SET_ASIDE:
            return self._set_aside(check_relative_path(body["run"]), body)
        if kind == KIND_FILE:
            self.files[check_relative_path(body["path"])] = str(body["digest"])
            return ""
        return f"is of no kind that a road writes: {kind!r}"

    def _set_aside(self, name: str, body: dict[str, Any]) -> str:
        """The run ``name`` was renamed, or was gone."""
        was_finished = self.runs.pop(name, None) is not None
        # A report in the run's folder went with it, and is under the digest of the set-aside folder.
        self.files = {path: file_digest for path, file_digest in self.files.items() if not path.startswith(f"{name}/")}
        if body["to"] is None:
            self.deleted.add(name)
            return ""
        to = check_relative_path(body["to"])
        previous = self.set_aside.get(to)
        self.set_aside[to] = {**body, "finished": was_finished or bool(previous and previous["finished"])}
        conflicts = previous is not None and previous.get("digest") != body.get("digest")
        return f"sets aside to {to!r}, where another run lies" if conflicts else ""

    def deleted_runs(self) -> list[str]:
        """Runs that were gone and were not made again."""
        return sorted(self.deleted - self.runs.keys())


def check_relative_path(name: Any) -> str:
    """``name`` if it is the plain path of something in the pipeline's folder.

    Raises:
        ValueError: it is no such path.
    """
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or path.as_posix() != name or "\0" in name:
        raise ValueError(f"not a path in the road: {name!r}")
    return str(name)
