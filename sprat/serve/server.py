"""The process: take the port, load the model, serve until it is told to stop.

What cannot work is said before the model is loaded, which is the slowest step: a port that is in use, TLS files that
are missing, too few open files. The address is printed when requests are really answered. How it leaves:
``http_server``.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import ipaddress
import logging
import signal
import socket
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sprat.errors import CheckpointError, EngineDeadError, MachineError, ServeError
from sprat.serve.app import ServedModel, create_app
from sprat.serve.config import ServeConfig
from sprat.serve.server_file import ModelSource
from sprat.serve.tls import tls_context

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger(__name__)
ADAPTER_FILE = "adapter_config.json"
OTHER_FILES = 256  # beside connections: the model's, the engine's, those of libraries
SEND_BUFFER_BYTES = 1 << 18  # in the system, for each connection; it would grow to megabytes for one that does not read
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # a peer that vanished is gone after a minute


def bind_socket(config: ServeConfig) -> socket.socket:
    """A socket that listens on ``config.host`` and ``config.port``.

    It listens from now on: early callers wait in its queue until the server is up.

    Raises:
        ServeError: the port is in use or not allowed, the host is not ours, or others could reach it without a key.
    """
    host, port = config.host, config.port
    where = f"{host}:{port}"
    try:
        family, sock_type, sock_proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise ServeError("no such host", where=host, todo="use 127.0.0.1, or an address of this machine") from None
    if not config.api_keys and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        todo = "give a key with --api-key (or SPRAT_API_KEY), or listen on 127.0.0.1"
        raise ServeError("other machines could use this server without a key", where=where, todo=todo)
    listener = socket.socket(family, sock_type, sock_proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _set_connection_options(listener)
        listener.bind(address)
        listener.listen(2048)
        listener.setblocking(False)
    except PermissionError:
        listener.close()
        raise ServeError("this port needs more rights", where=where, todo="use a port above 1023") from None
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            todo = "stop the other program or give another port (0 takes any free one)"
            raise ServeError("the port is already in use", where=where, todo=todo) from None
        raise ServeError(f"cannot listen: {error.strerror}", where=where, todo="use 127.0.0.1") from None
    return listener


def bind_metrics_socket(config: ServeConfig) -> socket.socket | None:
    """A socket for the metrics' own port, if there is one; raises as ``bind_socket``."""
    return None if config.metrics_port is None else bind_socket(config.replace(port=config.metrics_port))


def _set_connection_options(listener: socket.socket) -> None:
    """What connections take over from their listener."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def socket_url(listener: socket.socket, scheme: str = "http") -> str:
    """The address of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def raise_file_limit(max_connections: int) -> int:
    """Let this process have enough files open for ``max_connections``; returns for how many it may, and warns of fewer.

    Raises:
        ServeError: it may not have enough for any.
    """
    try:
        import resource
    except ImportError:  # no such limit on this system
        return max_connections
    needed = max_connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return max_connections
    granted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    what = f"{max_connections} connections need {needed} open files, and this process may have {granted}"
    todo = "raise the limit (ulimit -Hn, LimitNOFILE of systemd), or lower max_connections"
    if granted <= OTHER_FILES:
        raise ServeError(what, where="max_connections", todo=todo)
    if granted < needed:
        warnings.warn(f"{what}: {granted - OTHER_FILES} connections are taken; {todo}", stacklevel=2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (granted, hard))
    return granted - OTHER_FILES


def serve(
    app: FastAPI,
    listener: socket.socket,
    *,
    on_ready: Callable[[str], None] = print,
    metrics_listener: socket.socket | None = None,
) -> None:
    """Serve ``app`` on a listening socket until Ctrl-C or SIGTERM, or until its engines are down for good.

    Args:
        app: from ``create_app``.
        listener: from ``bind_socket``.
        on_ready: called once with the address when requests are answered.
        metrics_listener: from ``bind_metrics_socket``.

    Raises:
        ServeError: TLS cannot be had of the files that the app's config names, or there are too few open files.
        EngineDeadError: all its engines died again and again.
    """
    from sprat.serve.http_server import HttpServer

    config: ServeConfig = app.state.config
    config = config.replace(max_connections=raise_file_limit(config.max_connections))
    tls = tls_context(config)
    url = socket_url(listener, "https" if tls else "http")
    # uvicorn sends itself the signal again when it has shut down
    previous_handler = _handle_as_interrupt(signal.SIGTERM)

    def is_ready() -> None:
        on_ready(url)
        if metrics_listener is not None:
            log.info("metrics: %s/metrics", socket_url(metrics_listener, "https" if tls else "http"))

    server = HttpServer(app, config, tls, is_ready, metrics_listener)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        return
    finally:
        if previous_handler is not None:
            signal.signal(signal.SIGTERM, previous_handler)
        listener.close()
    if server.failure is not None:
        what = f"no engine of this server is up any more, each died again and again: {server.failure.what}"
        raise EngineDeadError(what, where=server.failure.where or url, todo="mend that and start the server again")


def _handle_as_interrupt(signal_number: int) -> Any:
    """Let a signal mean Ctrl-C; what it meant before, or None outside of the main thread, where nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal_number, signal.default_int_handler)


def run(
    models: str | Path | Sequence[ModelSource],
    config: ServeConfig,
    *,
    adapters: Mapping[str, str | Path] | None = None,
    on_ready: Callable[[str], None] = print,
) -> None:
    """Serve models until Ctrl-C or until all their engines are down for good, each engine in a process of its own.

    Args:
        models: a folder (HF layout or a run folder), a GGUF file or a name; or several, with what they are called.
        config: see ``ServeConfig``; a single folder is called as it says.
        adapters: LoRA adapters beside a single folder, name → folder; a request chooses one as ``model:name``.
        on_ready: called once with the address when requests are answered.

    Raises:
        ServeError: the port or so many open files cannot be had, TLS cannot be set up, the network is asked for without
            a key, an adapter has the model's name, or the model's chat template cannot be followed (see
            ``ServeConfig.chat_template``).
        MachineError: FastAPI or uvicorn is missing.
        CheckpointError, ConfigError: the folder holds no model, or an adapter's is of another.
        EngineDeadError: see ``serve``.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            todo = f"pip install {package.replace('_', '-')}"
            raise MachineError(f"serving needs the package {package!r}", where="this Python", todo=todo)
    config = config.replace(max_connections=raise_file_limit(config.max_connections))
    tls_context(config)  # what is wrong with it is said now, not when the model is there
    if isinstance(models, str | Path):
        names = (config.served_model_name,) if config.served_model_name else ()
        own = {name: Path(folder) for name, folder in (adapters or {}).items()}
        models = [ModelSource(Path(models), (*names, *config.served_model_aliases), own)]
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(bind_socket(config))
        metrics_listener = bind_metrics_socket(config)
        if metrics_listener is not None:
            stack.enter_context(metrics_listener)
        app = create_app([_served(source, config) for source in models], config)
        serve(app, listener, on_ready=on_ready, metrics_listener=metrics_listener)


def _served(source: ModelSource, config: ServeConfig) -> ServedModel:
    """A model whose engine is to run in a process of its own; not started.

    Raises:
        ServeError: its chat template cannot be followed.
        CheckpointError: there is no adapter in a folder.
        SpratError: see ``load_tokenizer``.
    """
    from sprat.formats.load import load_tokenizer
    from sprat.serve.engine_process import ProcessEngineClient

    for name, folder in source.adapters.items():  # said now, not when the model is there
        if not (folder / ADAPTER_FILE).is_file():
            what, todo = f"the adapter {name!r} has no {ADAPTER_FILE}", "give the folder of a LoRA adapter (PEFT)"
            raise CheckpointError(what, where=str(folder), todo=todo)
    tokenizer = load_tokenizer(source.folder)
    if (mismatch := tokenizer.chat_format.mismatch) and config.chat_template == "refuse":
        what = f"the model's chat template cannot be followed, and it would be asked in another format: {mismatch}"
        raise ServeError(what, where=str(source.folder), todo="mend the template, or say --chat-template accept")
    settings = {"max_batch": config.max_num_seqs, "cache_bytes": config.kv_cache_memory_bytes}
    engine = ProcessEngineClient(
        source.folder,
        adapters=source.adapters,
        iteration_timeout_seconds=config.engine_iteration_timeout_seconds,
        **settings,
    )
    default_sampling = tokenizer.generation_config.default_sampling
    return ServedModel(engine, tokenizer, source.served_names, default_sampling, tuple(source.adapters))
