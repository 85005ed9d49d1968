"""The engine's process (``engine_process`` starts it): load a model, say so, and work on jobs until told to stop.

It lives as long as the process that started it and no longer, however that ends. Signals at the terminal and of a
service manager are not meant for it: the server lets running answers finish first, and then stops it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any

from sprat.errors import EngineError, SpratError
from sprat.serve.engine_client import EngineDied
from sprat.serve.engine_watchdog import Heartbeat
from sprat.serve.engine_wire import (
    Message,
    Unpacker,
    pack,
    pack_error,
    pack_notices,
    unpack_grammar,
    unpack_job,
    unpack_prompts,
)

if TYPE_CHECKING:
    from sprat.engine import Engine
    from sprat.serve.engine_jobs import Notice
    from sprat.serve.engine_worker import EngineWorker

RECEIVE_BYTES = 1 << 18
SWITCH_SECONDS = 0.0005  # a step waits no longer for a thread that makes a request of a long prompt
SEND_BUFFER_BYTES = 1 << 20  # a step is not held up by a server that is busy for a moment


class Connection:
    """The socket to the server; any thread may send."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket, self._lock = connected, threading.Lock()
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

    def __iter__(self) -> Iterator[Message]:
        """Messages until the server is gone."""
        unpacker = Unpacker()
        with contextlib.suppress(OSError):
            while data := self._socket.recv(RECEIVE_BYTES):
                yield from unpacker.push(data)

    def send(self, message: Message) -> None:
        """Send; nothing happens if nobody is there, which the reader notices."""
        data = pack(message)
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(data)


def main() -> None:
    """Serve until told to stop, or until the server is gone."""
    descriptor, parent, beat_seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    _live_with(parent)
    sys.setswitchinterval(SWITCH_SECONDS)
    connection = Connection(socket.socket(fileno=descriptor))
    heartbeat = Heartbeat(lambda stuck_seconds: connection.send({"beat": stuck_seconds}), beat_seconds)
    heartbeat.start()
    messages = iter(connection)
    worker = _start_worker(connection, next(messages, {}))
    if worker is None:
        return
    commands = Commands(worker, connection)
    heartbeat.watch(worker.step_mark)
    heartbeat.watch(lambda: commands.mark)
    commands.follow(messages)
    sys.stderr.flush()
    os._exit(0)  # a grammar that compiles, or the threads of a back end, are not waited for


def _live_with(parent: int) -> None:
    """End when ``parent`` does, and not when somebody presses Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _start_worker(connection: Connection, message: Message) -> EngineWorker | None:
    """Load the model and say how that went; None if it failed."""
    from sprat.serve.engine_worker import EngineWorker

    def send(notices: list[Notice]) -> None:
        connection.send(pack_notices(notices))

    try:
        worker = EngineWorker(load_engine(**message["load"]), send)
        worker.start()
    except SpratError as error:
        connection.send({"error": pack_error(error)})
        return None
    except Exception as error:
        fault = f"the engine cannot start: {type(error).__name__}: {error}"
        todo = "if it stays, report it with --debug"
        connection.send({"error": pack_error(EngineError(fault, where="engine", todo=todo))})
        return None
    gc.collect()
    gc.freeze()  # what was loaded stays: no step looks through it for garbage
    first = {"info": dataclasses.asdict(worker.info()), "stats": dataclasses.asdict(worker.stats())}
    connection.send({"value": first})
    return worker


def load_engine(model_folder: str, adapters: dict[str, str], settings: dict[str, Any]) -> Engine:
    """The engine of a model's folder, with ``settings`` of ``Engine``; raises as ``load`` and ``Engine`` do."""
    from sprat.engine import Engine
    from sprat.formats.load import load

    model, tokenizer = load(model_folder)
    return Engine(model, tokenizer, adapters=adapters, frozen=True, consume=True, **settings)


class Commands:
    """What the server asks of a worker.

    Attributes:
        mark: which command is being followed, None: none is.
    """

    def __init__(self, worker: EngineWorker, connection: Connection) -> None:
        self._worker, self._connection = worker, connection
        self.mark: int | None = None

    def follow(self, messages: Iterator[Message]) -> None:
        """Do what each message says, until one says to stop."""
        for number, message in enumerate(messages):
            if "stop" in message:
                self._worker.stop()
                return
            self.mark = number
            self._follow(message)
            self.mark = None

    def _follow(self, message: Message) -> None:
        worker, connection = self._worker, self._connection
        if "submit" in message:
            number = message["submit"]
            try:
                job = unpack_job(message)
            except SpratError as error:
                connection.send(pack_notices([(number, error)]))
            else:
                worker.submit(number, job)
        elif "cancel" in message:
            worker.cancel(message["cancel"])
        elif "stats" in message:
            connection.send({"reply": message["stats"], "value": dataclasses.asdict(worker.stats())})
        elif "compile" in message:
            known = worker.compile(*unpack_grammar(message))
            known.add_done_callback(lambda done: _reply(connection, message["compile"], done))
        elif "embed" in message:
            future = worker.embed(*unpack_prompts(message))
            future.add_done_callback(lambda done: _reply(connection, message["embed"], done))


def _reply(connection: Connection, number: int, done: Future[Any]) -> None:
    """Send what a future gave."""
    try:
        connection.send({"reply": number, "value": done.result()})
    except CancelledError:
        died = EngineDied("the engine is being stopped", where="engine", todo="start it again")
        connection.send({"reply": number, "error": pack_error(died)})
    except SpratError as error:
        connection.send({"reply": number, "error": pack_error(error)})
    except Exception as error:
        fault = f"the engine failed: {type(error).__name__}: {error}"
        packed = pack_error(EngineError(fault, where="engine", todo="ask again"))
        connection.send({"reply": number, "error": packed})


if __name__ == "__main__":
    main()
