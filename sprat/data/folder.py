"""A folder of the user's data: which of its files are read, in which order, and a count of what is left out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from sprat.trust.stage_facts import ExcludedText

log = logging.getLogger(__name__)
_NAMES_PER_REASON = 3  # names that a tally keeps of each reason


class ExclusionTally:
    """Counts what is left out, by reason."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}
        self._counts: dict[str, int] = {}
        self._sizes: dict[str, int] = {}

    def add(self, why: str, name: str, size: int = 0) -> None:
        """``size`` bytes of ``name`` are left out because of ``why``, which reads well after a number."""
        self._counts[why] = self._counts.get(why, 0) + 1
        self._sizes[why] = self._sizes.get(why, 0) + size
        if self._counts[why] <= _NAMES_PER_REASON:
            self._names.setdefault(why, []).append(name)

    def excluded(self) -> tuple[ExcludedText, ...]:
        """One entry for each reason, in the order in which they came up."""
        counts = self._counts.items()
        return tuple(ExcludedText(why, count, self._sizes[why], tuple(self._names[why])) for why, count in counts)

    def __str__(self) -> str:
        return "; ".join(map(str, self.excluded()))


def walk_files(folder: Path, is_known: Callable[[Path], bool], known: str, tally: ExclusionTally) -> Iterator[Path]:
    """Files of a known kind below ``folder``, sorted, those of a folder before those of its subfolders.

    Links to folders are not followed; a link to a file is that file.

    Args:
        is_known: whether a file is of a known kind by its name.
        known: the kinds that are, as ``tally`` says it of the others.
        tally: is told of other kinds, hidden files and folders, broken links, pipes and devices.
    """
    for parent, folders, names in os.walk(folder):
        for name in sorted(folders + names):
            path = Path(parent, name)
            relative_name = path.relative_to(folder).as_posix()
            if name.startswith("."):
                tally.add("hidden files and folders", relative_name)
            elif path.is_symlink() and not path.is_file():
                tally.add("links that lead to no file", relative_name)
            elif path.is_dir():
                continue
            elif not path.is_file():
                tally.add("pipes and devices", relative_name)
            elif not is_known(path):
                tally.add(f"files of other kinds than {known}", relative_name)
            else:
                yield path
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def warn_of_excluded(excluded: Iterable[ExcludedText], where: str | Path) -> None:
    """Say what of the data at ``where`` is left out, a line for each reason."""
    for each in excluded:
        log.warning("left out of %s: %s", where, each)
