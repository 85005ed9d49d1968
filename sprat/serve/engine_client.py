"""What serving needs of an engine, wherever that runs: in a thread of this process, or in a process of its own.

All of it is called from the event loop and never blocks it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from sprat.errors import SpratError

if TYPE_CHECKING:
    from sprat.engine.response import Response
    from sprat.engine.sampling_params import Sampling
    from sprat.engine.sequence import Tenant
    from sprat.engine.stats import Stats


TokenLogprob = tuple[int, float | None, tuple[tuple[int, float], ...]]  # an id, its own, the likeliest with theirs


class EngineDied(SpratError):
    """The engine's process ended while it had the request, or is not up."""


@dataclass(frozen=True)
class EngineInfo:
    """What an engine can: ``context`` tokens of one request, ``cache_tokens`` of all, ``max_num_seqs`` at a time."""

    context: int
    cache_tokens: int
    max_num_seqs: int
    vocab_size: int
    adapters: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """Answers to one prompt: ``prompt_ids``, and the settings of each answer (each with a seed of its own)."""

    prompt_ids: Sequence[int]
    samplings: Sequence[Sampling]
    tenant: Tenant
    adapter: str | None = None


@dataclass(frozen=True, slots=True)
class JobEvent:
    """What happens to a job; ``choice`` is the place in ``Job.samplings``.

    ``started`` comes once for a job, when its first answer begins, with ``prompt_tokens`` and ``cached_tokens``. Then
    pieces of text, where log-probabilities are wanted with those of the tokens that came since the last piece
    ((id, logprob, ((id, logprob), …)) each); ``done`` for each choice, with its counts. Where prompt_logprobs are
    asked for, ``prompt`` comes for each choice before its text, with those of all its tokens (None for the first). No
    event follows the last one. A job that was cancelled early has ``done`` alone.

    Attributes:
        stop: the stop string that ended it, if one did.
    """

    kind: Literal["started", "prompt", "reasoning", "content", "done"]
    choice: int = 0
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    finish_reason: Literal["", "stop", "length", "cancelled"] = ""
    stop: str = ""


class JobStream(Protocol):
    """A running job."""

    def __aiter__(self) -> AsyncIterator[JobEvent]:
        """Its events, once. Raises SpratError in the place of the next one: EngineError (the job was refused, or one
        of its choices failed, which ends all of them), or EngineDied. Who stops reading early must ``cancel``."""
        ...

    def cancel(self) -> None:
        """End it soon; ``done`` of each choice still comes, with the exact counts. Harmless afterwards."""
        ...


class EngineClient(Protocol):
    """An engine; known by ``info`` once it was started."""

    info: EngineInfo

    @property
    def alive(self) -> bool:
        """Turns false when its process has died or is ``stalled``, and true again when one is up that gets on."""
        ...

    @property
    def stalled(self) -> bool:
        """Its process is there and does not seem to get on; it is ended where that lasts."""
        ...

    @property
    def failure(self) -> SpratError | None:
        """Why it is down for good, after it died several times in a row; None while it is up or will be."""
        ...

    async def start(self) -> None:
        """Have it up. Raises SpratError: it cannot be (no model, no memory)."""
        ...

    async def stop(self) -> None:
        """End it; jobs end as cancelled."""
        ...

    def submit(self, job: Job) -> JobStream:
        """Take a job; what is wrong with it is raised by the stream."""
        ...

    async def stats(self) -> Stats:
        """What it has done and holds; the last known where it is busy or dead: never waits for a step."""
        ...

    async def compile(self, response: Response, tenant: Tenant) -> None:
        """Have a grammar compiled, so that a job with it begins at once; returns soon where it is known.

        It may take seconds, one after the other for each tenant. Raises SpratError: it cannot be used, or the engine
        died.
        """
        ...

    async def embed(
        self, prompts: Sequence[Sequence[int]], adapter: str | None = None, tenant: Tenant = ...
    ) -> list[list[float]]:
        """Pooled hidden states of prompts: the mean over tokens of the last norm's output, scaled to length 1.

        They wait in the fair order of the tenants, as jobs do. Raises SpratError: a prompt is empty or too long, there
        is no such adapter, or the engine died.
        """
        ...
