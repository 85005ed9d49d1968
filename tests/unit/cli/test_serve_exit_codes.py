"""``sprat serve``: a wrong setting has the exit code of docs/exit-codes.md, in an option, a file or the environment."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sprat.cli.main import app
from sprat.serve import access_log, server

COMMAND_LINE, WEIGHTS, SETTING = 2, 4, 7  # docs/exit-codes.md

# An option, what it is given, and what the sentence names. PORT is one that is in use, MODEL a model's folder.
OPTIONS: list[tuple[list[str], str]] = [
    (["--port", "70000"], "port"),
    (["--port", "-1"], "port"),
    (["--port", "http"], "port"),
    (["--port", "PORT"], "already in use"),
    (["--metrics-port", "PORT"], "already in use"),
    (["--metrics-port", "70000"], "metrics-port"),
    (["--host", ""], "host"),
    (["--host", "no.such.host.invalid"], "no such host"),
    (["--host", "192.0.2.1", "--api-key", "k"], "cannot listen"),
    (["--host", "0.0.0.0"], "without a key"),
    (["--max-num-seqs", "0"], "max-num-seqs"),
    (["--max-tokens", "0"], "max-tokens"),
    (["--max-model-len", "1"], "max-model-len"),
    (["--max-num-queued-reqs", "-1"], "max-num-queued-reqs"),
    (["--max-num-queued-tokens", "-1"], "max-num-queued-tokens"),
    (["--kv-cache-memory-bytes", "0"], "kv-cache-memory-bytes"),
    (["--engine-iteration-timeout", "0"], "engine-iteration-timeout"),
    (["--shutdown-timeout", "-1"], "shutdown-timeout"),
    (["--turns", "-1"], "turns"),
    (["--chat-template", "mend"], "chat-template"),
    (["--prices", "none-of-ours"], "prices"),
    (["--root-path", "llm"], "root_path"),
    (["--allowed-origins", "chat.example"], "allowed_origins"),
    (["--allowed-origins", "http://["], "allowed_origins"),
    (["--allowed-host", "https://chat.example"], "allowed_hosts"),
    (["--api-key", "two words"], "API key"),
    (["--api-key-file", "/no/such/keys"], "/no/such/keys"),
    (["--ssl-certfile", "/no/such.pem"], "/no/such.pem"),
    (["--ssl-certfile", "MODEL/config.json"], "no certificate"),
    (["--ssl-keyfile", "/no/such.key"], "ssl_keyfile"),
    (["--ssl-ca-certs", "/no/such.pem"], "ssl_ca_certs"),
    (["--adapter", "mine"], "NAME=FOLDER"),
    (["--adapter", "a=b", "--adapter", "a=c"], "two adapters"),
    (["--name", ""], "empty name"),
    (["--name", "a", "--name", "a"], "called 'a'"),
    (["--config", "/no/such.toml"], "/no/such.toml"),
    (["--config", "MODEL"], "Is a directory"),
]

FILES: list[tuple[str, str]] = [
    ("prot = 1", "port"),
    ("port = 70000", "port"),
    ('port = "http"', "port"),
    ("port = PORT", "already in use"),
    ("metrics_port = PORT", "already in use"),
    ("a b", "cannot read"),
    ("a = " + "[" * 5000, "cannot read"),
    ("models = 3", "models"),
    ("[[models]]\nmodel = 'x'\ncolour = 1", "colour"),
    ("[[models]]\nmodel = 'MODEL'", "called 'model'"),
    ("[[models]]", "no folder"),
    ("model = 3", "no folder"),
    ("adapters = 'x'", "adapters"),
    ("api_keys = 3", "api_keys"),
    ("api_keys = ['two words']", "API key"),
    ("api_key = 'a'\napi_keys = ['b']", "twice"),
    ("api_key_file = '/no/such/keys'", "/no/such/keys"),
    ("prices = 'none-of-ours'", "prices"),
    ("ssl_certfile = '/no/such.pem'", "/no/such.pem"),
    ("ssl_keyfile = 3", "ssl_keyfile"),
    ("max_wait_seconds = nan", "max_wait_seconds"),
    ("engine_iteration_timeout = 0", "engine_iteration_timeout_seconds"),
    ("chat_template = 'mend'", "chat_template"),
    ("allowed_hosts = ['https://chat.example']", "no host's name"),
    ("served_model_name = ''", "empty name"),
]


@pytest.fixture(autouse=True)
def nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that would begin is a test that fails: nothing was found wrong."""

    def begin(*_: object, **__: object) -> None:
        raise AssertionError("it would be served")

    monkeypatch.setattr(server, "serve", begin)
    level, propagates = access_log.log.level, access_log.log.propagate
    yield
    access_log.log.setLevel(level)
    access_log.log.propagate = propagates


@pytest.fixture(scope="module")
def busy_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def serve(*words: str | Path, **environment: str) -> Any:
    return CliRunner().invoke(app, ["serve", *map(str, words)], env=environment)


def assert_refused(done: Any, code: int, said: str) -> None:
    assert done.exit_code == code, (done.exit_code, done.stderr, done.exception)
    assert said in done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("words", "said"), OPTIONS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_wrong_setting_in_an_option(words: list[str], said: str, model_folder: Path, busy_port: int) -> None:
    words = [word.replace("PORT", str(busy_port)).replace("MODEL", str(model_folder)) for word in words]
    port = [] if "--port" in words else ["--port", "0"]
    assert_refused(serve(model_folder, *port, *words), SETTING, said)


@pytest.mark.parametrize(("text", "said"), FILES, ids=lambda value: value.partition("\n")[0][:40])
def test_a_wrong_setting_in_a_file(text: str, said: str, model_folder: Path, busy_port: int, tmp_path: Path) -> None:
    text = text.replace("PORT", str(busy_port)).replace("MODEL", str(model_folder))
    (tmp_path / "server.toml").write_text(text if "port = " in text else f"port = 0\n{text}")
    assert_refused(serve(model_folder, "--config", tmp_path / "server.toml"), SETTING, said)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_bytes(b"\xff\xfe")
    assert_refused(serve("--config", tmp_path / "server.toml"), SETTING, "cannot read")


def test_a_wrong_key_in_the_environment(model_folder: Path) -> None:
    assert_refused(serve(model_folder, "--port", "0", SPRAT_API_KEY="clé"), SETTING, "API key")


@pytest.mark.parametrize("text", ["max_num_seqs = 3", "served_model_name = 'a'\n[[models]]\nmodel = 'x'"])
def test_no_model_in_a_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text(text)
    assert_refused(serve("--config", tmp_path / "server.toml"), SETTING, "model")


def test_no_model_at_all() -> None:
    assert_refused(serve(), SETTING, "no model to serve")
    assert_refused(serve("--name", "a"), SETTING, "of no model")


@pytest.mark.skipif(os.geteuid() == 0, reason="whoever is root may")
def test_a_port_of_the_systems() -> None:
    assert_refused(serve("/no/such", "--port", "1"), SETTING, "more rights")


def test_too_few_open_files(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100, 200))
    assert_refused(serve(model_folder, "--port", "0"), SETTING, "max_connections")


def test_memory_that_holds_no_block_is_found_by_the_engine(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # it is served, until the engine says no
    done = serve(model_folder, "--port", "0", "--kv-cache-memory-bytes", "1", "--no-access-log")
    assert_refused(done, SETTING, "(kv_cache_memory_bytes)")


@pytest.mark.parametrize("words", [["--prot", "1"], ["--port"], ["another-model"]])
def test_a_command_line_that_says_nothing_we_know_is_as_of_any_verb(words: list[str], model_folder: Path) -> None:
    assert serve(model_folder, *words).exit_code == COMMAND_LINE


def test_what_is_wrong_with_a_model_is_not_with_the_server(model_folder: Path) -> None:
    assert_refused(serve("/no/such/model", "--port", "0"), WEIGHTS, "/no/such/model")
    assert_refused(serve(model_folder, "--port", "0", "--adapter", "a=/no"), WEIGHTS, "adapter_config.json")


def test_the_table_of_exit_codes_says_so() -> None:
    table = (Path(__file__).resolve().parents[3] / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    (row,) = [line for line in table.splitlines() if line.startswith(f"| {SETTING} |")]
    assert all(word in row for word in ("setting", "option", "file", "environment", "port in use", "certificate"))
