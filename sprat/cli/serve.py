"""``sprat serve``: models behind an HTTP server that clients of OpenAI, Anthropic and DeepSeek can use."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sprat.cli.inference import Prices, Turns, chat_defaults, parse_adapters
from sprat.cli.verb import Result, print_err

if TYPE_CHECKING:
    from sprat.serve import ServeConfig
    from sprat.serve.server_file import ModelSource

_MODEL = "A run folder, a Hugging Face folder, a GGUF file, or a name to fetch: smol. Left out: what --config says."
Model = Annotated[Path | None, typer.Argument(metavar="MODEL", help=_MODEL)]
_CONFIG = "A TOML file with these settings (max_num_seqs = 32, …) and more models; options count more."
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help=_CONFIG)]
Host = Annotated[
    str | None, typer.Option("--host", help="Loopback unless told otherwise; any other address needs a key.")
]
Port = Annotated[int | None, typer.Option("--port", min=0, max=65535, help="8000 if left out; 0 takes any free port.")]
_NAME = "The model id of the API, the folder's name if left out; repeat it for other names of the same model."
Names = Annotated[list[str] | None, typer.Option("--served-model-name", "--name", metavar="NAME", help=_NAME)]
_KEY = "Who asks must send it; repeat it for several, each a tenant of its own. Others see a command line."
ApiKeys = Annotated[list[str] | None, typer.Option("--api-key", metavar="KEY", envvar="SPRAT_API_KEY", help=_KEY)]
KeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", metavar="FILE", help="Keys that may ask, one on each line.")
]
_ADAPTER = "A LoRA adapter (PEFT) for requests that give MODEL:NAME as their model; may be repeated."
Adapters = Annotated[list[str] | None, typer.Option("--adapter", metavar="NAME=FOLDER", help=_ADAPTER)]
_TEMPLATE = "A model whose own template cannot be followed: refuse it, or accept it in another format."
ChatTemplate = Annotated[Literal["refuse", "accept"] | None, typer.Option("--chat-template", help=_TEMPLATE)]
_TOKENS = "The most tokens of one answer, thinking included; left out: what the context holds."
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, max=2**31 - 1, help=_TOKENS)]
_LENGTH = "Tokens of one request, prompt and answer, at most; left out: the model's context."
MaxModelLen = Annotated[int | None, typer.Option("--max-model-len", min=2, max=2**31 - 1, help=_LENGTH)]
MaxSeqs = Annotated[
    int | None, typer.Option("--max-num-seqs", min=1, max=4096, help="Answers worked on at a time: 64.")
]
_CACHE = "Bytes of memory for keys and values, kept prompts included, at most; left out: by what is free."
CacheBytes = Annotated[int | None, typer.Option("--kv-cache-memory-bytes", min=1, help=_CACHE)]
_ITERATION = "Seconds of one step, or of silence, after which an engine is taken for hung and started again: 300."
IterationTimeout = Annotated[float | None, typer.Option("--engine-iteration-timeout", min=1, help=_ITERATION)]
_QUEUED = "Requests that wait at most: 256; more are refused with 429 or 503, and told when to come again."
MaxQueued = Annotated[int | None, typer.Option("--max-num-queued-reqs", min=0, help=_QUEUED)]
_QUEUED_TOKENS = "Tokens of the prompts that wait at most, as estimated from their bytes."
MaxQueuedTokens = Annotated[int | None, typer.Option("--max-num-queued-tokens", min=0, help=_QUEUED_TOKENS)]
_SHUTDOWN = "Seconds that running answers have after the first Ctrl-C or SIGTERM: 30. A second one stops at once."
Shutdown = Annotated[float | None, typer.Option("--shutdown-timeout", min=0, help=_SHUTDOWN)]
RootPath = Annotated[str | None, typer.Option("--root-path", metavar="PATH", help="Where a proxy shows this server.")]
Certificate = Annotated[Path | None, typer.Option("--ssl-certfile", metavar="FILE", help="Certificate (PEM): HTTPS.")]
Key = Annotated[Path | None, typer.Option("--ssl-keyfile", metavar="FILE", help="Its key (PEM).")]
_AUTHORITIES = "Callers must show a certificate that one of these (PEM) vouches for."
Authorities = Annotated[Path | None, typer.Option("--ssl-ca-certs", metavar="FILE", help=_AUTHORITIES)]
_ORIGINS = "A site (https://chat.example) whose pages may ask; repeat it for several, * for all."
Origins = Annotated[list[str] | None, typer.Option("--allowed-origins", metavar="ORIGIN", help=_ORIGINS)]
_HOSTS = "A name, beside --host, under which this server is reached; may be repeated."
Hosts = Annotated[list[str] | None, typer.Option("--allowed-host", metavar="NAME", help=_HOSTS)]
_METRICS = "/metrics on a port of its own, for a collector without a key."
MetricsPort = Annotated[int | None, typer.Option("--metrics-port", min=0, max=65535, help=_METRICS)]

_ACCESS = "A line of JSON on stderr for each request: who, what, how long; never what was said."
AccessLog = Annotated[bool | None, typer.Option("--access-log/--no-access-log", help=_ACCESS)]


def serve(
    model: Model = None,
    config: ConfigFile = None,
    host: Host = None,
    port: Port = None,
    served_model_name: Names = None,
    api_key: ApiKeys = None,
    api_key_file: KeyFile = None,
    adapter: Adapters = None,
    max_tokens: MaxTokens = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxSeqs = None,
    kv_cache_memory_bytes: CacheBytes = None,
    engine_iteration_timeout: IterationTimeout = None,
    max_num_queued_reqs: MaxQueued = None,
    max_num_queued_tokens: MaxQueuedTokens = None,
    shutdown_timeout: Shutdown = None,
    root_path: RootPath = None,
    ssl_certfile: Certificate = None,
    ssl_keyfile: Key = None,
    ssl_ca_certs: Authorities = None,
    allowed_origins: Origins = None,
    allowed_host: Hosts = None,
    metrics_port: MetricsPort = None,
    turns: Turns = None,
    prices: Prices = None,
    chat_template: ChatTemplate = None,
    access_log: AccessLog = None,
) -> Result:
    """Serve models and a chat page until Ctrl-C: OpenAI's chat, completions and responses, Anthropic's messages.

    Each request leaves one line of JSON on stderr. docs/api.md says what may be asked.

    Example: sprat serve smol --port 0 --api-key secret --max-num-seqs 32
    """
    given = {
        "host": host,
        "port": port,
        "max_tokens": max_tokens,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "kv_cache_memory_bytes": kv_cache_memory_bytes,
        "engine_iteration_timeout_seconds": engine_iteration_timeout,
        "max_num_queued_reqs": max_num_queued_reqs,
        "max_num_queued_tokens": max_num_queued_tokens,
        "shutdown_timeout_seconds": shutdown_timeout,
        "root_path": root_path,
        "ssl_certfile": ssl_certfile and str(ssl_certfile),
        "ssl_keyfile": ssl_keyfile and str(ssl_keyfile),
        "ssl_ca_certs": ssl_ca_certs and str(ssl_ca_certs),
        "allowed_origins": allowed_origins,
        "allowed_hosts": allowed_host,
        "metrics_port": metrics_port,
        "chat_template": chat_template,
        "access_log": access_log,
        "prices": prices,
    }
    names = {"model": model, "names": tuple(served_model_name or ()), "adapters": parse_adapters(adapter or [])}
    return _serve(config, given, names, (api_key, api_key_file), turns)


def _serve(
    file: Path | None,
    given: dict[str, Any],
    first: dict[str, Any],
    keys: tuple[list[str] | None, Path | None],
    turns: int | None,
) -> Result:
    """Join what was said on the command line with what the file says, and serve."""
    from sprat.serve.stop_signals import stop_signals

    url = ""

    def on_ready(address: str) -> None:
        nonlocal url
        url = address
        print_err(address)

    names: list[str] = []
    with stop_signals() as stopped, contextlib.ExitStack() as stack:
        from sprat.serve import access_log, server
        from sprat.serve.server_log import log_to

        stack.enter_context(log_to(sys.stderr))
        sources, config = _settings(file, given, first, keys, turns)
        names += [name for source in sources for name in source.served_names]
        if config.access_log:
            stack.callback(access_log.log.removeHandler, access_log.write_lines_to(sys.stderr))
        if not stopped.is_set():
            server.run(sources, config, on_ready=on_ready)
    return Result({"models": names, "url": url, "stopped": True})


def _settings(
    file: Path | None,
    given: dict[str, Any],
    first: dict[str, Any],
    keys: tuple[list[str] | None, Path | None],
    turns: int | None,
) -> tuple[list[ModelSource], ServeConfig]:
    """The models and the settings; what was said on the command line counts more than what the file says."""
    from sprat.serve import ServeConfig, meter
    from sprat.serve.api_keys import read_api_keys
    from sprat.serve.server_file import ServerFile, read_server_file

    server_file = read_server_file(file) if file is not None else ServerFile()
    table = {**server_file.settings, **{name: value for name, value in given.items() if value is not None}}
    sources = server_file.sources(first["model"], first["names"], first["adapters"])
    key_file = keys[1] or table.pop("api_key_file", None)
    table.pop("api_key_file", None)
    table["api_keys"] = [*table.pop("api_keys", ()), *(keys[0] or ()), *(read_api_keys(key_file) if key_file else ())]
    table["prices"] = meter.select_prices(meter.load_price_tables(), table.get("prices") or meter.DEFAULT_PRICES)
    if turns is not None:
        table["max_history_turns"] = turns
    examples, max_turns = chat_defaults(sources[0].folder)
    page = {"examples": tuple(examples)} | ({} if max_turns is None else {"max_history_turns": max_turns})
    return sources, ServeConfig(**{**page, **table})
