"""Engines in processes of their own, and rounds in which each gets its turn.

Ratios come from one round at a time: within a round the engines run one after the other in a few seconds, so a slow
hour of the machine slows them alike. A round in which somebody else used our cores is marked; medians are over the
undisturbed rounds where there are at least three, else over all of them, and then the report says so.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from bench.inference import cores
from bench.oracles import ROOT, make_llama

SETTLE = 0.05  # seconds for the threads of the engine before to stop spinning
LEAST = 3  # undisturbed rounds that make a median


class WorkerError(RuntimeError):
    """An engine's process failed, or refused a command."""


class Worker:
    """One engine in a process bound to ``on`` cores; ``ask`` sends a command and waits for its answer.

    ``options`` are words that the worker knows (see ``sprat_worker``).
    """

    def __init__(self, name: str, on: list[int], place: Path, options: str = "") -> None:
        python = str(make_llama()) if name == "llama" else sys.executable
        command = [
            python,
            "-m",
            f"bench.inference.{name}_worker",
            ",".join(map(str, on)),
            f"{place}::{options}" if options else str(place),
        ]
        self.name, self.on = name, on
        self.log = open(place.parent / f"{name}.log", "w+")  # noqa: SIM115 - closed in ``close``
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=ROOT
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, do: str, **command: Any) -> dict[str, Any]:
        """The worker's answer.

        Raises:
            WorkerError: the worker died, or the command failed there.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **command}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self.process.stdout.readline()
        if not line:
            raise WorkerError(f"{self.name} ended with {self.process.wait()}: see {self.log.name}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}, {do}: {answer['error']}; see {self.log.name}")
        return answer

    def time(self, do: str, **command: Any) -> Reading:
        """``ask`` for a measurement, and look at who else used the cores meanwhile."""
        time.sleep(SETTLE)
        watch = cores.Watch(self.on)
        figures = self.ask(do, **command)
        return Reading(figures, watch.read(figures["processor"]))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


@dataclass(frozen=True)
class Reading:
    """One measurement: the worker's figures, and the shares of the cores that others took."""

    figures: dict[str, Any]
    share: dict[str, float]

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return float(self.figures["tokens"] / self.figures["seconds"])

    @property
    def disturbed(self) -> bool:
        """Whether it could not get its cores."""
        return cores.disturbed(self.share)


@dataclass
class Series:
    """The readings of one figure, by engine; reading ``i`` of each engine belongs to round ``i``."""

    readings: dict[str, list[Reading]] = field(default_factory=dict)

    def add(self, engine: str, reading: Reading) -> None:
        """Append a reading of this round."""
        self.readings.setdefault(engine, []).append(reading)

    def kept(self, *engines: str) -> list[int]:
        """The rounds that count for ``engines``: undisturbed ones, or all where those are too few."""
        rounds = range(min(len(self.readings[engine]) for engine in engines))
        quiet = [i for i in rounds if not any(self.readings[engine][i].disturbed for engine in engines)]
        return quiet if len(quiet) >= min(LEAST, len(rounds)) else list(rounds)

    def rate(self, engine: str) -> float:
        """Median tokens per second."""
        return statistics.median(self.readings[engine][i].rate for i in self.kept(engine))

    def seconds(self, engine: str) -> float:
        """Median seconds."""
        return statistics.median(float(self.readings[engine][i].figures["seconds"]) for i in self.kept(engine))

    def ratio(self, ours: str, theirs: str) -> float:
        """Median over rounds of our rate over theirs."""
        pairs = [(self.readings[ours][i].rate, self.readings[theirs][i].rate) for i in self.kept(ours, theirs)]
        return statistics.median(a / b for a, b in pairs)

    @property
    def lost(self) -> tuple[int, int]:
        """(disturbed readings, all readings)."""
        every = [reading for readings in self.readings.values() for reading in readings]
        return sum(reading.disturbed for reading in every), len(every)


Turn = Callable[[int], Reading]


def rounds(count: int, turns: dict[str, dict[str, Turn]], say: Callable[[str], None]) -> dict[str, Series]:
    """``count`` rounds; in each, every figure of every engine, engines side by side.

    Args:
        turns: figure -> engine -> how to take one reading, given the number of the round.
        say: told of progress.
    """
    series = {figure: Series() for figure in turns}
    for number in range(count):
        for figure, engines in turns.items():
            say(f"round {number + 1} of {count}: {figure}")
            order: Iterable[str] = engines if number % 2 == 0 else reversed(list(engines))
            for engine in order:
                series[figure].add(engine, engines[engine](number))
    return series


def best(settings: Iterable[Any], measure: Callable[[Any], Reading], tries: int = 2) -> Any:
    """The setting with the highest rate in ``tries`` tries each; one that fails is out.

    Raises:
        WorkerError: no setting works.
    """
    rates: list[tuple[float, Any]] = []
    fault: WorkerError | None = None
    for setting in settings:
        try:
            rates.append((max(measure(setting).rate for _ in range(tries)), setting))
        except WorkerError as error:
            fault = error
    if not rates:
        raise fault or WorkerError("no settings to choose from")
    return max(rates, key=lambda pair: pair[0])[1]
