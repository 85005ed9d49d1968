"""A real HTTP server in a thread, on a free loopback port, for as long as a ``with`` block lasts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sprat.serve import ServeConfig, bind_socket, create_app
from sprat.serve.app import ServedModel
from sprat.serve.http_server import HttpServer
from sprat.serve.server import socket_url
from sprat.serve.tls import tls_context


class Prompt(HttpServer):
    """The server, which looks ten times as often whether it shall end: a test waits for that at its end."""

    async def main_loop(self) -> None:
        ticks = 0
        while not self.should_exit:
            if ticks % 10 == 0:
                self.should_exit |= await self.on_tick(ticks // 10)
            ticks += 1
            await asyncio.sleep(0.01)


@contextmanager
def live(
    engine: Any,
    *,
    adapters: tuple[str, ...] = (),
    **settings: Any,
) -> Iterator[str]:
    """The address of a server around an engine, or a client of one, by the name of tiny.

    Args:
        adapters: what the client calls them.
        settings: those of ``ServeConfig``.
    """
    serve_config = ServeConfig(port=0, **{"served_model_name": "tiny", "shutdown_timeout_seconds": 0, **settings})
    if hasattr(engine, "tokenizer") and hasattr(engine, "info"):  # a client, such as the scripted one
        engine = [ServedModel(engine, engine.tokenizer, ("tiny",), adapters=adapters)]
    app = create_app(engine, serve_config)
    with serving(app, serve_config) as address:
        yield address


@contextmanager
def serving(app: Any, serve_config: ServeConfig) -> Iterator[str]:
    """The address of a server of any application that can be drained."""
    listener = bind_socket(serve_config)
    tls = tls_context(serve_config)
    started = threading.Event()
    server = Prompt(app, serve_config, tls, started.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert started.wait(30)
    try:
        yield socket_url(listener, "https" if tls else "http")
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()


def tiny_model(folder: Path) -> None:
    """Save a random model and a tokenizer of a few lines into ``folder``: real in all but what it knows."""
    from sprat.config.sizes import size
    from sprat.formats.load import save
    from sprat.model import Transformer
    from sprat.tokens import Tokenizer

    tokenizer = Tokenizer.train([f"what is {a} + {b}? the sum is {a + b}." for a in range(30) for b in range(30)], 512)
    ids = tokenizer.special_ids
    config = size(
        "pico", vocab_size=tokenizer.vocab_size, max_position_embeddings=128,
        bos_token_id=ids.bos, eos_token_id=ids.eos, pad_token_id=ids.pad,
    )  # fmt: skip
    save(Transformer.create(config, seed=0), tokenizer, folder)
