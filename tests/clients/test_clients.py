"""Unchanged clients get what their own documentation promises: each case runs in the client's own environment.

The cases, and what they expect, stand in ``workers/``. Where an environment is not made they skip; ``make clients``
makes them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.serving.server import Server
from tests.clients.server import case_names, environment

RUNS = (
    ("clients", "openai_chat_cases"), ("clients-openai3", "openai_chat_cases"),
    ("clients", "openai_tools_cases"), ("clients-openai3", "openai_tools_cases"),
    ("clients", "openai_other_cases"), ("clients-openai3", "openai_other_cases"),
    ("clients", "openai_responses_cases"), ("clients-openai3", "openai_responses_cases"),
    ("clients", "deepseek_cases"), ("clients-openai3", "deepseek_cases"),
    ("clients", "anthropic_cases"), ("clients", "litellm_cases"), ("clients", "langchain_cases"),
)  # fmt: skip
CASES = [(name, worker, case) for name, worker in RUNS for case in case_names(worker)]


@pytest.mark.parametrize(("name", "worker", "case"), CASES)
def test_a_client(name: str, worker: str, case: str, fault_of: Callable[[str, str, str], str]) -> None:
    fault = fault_of(name, worker, case)
    assert not fault, fault


def test_a_client_that_is_not_there_is_a_failure_where_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPRAT_REQUIRE_CLIENTS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="python -m bench.oracles no-such"):
        environment("no-such")
    monkeypatch.setenv("SPRAT_REQUIRE_CLIENTS", "1")
    with pytest.raises(pytest.fail.Exception, match="python -m bench.oracles no-such"):
        environment("no-such")


def test_no_client_made_the_server_stumble(server: Server, fault_of: Callable[[str, str, str], str]) -> None:
    for name, worker in RUNS:
        fault_of(name, worker, case_names(worker)[0])
    assert server.process.poll() is None and not server.trace, server.trace
