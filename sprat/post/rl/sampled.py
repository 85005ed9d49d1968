"""What a worker is asked and what it answers: tokens in, tokens out, as messages of the wire.

A worker knows neither tasks nor verifiers: it is given the ids of prompts and how to draw, and gives ids back with
their log-probabilities, the version of the weights of each, and the experts that each place took, where somebody asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sprat.engine import Sampling
from sprat.engine.sampling_params import pack_sampling, unpack_sampling
from sprat.errors import EngineError, TrustError
from sprat.post.rl.wire import Arrays, Message

_FINISHES = ("stop", "length", "cancelled")


@dataclass(frozen=True)
class Request:
    """A group to sample: ``sampling.n`` answers to one prompt."""

    group: int
    prompt_ids: list[int]
    sampling: Sampling


@dataclass(frozen=True)
class SampledAnswer:
    """One answer, not paid yet.

    Attributes:
        logprobs: of its tokens, in nats, float32.
        versions: of the weights that sampled each token.
        finish: why it ended.
        prefill_tokens: prompt tokens that are computed for it; the first answer of a group pays for the others, so that
            the cost of a group does not depend on what was sampled beside it.
        routes: experts of each place of prompt and answer [positions, MoE layers, top_k]; None where nobody asked.
    """

    token_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    finish: str
    prefill_tokens: int
    routes: NDArray[Any] | None = None


def pack_requests(requests: Sequence[Request]) -> tuple[list[dict[str, Any]], Arrays]:
    """Requests as rows of JSON, and the ids of their prompts."""
    rows = [
        {"group": each.group, "length": len(each.prompt_ids), "sampling": pack_sampling(each.sampling)}
        for each in requests
    ]
    return rows, {"prompt_ids": np.array([i for each in requests for i in each.prompt_ids], "<i4")}


def unpack_requests(message: Message) -> list[Request]:
    """The requests of ``pack_requests``.

    Raises:
        TrustError, EngineError: they do not hold.
    """
    ids, start, requests = message.array("prompt_ids", "<i4").tolist(), 0, list[Request]()
    for row in message.rows("requests"):
        part = Message(row)
        stop = start + part.integer("length", 1)
        settings = part.table("sampling")
        if "processors" in settings:
            raise _refused("settings hold code")
        try:
            sampling = unpack_sampling(settings)
        except TypeError as error:
            raise EngineError(f"unknown settings: {error}", where="wire", todo="run the same version") from None
        requests.append(Request(part.integer("group"), ids[start:stop], sampling))
        start = stop
    if start != len(ids):
        raise _refused(f"prompts of {start} tokens, and {len(ids)} came")
    return requests


def pack_answers(answers: Sequence[SampledAnswer]) -> tuple[dict[str, Any], Arrays]:
    """The answers of a group as JSON and arrays."""
    body = {"finishes": [one.finish for one in answers]}
    arrays: dict[str, NDArray[Any]] = {
        "lengths": np.array([len(one.token_ids) for one in answers], "<i4"),
        "prefill_tokens": np.array([one.prefill_tokens for one in answers], "<i4"),
        "token_ids": np.array([token for one in answers for token in one.token_ids], "<i4"),
        "logprobs": np.array([value for one in answers for value in one.logprobs], "<f4"),
        "versions": np.array([version for one in answers for version in one.versions], "<i4"),
    }
    routes = [one.routes for one in answers if one.routes is not None]
    if routes:
        arrays["routes"] = np.concatenate(routes)
    return body, arrays


def unpack_answers(message: Message, prompt_tokens: int, count: int) -> list[SampledAnswer]:
    """The ``count`` answers of ``pack_answers`` to a prompt of ``prompt_tokens``.

    Raises:
        TrustError: they are not whole.
    """
    lengths = message.array("lengths", "<i4").tolist()
    prefill = message.array("prefill_tokens", "<i4").tolist()
    columns = [message.array(name, kind) for name, kind in (("token_ids", "<i4"), ("logprobs", "<f4"))]
    columns.append(message.array("versions", "<i4"))
    finishes, routes = message.body.get("finishes"), message.arrays.get("routes")
    if not isinstance(finishes, list) or not {len(lengths), len(prefill), len(finishes)} == {count}:
        raise _refused(f"{len(lengths)} answers came, and {count} were asked for")
    if any(finish not in _FINISHES for finish in finishes) or min(lengths, default=0) < 1:
        raise _refused("an answer is empty, or has no reason to end")
    if any(len(column) != sum(lengths) for column in columns):
        raise _refused("tokens, log-probabilities and versions differ in number")
    if routes is not None and (routes.ndim != 3 or len(routes) != sum(lengths) + count * prompt_tokens):
        raise _refused("routes are not those of the tokens")
    tokens, logprobs, versions = (column.tolist() for column in columns)
    answers, start, place = list[SampledAnswer](), 0, 0
    for length, finish, computed in zip(lengths, finishes, prefill, strict=True):
        stop, next_place = start + length, place + prompt_tokens + length
        own = None if routes is None else routes[place:next_place]
        parts = tokens[start:stop], logprobs[start:stop], versions[start:stop]
        answers.append(SampledAnswer(*parts, finish, computed, own))
        start, place = stop, next_place
    return answers


def check_versions(answers: Sequence[SampledAnswer], oldest: int, newest: int, where: str) -> None:
    """Refuse answers with a token of other weights than versions ``oldest`` to ``newest``.

    Raises:
        TrustError: there is one.
    """
    found = [version for answer in answers for version in answer.versions]
    if not oldest <= min(found) <= max(found) <= newest:
        what = f"versions {min(found)} to {max(found)} of the weights sampled it, and {oldest} to {newest} may have"
        raise TrustError(what, where=where, todo="run the same version of sprat on all machines")


def _refused(fault: str) -> TrustError:
    return TrustError(f"a message cannot be read: {fault}", where="wire", todo="run the same version on all machines")
