"""A custom tool's input matches its pattern as a whole, whoever asks and however it comes; a wrong pattern is named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve import answers
from tests.serve.answers import PATHS
from tests.serve.lively import Lively, lively_server

PATTERNS = ("[a-c]{1,6}", "(yes|no)", r"^\d{2}-\d{2}$", r'"[é\\]{1,4}"', "(a\nb){1,2}", r"(?P<day>\d)\.")
SEEDS = 8


@pytest.fixture(scope="module")
def lively() -> Iterator[Lively]:
    with lively_server(("chatml", "deepseek"), ("ngram",)) as server:
        yield server


def asked(protocol: str, *patterns: str, choice: str = "required") -> dict[str, Any]:
    """A request with a custom tool for each pattern, and a function beside them."""
    names = [f"pick{index}" for index in range(len(patterns))]
    if protocol == "responses":
        forms = [{"type": "grammar", "syntax": "regex", "definition": pattern} for pattern in patterns]
        tools = [{"type": "custom", "name": name, "format": form} for name, form in zip(names, forms, strict=True)]
        more = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
        body: dict[str, Any] = {"input": "pick one", "max_output_tokens": 120, "tools": [*tools, more]}
        return body | {"tool_choice": {"type": "custom", "name": "pick0"} if choice == "named" else choice}
    forms = [{"type": "grammar", "grammar": {"syntax": "regex", "definition": pattern}} for pattern in patterns]
    rows = [{"name": name, "format": form} for name, form in zip(names, forms, strict=True)]
    more = {"type": "function", "function": {"name": "f"}}
    body = {"messages": [{"role": "user", "content": "pick one"}], "max_tokens": 120}
    body["tools"] = [*({"type": "custom", "custom": row} for row in rows), more]
    return body | {"tool_choice": {"type": "custom", "custom": {"name": "pick0"}} if choice == "named" else choice}


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["chat", "responses"])
@pytest.mark.parametrize("family", ["chatml", "deepseek"])
def test_the_input_matches_its_pattern_whole_and_streamed(lively: Lively, protocol: str, family: str) -> None:
    matched = 0
    for pattern in PATTERNS:
        for seed in range(SEEDS):
            body = asked(protocol, pattern, choice="named" if seed % 2 else "required")
            body |= {"model": f"{family}-ngram", "seed": seed, "temperature": 1}
            body |= {"thinking": {"type": "disabled"}} if protocol == "chat" else {"reasoning": {"effort": "none"}}
            whole, stream = (lively.post(PATHS[protocol], {**body, "stream": flag}) for flag in (False, True))
            assert whole.status_code == stream.status_code == 200, whole.text
            answer = answers.whole(protocol, whole.json())
            assert answer.choices == answers.streamed(protocol, stream.text).choices
            calls = answer.choices[0].calls
            if answer.choices[0].finish in ("tool_calls", ("completed", None)):
                assert calls
                for name, text in calls:
                    assert name == "f" or re.fullmatch(pattern, text), (pattern, text)
                    matched += name != "f"
    assert matched > len(PATTERNS) * SEEDS // 2


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["(?=x)y", "(a", r"(a)\1"])
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_pattern_that_cannot_be_followed_is_refused_by_its_own_path(
    lively: Lively, pattern: str, choice: str
) -> None:
    for protocol, path in (
        ("chat", "tools[1].custom.format.grammar.definition"),
        ("responses", "tools[1].format.definition"),
    ):
        for _ in range(2):  # known to be wrong the second time
            reply = lively.post(
                PATHS[protocol], {**asked(protocol, "a", pattern, choice=choice), "model": "chatml-ngram"}
            )
            assert reply.status_code == 400, reply.text
            error = reply.json()["error"]
            assert (error["param"], error["code"]) == (path, "not_possible"), error
