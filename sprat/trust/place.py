"""What lies in a road's folder, each thing under the entry of the ledger that answers for it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from sprat.errors import TrustError
from sprat.trust import digest, lock, record
from sprat.trust.history import History
from sprat.trust.ledger import NAME

_NO_DIGEST = "it was set aside without a digest, because it holds a link or another thing that has none"
_PARTLY = re.compile(r"\..+\.tmp-\d+")


@dataclass
class Place:
    """A road's folder as it is.

    Attributes:
        runs: folders of finished runs, in the order of their finish.
        aside: names of set-aside folders that are as they were when they were renamed.
        unfinished: names of folders of runs that are not finished.
        unproved: names of what nobody answers for and nobody reads, with the reason where it is not plain.
        faults: (name, sentence) of all that is not as it was entered, or was never entered.
    """

    runs: list[Path] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    unproved: list[str] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)


def survey(road: Path, history: History) -> Place:
    """Everything in the folder ``road`` but its ledger and lock, held against ``history``."""
    here = Place()
    waiting = [road]
    while waiting:
        for path in sorted(waiting.pop().iterdir()):
            name = path.relative_to(road).as_posix()
            ours = name == NAME or (name == lock.NAME and lock.is_lock(path))
            if not ours and _sort(path, name, history, here):
                waiting.append(path)
    here.runs.sort(key=lambda run: (str((record.read_json(run / "run.json") or {}).get("finished")), str(run)))
    here.faults += [
        (name, "it was set aside as a finished run and is not there")
        for name, body in sorted(history.aside.items())
        if body["finished"] and not (road / name).is_dir()
    ]
    in_runs = tuple(f"{name}/" for name in history.runs)
    gone = [name for name in history.files if not name.startswith(in_runs) and not (road / name).exists()]
    here.faults += [(name, "it is not there") for name in sorted(gone)]
    return here


def written_partly(name: str) -> bool:
    """Whether a file of this name is a write that was cut off (see ``atomic.replacing``)."""
    return _PARTLY.fullmatch(name) is not None


def _sort(path: Path, name: str, history: History, here: Place) -> bool:
    """Put ``path`` where it belongs in ``here``; True for a folder that is to be looked into."""
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        here.faults.append((name, "a link, a pipe or a device proves nothing"))
    elif name in history.files:
        _bound(path, name, history.files[name], here)
    elif path.is_file():
        if history.old or written_partly(path.name):
            here.unproved.append(name)
        else:
            here.faults.append((name, "no run wrote it and the ledger does not know it"))
    elif ".old-" in path.name:
        _aside(path, name, history, here)
    elif (path / "run.json").is_file():
        here.runs.append(path)
    elif (path / "open.json").is_file():
        here.unfinished.append(name)
    else:
        return True
    return False


def _bound(path: Path, name: str, known: str, here: Place) -> None:
    """A file or folder that was entered by its digest."""
    try:
        fault = "" if digest.content(path) == known else "it was changed after it was entered in the ledger"
    except TrustError as error:
        fault = error.what
    if fault:
        here.faults.append((name, fault))


def _aside(path: Path, name: str, history: History, here: Place) -> None:
    """A folder that was set aside."""
    body = history.aside.get(name)
    if body is None and not history.old:
        here.faults.append((name, "the ledger does not know that it was set aside"))
    elif body is None or (history.old and "digest" not in body):
        here.unproved.append(name)
    elif record.content_of(path) != body.get("digest"):
        here.faults.append((name, "it was changed after it was set aside"))
    elif not body["digest"]:
        here.unproved.append(f"{name} ({_NO_DIGEST})")
    else:
        here.aside.append(name)
