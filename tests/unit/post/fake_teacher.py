"""A server on loopback that answers as it is told, honestly or not, and keeps a log of what it was asked."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, str], Any]  # status, headers, bytes or pieces of them
JSON = {"Content-Type": "application/json"}


def completion(text: str | None, **changes: Any) -> dict[str, Any]:
    """The body of a response as OpenAI documents it, with ``changes``."""
    return {
        "id": f"chatcmpl-{abs(hash(text))}",
        "object": "chat.completion",
        "model": "wise",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
        **changes,
    }


def reply(body: Any, status: int = 200, **headers: str) -> Reply:
    """A response of JSON, or of bytes as they are."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return status, {**JSON, **{name.replace("_", "-"): value for name, value in headers.items()}}, content


class FakeTeacher:
    """``answer`` is given each request's body and how often its question came before.

    Attributes:
        log: the questions in the order in which they came; ``headers`` what was sent with each.
    """

    def __init__(self, answer: Callable[[dict[str, Any], int], Reply]) -> None:
        self.answer, self.log, self.headers, self.url = answer, list[str](), list[dict[str, str]](), ""
        self.lock = threading.Lock()


@contextmanager
def fake_teacher(
    answer: Callable[[dict[str, Any], int], Reply], context: ssl.SSLContext | None = None
) -> Iterator[FakeTeacher]:
    """A running ``FakeTeacher``; its ``url`` ends with /v1, and is encrypted where there is a ``context``."""
    teacher = FakeTeacher(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = body["messages"][-1]["content"]
            with teacher.lock:
                before = teacher.log.count(question)
                teacher.log.append(question)
                teacher.headers.append({**dict(self.headers), "path": self.path})
            status, headers, content = teacher.answer(body, before)
            self.send_response(status)
            for name, value in {
                "Content-Length": str(len(content)) if isinstance(content, bytes) else "90",
                **headers,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                for piece in [content] if isinstance(content, bytes) else content:
                    self.wfile.write(piece)

        def log_message(self, *_: Any) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    host = "http://127.0.0.1" if context is None else "https://localhost"
    teacher.url = f"{host}:{server.server_port}/v1"
    try:
        yield teacher
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
