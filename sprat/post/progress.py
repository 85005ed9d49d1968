"""A progress bar with rate and time left for what takes over two seconds; silence where there is no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def bar(name: str, total: int, done: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Yields ``advance(done, note)``."""
    console = Console(stderr=True)
    columns = (
        TextColumn(name),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:
        task = shown.add_task(name, total=total, completed=done, note="")

        def advance(now: int, note: str) -> None:
            shown.update(task, completed=now, note=note)

        yield advance
