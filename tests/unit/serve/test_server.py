"""The server takes its port first, says where it is, and leaves in good order."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.serving.server import running
from sprat.errors import ServeError
from sprat.formats.load import save
from sprat.model import Transformer
from sprat.serve import ServeConfig, server
from sprat.serve.server import bind_socket, run, socket_url
from tests.lucky import lucky_shape, lucky_tokenizer
from tests.unit.serve.live import live, tiny_model
from tests.unit.serve.scripted import ScriptedEngine

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys
from sprat.serve import ServeConfig, bind_socket, create_app, serve
from sprat.serve.app import ServedModel
from tests.unit.serve.scripted import ScriptedEngine
config = ServeConfig(port=0, max_num_seqs=1, shutdown_timeout_seconds=float(sys.argv[2]))
taken = bind_socket(config)
engine = ScriptedEngine(pause=float(sys.argv[1]))
app = create_app([ServedModel(engine, engine.tokenizer, ["tiny"])], config)
serve(app, taken, on_ready=lambda at: print(at, flush=True))
print("left", flush=True)
"""


@contextmanager
def program(text: str, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server as a process of its own, and its address; nothing of it is left afterwards."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", text, *words],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()


def left_quietly(process: subprocess.Popen[str]) -> bool:
    out, err = process.communicate(timeout=60)
    return (process.returncode, out.strip(), err.strip()) == (0, "left", "")


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
    monkeypatch.setattr(server, "serve", lambda app, listener, **_: served.append(app))
    with pytest.raises(ServeError, match=r"template cannot be followed.*--chat-template accept"):
        run(tmp_path, ServeConfig(port=0))
    assert not served
    run(tmp_path, ServeConfig(port=0, chat_template="accept"))
    assert len(served) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="what a process has loaded is read from /proc")
def test_the_process_that_answers_has_no_torch_and_its_engine_has(tmp_path: Path) -> None:
    """180 MB and a second of its start; the models are in the engines' processes."""
    tiny_model(tmp_path / "tiny")
    with running(tmp_path / "tiny") as server:
        ask: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "what is 3?"}]}
        headers, url = {"Authorization": f"Bearer {server.key}"}, server.url + "/v1/chat/completions"
        assert httpx.post(url, json=ask, headers=headers, timeout=60).status_code == 200
        has_torch = ["libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in server.processes()]
    assert has_torch == [False, True]


def test_port_0_takes_a_free_one_on_loopback() -> None:
    config = ServeConfig(port=0)
    with bind_socket(config) as first, bind_socket(config) as second:
        assert socket_url(first).startswith("http://127.0.0.1:")
        assert socket_url(first) != socket_url(second)


def ask(address: str, **more: Any) -> AbstractContextManager[httpx.Response]:
    """One streamed answer of eighteen words."""
    body = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "add 1 2 3"}], **more}
    return httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=60)


def test_ctrl_c_lets_running_answers_finish_and_refuses_whoever_waits() -> None:
    with program(PROGRAM, "0.1", "30") as (process, address), ask(address) as running:
        lines = running.iter_lines()
        next(lines)
        refused: list[httpx.Response] = []

        def wait_for_a_place() -> None:
            with ask(address) as answer:
                answer.read()
                refused.append(answer)

        waiting = threading.Thread(target=wait_for_a_place)
        waiting.start()
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        waiting.join(10)
        assert refused[0].status_code == 503 and refused[0].json()["error"]["type"]
        assert httpx.get(f"{address}/health/ready", timeout=10).status_code == 503
        assert httpx.get(f"{address}/health/live", timeout=10).status_code == 200
        with ask(address) as late:
            assert late.status_code == 503
        assert [line for line in lines if line][-1] == "data: [DONE]"
        assert left_quietly(process)


def test_who_has_sent_half_a_request_holds_up_nobody_and_is_told() -> None:
    with program(PROGRAM, "0", "30") as (process, address):
        host, port = address.removeprefix("http://").split(":")
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port)), timeout=10) as half, socket.socket() as silent:
            silent.connect((host, int(port)))
            half.sendall(head.replace("x", host).encode() + b"Content-Length: 500\r\n\r\n{")
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            assert half.recv(4096).startswith(b"HTTP/1.1 503 ") and silent.recv(1) == b""
            assert left_quietly(process)


FROZEN = """
import gc
from sprat.serve import ServeConfig, bind_socket, create_app, serve
from sprat.serve.app import ServedModel
from tests.unit.serve.scripted import ScriptedEngine
config, engine = ServeConfig(port=0), ScriptedEngine()
app, before = create_app([ServedModel(engine, engine.tokenizer, ["tiny"])], config), gc.get_freeze_count()

def on_ready(at):
    print(before, gc.get_freeze_count(), len(gc.get_objects()), flush=True)

serve(app, bind_socket(config), on_ready=on_ready)
print("left", flush=True)
"""


def test_nobody_waits_while_what_was_loaded_is_looked_through_for_garbage() -> None:
    """The collector leaves alone what was there before the first request: most of all that there is."""
    with program(FROZEN) as (process, line):
        before, frozen, others = map(int, line.split())
        assert before == 0 and frozen > 10_000 and others < frozen / 10
        process.send_signal(signal.SIGTERM)
        assert left_quietly(process)


METRICS = """
import sys
from sprat.serve import ServeConfig, bind_socket, create_app, serve
from sprat.serve.app import ServedModel
from sprat.serve.server import bind_metrics_socket, socket_url
from tests.unit.serve.scripted import ScriptedEngine
config, engine = ServeConfig(port=0, metrics_port=0, api_keys=("sk-1",)), ScriptedEngine()
app, metrics = create_app([ServedModel(engine, engine.tokenizer, ["tiny"])], config), bind_metrics_socket(config)
print(socket_url(metrics), flush=True)
serve(app, bind_socket(config), on_ready=lambda at: print(at, flush=True), metrics_listener=metrics)
print("left", flush=True)
"""


def test_metrics_have_a_port_of_their_own_without_a_key_and_nothing_else_has() -> None:
    with program(METRICS) as (process, metrics):
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        with httpx.Client() as client:  # kept open, as Prometheus does
            assert "sprat:num_requests_running" in client.get(f"{metrics}/metrics").text
            assert client.get(f"{metrics}/v1/models").status_code == 404
            assert client.get(f"{metrics}/metrics", headers={"Host": "evil.example"}).status_code == 403
            assert client.get(f"{address}/metrics").status_code == 401
            process.send_signal(signal.SIGTERM)
            assert left_quietly(process)


def test_a_busy_port_for_metrics_is_one_sentence_too(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServeError, match=f"already in use \\(127.0.0.1:{port}\\)"):
            run(tmp_path / "no-such-model", ServeConfig(port=0, metrics_port=port))


STARTING = """
import asyncio, sys
from sprat.errors import MachineError
from sprat.serve import ServeConfig, bind_socket, create_app, serve
from sprat.serve.app import ServedModel
from tests.unit.serve.scripted import ScriptedEngine

class Slow(ScriptedEngine):
    async def start(self):
        print("starting", flush=True)
        try:
            await asyncio.sleep(float(sys.argv[1]))
        finally:
            print("ended", flush=True)
        raise MachineError("there is no memory for this model", where="engine", todo="take a smaller one")

config, engine = ServeConfig(port=0), Slow()
app = create_app([ServedModel(engine, engine.tokenizer, ["tiny"])], config)
try:
    serve(app, bind_socket(config), on_ready=print)
except MachineError as error:
    print(error)
print("left", flush=True)
"""


def test_an_engine_that_cannot_start_is_one_sentence() -> None:
    with program(STARTING, "0.5") as (process, first):  # later than its first line is read
        out, err = process.communicate(timeout=60)
    assert (first, err) == ("starting", "") and out.splitlines()[0] == "ended"
    assert out.splitlines()[1].startswith("there is no memory for this model") and process.returncode == 0


GIVEN_UP = """
from sprat.errors import EngineDeadError
from sprat.serve import ServeConfig, bind_socket, create_app, serve
from sprat.serve.app import ServedModel
from sprat.serve.engine_client import EngineDied
from tests.unit.serve.scripted import ScriptedEngine
config, engines = ServeConfig(port=0), [ScriptedEngine(), ScriptedEngine()]
app = create_app([ServedModel(each, each.tokenizer, [name]) for each, name in zip(engines, "ab")], config)

def lose(number):
    engines[number].alive, engines[number].failure = False, EngineDied("its process ended (signal 9, Killed)")

def on_ready(at):
    import asyncio
    lose(0)
    print("up", flush=True)
    asyncio.get_running_loop().call_later(1.5, lambda: (print("one", flush=True), lose(1)))

try:
    serve(app, bind_socket(config), on_ready=on_ready)
except EngineDeadError as error:
    print(error)
"""


def test_a_server_whose_engines_are_all_down_for_good_ends() -> None:
    with program(GIVEN_UP) as (process, first):
        out, err = process.communicate(timeout=60)
    assert (first, err) == ("up", "") and out.splitlines()[0] == "one", "while one is up it goes on"
    assert "signal 9, Killed" in out.splitlines()[1]


def test_a_signal_while_the_engine_starts_stops_at_once() -> None:
    with program(STARTING, "600") as (process, first):
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    assert (first, out.split(), err, process.returncode) == ("starting", ["ended", "left"], "", 0)


def test_what_runs_longer_than_the_time_to_stop_ends_with_an_error_and_uncleanly() -> None:
    with program(PROGRAM, "1", "0.5") as (process, address), ask(address) as running:
        got: list[str] = []
        lines = running.iter_lines()
        got.append(next(lines))
        process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
            got += lines
        last = json.loads([line for line in got if line][-1].removeprefix("data: "))
        assert last["error"]["code"] == "shutting_down"
        assert left_quietly(process)


DRAINING = """
import asyncio, sys
from fastapi import FastAPI
from starlette.responses import StreamingResponse
from sprat.serve import ServeConfig, bind_socket, serve

class Service:
    running, closing, aborted, enough, failure = set(), False, False, False, None

    async def drain(self, timeout):
        self.closing = True
        end = asyncio.get_running_loop().time() + timeout
        while self.running and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.02)

    def abort(self):
        self.aborted = True

app = FastAPI()
app.state.serving = service = Service()
app.state.config = config = ServeConfig(port=0, shutdown_timeout_seconds=float(sys.argv[1]))

@app.get("/health/ready")
async def ready():
    return {"ready": not service.closing}

@app.get("/enough")
async def enough():
    service.enough = True

@app.get("/stream")
async def stream(seconds: float):
    async def events():
        service.running.add(me := object())
        try:
            for n in range(int(seconds * 10)):
                if service.enough:
                    break
                yield f"data: {n}\\n\\n"
                await asyncio.sleep(0.1)
                if service.aborted:
                    yield "data: aborted\\n\\n"
                    return
            yield "data: whole\\n\\n"
        finally:
            service.running.discard(me)
    return StreamingResponse(events(), media_type="text/event-stream")

serve(app, bind_socket(config), on_ready=lambda at: print(at, flush=True))
print("left", flush=True)
"""


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_at_the_first_signal_running_answers_finish_and_ready_turns_false(first: signal.Signals) -> None:
    with program(DRAINING, "30") as (process, address):
        with httpx.stream("GET", f"{address}/stream?seconds=25", timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            assert httpx.get(f"{address}/health/ready", timeout=10).json() == {"ready": True}
            process.send_signal(first)
            time.sleep(0.5)
            assert httpx.get(f"{address}/health/ready", timeout=10).json() == {"ready": False}, "late callers are told"
            httpx.get(f"{address}/enough", timeout=10)
            assert [line for line in lines if line][-1] == "data: whole"
        assert left_quietly(process)


def test_what_still_runs_when_the_time_is_over_is_stopped() -> None:
    with program(DRAINING, "0.5") as (process, address):
        with httpx.stream("GET", f"{address}/stream?seconds=60", timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: aborted"
        assert left_quietly(process)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(second: signal.Signals) -> None:
    with program(DRAINING, "60") as (process, address):
        with httpx.stream("GET", f"{address}/stream?seconds=60", timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            began = time.monotonic()
            process.send_signal(second)
            with suppress(httpx.RemoteProtocolError):
                assert "data: whole" not in list(lines)
        assert left_quietly(process) and time.monotonic() - began < 5


def certificate(folder: Path, name: str, password: str = "") -> tuple[str, str]:
    """A certificate that vouches for itself, for 127.0.0.1, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    certfile, keyfile = folder / f"{name}.pem", folder / f"{name}.key"
    protection = ["-passout", f"pass:{password}"] if password else ["-nodes"]
    command = [
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", *protection,
        "-keyout", keyfile, "-out", certfile, "-days", "2", "-subj", f"/CN={name}",
        "-addext", "subjectAltName=IP:127.0.0.1",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    return str(certfile), str(keyfile)


@pytest.mark.parametrize("password", ["", "open sesame"])
def test_with_a_certificate_it_speaks_https_and_nothing_else(tmp_path: Path, password: str) -> None:
    certfile, keyfile = certificate(tmp_path, "server", password)
    settings = {"ssl_certfile": certfile, "ssl_keyfile": keyfile, "ssl_keyfile_password": password or None}
    context = ssl.create_default_context(cafile=certfile)
    body = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "add 3 and 4"}]}
    with live(ScriptedEngine(), header_timeout_seconds=1, **settings) as address:
        assert address.startswith("https://127.0.0.1:")
        assert httpx.get(f"{address}/healthz", verify=context).json()["status"] == "ok"
        answer = httpx.post(f"{address}/v1/chat/completions", verify=context, json=body)
        assert answer.text.rstrip().endswith("data: [DONE]")
        with pytest.raises(httpx.HTTPError):
            httpx.get(address.replace("https", "http") + "/healthz")
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=5) as silent:
            assert silent.recv(1) == b"", "a handshake has its deadline too"


def test_with_authorities_only_their_callers_get_in(tmp_path: Path) -> None:
    certfile, keyfile = certificate(tmp_path, "server")
    mine, my_key = certificate(tmp_path, "caller")
    context = ssl.create_default_context(cafile=certfile)
    with live(ScriptedEngine(), ssl_certfile=certfile, ssl_keyfile=keyfile, ssl_ca_certs=mine) as address:
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{address}/healthz", verify=context)
        context.load_cert_chain(mine, my_key)
        assert httpx.get(f"{address}/healthz", verify=context).status_code == 200


def test_tls_files_that_will_not_do_are_one_sentence_before_the_model_is_loaded(tmp_path: Path) -> None:
    certfile, keyfile = certificate(tmp_path, "server", "open sesame")
    other = certificate(tmp_path, "other")[1]
    text = tmp_path / "text"
    text.write_text("no PEM")
    faults: list[tuple[dict[str, str], str]] = [
        ({"ssl_certfile": "/no/such.pem"}, "ssl_certfile: No such file.*/no/such.pem"),
        ({"ssl_certfile": certfile, "ssl_keyfile": "/no/such.key"}, "ssl_keyfile: No such file"),
        ({"ssl_certfile": certfile, "ssl_keyfile": other}, "cannot be used: .*mismatch"),
        ({"ssl_certfile": certfile, "ssl_keyfile": keyfile}, "cannot be used: its key has a password"),
        ({"ssl_certfile": certfile, "ssl_keyfile": keyfile, "ssl_keyfile_password": "wrong"}, "password .* is wrong"),
        ({"ssl_certfile": str(text), "ssl_keyfile": keyfile}, "no certificate in .*text"),
        ({"ssl_certfile": certfile}, "no private key in .*server"),
        ({"ssl_certfile": str(tmp_path)}, "ssl_certfile: Is a directory"),
        ({"ssl_certfile": certfile, "ssl_keyfile": keyfile, "ssl_keyfile_password": "open sesame",
          "ssl_ca_certs": str(text)}, "authorities cannot be read"),
    ]  # fmt: skip
    for settings, message in faults:
        with pytest.raises(ServeError, match=message):
            run(tmp_path / "no-such-model", ServeConfig(port=0, **settings))
    for settings in ({"ssl_keyfile": keyfile}, {"ssl_ca_certs": certfile}):
        with pytest.raises(ServeError, match="without a certificate"):
            ServeConfig(**settings)


def test_the_password_of_a_key_is_in_nothing_that_is_written_and_in_every_copy() -> None:
    config = ServeConfig(ssl_certfile="a.pem", ssl_keyfile_password="open sesame")
    for shown in (repr(config), config.to_toml(), repr(config.model_dump()), config.model_dump_json()):
        assert "open sesame" not in shown
    assert config.replace(port=0).ssl_keyfile_password == "open sesame"


def test_a_low_limit_of_open_files_is_raised_and_too_low_a_one_is_told() -> None:
    text = """
import resource, warnings
from bench.serving.server import running
from sprat.errors import ServeError
from sprat.serve.server import raise_file_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 2000))
print(raise_file_limit(1000), 1000 < resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 2000)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    print(1000 < raise_file_limit(5000) < 2000, "5000 connections need" in str(told[0].message))
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))
try:
    raise_file_limit(5000)
except ServeError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[:2] == ["1000 True", "True True"] and "LimitNOFILE" in done.stdout
