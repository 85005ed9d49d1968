"""A server that several tests of this folder ask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.serving.server import Server, running
from tests.clients.talking_model import talking_model


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``sprat serve`` with a tiny model that has learned to talk, by the name and with the key of docs/api.md."""
    folder = tmp_path_factory.mktemp("served") / "smol"
    talking_model(folder)
    with running(folder, keys=("secret",)) as server:
        yield server
