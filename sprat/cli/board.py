"""What a person sees while a road is walked: a bar for each stage that runs, and a line for each that is done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sprat.cli.verb import say

Told = Callable[[str, str, float], None]


@contextmanager
def board(road: Path) -> Iterator[Told]:
    """Yield the listener of ``graph.run_stages``: bars on a terminal, a line for each start and end elsewhere."""
    if not sys.stderr.isatty():
        yield narrate
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
        yield _Bars(bars, road)


@contextmanager
def count(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yield a listener of ``(done, of)``: a bar on a terminal, silence elsewhere."""
    from rich import progress
    from rich.console import Console

    columns = (*progress.Progress.get_default_columns(), progress.MofNCompleteColumn())
    console = Console(stderr=True)
    with progress.Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(title, total=None)
        yield lambda done, of: bars.update(task, completed=done, total=of)


def narrate(stage: str, what: str, seconds: float) -> None:
    """Say that ``stage`` starts, how long it took, or what it has to say itself."""
    if what != "runs":
        say(f"sprat: {stage} {what}" + (f" in {seconds:.0f} s" if seconds else ""))


class _Bars:
    """One bar for each stage that runs; how far it is, is read from its run folder."""

    def __init__(self, bars: Any, road: Path) -> None:
        self._bars, self._road = bars, road
        self._tasks: dict[str, Any] = {}

    def __call__(self, stage: str, what: str, seconds: float) -> None:
        from sprat.trust.run_record import read_progress

        if what == "starts":
            self._tasks[stage] = self._bars.add_task(stage, total=None)
        elif what == "runs":
            step, steps = read_progress(self._road / stage)
            self._bars.update(self._tasks[stage], completed=step, total=steps or None)
        elif what == "done":
            self._bars.remove_task(self._tasks.pop(stage))
            self._bars.console.print(f"{stage} done in {seconds:.0f} s")
        else:
            self._bars.console.print(f"{stage} {what}")
