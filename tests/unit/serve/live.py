"""A real HTTP server in a thread, on a free loopback port, for as long as a ``with`` block lasts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from sprat.serve import ServeConfig, bind_socket, create_app
from sprat.serve.connections import bounded_protocol
from sprat.serve.server import socket_url
from tests.unit.serve.scripted import within


class Prompt(uvicorn.Server):
    """uvicorn, which looks ten times as often whether it shall end: a test waits for that at its end."""

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
    """The address of a server around ``engine``, by the name of tiny; ``settings`` are those of ``ServeConfig``."""
    serve_config = ServeConfig(port=0, **{"served_model_name": "tiny", **settings})
    app = create_app(engine, serve_config, adapters=adapters)
    listener = bind_socket(serve_config)
    http = bounded_protocol(serve_config)
    config = uvicorn.Config(app, http=http, log_level="warning", timeout_graceful_shutdown=2, ws="none")
    server = Prompt(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert within(30, lambda: server.started)
    try:
        yield socket_url(listener)
    finally:
        app.state.pool.close()
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
