"""The settings of a server are checked when they are made, and the command line offers the same defaults."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest

from sprat.cli import inference, quickstart
from sprat.errors import ServeError
from sprat.serve import ServeConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 65536}, "^port: .*65535 .*correct it"),
        ({"port": "8000"}, "^port: .*number is asked for"),
        ({"max_concurrent_requests": 0}, "^max_concurrent_requests: "),
        ({"max_history_turns": -1}, "^max_history_turns: "),
        ({"examples": [3]}, "^examples.0: "),
        ({"prots": 1}, "^prots: .*not permitted .*there are host, port"),
    ],
)
def test_what_cannot_be_is_one_sentence_that_names_the_setting(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ServeError, match=message):
        ServeConfig(**settings)
    with pytest.raises(ServeError, match=message):
        ServeConfig().replace(**settings)


def test_a_key_is_shown_to_nobody() -> None:
    assert "sk-secret" not in repr(ServeConfig(api_keys=("sk-secret",)))


def test_the_command_line_has_the_same_defaults() -> None:
    verbs = [(inference.serve, name) for name in ("host", "port", "max_tokens")] + [(quickstart.quickstart, "port")]
    for verb, name in verbs:
        assert inspect.signature(verb).parameters[name].default == getattr(ServeConfig(), name)


def test_settings_are_made_without_torch_and_without_a_web_server() -> None:
    program = "import sys; from sprat.serve import ServeConfig; ServeConfig(api_keys=('k',)); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "fastapi", "starlette", "uvicorn"} & set(loaded)
