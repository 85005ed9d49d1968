"""How a server is set up: where it listens, who may ask, how much they get, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, field_validator, model_validator

from sprat.config.base import Config
from sprat.errors import ServeError
from sprat.serve import meter
from sprat.serve.api_keys import check_api_key
from sprat.serve.engine_watchdog import ITERATION_TIMEOUT_SECONDS
from sprat.serve.meter import Prices


class ServeConfig(Config):
    """The settings of one server; checked when it is made.

    Attributes:
        host: address or name to listen on. All but loopback opens the server to the network and needs ``api_keys``.
        port: 0 takes any free one.
        served_model_name: the model id that requests must give; None: the name of the model's folder, or "sprat" where
            an app is made without one.
        served_model_aliases: other names of the same model.
        api_keys: each a tenant of its own; without any everybody may ask, as one tenant. In no dump, TOML or ``repr``.
        allowed_hosts: names, beside ``host``, ``localhost`` and IP addresses, that a ``Host`` header may give.
        allowed_origins: other sites (``https://chat.example``) whose pages may ask; "*": all of them.
        root_path: where a proxy shows this server, such as ``/llm``; whether or not it takes that off.
        ssl_certfile: PEM file of the certificate and those that vouch for it: HTTPS.
        ssl_keyfile: PEM file of its key; None: the key is in ``ssl_certfile``.
        ssl_keyfile_password: of the key. In no dump, TOML or ``repr``.
        ssl_ca_certs: PEM file; callers must show a certificate that one of these vouches for.
        prices: nano-yuan per token; by default the table that holds today.
        max_tokens: the most tokens of one answer, thinking included; also the default. A request for more is refused
            with 400. None: what the context holds.
        max_model_len: tokens of one request, prompt and answer, at most; None: the model's context.
        max_num_seqs: answers that the engine works on at a time.
        kv_cache_memory_bytes: of keys and values of all requests and of prompts that are kept, of each model, at most;
            None: twice what all answers need, and half of the memory that is free at most.
        engine_iteration_timeout_seconds: an engine's process that is at one step, or says nothing, for longer is taken
            for hung: it is killed and started again.
        max_num_queued_reqs: requests that wait for that at most; one more is refused with 429 or 503. 0: none waits.
        max_num_queued_tokens: of their prompts, estimated from their bytes.
        max_wait_seconds: until a request begins; then it is refused with 503.
        max_body_bytes: bound of a request body; a larger one is refused with 413. None: what a context of text takes.
        metrics_port: /metrics on a port of its own, without a key; None: on the server's, with one where it has keys.
        max_connections: connections at a time; one more takes the place of the longest idle one, else gets a 503.
        header_timeout_seconds: for the head of a request, from its connection or its first byte on.
        body_timeout_seconds: for its body; thereafter at least 16 KiB a second must come.
        max_unread_bytes: of a stream, that may wait for its reader; more, for two seconds, and it is dropped.
        write_timeout_seconds: how long an answer may wait for a reader who takes nothing of it.
        shutdown_timeout_seconds: for running answers, at the first signal to stop; a second one stops them.
        examples: questions that the page offers.
        max_history_turns: how many past exchanges the page sends along; 0 for a model that was taught single questions,
            None for no limit. Requests made otherwise are not touched.
        chat_template: "refuse" a model whose own template cannot be followed, since it would be asked in a format that
            it has not learned, or "accept" it, in the format that stands in its place.
        access_log: whether ``sprat serve`` writes a line for each request (see ``access_log``).

    Raises:
        ServeError: a setting is unknown or out of its bounds, or a key cannot stand in a header.

    >>> ServeConfig(port=70000)
    Traceback (most recent call last):
    sprat.errors.ServeError: port: Input should be less than or equal to 65535 (ServeConfig); correct it.
    """

    moved_keys: ClassVar[Mapping[str, str]] = {
        "name": "served_model_name",
        "keys": "api_keys",
        "turns": "max_history_turns",
        "max_requests": "max_num_seqs",
        "max_concurrent_requests": "max_num_seqs",
    }

    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(8000, ge=0, le=65535)
    served_model_name: str | None = Field(None, min_length=1)
    served_model_aliases: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = Field((), repr=False, exclude=True)
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    root_path: str = ""
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_keyfile_password: str | None = Field(None, repr=False, exclude=True)
    ssl_ca_certs: str | None = None
    prices: Prices = Field(default_factory=lambda: meter.select_prices(meter.load_price_tables()))
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_model_len: int | None = Field(None, ge=2, lt=2**31)
    max_num_seqs: int = Field(64, ge=1, le=4096)
    kv_cache_memory_bytes: int | None = Field(None, ge=1)
    engine_iteration_timeout_seconds: float = Field(ITERATION_TIMEOUT_SECONDS, ge=1)
    max_num_queued_reqs: int = Field(256, ge=0)
    max_num_queued_tokens: int = Field(1 << 20, ge=0)
    max_wait_seconds: float = Field(60.0, gt=0)
    max_body_bytes: int | None = Field(None, ge=1)
    metrics_port: int | None = Field(None, ge=0, le=65535)
    max_connections: int = Field(2048, ge=1)
    header_timeout_seconds: float = Field(10.0, gt=0)
    body_timeout_seconds: float = Field(30.0, gt=0)
    max_unread_bytes: int = Field(1 << 18, ge=1)
    write_timeout_seconds: float = Field(30.0, gt=0)
    shutdown_timeout_seconds: float = Field(30.0, ge=0)
    examples: tuple[str, ...] = ()
    max_history_turns: int | None = Field(None, ge=0)
    chat_template: Literal["refuse", "accept"] = "refuse"
    access_log: bool = True

    def replace(self, **changes: Any) -> Self:
        """A copy with ``changes``, validated again; the secrets, which no dump has, stay."""
        secrets = {"api_keys": self.api_keys, "ssl_keyfile_password": self.ssl_keyfile_password}
        return super().replace(**{**secrets, **changes})

    @model_validator(mode="wrap")
    @classmethod
    def _say_fault(cls, settings: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Make the first fault one sentence of ours."""
        try:
            return validate(settings)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            todo = "correct it"
            if first["type"] == "extra_forbidden":
                new = cls.moved_keys.get(key)
                todo = f"it is called {new} now" if new else f"there are {', '.join(cls.model_fields)}"
            raise ServeError(f"{key}: {first['msg']}", where=cls.__name__, todo=todo) from None

    @field_validator("api_keys")
    @classmethod
    def _check_api_keys(cls, api_keys: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse what cannot stand in an ``Authorization`` header."""
        for key in api_keys:
            check_api_key(key, "api_keys, --api-key")
        return api_keys

    @field_validator("host")
    @classmethod
    def _without_brackets(cls, host: str) -> str:
        """An IPv6 address as URLs have it is one as well."""
        return host[1:-1] if host.startswith("[") and host.endswith("]") and ":" in host else host

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _check_allowed_hosts(cls, hosts: Any) -> Any:
        """Refuse what no ``Host`` header can match: they are compared without their port."""
        if isinstance(hosts, str):
            raise ServeError("allowed_hosts is no list", where="allowed_hosts", todo='write ["chat.example"]')
        for host in hosts:
            if not isinstance(host, str) or not host or set(host) & set("/:@ "):
                todo = "write it as chat.example, without scheme and port"
                raise ServeError(f"{host!r} is no host's name", where="allowed_hosts, --allowed-host", todo=todo)
        return hosts

    @field_validator("allowed_origins")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse what no browser sends as ``Origin``; they send it in lower case and without a path."""
        for origin in origins:
            parts = urlsplit(origin)
            if origin != "*" and (
                parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}"
            ):
                todo = "write it as https://chat.example, with the port where it has one"
                raise ServeError(f"{origin[:100]!r} is no origin", where="allowed_origins", todo=todo)
        return tuple(origin.lower() for origin in origins)

    @field_validator("root_path")
    @classmethod
    def _check_root_path(cls, path: str) -> str:
        """Take off a slash at the end, and refuse what does not begin with one."""
        path = path.rstrip("/")
        if path and (not path.startswith("/") or not path.isascii() or not path.isprintable()):
            raise ServeError(f"{path[:100]!r} is no path", where="root_path", todo="write it as /llm")
        return path

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        """A key or an authority without a certificate is half of a setting."""
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            todo = "give the certificate with ssl_certfile"
            raise ServeError("TLS is set up without a certificate", where="ssl_keyfile, ssl_ca_certs", todo=todo)
        return self
