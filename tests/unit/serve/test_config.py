"""The settings of a server are checked when they are made, and the command line offers the same defaults."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sprat.cli import quickstart
from sprat.cli.main import app
from sprat.errors import ServeError
from sprat.serve import ServeConfig, access_log, server


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 65536}, "^port: .*65535 .*correct it"),
        ({"port": "8000"}, "^port: .*number is asked for"),
        ({"max_num_seqs": 0}, "^max_num_seqs: "),
        ({"max_history_turns": -1}, "^max_history_turns: "),
        ({"examples": [3]}, "^examples.0: "),
        ({"served_model_name": ""}, "^served_model_name: "),
        ({"api_keys": ("two words",)}, "API key .*api_keys"),
        ({"name": "tiny"}, "^name: .*; it is called served_model_name now"),
        ({"keys": ("k",)}, "^keys: .*; it is called api_keys now"),
        ({"turns": 3}, "^turns: .*; it is called max_history_turns now"),
        ({"max_requests": 3}, "^max_requests: .*; it is called max_num_seqs now"),
        ({"max_concurrent_requests": 3}, "^max_concurrent_requests: .*; it is called max_num_seqs now"),
        ({"prots": 1}, "^prots: .*not permitted .*there are host, port"),
    ],
)
def test_what_cannot_be_is_one_sentence_that_names_the_setting(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ServeError, match=message):
        ServeConfig(**settings)
    with pytest.raises(ServeError, match=message):
        ServeConfig().replace(**settings)


def test_a_key_is_shown_to_nobody() -> None:
    config = ServeConfig(api_keys=("sk-secret",))
    for shown in (repr(config), config.to_toml(), repr(config.model_dump()), config.model_dump_json()):
        assert "sk-secret" not in shown and "port" in shown


def test_a_server_with_other_settings_still_needs_its_key() -> None:
    config = ServeConfig(api_keys=("sk-secret",))
    assert config.replace(port=0).api_keys == ("sk-secret",) and config.replace(api_keys=()).api_keys == ()


def test_the_command_line_changes_only_what_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[ServeConfig] = []
    monkeypatch.setattr(server, "run", lambda sources, config, **_: served.append(config))
    monkeypatch.setattr(access_log, "write_lines_to", lambda stream: None)
    for words in ([], ["--max-num-seqs", "3", "--metrics-port", "0", "--allowed-host", "box.lan"]):
        done = CliRunner().invoke(app, ["serve", str(tmp_path), *words])
        assert done.exit_code == 0, done.output
    page = {"examples": served[0].examples, "max_history_turns": served[0].max_history_turns}
    assert served[0] == ServeConfig(**page)
    assert served[1] == ServeConfig(**page, max_num_seqs=3, metrics_port=0, allowed_hosts=("box.lan",))
    assert inspect.signature(quickstart.quickstart).parameters["port"].default == ServeConfig().port


def test_the_example_of_the_help_page_serves_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[tuple[Any, ServeConfig]] = []
    monkeypatch.setattr(server, "run", lambda sources, config, **_: served.append((sources, config)))
    monkeypatch.setattr(access_log, "write_lines_to", lambda stream: None)
    help_page = CliRunner().invoke(app, ["serve", "--help"]).output
    (example,) = re.findall(r"Example: sprat (serve .*(?:\n +--.*)*)", help_page)
    done = CliRunner().invoke(app, example.split())
    assert done.exit_code == 0, done.output
    ((source,), config) = served[0]
    assert source.served_names == ("smol",)
    assert (config.port, config.api_keys, config.max_num_seqs) == (0, ("secret",), 32)


def test_settings_are_made_without_torch_and_without_a_web_server() -> None:
    program = "import sys; from sprat.serve import ServeConfig; ServeConfig(api_keys=('k',)); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "fastapi", "starlette", "uvicorn"} & set(loaded)


def test_an_address_in_brackets_is_one() -> None:
    assert ServeConfig(host="[::1]").host == "::1"


@pytest.mark.parametrize("hosts", ["chat.example", ["chat.example:8000"], ["https://chat.example"], [""]])
def test_a_host_that_no_header_matches_is_refused(hosts: Any) -> None:
    with pytest.raises(ServeError, match="allowed_hosts"):
        ServeConfig(allowed_hosts=hosts)
