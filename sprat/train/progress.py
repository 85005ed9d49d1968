"""A progress bar with rate and time left where there is a terminal; and word to those who watch from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sprat.trust.run import Run


@contextmanager
def progress_bar(run: Run, steps: int, done: int = 0, *, shown: bool = True) -> Iterator[Callable[[int, str], None]]:
    """Yields ``advance(done, note)`` for the ``steps`` of ``run``; other processes see them in ``record.pulse``."""
    run.start_progress(steps, done)
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as progress:
        task = progress.add_task(run.stage, total=steps, completed=done, note="")
        yield lambda now, note: progress.update(task, completed=now, note=note)
