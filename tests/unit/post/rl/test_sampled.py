"""Requests and answers cross the wire whole; what is not whole is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sprat.engine import Sampling
from sprat.errors import SpratError, TrustError
from sprat.post.rl.sampled import (
    Request,
    SampledAnswer,
    pack_answers,
    pack_requests,
    unpack_answers,
    unpack_requests,
)
from sprat.post.rl.wire import Message

REQUESTS = [
    Request(7, [1, 2, 3], Sampling(temperature=0.7, max_tokens=9, seed=5, n=4, logprobs=True)),
    Request(2, [9], Sampling(seed=-3)),
]
ROUTES = np.arange(2 * 3 * 12, dtype=np.uint8).reshape(12, 2, 3)
ANSWERS = [
    SampledAnswer([5, 6], [-0.5, -0.25], [3, 4], "stop", 2, ROUTES[:4]),
    SampledAnswer([7] * 6, [-1.0] * 6, [4] * 6, "length", 0, ROUTES[4:]),
]


def test_requests_come_as_they_were_sent() -> None:
    rows, arrays = pack_requests(REQUESTS)
    assert unpack_requests(Message({"requests": rows}, dict(arrays))) == REQUESTS


def test_answers_come_as_they_were_sent() -> None:
    body, arrays = pack_answers(ANSWERS)
    back = unpack_answers(Message(body, dict(arrays)), 2, 2)
    for one, other in zip(back, ANSWERS, strict=True):
        assert {k: v for k, v in vars(one).items() if k != "routes"} == {
            k: v for k, v in vars(other).items() if k != "routes"
        }
        assert one.routes is not None and other.routes is not None and np.array_equal(one.routes, other.routes)


def test_answers_that_are_not_whole_are_refused() -> None:
    body, arrays = pack_answers(ANSWERS)
    changes: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"finishes": ["stop"]}, {}),
        ({"finishes": ["stop", "bored"]}, {}),
        ({"finishes": "st"}, {}),
        ({}, {"lengths": np.array([8, 0], "<i4")}),
        ({}, {"lengths": np.array([-1, 9], "<i4")}),
        ({}, {"token_ids": arrays["token_ids"][1:]}),
        ({}, {"versions": arrays["versions"][1:]}),
        ({}, {"logprobs": arrays["logprobs"].astype("<f8")}),
        ({}, {"routes": ROUTES[1:]}),
        ({}, {"routes": ROUTES[:, 0]}),
    ]
    for more, other in changes:
        with pytest.raises(TrustError, match="a message cannot be read"):
            unpack_answers(Message({**body, **more}, {**arrays, **other}), 2, 2)
    with pytest.raises(TrustError):
        unpack_answers(Message(body, dict(arrays)), 2, 3)


def test_requests_that_are_not_whole_or_hold_code_are_refused() -> None:
    rows, arrays = pack_requests(REQUESTS)
    settings = [{"processors": ["os.system"]}, {"temperature": -1}, {"eval": 1}, {"n": 0}]
    for broken in (
        [{**rows[0], "length": 9}, rows[1]],
        rows[:1],
        *([{**rows[0], "sampling": s}, rows[1]] for s in settings),
    ):
        with pytest.raises(SpratError):
            unpack_requests(Message({"requests": broken}, dict(arrays)))
