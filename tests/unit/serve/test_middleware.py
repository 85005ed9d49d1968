"""Errors are JSON in the caller's own form, every answer has a name, and other sites get in only where they may."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import StreamingResponse

from sprat.errors import ServeError
from sprat.serve import ServeConfig
from sprat.serve.api_keys import ApiKeys, read_api_keys
from sprat.serve.error_handlers import add_error_handlers
from sprat.serve.errors import BrokenStream, RequestError, error_body
from sprat.serve.middleware import SecurityMiddleware
from tests.unit.serve.live import live, serving
from tests.unit.serve.scripted import ScriptedEngine

KEY = "sk-alice-0123456789"
BEARER = {"Authorization": f"Bearer {KEY}"}
SITE = "https://chat.example"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with live(ScriptedEngine(), api_keys=(KEY,), allowed_origins=(SITE,), allowed_hosts=("box.lan",)) as address:
        yield address


REFUSED: list[tuple[str, str, dict[str, str], int, str]] = [
    ("GET", "/v1/models", {}, 401, "authentication_error"),
    ("GET", "/v1/models", {"Authorization": f"Bearer {KEY}x"}, 401, "authentication_error"),
    ("GET", "/v1/models", {"x-api-key": f"{KEY}x"}, 401, "authentication_error"),
    ("GET", "/healthz", {"Host": "evil.example"}, 403, "permission_error"),
    ("POST", "/v1/chat/completions", {**BEARER, "Origin": "https://evil.example"}, 403, "permission_error"),
    ("OPTIONS", "/v1/models", {"Origin": "null", "Access-Control-Request-Method": "POST"}, 403, "permission_error"),
    ("GET", "/no/such/thing", BEARER, 404, "not_found_error"),
    ("PUT", "/v1/models", BEARER, 405, "invalid_request_error"),
    ("GET", "/v1/chat/completions", BEARER, 405, "invalid_request_error"),
    ("OPTIONS", "/v1/models", BEARER, 405, "invalid_request_error"),
    ("GET", f"/healthz?{'x' * 9000}", {}, 414, "invalid_request_error"),
    ("POST", "/v1/chat/completions", {**BEARER, "Content-Type": "text/plain"}, 415, "invalid_request_error"),
]


@pytest.mark.parametrize(("method", "path", "headers", "status", "kind"), REFUSED)
def test_every_refusal_is_json_with_a_name_in_openai_s_form(
    address: str, method: str, path: str, headers: dict[str, str], status: int, kind: str
) -> None:
    answer = httpx.request(method, address + path, headers=headers)
    assert answer.status_code == status and answer.headers["content-type"] == "application/json"
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"] and answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("headers", "status", "kind"), [({}, 401, "authentication_error"), (BEARER, 404, "not_found_error")]
)
@pytest.mark.parametrize("path", ["/anthropic/v1/nothing", "/anthropic/v1/messages/nothing"])
def test_on_anthropic_s_paths_it_is_in_anthropic_s_form(
    address: str, headers: dict[str, str], status: int, kind: str, path: str
) -> None:
    answer = httpx.post(address + path, headers=headers, json={})
    assert answer.status_code == status and answer.json().keys() == {"type", "error", "request_id"}
    assert answer.json()["type"] == "error" and answer.json()["error"].keys() == {"type", "message"}
    assert answer.json()["error"]["type"] == kind
    assert answer.json()["request_id"] == answer.headers["x-request-id"] == answer.headers["request-id"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"), (401, "authentication_error"), (403, "permission_error"),
        (402, "billing_error"), (404, "not_found_error"), (408, "timeout_error"),
        (413, "request_too_large"), (415, "invalid_request_error"),
        (429, "rate_limit_error"), (500, "api_error"),
        (502, "api_error"), (503, "overloaded_error"), (504, "timeout_error"), (529, "overloaded_error"),
    ],
)  # fmt: skip
def test_a_status_has_the_type_that_anthropic_s_documents_give_it(status: int, kind: str) -> None:
    assert error_body(RequestError(status, "no"), "/v1/messages")["error"] == {"type": kind, "message": "no"}


def test_the_methods_of_a_path_are_told_and_head_goes_with_get(address: str) -> None:
    for method, path, allowed in (("PUT", "/v1/models", "GET, HEAD"), ("GET", "/v1/chat/completions", "POST")):
        assert httpx.request(method, address + path, headers=BEARER).headers["allow"] == allowed
    for path in ("/", "/healthz", "/openapi.json", "/v1/models", "/v1/models/tiny", "/v1/models/none"):
        head, get = (httpx.request(method, address + path, headers=BEARER) for method in ("HEAD", "GET"))
        assert head.status_code == get.status_code and head.content == b"" != get.content
        assert head.headers["content-length"] == get.headers["content-length"]
    with httpx.Client(base_url=address) as client:  # on one connection: no body of a HEAD is left in it
        assert [client.head("/healthz").status_code, client.get("/healthz").status_code] == [200, 200]


@pytest.mark.parametrize("sent", ["job 7", "a", "x" * 128, "~!"])
def test_the_caller_s_own_name_for_a_request_is_kept(address: str, sent: str) -> None:
    for path in ("/healthz", "/v1/models"):
        assert httpx.get(address + path, headers={"x-request-id": sent}).headers["x-request-id"] == sent


@pytest.mark.parametrize("sent", [b"", b"x" * 129, b"tab\there", b"\xc3\xa9"])
def test_a_name_that_no_log_can_hold_is_replaced(address: str, sent: bytes) -> None:
    answers = [httpx.get(f"{address}/healthz", headers=[(b"x-request-id", sent)]) for _ in range(2)]
    names = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(names)) == 2 and all(name.isascii() and name.isprintable() and len(name) < 64 for name in names)


def test_a_key_comes_in_either_header(address: str) -> None:
    for headers in (BEARER, {"x-api-key": KEY}, {"Authorization": "Bearer none", "x-api-key": KEY}):
        assert httpx.get(f"{address}/v1/models", headers=headers).status_code == 200
    assert httpx.get(f"{address}/v1/models", headers={"x-api-key": ""}).status_code == 401


@pytest.mark.parametrize("headers", [{"Authorization": f"Bearer {KEY}x"}, {"x-api-key": f"{KEY}x"}])
def test_who_sends_a_wrong_key_is_not_told_to_send_one(address: str, headers: dict[str, str]) -> None:
    wrong, none = (httpx.get(f"{address}/v1/models", headers=each).json()["error"] for each in (headers, {}))
    assert wrong["code"] == none["code"] == "invalid_api_key"
    assert "needs an API key" in none["message"]
    assert "needs" not in wrong["message"] and "none of this server's" in wrong["message"] and KEY not in str(wrong)
    for path in ("/", "/healthz", "/health", "/health/live", "/health/ready", "/openapi.json"):
        assert httpx.get(address + path).status_code == 200
    assert httpx.get(f"{address}/health/nothing").status_code == 404, "no key is asked for"
    for path in ("/metrics", "/metrics/", "/healthx", "//metrics", "//v1/models", "/health/../v1/models"):
        assert httpx.get(address + path).status_code in (401, 404) and "data" not in httpx.get(address + path).text


def test_a_preflight_needs_no_key_and_opens_nothing(address: str) -> None:
    asked = {"Access-Control-Request-Method": "POST"}
    assert httpx.options(f"{address}/v1/models", headers={**asked, "Origin": SITE}).content == b""
    assert httpx.options(f"{address}/v1/models", headers=asked).status_code == 401


def test_a_site_that_may_ask_is_told_so_by_the_fetch_standard(address: str) -> None:
    asked = {
        "Origin": SITE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type,x-y",
    }
    answer = httpx.options(f"{address}/v1/chat/completions", headers=asked)
    assert answer.status_code == 204 and answer.headers["access-control-allow-origin"] == SITE
    assert (
        "POST" in answer.headers["access-control-allow-methods"]
        and "x-y" in answer.headers["access-control-allow-headers"]
    )
    body = {"model": "tiny", "messages": [{"role": "user", "content": "add 3 and 4"}]}
    answer = httpx.post(f"{address}/v1/chat/completions", headers={**BEARER, "Origin": SITE}, json=body)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == SITE
    assert "Origin" in answer.headers["vary"] and "access-control-allow-credentials" not in answer.headers
    refused = httpx.post(f"{address}/v1/chat/completions", headers={"Origin": SITE}, json=body)
    assert refused.status_code == 401 and refused.headers["access-control-allow-origin"] == SITE, "a page can read why"
    stranger = httpx.get(f"{address}/healthz", headers={"Origin": "https://evil.example"})
    assert stranger.status_code == 200 and "access-control-allow-origin" not in stranger.headers
    assert httpx.get(f"{address}/healthz", headers={"Host": "box.lan:80"}).status_code == 200


def test_without_origins_no_other_site_gets_in_and_no_cors_header_is_sent() -> None:
    asked = {"Origin": SITE, "Access-Control-Request-Method": "POST"}
    with live(ScriptedEngine()) as address:
        answer = httpx.options(f"{address}/v1/chat/completions", headers=asked)
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "cross_site"
        own = httpx.post(f"{address}/v1/chat/completions", headers={"Origin": address}, json={})
        assert own.status_code == 400, "the server's own page gets in"
    assert not [name for name in [*answer.headers, *own.headers] if name.startswith("access-control")]


@pytest.mark.parametrize("origin", ["chat.example", "https://chat.example/", "ftp://chat.example", ""])
def test_an_origin_that_no_browser_sends_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(ServeError, match="no origin"):
        ServeConfig(allowed_origins=(origin,))


def test_behind_a_proxy_all_is_where_it_was_whether_or_not_the_prefix_is_taken_off() -> None:
    with live(ScriptedEngine(), api_keys=(KEY,), root_path="/llm/") as address:
        for prefix in ("", "/llm"):
            assert httpx.get(f"{address}{prefix}/healthz").status_code == 200
            assert httpx.get(f"{address}{prefix}/v1/models", headers=BEARER).status_code == 200
            assert httpx.get(f"{address}{prefix}/v1/models").status_code == 401
            assert httpx.get(f"{address}{prefix}/anthropic/x").json()["type"] == "error"
            page = httpx.get(f"{address}{prefix}/")
            assert page.status_code == 200 and httpx.get(f"{address}{prefix}").content == page.content
        assert httpx.get(f"{address}/llms/healthz").status_code == 401
        assert httpx.get(f"{address}/llms").status_code == 401
        assert httpx.post(f"{address}/llm").status_code == 405


def test_a_slash_too_many_is_as_if_it_were_not_there() -> None:
    """Of a base URL that ends in one, to which clients append a path that begins with one."""
    with live(ScriptedEngine(), api_keys=(KEY,), root_path="/llm") as address:
        for path in ("//v1/models", "/v1//models", "//llm//v1/models"):
            assert httpx.get(f"{address}{path}", headers=BEARER).status_code == 200
            assert httpx.get(f"{address}{path}").status_code == 401, "a path is looked at as it is read"
        assert httpx.get(f"{address}//v1/none", headers=BEARER).status_code == 404


def raw(address: str, request: bytes) -> bytes:
    """All that is answered to ``request`` until the server closes."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as caller:
        caller.sendall(request)
        answer = b""
        while piece := caller.recv(65536):
            answer += piece
    return answer


@pytest.mark.parametrize(
    ("request_line", "headers", "status"),
    [
        (b"GET /healthz HTTP/2.0", b"", b"505"),
        (b"POST /v1/messages HTTP/1.1", b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", b"400"),
    ],
)
def test_what_could_be_read_in_two_ways_ends_the_connection(
    address: str, request_line: bytes, headers: bytes, status: bytes
) -> None:
    smuggled = b"0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    answer = raw(address, request_line + b"\r\nHost: 127.0.0.1\r\n" + headers + b"\r\n" + smuggled)
    assert answer.startswith(b"HTTP/1.1 " + status) and answer.count(b"HTTP/1.1 ") == 1


class Drained:
    """The least that a server wants of an application."""

    failure = None

    async def drain(self, timeout: float) -> None:
        return None

    def abort(self) -> None:
        return None


@pytest.fixture
def broken() -> Iterator[str]:
    """A server of two routes that do not end well."""
    config = ServeConfig(port=0)
    app = FastAPI()
    app.state.serving = Drained()
    app.add_middleware(SecurityMiddleware, api_keys=ApiKeys())
    add_error_handlers(app)

    @app.get("/v1/messages/crash")
    async def crash() -> Any:
        raise KeyError("secret")

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def events() -> AsyncIterator[str]:
            yield "data: 1\n\n"
            yield 'data: {"error": {}}\n\n'
            raise BrokenStream

        return StreamingResponse(events(), media_type="text/event-stream")

    with serving(app, config) as address:
        yield address


def test_a_fault_of_ours_has_a_name_too_and_tells_nothing(broken: str) -> None:
    answer = httpx.get(f"{broken}/v1/messages/crash", headers={"x-request-id": "mine"})
    assert answer.status_code == 500 and answer.headers["x-request-id"] == "mine"
    assert answer.json()["error"]["type"] == "api_error" and "secret" not in answer.text


def test_a_stream_that_breaks_is_never_taken_for_whole(broken: str, caplog: pytest.LogCaptureFixture) -> None:
    got = b""
    with (
        pytest.raises(httpx.RemoteProtocolError, match="incomplete"),
        httpx.stream("GET", f"{broken}/stream") as answer,
    ):
        for piece in answer.iter_raw():
            got += piece
    assert got.endswith(b'data: {"error": {}}\n\n'), "the error event came before"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"{broken}/stream")


def test_keys_come_from_a_file(tmp_path: Any) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# of the house\n{KEY}\n\n  sk-bob-9876543210  \n")
    file.chmod(0o600)
    assert read_api_keys(file) == (KEY, "sk-bob-9876543210")
    file.chmod(0o644)
    with pytest.warns(UserWarning, match="others can read.*chmod 600"):
        read_api_keys(file)


@pytest.mark.parametrize("content", [None, b"", b"# none\n\n", b"\xff\xfe\x00"])
def test_a_file_without_keys_is_one_sentence(tmp_path: Any, content: bytes | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
        file.chmod(0o600)
    with pytest.raises(ServeError, match="API key.*keys.*one key a line"):
        read_api_keys(file)


def test_the_bodies_of_errors_are_json_for_any_message() -> None:
    for path in ("/v1/messages", "/v1/models"):
        assert json.loads(json.dumps(error_body(RequestError(400, "\ud800 \x00 ü"), path)))


def first_line(address: str, head: str) -> str:
    """The first line of the answer to a request's head, written by hand."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"{head}\r\n\r\n".encode())
        return connection.makefile("rb").readline().decode().strip()


def test_the_check_of_a_load_balancer_needs_no_host(address: str) -> None:
    # HAProxy's "option httpchk GET /health" sends HTTP/1.0 without a Host, which no browser does
    assert first_line(address, "GET /health HTTP/1.0").endswith("200 OK")
    assert first_line(address, f"GET /v1/models HTTP/1.0\r\nx-api-key: {KEY}").endswith("403 Forbidden")
    assert first_line(address, "GET /health HTTP/1.0\r\nHost: evil.example").endswith("403 Forbidden")


def test_a_whole_url_is_a_path_and_its_authority_the_host(address: str) -> None:
    def ask(url: str, host: str) -> str:
        return first_line(address, f"GET {url} HTTP/1.1\r\nHost: {host}\r\nx-api-key: {KEY}\r\nConnection: close")

    assert ask(f"{address}/v1/models", "box.lan").endswith("200 OK")  # RFC 9112, 3.2.2: it has to be accepted
    assert ask("http://box.lan/v1/models", "evil.example").endswith("200 OK")  # and the Host that was sent is ignored
    assert ask("http://evil.example/v1/models", "box.lan").endswith("403 Forbidden")
    assert ask("http://box.lan", "box.lan").endswith("200 OK")
