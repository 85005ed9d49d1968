"""What lies in a pipeline's folder, each thing under the entry of the ledger that answers for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sprat.errors import TrustError
from sprat.files import digest, lock
from sprat.files.atomic import is_temporary
from sprat.trust import run_record
from sprat.trust.ledger import LEDGER_NAME
from sprat.trust.ledger_state import LedgerState

_SET_ASIDE_WITHOUT_DIGEST = "it was set aside without a digest, because it holds a link or another thing that has none"


@dataclass
class FolderContents:
    """A pipeline's folder as it is.

    Attributes:
        runs: folders of finished runs, in the order of their finish.
        set_aside: names of set-aside folders that are as they were when they were renamed.
        unfinished: names of folders of runs that are not finished.
        unverified: names of what nobody answers for and nobody reads, with the reason where it is not plain.
        errors: (name, sentence) of all that is not as it was entered, or was never entered.
    """

    runs: list[Path] = field(default_factory=list)
    set_aside: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    unverified: list[str] = field(default_factory=list)
    errors: list[tuple[str, str]] = field(default_factory=list)


def scan_folder(folder: Path, state: LedgerState) -> FolderContents:
    """Everything in the folder ``folder`` but its ledger and lock, held against ``state``."""
    contents = FolderContents()
    pending = [folder]
    while pending:
        for path in sorted(pending.pop().iterdir()):
            name = path.relative_to(folder).as_posix()
            is_own = name == LEDGER_NAME or (name == lock.LOCK_NAME and lock.is_lock(path))
            if not is_own and _classify(path, name, state, contents):
                pending.append(path)
    contents.runs.sort(key=run_record.finish_order)
    for name, body in sorted(state.set_aside.items()):
        if body["finished"] and not (folder / name).is_dir():
            contents.errors.append((name, "it was set aside as a finished run and is not there"))
    in_runs = tuple(f"{name}/" for name in state.runs)
    missing = [name for name in state.files if not name.startswith(in_runs) and not (folder / name).exists()]
    contents.errors += [(name, "it is not there") for name in sorted(missing)]
    return contents


def _classify(path: Path, name: str, state: LedgerState, contents: FolderContents) -> bool:
    """Put ``path`` where it belongs in ``contents``; True for a folder that is to be looked into."""
    if path.is_symlink() or not (path.is_file() or path.is_dir()):
        contents.errors.append((name, "a link, a pipe or a device proves nothing"))
    elif name in state.files:
        _check_file(path, name, state.files[name], contents)
    elif path.is_file():
        if state.is_legacy or is_temporary(path.name):
            contents.unverified.append(name)
        else:
            contents.errors.append((name, "no run wrote it and the ledger does not know it"))
    elif ".old-" in path.name:
        _check_set_aside(path, name, state, contents)
    elif (path / "run.json").is_file():
        contents.runs.append(path)
    elif (path / "open.json").is_file():
        contents.unfinished.append(name)
    else:
        return True
    return False


def _check_file(path: Path, name: str, expected: str, contents: FolderContents) -> None:
    """A file or folder that was entered by its digest."""
    try:
        message = "" if digest.of_path(path) == expected else "it was changed after it was entered in the ledger"
    except TrustError as error:
        message = error.what
    if message:
        contents.errors.append((name, message))


def _check_set_aside(path: Path, name: str, state: LedgerState, contents: FolderContents) -> None:
    """A folder that was set aside."""
    body = state.set_aside.get(name)
    if body is None and not state.is_legacy:
        contents.errors.append((name, "the ledger does not know that it was set aside"))
    elif body is None or (state.is_legacy and "digest" not in body):
        contents.unverified.append(name)
    elif run_record.run_folder_digest(path) != body.get("digest"):
        contents.errors.append((name, "it was changed after it was set aside"))
    elif not body["digest"]:
        contents.unverified.append(f"{name} ({_SET_ASIDE_WITHOUT_DIGEST})")
    else:
        contents.set_aside.append(name)
