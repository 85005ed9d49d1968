"""The two ends of the wire (see ``wire``): sockets, questions and replies, signs of life, and who may speak at all.

Processes of one machine are joined by a socket pair, which nobody else can reach. Over TCP each side first proves that
it has the run's key: each sends a nonce, and answers the other's with HMAC-SHA256 of both, so that a recorded
conversation is worth nothing. What follows is not encrypted: between machines use a network of your own or a tunnel.

Whoever asks waits for its reply, and a connection has one question at a time; meanwhile a thread says every few seconds
that the process lives, and how much CPU time it has taken, and is told the same. So a machine that lost its power is
noticed as well as a process that ended.
"""

from __future__ import annotations

import hmac
import queue
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from sprat.errors import MachineError, SpratError, TrustError, pack_error, unpack_error
from sprat.post.rl.wire import LENGTHS, Arrays, Message, pack, unpack, unpack_header

ALIVE_SECONDS = 2.0  # between two signs of life
SILENT_SECONDS = 120.0  # without any, a connection is given up
HANDSHAKE_SECONDS = 10.0
_GREETING = b"sprat-rl/1\n"
_NONCE_BYTES, _PROOF_BYTES = 32, 32


class Connection:
    """One end of the wire; any thread may send, one receives.

    Args:
        connected: a stream socket.
        peer: who is at the other end, for error messages.

    Attributes:
        closed: it was ended from here.
    """

    def __init__(self, connected: socket.socket, peer: str) -> None:
        self.peer, self._socket, self._lock, self.closed = peer, connected, threading.Lock(), False
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.settimeout(SILENT_SECONDS)

    def send(self, body: Mapping[str, Any], arrays: Arrays | None = None) -> None:
        """Send a message. Raises OSError: nobody is there, or takes it."""
        parts = pack(body, arrays)
        with self._lock:
            for part in parts:
                self._socket.sendall(part)

    def send_alive(self) -> None:
        """Say that this process lives, unless that is said by what is being sent, or nobody takes it."""
        if self._lock.acquire(blocking=False):
            try:
                if select.select([], [self._socket], [], 0)[1]:
                    for part in pack({"kind": "alive"}):
                        self._socket.sendall(part)
            except (OSError, ValueError):  # it was closed; whoever receives notices
                pass
            finally:
                self._lock.release()

    def receive(self) -> Message | None:
        """The next message; None where the other side has ended, or has been silent for ``SILENT_SECONDS``.

        Raises:
            TrustError: it does not hold.
        """
        try:
            lengths = self._read(LENGTHS.size)
            if lengths is None:
                return None
            header_bytes, payload_bytes = unpack_header(bytes(lengths))
            header, payload = self._read(header_bytes), self._read(payload_bytes)
        except OSError:  # reset, timed out, or closed by a thread of ours
            return None
        return None if header is None or payload is None else unpack(header, payload)

    def _read(self, size: int) -> bytearray | None:
        """So many bytes; None at the end. Memory grows with what has come, not with what was claimed."""
        data = bytearray()
        while len(data) < size:
            piece = self._socket.recv(min(size - len(data), 1 << 20))
            if not piece:
                return None
            data += piece
        return data

    def close(self) -> None:
        """End it; whoever receives at either side gets None."""
        self.closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Caller:
    """The end that asks: one question at a time, and signs of life from a thread of its own.

    Args:
        on_lost: is called, in a thread, when the other side has ended.
    """

    def __init__(self, connection: Connection, on_lost: Callable[[], None]) -> None:
        self._connection, self._on_lost = connection, on_lost
        self._replies, self._asking = queue.SimpleQueue[Message | None](), threading.Lock()
        for loop in (self._receive, self._say_alive):
            threading.Thread(target=loop, name=f"sprat-rl{loop.__name__}", daemon=True).start()

    def ask(self, kind: str, arrays: Arrays | None = None, **content: Any) -> Message:
        """The reply to a question. Raises SpratError: what it says; MachineError: nobody is there any more."""
        with self._asking:
            try:
                self._connection.send({"kind": kind, "cpu": time.process_time(), **content}, arrays)
                reply = self._replies.get()
            except OSError:
                reply = None
        if reply is None:
            raise MachineError("the run's orchestrator has ended", where=self._connection.peer, todo="start it again")
        if "error" in reply.body:
            raise unpack_error(reply.body["error"], MachineError)
        return reply

    def _receive(self) -> None:
        try:
            while (reply := self._connection.receive()) is not None:
                if reply.body.get("kind") != "alive":
                    self._replies.put(reply)
        finally:
            self._replies.put(None)
            self._on_lost()

    def _say_alive(self) -> None:
        with suppress(OSError):
            while True:
                time.sleep(ALIVE_SECONDS)
                self._connection.send({"kind": "alive", "cpu": time.process_time()})


def error_reply(error: SpratError) -> dict[str, Any]:
    """The body of a reply that is raised where it arrives."""
    return {"error": pack_error(error)}


def parse_address(address: str) -> tuple[str, int]:
    """Host and port.

    >>> parse_address("[::1]:7000"), parse_address("box:0")
    (('::1', 7000), ('box', 0))

    Raises:
        MachineError: it is not written so.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise MachineError(f"cannot read the address {address!r}", where="address", todo="write it as HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def connect(address: str, key: bytes) -> Connection:
    """A connection to the orchestrator that listens at ``address``.

    Raises:
        MachineError: nobody is there. TrustError: it has another key.
    """
    try:
        connected = socket.create_connection(parse_address(address), timeout=HANDSHAKE_SECONDS)
    except OSError as error:
        what = f"no orchestrator can be reached: {error.strerror or error}"
        raise MachineError(what, where=address, todo="start the run, and let it listen there") from None
    return Connection(_shake_hands(connected, address, key, b"worker", b"orchestrator"), address)


def accept(connected: socket.socket, peer: str, key: bytes) -> Connection:
    """The connection of a ``peer`` that proves to have the key.

    Raises:
        TrustError: it has another one. MachineError: it says nothing, or not in time.
    """
    return Connection(_shake_hands(connected, peer, key, b"orchestrator", b"worker"), peer)


def _shake_hands(connected: socket.socket, peer: str, key: bytes, own: bytes, other: bytes) -> socket.socket:
    """Prove the key to each other; each side's proof names its role, so that none can be sent back."""

    def proof(role: bytes, mine: bytes, yours: bytes) -> bytes:
        return hmac.digest(key, _GREETING + role + mine + yours, "sha256")

    try:
        connected.settimeout(HANDSHAKE_SECONDS)
        deadline, nonce = time.monotonic() + HANDSHAKE_SECONDS, secrets.token_bytes(_NONCE_BYTES)
        connected.sendall(_GREETING + nonce)
        greeting = _receive_exactly(connected, len(_GREETING) + _NONCE_BYTES, deadline)
        if not greeting.startswith(_GREETING):
            raise _untrusted(peer, "it speaks another language")
        theirs = greeting[len(_GREETING) :]
        connected.sendall(proof(own, nonce, theirs))
        if not hmac.compare_digest(_receive_exactly(connected, _PROOF_BYTES, deadline), proof(other, theirs, nonce)):
            raise _untrusted(peer, "it has another key")
    except OSError as error:
        connected.close()
        what = f"the connection ended before the key was proved: {error}"
        raise MachineError(what, where=peer, todo="start it again") from None
    except TrustError:
        connected.close()
        raise
    return connected


def _untrusted(peer: str, fault: str) -> TrustError:
    return TrustError(f"the other side cannot be trusted: {fault}", where=peer, todo="give it the key of this run")


def _receive_exactly(connected: socket.socket, size: int, deadline: float) -> bytes:
    data = b""
    while len(data) < size:
        if time.monotonic() > deadline or not (piece := connected.recv(size - len(data))):
            raise OSError("it said nothing")
        data += piece
    return data
