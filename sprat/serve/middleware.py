"""Checks on every request before any route sees it: host, origin, API key.

A server on loopback is reachable from every web page that the user has open. Two checks keep such
pages out. DNS rebinding: a hostile page points its own name at 127.0.0.1, so a ``Host`` that is
neither an IP address nor ``localhost`` nor a name we were given is refused (an IP address cannot be
rebound). Cross-site requests: a ``POST`` whose ``Origin`` is not this server is refused, and no CORS
header is ever sent. Programs such as curl and the OpenAI clients send no ``Origin`` and pass.

Where the server has keys, everything but the page, the health check and the schema needs one, and it is looked at
before any of the body is read.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sprat.serve.api_keys import ApiKeys
from sprat.serve.errors import RequestError

PUBLIC_PATHS = ("/", "/healthz", "/openapi.json")  # what needs no key
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


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


class SecurityMiddleware:
    """ASGI middleware: refuses foreign hosts, origins and keys, adds the security headers to every answer.

    Whose request it is stands in ``request.state.tenant`` from here on.
    """

    def __init__(self, app: ASGIApp, api_keys: ApiKeys, allowed_hosts: Iterable[str] = ()) -> None:
        self.app, self.api_keys = app, api_keys
        self.allowed_hosts = frozenset(name.lower() for name in allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *SECURITY_HEADERS]
            await send(message)

        error = self._check_request(scope)
        if error is None:
            await self.app(scope, receive, send_with_headers)
            return
        body = json.dumps(error.body()).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await send_with_headers({"type": "http.response.start", "status": error.status, "headers": headers})
        await send_with_headers({"type": "http.response.body", "body": body})

    def _check_request(self, scope: Scope) -> RequestError | None:
        headers = {key: value.decode("latin-1") for key, value in scope["headers"]}
        host = headers.get(b"host", "")
        if not host_allowed(host, self.allowed_hosts):
            message = f"the host {host[:100]!r} is not served here; use the address the server printed"
            return RequestError(403, message, param="Host", code="host_not_allowed")
        origin = headers.get(b"origin")
        if scope["method"] not in ("GET", "HEAD") and origin is not None:
            parts = origin.split("://", 1)
            if len(parts) != 2 or parts[0] not in ("http", "https") or parts[1].lower() != host.lower():
                return RequestError(403, "requests from other sites are refused", param="Origin", code="cross_site")
        tenant = self.api_keys.tenant(headers.get(b"authorization", ""))
        if tenant is None and scope["path"].removeprefix(scope.get("root_path", "")) not in PUBLIC_PATHS:
            message = "this server needs an API key: send it as 'Authorization: Bearer KEY'"
            return RequestError(401, message, param="Authorization", code="invalid_api_key")
        scope.setdefault("state", {})["tenant"] = tenant
        return None
