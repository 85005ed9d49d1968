"""What crosses the wire arrives as it was sent; what is malformed, too long or of a stranger is refused."""

from __future__ import annotations

import dataclasses
import json
import random
import socket
import struct
import threading
from typing import Any

import numpy as np
import pytest

from sprat.errors import MachineError, SpratError, TrustError
from sprat.post.rl import connection, wire
from sprat.post.rl.connection import Caller, Connection
from sprat.post.rl.trajectory import digest_rollouts, pack_rollout, unpack_rollout
from tests.unit.post.rl.trajectories import rollout


def framed(header: Any, payload: bytes = b"", lengths: tuple[int, int] | None = None) -> bytes:
    """A message made by hand, as docs/rl-once.md says it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("!IQ", *(lengths or (len(text), len(payload)))) + text + payload


def pair() -> tuple[socket.socket, Connection]:
    """Our end as plain bytes, and the other as a connection."""
    ours, theirs = socket.socketpair()
    return ours, Connection(theirs, "test")


def test_arrays_arrive_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "ids": np.array([0, 1, 2**31 - 1], "<i4"),
        "logprobs": rng.standard_normal(1000).astype("<f4"),
        "routes": rng.integers(0, 255, (3, 2, 4)).astype("|u1"),
        "empty": np.zeros((0, 5), "<f8"),
        "strided": np.arange(20, dtype="<i8")[::2],
    }
    ours, theirs = socket.socketpair()
    sender, receiver = Connection(ours, "a"), Connection(theirs, "b")
    threading.Thread(target=sender.send, args=({"kind": "x", "text": "é\ud800"}, arrays)).start()
    message = receiver.receive()
    assert message is not None and message.kind == "x" and message.text("text") == "é\ud800"
    assert message.arrays.keys() == arrays.keys()
    for name, value in arrays.items():
        assert message.arrays[name].dtype == value.dtype and np.array_equal(message.arrays[name], value)


ARRAY = {"body": {}, "arrays": [["a", "<i4", [2]]]}
MALFORMED = {
    "no JSON": framed(b"\xff\xfe{"),
    "cut JSON": framed(b'{"body": {}'),
    "deep JSON": framed(b"[" * 100_000),
    "a list": framed([1]),
    "no body": framed({"arrays": []}),
    "a key twice": framed(b'{"body": {"a": 1, "a": 2}, "arrays": []}'),
    "NaN": framed(b'{"body": {"a": NaN}, "arrays": []}'),
    "bytes too few": framed(ARRAY, b"1234567"),
    "bytes too many": framed(ARRAY, b"123456789"),
    "code": framed({"body": {}, "arrays": [["a", "|O", [1]]]}, b"12345678"),
    "negative": framed({"body": {}, "arrays": [["a", "<i4", [-2]]]}),
    "overflow": framed({"body": {}, "arrays": [["a", "<i4", [2**31, 2**31, 2**31]]]}),
    "deep": framed({"body": {}, "arrays": [["a", "<i4", [1] * 5]]}, b"1234"),
    "truth as a number": framed({"body": {}, "arrays": [["a", "<i4", [True]]]}, b"1234"),
    "an array twice": framed({"body": {}, "arrays": [["a", "<i4", [1]]] * 2}, b"12345678"),
    "header too long": framed({}, lengths=(2**32 - 1, 0)),
    "payload too long": framed({}, lengths=(2, 2**63)),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_malformed_is_refused_by_a_sentence(name: str) -> None:
    ours, receiver = pair()
    ours.sendall(MALFORMED[name])
    with pytest.raises(TrustError, match="a message cannot be read"):
        receiver.receive()


def test_noise_is_refused_or_the_end_and_never_anything_else() -> None:
    rng, sound = random.Random(0), framed(ARRAY, b"12345678")
    for _ in range(300):
        ours, receiver = pair()
        damaged = bytearray(sound)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        ours.sendall(damaged[: rng.randrange(len(damaged) + 1)])
        ours.close()
        try:
            message = receiver.receive()
        except TrustError:
            continue
        assert message is None or isinstance(message.body, dict)


def test_a_claim_of_a_gigabyte_takes_no_memory_before_it_comes() -> None:
    ours, receiver = pair()
    ours.sendall(framed({}, lengths=(2, 2**31 - 1)))
    ours.close()
    assert receiver.receive() is None


def test_fields_are_asked_for_by_type() -> None:
    message = wire.Message({"n": 3, "yes": True, "text": "a", "x": 1.5, "rows": [{}]}, {"ids": np.zeros(2, "<i4")})
    assert (message.integer("n"), message.number("x"), message.number("n"), message.text("text")) == (3, 1.5, 3.0, "a")
    faults = [
        lambda: message.integer("yes"),
        lambda: message.integer("n", 4),
        lambda: message.integer("x"),
        lambda: message.number("text"),
        lambda: message.text("n"),
        lambda: message.table("rows"),
        lambda: message.rows("text"),
        lambda: message.array("ids", "<f4"),
        lambda: message.array("ids", "<i4", 2),
        lambda: message.array("none", "<i4"),
    ]
    for fault in faults:
        with pytest.raises(TrustError):
            fault()


def test_only_numbers_that_travel_are_sent() -> None:
    for body, arrays in (
        ({"a": float("nan")}, {}),
        ({}, {"a": np.zeros(1, np.complex64)}),
        ({}, {"a": np.array([{}])}),
    ):
        with pytest.raises(ValueError):
            wire.pack(body, arrays)


def test_who_asks_is_answered_hears_errors_and_notices_the_end() -> None:
    ours, theirs = socket.socketpair()
    server, lost = Connection(ours, "caller"), threading.Event()
    caller = Caller(Connection(theirs, "server"), lost.set)

    def serve() -> None:
        for _ in range(2):
            while (message := server.receive()) is not None and message.kind == "alive":
                server.send({"kind": "alive"})
            assert message is not None
            if message.kind == "double":
                server.send({"kind": "value", "value": 2 * message.integer("n")})
            else:
                server.send(connection.error_reply(TrustError("torn", where="here", todo="mend it")))
        server.close()

    threading.Thread(target=serve).start()
    assert caller.ask("double", n=21).integer("value") == 42
    with pytest.raises(TrustError, match=r"torn \(here\); mend it\."):
        caller.ask("break")
    assert lost.wait(10)
    with pytest.raises(MachineError, match="has ended"):
        caller.ask("double", n=1)


def meet(server_key: bytes, client_key: bytes) -> tuple[list[Any], list[Any]]:
    """What becomes of a client and a server with these keys."""
    ended: tuple[list[Any], list[Any]] = ([], [])
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            try:
                ended[0].append(connection.accept(listener.accept()[0], "client", server_key))
            except SpratError as error:
                ended[0].append(error)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            ended[1].append(connection.connect(f"127.0.0.1:{listener.getsockname()[1]}", client_key))
        except SpratError as error:
            ended[1].append(error)
        thread.join()
    return ended


def test_over_tcp_both_sides_prove_the_key() -> None:
    (server,), (client,) = meet(b"k" * 32, b"k" * 32)
    client.send({"kind": "hello"})
    assert server.receive().kind == "hello"
    (server,), (client,) = meet(b"k" * 32, b"x" * 32)
    assert all(isinstance(side, TrustError) and "it has another key" in str(side) for side in (server, client))


def test_a_proof_cannot_be_sent_back() -> None:
    """Who knows no key and repeats whatever it is sent is no peer."""
    ours, theirs = socket.socketpair()

    def echo() -> None:
        while data := theirs.recv(1000):
            theirs.sendall(data)

    threading.Thread(target=echo, daemon=True).start()
    with pytest.raises(TrustError, match="another key"):
        connection.accept(ours, "mirror", b"k" * 32)


def test_a_peer_that_proves_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HANDSHAKE_SECONDS", 0.2)
    ours, theirs = socket.socketpair()
    with pytest.raises(MachineError):
        connection.accept(ours, "silent", b"k" * 32)
    theirs.close()


def test_an_answer_crosses_the_wire_whole() -> None:
    for sample in range(20):
        one = rollout(3, sample, routes=sample % 2 == 0)
        fields, arrays = pack_rollout(one)
        body, *payload = wire.pack({"one": fields}, arrays)
        header_bytes, _ = wire.unpack_header(bytes(body[:12]))
        message = wire.unpack(bytes(body[12 : 12 + header_bytes]), b"".join(payload))
        back = unpack_rollout(message.table("one"), message.arrays)
        for name, value in vars(one).items():
            same = getattr(back, name)
            assert (same == value) if name != "routes" else (value is None) == (same is None)
        assert one.routes is None or (back.routes is not None and bool((back.routes == one.routes).all()))


@pytest.mark.parametrize("finished", [True, False])
def test_whether_an_answer_was_cut_off_is_known_on_the_other_side(finished: bool) -> None:
    own = rollout(1, 0)
    cut = dataclasses.replace(own, response=dataclasses.replace(own.response, finished=finished))
    assert unpack_rollout(*pack_rollout(cut)).response == cut.response
    assert (digest_rollouts([cut]) == digest_rollouts([own])) == finished
