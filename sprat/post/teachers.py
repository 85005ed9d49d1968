# size: a request, its tries and the ways in which an answer is none are one noun
"""A teacher over HTTP: any server with OpenAI's ``/v1/chat/completions`` (vLLM, SGLang, llama.cpp, DeepSeek, ours).

What it says is checked before it is learned, because a server's fault would be taught without a word: an answer that
was cut off has no end, one of another model has other terms, an HTML page of a proxy is fluent text. Each such answer
keeps the reason why it is none, and is counted by it.

One request is one connection and one time limit for all of it, so that a server that sends a byte a minute holds
nobody. 408, 429, 5xx, a broken connection and silence are tried again, after what ``Retry-After`` says or twice as long
as before; what every further question would meet as well (no such address, no rights, no money, a certificate that does
not hold) ends the collection. The key goes to the host of the URL and to no other: no redirect is followed. It is sent
over plain HTTP only within a machine or a private network, and stands in no error and in no file.

Left out: streaming, and reading several answers (``n``) of one request, which few servers give.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import http.client
import ipaddress
import json
import random
import re
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sprat.config.teach import TracesConfig
from sprat.data.turns import Fault, assistant_message
from sprat.errors import ConfigError, ServeError
from sprat.tokens.chat import Message

CUT_OFF, EMPTY, NO_END = "cut off at max_tokens", "an empty answer", "no proper end"
NOT_JSON, BROKEN_JSON, AN_ERROR = "no JSON", "broken JSON", "an error in place of an answer"
NO_CHOICES, OTHER_MODEL, NO_USAGE = "no choices", "another model", "no usage"
NO_TEXT, TOOL_CALL = "content that is no text", "a call of a tool"
TOO_LARGE, NOT_TEXT, BAD_REASONING = "a response that is too large", "text that is no Unicode", "broken reasoning"
_RETRIED = frozenset({408, 425, 429})
_REFUSED = frozenset({400, 413, 422})  # of this question; others may be answered
_MAX_BACKOFF_SECONDS = 60.0
_MAX_DETAIL = 200  # characters of a server's own words
_MAX_COUNT = 2**53
_DATE = re.compile(r"\d{4}|\d{6}|\d{8}|\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True)
class Limits:
    """How a server is treated; nothing of it changes what is asked.

    Attributes:
        concurrency: requests at once.
        seconds: for one try, from the connection to the last byte.
        tries: of one question.
        backoff: seconds before the second try, about; twice as many before each further one.
        max_wait: seconds of ``Retry-After`` that are waited for.
        max_bytes: of a response.
        max_faults: the share of questions without a good answer at which the collection stops.
        min_asked: how many questions it is measured on at least, or all.
    """

    concurrency: int = 4
    seconds: float = 600.0
    tries: int = 5
    backoff: float = 1.0
    max_wait: float = 600.0
    max_bytes: int = 16 * 2**20
    max_faults: float = 0.5
    min_asked: int = 20


@dataclass(frozen=True)
class TeacherAnswer:
    """One answer. ``fault`` is empty, or says why it is not learned; it may have been paid for all the same.

    Attributes:
        created: the second in which the server says that it answered, as a Unix time.
        usage: ``prompt_tokens`` and ``completion_tokens``; empty where the server did not say.
    """

    text: str = ""
    reasoning: str = ""
    finish_reason: str = ""
    response_id: str = ""
    created: int | None = None
    model: str = ""
    usage: Mapping[str, int] = field(default_factory=dict)
    fault: str = ""
    detail: str = ""


class Unanswered(Exception):
    """A question to which no answer came; ``kind`` is one of a few, to be counted by."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


class HTTPTeacher:
    """A model behind a URL; any thread may ask.

    Args:
        url: up to and with ``/v1``.
        key: sent as a bearer token; empty sends none.

    Attributes:
        stopping: set to end waiting.

    Raises:
        ConfigError: the URL cannot be used, or ``key`` cannot be sent or would be sent for all to read.
    """

    def __init__(self, url: str, config: TracesConfig, *, key: str = "", limits: Limits | None = None) -> None:
        self.url, self.config, self.limits, self.stopping = (
            check_url(url),
            config,
            limits or Limits(),
            threading.Event(),
        )
        self._parts = urllib.parse.urlsplit(self.url)
        if key and (not key.isascii() or not key.isprintable() or " " in key):
            todo = "set it to the key alone, without blanks or quotes"
            raise ConfigError("the key has characters that no key has", where="key", todo=todo)
        if key and self._parts.scheme == "http" and not _is_private(self._parts.hostname or ""):
            todo = "use https, or a tunnel to this machine"
            raise ConfigError("the key would travel unencrypted", where=self.url, todo=todo)
        self._key, self._open = key, set[socket.socket]()

    def abort(self) -> None:
        """Give up all requests in flight, which may be paid for all the same."""
        self.stopping.set()
        for sock in list(self._open):
            _shut(sock)

    def ask(self, prompt: Sequence[Message], sample: int = 0) -> TeacherAnswer:
        """Answer number ``sample`` to ``prompt``.

        Raises:
            Unanswered: none came, after all tries; nothing was paid, as far as anyone can know.
            ServeError: no question will be answered: the address, the rights or the certificate do not hold.
        """
        body, kind, detail = json.dumps(self._request(prompt, sample)).encode(), "", ""
        for attempt in range(self.limits.tries):
            wait = min(_MAX_BACKOFF_SECONDS, self.limits.backoff * 2**attempt) * random.uniform(0.5, 1.0)
            try:
                status, headers, content = self._post(body)
            except ssl.SSLCertVerificationError as error:
                todo = "check the address, or the certificates of this machine"
                raise ServeError(
                    f"no trust in the certificate: {error.verify_message}", where=self.url, todo=todo
                ) from None
            except TimeoutError:
                kind, detail = "no answer in time", f"{self.limits.seconds:g} s"
            except (OSError, http.client.HTTPException) as error:
                kind, detail = "a broken connection", type(error).__name__
            else:
                if status == 200:
                    return read_answer(content, headers.get("content-type", ""), self.config.teacher_model)
                kind, detail = f"HTTP {status}", content[:_MAX_DETAIL].decode("utf-8", "replace")
                if status in _REFUSED:
                    break
                if status not in _RETRIED and status < 500:
                    raise self._refusal(status, headers, detail)
                wait = max(wait, self._retry_after(headers.get("retry-after", "")))
            if attempt + 1 < self.limits.tries and self.stopping.wait(wait):
                break
        raise Unanswered(kind, detail)

    def _request(self, prompt: Sequence[Message], sample: int) -> dict[str, Any]:
        """The body of a request."""
        config = self.config
        return {
            "model": config.teacher_model,
            "messages": [{"role": message.role, "content": message.content} for message in prompt],
            "max_tokens": config.max_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            **({} if config.seed is None else {"seed": config.seed + sample}),
            **config.extra_body,
            "stream": False,
        }

    def _post(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers (names in lower case) and body of one try; the key is blotted out of what comes back.

        Raises:
            TimeoutError: the time is over. OSError, HTTPException: see ``http.client``.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "sprat"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        connection, expired, sock = self._connection(), threading.Event(), None

        def expire() -> None:
            expired.set()
            if sock is not None:
                _shut(sock)

        watchdog = threading.Timer(self.limits.seconds, expire)
        watchdog.daemon = True
        watchdog.start()
        try:
            connection.connect()
            sock = connection.sock  # a response that ends with the connection takes it away from there
            self._open.add(sock)
            connection.request("POST", f"{self._parts.path}/chat/completions", body, headers)
            with connection.getresponse() as response:
                content = response.read(self.limits.max_bytes + 1)
                if response.length and len(content) <= self.limits.max_bytes:
                    raise http.client.IncompleteRead(content)
                received = {name.lower(): value for name, value in response.getheaders()}
        except (OSError, ValueError, http.client.HTTPException):
            if expired.is_set():
                raise TimeoutError from None
            raise
        finally:
            watchdog.cancel()
            self._open.discard(sock)
            connection.close()
        if expired.is_set():
            raise TimeoutError
        if self._key:
            content = content.replace(self._key.encode(), b"***")
        if len(content) > self.limits.max_bytes and response.status == 200:
            received["content-type"], content = TOO_LARGE, b""
        return response.status, received, content

    def _connection(self) -> http.client.HTTPConnection:
        """A connection that is not open yet, through the proxy that this machine has for HTTPS."""
        host, seconds, is_plain = self._parts.hostname or "", self.limits.seconds, self._parts.scheme == "http"
        port = self._parts.port or (80 if is_plain else 443)
        if is_plain:
            return http.client.HTTPConnection(host, port, timeout=seconds)
        context, proxy = ssl.create_default_context(), urllib.request.getproxies().get("https")
        if not proxy or urllib.request.proxy_bypass(host):
            return http.client.HTTPSConnection(host, port, timeout=seconds, context=context)
        through = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        headers = {}
        if through.username:
            login = f"{urllib.parse.unquote(through.username)}:{urllib.parse.unquote(through.password or '')}"
            headers["Proxy-Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
        connection = http.client.HTTPSConnection(
            through.hostname or "", through.port or 80, timeout=seconds, context=context
        )
        connection.set_tunnel(host, port, headers)
        return connection

    def _retry_after(self, value: str) -> float:
        """The seconds that ``Retry-After`` asks for (RFC 9110, section 10.2.3); 0 where it says nothing.

        Raises:
            ServeError: they are more than anyone waits for.
        """
        seconds = 0.0
        if value.strip().isdecimal():
            seconds = float(value)
        elif value:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError):
                return 0.0
        if seconds > self.limits.max_wait:
            todo = "start the same command again then; what was answered is kept"
            raise ServeError(f"the teacher asks to wait {seconds:.0f} s", where=self.url, todo=todo)
        return max(0.0, seconds)

    def _refusal(self, status: int, headers: Mapping[str, str], detail: str) -> ServeError:
        """A status that every other question would get too, as an error."""
        todo = {
            401: "set the environment variable that holds the key (--key-env says which)",
            402: "pay the provider; what was answered is kept",
            403: "see what this key may ask for",
            404: "the URL ends with /v1 as a rule, and --teacher-model is a name that the server has",
        }.get(status, "see what the server wants")
        if 300 <= status < 400:
            target = urllib.parse.urlsplit(headers.get("location", "")).hostname or "elsewhere"
            todo = f"it points to {target}: give that address if you trust it; no key is sent on"
        words = " ".join(detail.split())
        return ServeError(f"the teacher answers HTTP {status}: {words}".rstrip(": "), where=self.url, todo=todo)


def _shut(sock: socket.socket) -> None:
    """End what another thread reads from ``sock``, encrypted or not."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def check_url(url: str) -> str:
    """``url`` without a slash at its end.

    Raises:
        ConfigError: it is none of a server, or holds a password or a query, which would be written into the run.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError("no URL of a server", where=url[:_MAX_DETAIL], todo="write https://HOST/v1")
    if parts.username is not None or parts.query or parts.fragment:
        todo = "give the address alone, and the key in an environment variable"
        raise ConfigError("a URL with a login, a query or a fragment", where=parts.hostname or "", todo=todo)
    return url.rstrip("/")


def _is_private(host: str) -> bool:
    """Whether ``host`` is this machine or an address of a private network."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_private
    except ValueError:
        return False


def read_answer(content: bytes, content_type: str, model: str) -> TeacherAnswer:
    """The answer in the body of a response with status 200, or what is wrong with it as its ``fault``.

    Args:
        model: the name that was asked for; the response may say a dated version of it (``name-2026-01-31``).
    """
    if content_type == TOO_LARGE:
        return TeacherAnswer(fault=TOO_LARGE)
    if content_type.partition(";")[0].strip().lower() != "application/json":
        return TeacherAnswer(fault=NOT_JSON, detail=content_type[:_MAX_DETAIL])
    try:
        table = json.loads(content)
    except (ValueError, RecursionError):
        return TeacherAnswer(fault=BROKEN_JSON)
    if not isinstance(table, dict) or table.get("error") is not None:
        words = json.dumps(table.get("error"))[:_MAX_DETAIL] if isinstance(table, dict) else ""
        return TeacherAnswer(fault=AN_ERROR if words else NO_CHOICES, detail=words)
    usage, reported = _usage(table.get("usage")), table.get("model")
    facts: dict[str, Any] = {
        "response_id": _text(table.get("id"))[:_MAX_DETAIL],
        "created": created if type(created := table.get("created")) is int and 0 <= created < _MAX_COUNT else None,
        "model": _text(reported)[:_MAX_DETAIL],
        "usage": usage,
    }
    choices = table.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        return TeacherAnswer(fault=NO_CHOICES, **facts)
    reasoning = next((message[key] for key in ("reasoning_content", "reasoning") if message.get(key)), None)
    if message.get("tool_calls") or message.get("function_call"):
        facts["fault"] = TOOL_CALL  # what stands beside it is no answer to the question
    facts["finish_reason"] = _text(choice.get("finish_reason"))[:_MAX_DETAIL]
    try:
        answer = assistant_message(_content(message.get("content")), _text(reasoning) or None, "content")
        f"{answer.content}{answer.reasoning}".encode()
        facts |= {"text": answer.content, "reasoning": answer.reasoning or ""}
    except TypeError:
        facts |= {"fault": NO_TEXT, "detail": json.dumps(message["content"])[:_MAX_DETAIL]}
    except Fault as fault:
        facts |= {"fault": BAD_REASONING, "detail": fault.reason}
    except UnicodeEncodeError:
        facts |= {"fault": NOT_TEXT}
    return TeacherAnswer(**{**facts, "fault": _fault(facts, model)})


def _fault(facts: Mapping[str, Any], model: str) -> str:
    """Why an answer that could be read is not one to learn; empty where it is."""
    if facts["model"] != model and not _is_version(facts["model"], model):
        return OTHER_MODEL
    if facts["finish_reason"] == "length":
        return CUT_OFF
    if "fault" in facts:
        return str(facts["fault"])
    if not facts["text"].strip():
        return EMPTY
    if facts["finish_reason"] != "stop":
        return NO_END
    return "" if facts["usage"] else NO_USAGE


def _is_version(reported: str, model: str) -> bool:
    """Whether ``said`` is ``model`` and a date behind it: another size of a family is another model."""
    return reported.startswith(f"{model}-") and _DATE.fullmatch(reported[len(model) + 1 :]) is not None


def _text(value: Any) -> str:
    """A string as it is; all else is nothing said."""
    return value if isinstance(value, str) else ""


def _content(value: Any) -> str:
    """The text of a message, which is a string or a list of parts of text.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        return "".join(_text(part.get("text")) for part in value)
    if value is not None and not isinstance(value, str):
        raise TypeError
    return value or ""


def _usage(value: Any) -> dict[str, int]:
    """The two counts that are paid for; empty where they are not there or cannot be."""
    keys = ("prompt_tokens", "completion_tokens")
    counts = {key: value.get(key) for key in keys} if isinstance(value, dict) else {}
    fits = [type(count) is int and 0 <= count < _MAX_COUNT for count in counts.values()]
    return {key: int(count) for key, count in counts.items()} if fits and all(fits) else {}  # type: ignore[arg-type]
