"""What the gateway and the engine's process say to each other arrives as it was sent."""

from __future__ import annotations

import pytest

from sprat.engine import Response, Sampling, Tenant
from sprat.errors import CheckpointError, EngineError, SpratError
from sprat.serve.engine_client import EngineDied, Job, JobEvent
from sprat.serve.engine_jobs import Notice
from sprat.serve.engine_wire import Unpacker, pack, pack_job, pack_notices, unpack_job, unpack_notices


def test_settings_cross_the_wire_whole() -> None:
    job = Job(
        [1, 2, 3],
        (
            Sampling(),
            Sampling(
                temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, max_tokens=None, seed=-(2**80), stop=("\ud800", "é\n"),
                thinking=False, logprobs=True, top_logprobs=3, frequency_penalty=0.5, logit_bias={7: 1.5, 3: -2.0},
                bad_words=("cat", (1, 2)), stop_token_ids=(4,), response=Response.json(), fit=True, n=2,
                presence_penalty=-1, repetition_penalty=1.5, min_think_tokens=2, max_think_tokens=9, min_tokens=3,
                ignore_eos=True, prompt_logprobs=True, routes=True,
            ),
        ),
        Tenant("\x00ß", b"\xff\x00"),
        "terse",
    )  # fmt: skip
    plain, changed = map(vars, job.samplings)
    assert {name for name in plain if plain[name] == changed[name]} == {"processors"}
    stream = pack(pack_job(job)) + pack({"cancel": 1})
    for size in (1, 3, 7, len(stream)):
        unpacker = Unpacker()
        pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
        first, second = [message for piece in pieces for message in unpacker.push(piece)]
        assert unpack_job(first) == job and second == {"cancel": 1}


def test_events_and_errors_cross_the_wire_whole() -> None:
    top = ((3, -0.25), (4, float("-inf")))
    notices: list[Notice] = [
        (7, JobEvent("started", prompt_tokens=3, cached_tokens=1)),
        (7, JobEvent("prompt", 1, logprobs=((9, None, ()), (3, -0.25, top)))),
        (7, JobEvent("reasoning", 1, "\U0001f600 é")),
        (8, JobEvent("content", 0, "", ((3, -0.25, top),))),
        (8, JobEvent("done", 0, "", (), 3, 1, 5, 2, "length", "stop")),
    ]
    failed: list[Notice] = [
        (9, CheckpointError("torn", where="here", todo="mend it")),
        (10, EngineDied("gone")),
        (11, type("Unknown", (SpratError,), {})("odd")),
    ]
    (message,) = Unpacker().push(pack(pack_notices(notices + failed)))
    *events, (nine, torn), (ten, gone), (eleven, odd) = unpack_notices(message)
    assert events == notices and (nine, ten, eleven) == (9, 10, 11)
    assert type(torn) is CheckpointError and str(torn) == "torn (here); mend it."
    assert type(gone) is EngineDied and str(gone) == "gone."
    assert type(odd) is EngineError and str(odd) == "odd."


def test_code_does_not_cross_the_wire() -> None:
    with pytest.raises(EngineError, match="processors do not reach"):
        pack_job(Job([1], [Sampling(processors=(print,))], Tenant()))
