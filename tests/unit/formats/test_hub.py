"""A hub's id: weights and words come, code and pickles do not; what is cached needs no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sprat.errors import CheckpointError, MachineError
from sprat.formats import hub

pytest.importorskip("huggingface_hub")
COMMITS = {"main": "a" * 40, "v1": "b" * 40}
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"a pickle",
    "modeling_fish.py": b"print('run')",
    "onnx/config.json": b"{}",
}


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP as a download asks for: a repository's commit, its files, and each of them."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def _answer(self, send_body: bool) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.asked.append(path)
        parts = path.split("/")
        if path.startswith("api/models/org/fish"):
            revision = parts[5] if len(parts) > 5 else "main"
            commit = COMMITS.get(revision, revision)
            if commit not in COMMITS.values():
                self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, send_body)
            elif "tree" in parts:
                tree = [
                    {"type": "file", "path": name, "size": len(body), "oid": "0" * 40} for name, body in FILES.items()
                ]
                self._send(200, json.dumps(tree).encode(), {}, send_body)
            else:
                siblings = [{"rfilename": name} for name in FILES]
                self._send(
                    200, json.dumps({"id": "org/fish", "sha": commit, "siblings": siblings}).encode(), {}, send_body
                )
        elif path.startswith("org/fish/resolve/") and "/".join(parts[4:]) in FILES:
            body = FILES["/".join(parts[4:])]
            commit = COMMITS.get(parts[3], parts[3])
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hash(body) & 0xFFFFFFFF:040x}"'}
            self._send(200, body, headers, send_body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, send_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], send_body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if send_body:
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    _Hub.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


_CODE = """
import sys
from sprat.errors import SpratError
from sprat.formats import hub
for name in sys.argv[1:]:
    try:
        print(hub.download_snapshot(*hub.parse_id(name)))
    except SpratError as error:
        print(type(error).__name__, str(error).replace(chr(10), "|"))
"""


def _download(endpoint: str, home: Path, *names: str) -> list[str]:
    """What a process of its own, which reads HF_ENDPOINT as it starts, finds for each of ``names``."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE_"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    line = [sys.executable, "-c", _CODE, *names]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_repository_comes_without_code_and_is_there_without_a_network(endpoint: str, tmp_path: Path) -> None:
    newest, pinned, gone, nobody = _download(endpoint, tmp_path, "org/fish", "org/fish@v1", "org/fish@v9", "org/no")
    for folder, commit in ((Path(newest), COMMITS["main"]), (Path(pinned), COMMITS["v1"])):
        assert folder.name == commit and folder.is_relative_to(tmp_path)
        names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        assert names == {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
        assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert not any(name.endswith((".bin", ".py")) or "onnx" in name for name in _Hub.asked)
    assert gone.startswith("CheckpointError the hub does not give it") and "(org/fish@v9)" in gone and "|" not in gone
    assert nobody.startswith("CheckpointError the hub does not give it") and "(org/no)" in nobody
    count, nowhere = len(_Hub.asked), "http://127.0.0.1:9"
    again = _download(nowhere, tmp_path, "org/fish", f"org/fish@{COMMITS['v1']}", "org/whale")
    assert again[:2] == [newest, pinned] and len(_Hub.asked) == count
    assert again[2].startswith("MachineError not in the cache, and the hub cannot be reached") and "|" not in again[2]


def test_a_download_that_broke_off_is_completed(endpoint: str, tmp_path: Path) -> None:
    [folder] = _download(endpoint, tmp_path, "org/fish")
    (Path(folder) / "model.safetensors").unlink()
    assert _download(endpoint, tmp_path, "org/fish") == [folder]
    assert (Path(folder) / "model.safetensors").read_bytes() == b"weights"


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MachineError, match=r"pip install 'sprat\[hub\]'"):
        hub.download_snapshot("org/fish")


def test_what_is_no_id_is_not_asked_for(tmp_path: Path) -> None:
    for name in ("nowhere", "/nowhere/fish", f"{tmp_path}/fish", "a/b/c", "org/fish@"):
        with pytest.raises(CheckpointError, match="no such model folder"):
            hub.resolve(name)
    assert hub.resolve(tmp_path) == tmp_path
