"""Where workers are that are no children of this process: others' machines, or a Ray cluster.

They come over TCP and prove that they have the run's key (``connection``); from then on they are workers as any other.
``listen`` waits for whoever comes: ``python -m sprat.post.rl.worker HOST:PORT KEYFILE MODEL`` on each machine. ``ray``
has Ray place them as actors, one for each of ``rollout.workers``, and start again those that end. Both read the model
from a path of their own machine, and take weights over the wire where they do not see the run's folder.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from sprat.config.rollout import RolloutConfig
from sprat.errors import MachineError, SpratError
from sprat.files import atomic
from sprat.post.rl.connection import Connection, accept, parse_address

KEY_FILE, ADDRESS_FILE = "rollout.key", "rollout.address"  # in the run's checkpoints
_KEY_BYTES = 32
log = logging.getLogger("sprat.post.rl")
Serve = Callable[[Connection], None]


class Placement:
    """Workers elsewhere; this one has none."""

    def keep_alive(self) -> None:
        """Start again whoever ended. Raises SpratError: that cannot be."""

    def close(self) -> None:
        """End them."""


class Listening(Placement):
    """Whoever comes and has the key.

    Args:
        address: HOST:PORT; port 0 is any.
        folder: gets the key (readable by its owner alone) and the address.

    Raises:
        MachineError: the address cannot be had.
    """

    def __init__(self, address: str, folder: Path, serve: Serve) -> None:
        host, port = parse_address(address)
        self._serve, self.key = serve, _make_key(folder / KEY_FILE)
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, port), family=family)
        except OSError as error:
            what, todo = f"cannot listen: {error.strerror or error}", "give another rollout.listen, as HOST:PORT"
            raise MachineError(what, where=address, todo=todo) from None
        self.port = int(self._listener.getsockname()[1])
        self.address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        atomic.write_text(folder / ADDRESS_FILE, self.address + "\n", durable=False)
        threading.Thread(target=self._accept, daemon=True, name="rl-listen").start()

    def _accept(self) -> None:
        """Let strangers prove themselves, each in a thread, so that none keeps others waiting."""
        while True:
            try:
                connected, peer = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._meet, args=(connected, f"{peer[0]}:{peer[1]}"), daemon=True).start()

    def _meet(self, connected: socket.socket, peer: str) -> None:
        try:
            self._serve(accept(connected, peer, self.key))
        except SpratError as error:
            log.warning("%s", error)

    def close(self) -> None:
        """Nobody else may come."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # whoever waits in accept() is told
        self._listener.close()


def _make_key(path: Path) -> bytes:
    """The key in ``path``, drawn if there is none: the same over all sessions of a run."""
    if path.is_file():
        return bytes.fromhex(path.read_text(encoding="ascii"))
    key = secrets.token_bytes(_KEY_BYTES)
    with atomic.replace_file(path) as temporary:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as stream:
            stream.write(key.hex())
    return key


class RayPlacement(Listening):
    """Actors of Ray that run the worker's own function."""

    def __init__(self, config: RolloutConfig, folder: Path, job: Mapping[str, Any], serve: Serve) -> None:
        try:
            import ray
        except ModuleNotFoundError:
            todo = "pip install 'sprat[ray]', or leave rollout.placement out"
            raise MachineError("Ray is not installed", where="rollout.placement=ray", todo=todo) from None
        super().__init__(config.listen, folder, serve)
        self._ray, self._model = ray, str(job["model"])
        self._is_own = not ray.is_initialized()
        if self._is_own:
            here = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
            ray.init(log_to_driver=False, configure_logging=False, **here)
        host, _ = parse_address(self.address)
        if host in ("0.0.0.0", "::"):
            self.address = f"{ray.util.get_node_ip_address()}:{self.port}"
        self._function = ray.remote(num_cpus=1, max_retries=0)(run_worker)
        self._tasks: list[Any] = [None] * config.workers

    def keep_alive(self) -> None:
        """See ``Placement``."""
        running = [task for task in self._tasks if task is not None]
        ended = set(self._ray.wait(running, num_returns=len(running), timeout=0)[0]) if running else set()
        for place, task in enumerate(self._tasks):
            if task is None or task in ended:
                if task is not None:
                    log.warning("ray worker %d ended; it is started again", place)
                self._tasks[place] = self._function.remote(self.address, self.key, self._model)

    def close(self) -> None:
        """See ``Placement``."""
        super().close()
        for task in self._tasks:
            if task is not None:
                self._ray.cancel(task, force=True)
        if self._is_own:
            self._ray.shutdown()


def run_worker(address: str, key: bytes, model: str) -> None:
    """A worker of a run that listens at ``address``, until the run ends; what Ray runs, anywhere."""
    from sprat.post.rl.worker import work_at

    work_at(address, key, model)


def start_placement(config: RolloutConfig, folder: Path, job: Mapping[str, Any], serve: Serve) -> Placement:
    """What ``config.placement`` asks for. Raises MachineError: it cannot be."""
    if config.placement == "ray":
        return RayPlacement(config, folder, job, serve)
    return Listening(config.listen, folder, serve) if config.placement == "listen" else Placement()
