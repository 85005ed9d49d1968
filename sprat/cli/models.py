"""``sprat models``: which models are on this disk, and to remove one from the cache."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sprat.cli.verb import Result
from sprat.errors import ConfigError

if TYPE_CHECKING:
    from sprat.formats.model_list import ModelEntry

_WORDS_HELP = "Folders to look for models and runs in, beside the cache; or `rm` and the names to remove from it."
Words = Annotated[list[str] | None, typer.Argument(metavar="[DIR...] | rm NAME...", help=_WORDS_HELP)]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")]


def models(words: Words = None, yes: Yes = False) -> Result:
    """List the models in the cache, and those under a folder; `sprat models rm NAME` removes one from the cache.

    Example: sprat models runs
    """
    from sprat.formats.model_list import list_models

    if words and words[0] == "rm":
        return _remove(words[1:], yes)
    entries = list_models(*(words or ()))
    total = sum(entry.size for entry in entries)
    return Result({"models": [entry.to_dict() for entry in entries], "bytes": total}, _table(entries, total))


def _remove(names: list[str], yes: bool) -> Result:
    from sprat.formats.model_list import remove_model

    if not names:
        raise ConfigError("no model was named", where="models rm", todo="write sprat models rm NAME")
    if not yes and not sys.stdin.isatty():
        raise ConfigError("nobody is there to be asked", where="models rm", todo="add --yes")
    removed = []
    for name in names:
        if entry := remove_model(name, confirm=lambda entry: yes or _confirm(entry)):
            removed.append(entry)
    human = "\n".join(f"removed {entry.name}: {_megabytes(entry.size)}" for entry in removed) or "nothing was removed"
    return Result({"removed": [entry.name for entry in removed], "bytes": sum(entry.size for entry in removed)}, human)


def _confirm(entry: ModelEntry) -> bool:
    shared = ", which other programs share" if entry.path.is_dir() else ""
    question = f"remove {entry.name} ({_megabytes(entry.size)}) from the cache{shared}?"
    return bool(typer.confirm(question, err=True))


def _table(entries: list[ModelEntry], total: int) -> Any:
    """The entries as a table for a person, and what they take up."""
    from rich.table import Table

    if not entries:
        return "no models in the cache; sprat fetch smol brings one"
    table = Table(box=None, padding=(0, 2, 0, 0), caption=f"{_megabytes(total)} in all", caption_justify="left")
    for title in ("model", "architecture", "parameters", "weights", "on disk", "last used"):
        table.add_column(title, justify="right" if title in ("parameters", "on disk") else "left")
    for entry in entries:
        what = [entry.architecture, f"{entry.parameters / 1e6:,.2f} M", entry.kind]
        when = time.strftime("%Y-%m-%d", time.localtime(entry.last_used))
        shown = [f"cannot be read: {entry.fault}", "", ""] if entry.fault else what
        table.add_row(entry.name, *shown, _megabytes(entry.size), when)
    return table


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
