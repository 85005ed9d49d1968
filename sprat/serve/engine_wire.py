"""What the gateway and the engine's process say to each other: JSON objects, each behind its length in four bytes.

To the engine, first ``{"load": …}`` and then ``submit``, ``cancel``, ``stats``, ``compile``, ``embed`` and ``stop``.
From it ``events`` (all those of a step in one message), to all that ask for something a ``value`` or an ``error``, and
every second ``beat`` (see ``engine_watchdog``).
Nothing here needs torch.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sprat import errors
from sprat.engine.sampling_params import Response, Sampling
from sprat.engine.sequence import Tenant
from sprat.errors import EngineError, SpratError
from sprat.serve.engine_client import EngineDied, Job, JobEvent
from sprat.serve.engine_jobs import Notice

Message = dict[str, Any]
LENGTH = struct.Struct("!I")
MAX_BYTES = 1 << 30  # of one message; more means that the two are out of step
_COUNTS = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "finish_reason", "stop")
_ERRORS = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, SpratError)}
_ERRORS["EngineDied"] = EngineDied
_DEFAULTS = {item.name: item.default for item in dataclasses.fields(Sampling)}


def pack(message: Mapping[str, Any]) -> bytes:
    """The bytes of a message."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return LENGTH.pack(len(body)) + body


class Unpacker:
    """Messages of bytes that come in pieces."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def push(self, data: bytes) -> Iterator[Message]:
        """The messages that ``data`` completes.

        Raises:
            ValueError: this is none.
        """
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= LENGTH.size:
                (size,) = LENGTH.unpack_from(self._buffer, start)
                if size > MAX_BYTES:
                    raise ValueError("a message of the engine is too long")
                stop = start + LENGTH.size + size
                if stop > len(self._buffer):
                    break
                body = bytes(memoryview(self._buffer)[start + LENGTH.size : stop])
                start = stop
                yield json.loads(body)
        finally:
            del self._buffer[:start]


def pack_job(job: Job) -> Message:
    """A job as JSON.

    Raises:
        EngineError: settings hold code, which does not travel.
    """
    if any(sampling.processors for sampling in job.samplings):
        todo = "ask an engine of this process"
        raise EngineError("processors do not reach an engine of another process", where="processors", todo=todo)
    return {
        "ids": list(map(int, job.prompt_ids)),
        "samplings": [_pack_sampling(sampling) for sampling in job.samplings],
        "tenant": [job.tenant.name, job.tenant.secret.hex()],
        "adapter": job.adapter,
    }


def unpack_job(message: Message) -> Job:
    """The job of ``pack_job``."""
    name, secret = message["tenant"]
    samplings = tuple(_unpack_sampling(settings) for settings in message["samplings"])
    return Job(message["ids"], samplings, Tenant(name, bytes.fromhex(secret)), message["adapter"])


def pack_grammar(response: Response, tenant: Tenant) -> Message:
    """What is to be compiled, as JSON."""
    return {"response": [response.kind, response.source], "tenant": [tenant.name, tenant.secret.hex()]}


def unpack_grammar(message: Message) -> tuple[Response, Tenant]:
    """What ``pack_grammar`` packed."""
    (kind, source), (name, secret) = message["response"], message["tenant"]
    return Response(kind, source), Tenant(name, bytes.fromhex(secret))


def pack_prompts(prompts: Sequence[Sequence[int]], tenant: Tenant, adapter: str | None) -> Message:
    """What is to be embedded, as JSON."""
    ids = [list(map(int, prompt)) for prompt in prompts]
    return {"prompts": ids, "tenant": [tenant.name, tenant.secret.hex()], "adapter": adapter}


def unpack_prompts(message: Message) -> tuple[list[list[int]], Tenant, str | None]:
    """The prompts of ``pack_prompts``, whose they are, and the adapter."""
    name, secret = message["tenant"]
    return message["prompts"], Tenant(name, bytes.fromhex(secret)), message["adapter"]


def pack_notices(notices: list[Notice]) -> Message:
    """The events of a step: a list each, a short one where there is only text."""
    return {"events": [[number, *_pack_event(event)] for number, event in notices]}


def unpack_notices(message: Message) -> list[Notice]:
    """The events of ``pack_notices``."""
    return [(number, _unpack_event(*event)) for number, *event in message["events"]]


def pack_error(error: SpratError) -> list[str]:
    """An error as JSON."""
    return [type(error).__name__, error.what, error.where, error.todo]


def unpack_error(packed: list[str]) -> SpratError:
    """The error of ``pack_error``: the same sentence, and the same type if it is one of ours."""
    name, what, where, todo = packed
    return _ERRORS.get(name, EngineError)(what, where=where, todo=todo)


def _pack_sampling(sampling: Sampling) -> Message:
    """Settings that are not the default ones."""
    changed = {name: value for name, default in _DEFAULTS.items() if (value := getattr(sampling, name)) != default}
    if sampling.response is not None:
        changed["response"] = [sampling.response.kind, sampling.response.source]
    return changed


def _unpack_sampling(settings: Message) -> Sampling:
    """The settings of ``_pack_sampling``; they are checked again."""
    if "response" in settings:
        kind, source = settings["response"]
        settings = {**settings, "response": Response(kind, source)}
    return Sampling(**settings)


def _pack_event(event: JobEvent | SpratError) -> list[Any]:
    """[kind, choice, text], where needed with log-probabilities, or counts; or an error."""
    if isinstance(event, SpratError):
        return ["failed", 0, "", pack_error(event)]
    if event.kind in ("started", "done"):
        return [event.kind, event.choice, event.text, event.logprobs, *(getattr(event, name) for name in _COUNTS)]
    return [event.kind, event.choice, event.text, *([event.logprobs] if event.logprobs else [])]


def _unpack_event(kind: Any, choice: int, text: str, rest: Any = (), *counts: Any) -> JobEvent | SpratError:
    """The event of ``_pack_event``."""
    if kind == "failed":
        return unpack_error(rest)
    logprobs = tuple((token, logprob, tuple((other, its) for other, its in top)) for token, logprob, top in rest)
    return JobEvent(kind, choice, text, logprobs, *counts)
