"""The server that all clients ask, started once, and each worker's run, made once."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.serving.server import Server, running
from tests.clients.server import environment, run_cases
from tests.clients.talking_model import talking_model
from tests.conftest import once


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the model; its name is the model's id."""
    place, lock = once(tmp_path_factory, "talking-model")
    with lock.open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if not (place / "tiny" / "tokenizer.json").is_file():
            talking_model(place / "tiny")
    return place / "tiny"


@pytest.fixture(scope="session")
def server(model: Path) -> Iterator[Server]:
    """A server of the model with two keys."""
    with running(model) as server:
        yield server


@pytest.fixture(scope="session")
def fault_of(server: Server) -> Callable[[str, str, str], str]:
    """The fault of one case of one worker in one environment; the worker runs once, with its first case."""
    runs: dict[tuple[str, str], dict[str, str]] = {}

    def fault(name: str, worker: str, case: str) -> str:
        if (name, worker) not in runs:
            runs[name, worker] = run_cases(environment(name), worker, server.url)
        return runs[name, worker][case]

    return fault
