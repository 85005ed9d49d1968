"""Progress of a pipeline on stderr: a bar for each stage that runs, and a line for each that is done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sprat.cli.verb import print_err
from sprat.pipeline.graph import OnProgress


@contextmanager
def stage_progress(folder: Path) -> Iterator[OnProgress]:
    """Yield the callback of ``graph.run_stages``: bars on a terminal, a line for each start and end elsewhere."""
    if not sys.stderr.isatty():
        yield print_event
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description:<16}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        yield _StageBars(bars, folder)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback for ``(done, total)``: a bar on a terminal, silence elsewhere."""
    from rich import progress
    from rich.console import Console

    columns = (*progress.Progress.get_default_columns(), progress.MofNCompleteColumn())
    console = Console(stderr=True)
    with progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def print_event(stage: str, event: str, seconds: float) -> None:
    """Print that ``stage`` starts, how long it took, or its own message."""
    if event != "runs":
        print_err(f"sprat: {stage} {event}" + (f" in {seconds:.0f} s" if seconds else ""))


class _StageBars:
    """One bar for each stage that runs; how far it is, is read from its run folder."""

    def __init__(self, bars: Any, folder: Path) -> None:
        self._bars, self._folder = bars, folder
        self._tasks: dict[str, Any] = {}

    def __call__(self, stage: str, event: str, seconds: float) -> None:
        from sprat.trust.run_record import read_progress

        if event == "starts":
            self._tasks[stage] = self._bars.add_task(stage, total=None)
        elif event == "runs":
            step, steps = read_progress(self._folder / stage)
            self._bars.update(self._tasks[stage], completed=step, total=steps or None)
        elif event == "done":
            self._bars.remove_task(self._tasks.pop(stage))
            self._bars.console.print(f"{stage} done in {seconds:.0f} s")
        else:
            self._bars.console.print(f"{stage} {event}")
