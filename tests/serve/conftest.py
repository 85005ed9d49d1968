"""A server that several tests of this folder ask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.process import Served, served_model
from tests.unit.serve.live import tiny_model


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """``sprat serve`` with a tiny random model by the name of smol."""
    folder = tmp_path_factory.mktemp("served")
    tiny_model(folder)
    with served_model(folder) as server:
        yield server
