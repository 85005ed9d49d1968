"""The server takes its port first, says where it is, and leaves in good order."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from sprat.errors import ServeError
from sprat.formats.load import save
from sprat.model import Transformer
from sprat.serve import ServeConfig, server
from sprat.serve.server import bind_socket, run, socket_url
from tests.lucky import lucky_shape, lucky_tokenizer

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys
from sprat.serve import ServeConfig, bind_socket, create_app, serve
from tests.unit.serve.scripted import ScriptedEngine
config = ServeConfig(port=0, served_model_name="tiny")
taken = bind_socket(config)
app = create_app(ScriptedEngine(pause=float(sys.argv[1])), config)
serve(app, taken, on_ready=lambda at: print(at, flush=True))
print("left", flush=True)
"""


def test_a_busy_port_is_one_clear_sentence_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServeError, match=f"already in use \\(127.0.0.1:{port}\\)"):
            run(tmp_path / "no-such-model", ServeConfig(port=port))


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("no.such.host.invalid", 0), ("192.0.2.1", 0)])
def test_a_wrong_address_is_one_clear_sentence(host: str, port: int) -> None:
    with pytest.raises(ServeError, match="port|host|listen"):
        bind_socket(ServeConfig(host=host, port=port))


def test_a_template_that_cannot_be_followed_is_served_on_request_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = lucky_tokenizer()
    save(Transformer.create(lucky_shape(tokenizer), 0), tokenizer, tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    table = json.loads((tmp_path / "tokenizer_config.json").read_text())
    table["chat_template"] = "{{ messages | length }}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(table))
    served = list[object]()
    monkeypatch.setattr(server, "serve", lambda app, listener, on_ready: served.append(app))
    with pytest.raises(ServeError, match=r"template cannot be followed.*--chat-template accept"):
        run(tmp_path, ServeConfig(port=0))
    assert not served
    run(tmp_path, ServeConfig(port=0, chat_template="accept"))
    assert len(served) == 1


def test_port_0_takes_a_free_one_on_loopback() -> None:
    config = ServeConfig(port=0)
    with bind_socket(config) as first, bind_socket(config) as second:
        assert socket_url(first).startswith("http://127.0.0.1:")
        assert socket_url(first) != socket_url(second)


def test_ctrl_c_stops_running_answers_and_leaves_quietly() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "0.5"],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        assert httpx.get(f"{address}/healthz", timeout=30).json()["status"] == "ok"
        ask = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "add 1 2 3 4 5 6 7 8 9"}]}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=ask, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGINT)
            began = time.monotonic()
            rest = [line for line in lines if line]
        assert "insufficient_system_resource" in rest[-2]
        assert rest[-1] == "data: [DONE]"
        out, err = server.communicate(timeout=60)
        assert time.monotonic() - began < 30
        assert (server.returncode, out.strip(), err.strip()) == (0, "left", "")
    finally:
        server.kill()
        server.wait()
