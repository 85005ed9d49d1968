"""Checks on every request before any route sees it, and headers on every answer.

A server on loopback is reachable from every web page that the user has open. Two checks keep such
pages out. DNS rebinding: a hostile page points its own name at 127.0.0.1, so a ``Host`` that is
neither an IP address nor ``localhost`` nor a name we were given is refused (an IP address cannot be
rebound). Cross-site requests: a ``POST`` whose ``Origin`` is neither this server nor one of ``allowed_origins`` is
refused, and those alone are given CORS headers (the Fetch standard, section 3.2), without credentials: keys come in
headers. Programs such as curl and the OpenAI clients send no ``Origin`` and pass.

Where the server has keys, everything but the page, the health checks and the schema needs one, and it is looked at
before any of the body is read. Every answer has an ``x-request-id``: the caller's own where that is fit to stand in a
log. HEAD is answered wherever GET is.
"""

from __future__ import annotations

import ipaddress
import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sprat.serve.access_log import AccessRecord, log_request
from sprat.serve.api_keys import ApiKeys
from sprat.serve.error_handlers import internal_error
from sprat.serve.errors import RequestError, error_body, is_anthropic_path, route_path

PUBLIC_PATHS = ("/", "/health", "/healthz", "/openapi.json")  # what needs no key, and all below /health/
MAX_TARGET_BYTES = 8192  # of a path with its query
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
EXPOSED_HEADERS = b"x-request-id, request-id, retry-after, x-ignored-fields"


def parse_hostname(host: str) -> str | None:
    """The name in a ``Host`` header without its port, lower case; None when it is malformed.

    >>> parse_hostname("LocalHost:8000"), parse_hostname("[::1]:8000"), parse_hostname("a@b")
    ('localhost', '::1', None)
    """
    if not host or set(host) & set("/?#@\\ \t"):
        return None
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return None
    return parts.hostname


def host_allowed(host: str, allowed_hosts: Iterable[str]) -> bool:
    """True when ``host`` (a ``Host`` header) cannot be a rebound DNS name.

    >>> host_allowed("127.0.0.1:8000", []), host_allowed("evil.example", []), host_allowed("box.lan", ["box.lan"])
    (True, False, True)
    """
    hostname = parse_hostname(host)
    if hostname is None:
        return False
    if hostname == "localhost" or hostname in allowed_hosts:
        return True
    try:
        ipaddress.ip_address(hostname)
    except ValueError:
        return False
    return True


def request_id_of(sent: bytes) -> str:
    """The caller's own ``x-request-id`` where it is printable ASCII of at most 128 characters, else a new one.

    >>> request_id_of(b"job 7"), request_id_of(b"")[:4], request_id_of(b"x" * 129)[:4]
    ('job 7', 'req_', 'req_')
    """
    return sent.decode("ascii") if re.fullmatch(rb"[\x20-\x7e]{1,128}", sent) else f"req_{secrets.token_hex(12)}"


def is_public(path: str) -> bool:
    """Whether ``path`` needs no key."""
    return path in PUBLIC_PATHS or path.startswith("/health/")


class SecurityMiddleware:
    """ASGI middleware: refuses foreign hosts, origins and keys, adds its headers to every answer.

    From here on ``request.state.tenant`` is whose request it is, and ``request.state.request_id`` its name.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_keys: ApiKeys,
        allowed_hosts: Iterable[str] = (),
        allowed_origins: Iterable[str] = (),
        root_path: str = "",
    ) -> None:
        self.app, self.api_keys, self.root_path = app, api_keys, root_path
        self.allowed_hosts = frozenset(name.lower() for name in allowed_hosts)
        self.allowed_origins = frozenset(allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope = _with_plain_path(_without_authority(scope), self.root_path)
        headers = dict(scope["headers"])
        request_id = request_id_of(headers.get(b"x-request-id", b""))
        scope.setdefault("state", {})["request_id"] = request_id
        # The server strips the body that a HEAD gets; to the routes it is a GET.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        inner = {**scope, "method": method, "root_path": self.root_path or scope.get("root_path", "")}
        added = self._added_headers(inner, headers, request_id)
        status, start_time = 0, time.monotonic()

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        try:
            await self._answer(inner, headers, receive, send_with_headers, lambda: bool(status))
        finally:
            _log(inner, status, time.monotonic() - start_time)

    async def _answer(
        self, inner: Scope, headers: Mapping[bytes, bytes], receive: Receive, send: Send, started: Callable[[], bool]
    ) -> None:
        """Refuse a request, or have it answered."""
        error = self._check_request(inner, headers)
        if error is not None:
            await _send_error(error, inner, send)
        elif _is_preflight(inner, headers):
            await send({"type": "http.response.start", "status": 204, "headers": _preflight(headers)})
            await send({"type": "http.response.body"})
        else:
            try:
                await self.app(inner, receive, send)
            except Exception:
                if not started():
                    await _send_error(internal_error(), inner, send)
                raise

    def _added_headers(
        self, scope: Scope, headers: Mapping[bytes, bytes], request_id: str
    ) -> list[tuple[bytes, bytes]]:
        """What every answer carries, errors too."""
        name = request_id.encode()
        added = [*SECURITY_HEADERS, (b"x-request-id", name)]
        if is_anthropic_path(route_path(scope)):
            added.append((b"request-id", name))  # as Anthropic's clients call it
        if self.allowed_origins:
            added.append((b"vary", b"Origin"))
            origin = headers.get(b"origin", b"")
            if origin and self._origin_allowed(origin.decode("latin-1")):
                added.append((b"access-control-allow-origin", origin))
                added.append((b"access-control-expose-headers", EXPOSED_HEADERS))
        return added

    def _origin_allowed(self, origin: str) -> bool:
        return "*" in self.allowed_origins or origin.lower() in self.allowed_origins

    def _check_request(self, scope: Scope, headers: Mapping[bytes, bytes]) -> RequestError | None:
        """What is wrong with a request, as far as its head says."""
        if scope.get("http_version", "1.1") not in ("1.0", "1.1"):
            return RequestError(505, "this server speaks HTTP/1.1", code="http_version_not_supported")
        if b"transfer-encoding" in headers and b"content-length" in headers:
            message = "the body has both a Content-Length and a Transfer-Encoding; send one of them"
            return RequestError(400, message, param="Content-Length", code="ambiguous_length")
        if len(scope.get("raw_path", b"")) + len(scope["query_string"]) > MAX_TARGET_BYTES:
            return RequestError(414, f"the path is longer than {MAX_TARGET_BYTES} bytes", code="uri_too_long")
        host = headers.get(b"host", b"").decode("latin-1")
        is_check = not host and route_path(scope).startswith(
            "/health"
        )  # of a load balancer, by HTTP/1.0; of no browser
        if not is_check and not host_allowed(host, self.allowed_hosts):
            message = (
                f"the host {host[:100]!r} is not served here; use the address the server printed, or --allowed-host"
            )
            return RequestError(403, message, param="Host", code="host_not_allowed")
        origin = headers.get(b"origin")
        if origin is not None and scope["method"] != "GET" and not self._same_site(origin.decode("latin-1"), host):
            message = "requests from other sites are refused; --allowed-origins lets a site in"
            return RequestError(403, message, param="Origin", code="cross_site")
        names = (b"authorization", b"x-api-key")
        tenant = self.api_keys.tenant(*(headers.get(name, b"").decode("latin-1") for name in names))
        if tenant is None and not is_public(route_path(scope)) and not _is_preflight(scope, headers):
            message = "this server needs an API key: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'"
            if any(name in headers for name in names):
                message = "the API key that was sent is none of this server's; it knows those it was started with"
            return RequestError(401, message, param="Authorization", code="invalid_api_key")
        scope["state"]["tenant"] = tenant
        return None

    def _same_site(self, origin: str, host: str) -> bool:
        """Whether a page of ``origin`` may ask this server, which it calls ``host``."""
        scheme, _, place = origin.partition("://")
        return (scheme in ("http", "https") and place.lower() == host.lower()) or self._origin_allowed(origin)


def _without_authority(scope: Scope) -> Scope:
    """A request for a whole URL as one for its path; the URL's authority is the host (RFC 9112, 3.2.2)."""
    match = re.match("https?://([^/?#]*)(/.*)?", scope["path"], re.IGNORECASE | re.DOTALL)
    if match is None:
        return scope
    path, raw_path = match[2] or "/", scope.get("raw_path", b"")
    headers = [(b"host", match[1].encode("latin-1", "replace"))]
    headers += [(name, value) for name, value in scope["headers"] if name != b"host"]
    raw_path = b"/" + raw_path.split(b"://", 1)[-1].partition(b"/")[2]
    return {**scope, "path": path, "raw_path": raw_path, "headers": headers}


def _with_plain_path(scope: Scope, root_path: str) -> Scope:
    """A path with a slash too many, as of a base URL that ends in one, as the one that was meant; so the bare root."""
    path = re.sub("/{2,}", "/", scope["path"])
    return {**scope, "path": f"{path}/" if root_path and path == root_path else path}


def _is_preflight(scope: Scope, headers: Mapping[bytes, bytes]) -> bool:
    """Whether a browser asks what a page may send; it has no key then, and no route sees it."""
    return scope["method"] == "OPTIONS" and b"origin" in headers and b"access-control-request-method" in headers


def _preflight(headers: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """What a page of an allowed site may send: any method that we have, and the headers it asks about."""
    asked = headers.get(b"access-control-request-headers", b"")
    allowed = asked if re.fullmatch(rb"[A-Za-z0-9_, -]{1,2000}", asked) else b"authorization, content-type, x-api-key"
    return [
        (b"access-control-allow-methods", b"GET, HEAD, POST, DELETE, OPTIONS"),
        (b"access-control-allow-headers", allowed),
        (b"access-control-max-age", b"600"),
    ]


def _log(scope: Scope, status: int, seconds: float) -> None:
    """The line of a request that no ``Exchange`` writes one of: what was refused, or computed beside answers."""
    state, path = scope["state"], route_path(scope)
    is_read = status < 400 and scope["method"] in ("GET", "OPTIONS")
    if state.get("is_logged") or is_read or path.startswith(("/health", "/metrics")):
        return
    tenant = state.get("tenant")
    name = "" if tenant is None else tenant.name
    record = AccessRecord(state["request_id"], name, scope["method"], scope["path"], status, seconds)
    log_request(replace(record, **state.get("access_fields", {}), code=state.get("error_code", "")))


async def _send_error(error: RequestError, scope: Scope, send: Send) -> None:
    """Answer with ``error``; where the next request would be read wrongly, the connection ends with it."""
    scope["state"]["error_code"] = error.code
    body = json.dumps(error_body(error, route_path(scope), scope["state"]["request_id"])).encode()
    headers = [(name.lower().encode(), value.encode()) for name, value in error.headers().items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.code in ("http_version_not_supported", "ambiguous_length"):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
