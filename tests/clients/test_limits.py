"""What SDKs make of a server that is full: see ``workers/limits_cases.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.serving.server import running
from tests.clients.server import case_names, environment, run_cases


@pytest.fixture(scope="module")
def faults(model: Path) -> dict[str, str]:
    python = environment("clients")
    with running(model, "--max-num-seqs", "1", "--max-num-queued-reqs", "2") as server:
        return run_cases(python, "limits_cases", server.url)


@pytest.mark.parametrize("case", case_names("limits_cases"))
def test_a_full_server(case: str, faults: dict[str, str]) -> None:
    assert not faults[case], faults[case]
