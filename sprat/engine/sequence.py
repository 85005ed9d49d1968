"""What a request is: how to sample it, what it has said so far, and what comes back.

``token_ids`` hold every sampled token, the closing end-of-sequence token included, because
reinforcement learning must also learn to stop. ``logprobs`` are those of the model's whole
distribution at the request's temperature (at temperature 1 for greedy requests), before any ban,
top-k, top-p or min-p: what a trainer recomputes from the raw logits.
"""

from __future__ import annotations

import hashlib
import math
import threading
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from sprat.errors import EngineError

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Sampling:
    """How one request is sampled.

    Args:
        temperature: 0 is greedy; otherwise the logits are divided by it.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches this; 1 keeps all.
        min_p: drop tokens less likely than this share of the likeliest one; 0 drops none.
        max_tokens: sampled tokens at most; None means as many as the context holds.
        seed: same seed, same prompt, same model: same tokens, whatever else is in the batch.
        stop: strings that end the answer; they are cut from the text and never sought in the reasoning.
        thinking: True forces a think block, False forbids it, None lets the model decide.
        logprobs: whether to return the log-probability of each sampled token (nats).
        min_think_tokens: with thinking=True, ``</think>`` and the end are banned for this many tokens
            (one at least).
        n: answers per prompt, each from its own stream of noise.

    Raises:
        EngineError: a value is out of range or not a number.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int | None = 256
    seed: int = 0
    stop: tuple[str, ...] = ()
    thinking: bool | None = None
    logprobs: bool = False
    min_think_tokens: int = 0
    n: int = 1

    def __post_init__(self) -> None:
        """Check every value and turn ``stop`` into a tuple."""
        stop: Any = self.stop
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        object.__setattr__(self, "stop", stops)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        for name, low in (("top_k", 0), ("min_think_tokens", 0), ("n", 1), ("seed", None)):
            _integer(name, getattr(self, name), low)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        if not all(isinstance(text, str) and text for text in stops):
            raise EngineError(f"a stop string must be non-empty text, not {stops!r}", where="stop", todo="correct it")
        if self.thinking not in (True, False, None):
            raise EngineError(f"{self.thinking!r} is not a way to think", where="thinking", todo="true, false or null")


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise EngineError unless ``value`` is a finite number of [low, high] (or of (low, high])."""
    wrong = isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value)
    if wrong or not low <= value <= high or (open_low and value == low):
        bound = f"above {low:g}" if open_low else f"at least {low:g}"
        todo = f"give a number {bound} and at most {high:g}"
        raise EngineError(f"{name} cannot be {value!r}", where=name, todo=todo)


def _integer(name: str, value: Any, low: int | None) -> None:
    """Raise EngineError unless ``value`` is a whole number of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or (low is not None and value < low):
        todo = "give a whole number" + ("" if low is None else f" of at least {low}")
        raise EngineError(f"{name} cannot be {value!r}", where=name, todo=todo)


@dataclass(frozen=True)
class Usage:
    """Tokens of one request; ``cache_hit_tokens + cache_miss_tokens == prompt_tokens``."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cache_hit_tokens: int
    cache_miss_tokens: int


@dataclass(frozen=True)
class Output:
    """One finished answer. ``closed`` is False when the reasoning was cut off before ``</think>``."""

    text: str
    reasoning: str
    token_ids: list[int]
    logprobs: list[float] | None
    usage: Usage
    finish_reason: FinishReason
    prompt_ids: list[int]
    closed: bool = True


@dataclass(frozen=True)
class Delta:
    """A piece of a streamed answer; the last one is of kind ``done`` and carries the whole output."""

    kind: Literal["reasoning", "content", "done"]
    text: str = ""
    output: Output | None = None


@dataclass(eq=False)
class Sequence:
    """The state of one request inside the engine: waiting (row -1), running (row >= 0) or finished."""

    id: int
    prompt: list[int]
    sampling: Sampling
    limit: int  # sampled tokens at most
    key: int  # 64-bit key of its noise
    share: int = 0  # requests of equal non-zero share may share one prefill
    event: threading.Event | None = None  # once set, the request is cancelled
    ban: int = 0  # first tokens for which the end of thinking is banned
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    row: int = -1
    hit: int = 0  # prompt tokens whose cache came from a twin
    followed: bool = False  # its text is read token by token
    cancelled: bool = False
    finish_reason: FinishReason | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt and the answer so far."""
        return len(self.prompt) + len(self.token_ids)


def noise_key(seed: int, stream: int, prompt: list[int]) -> int:
    """The 64-bit key of a request's noise: a digest of (seed, stream, prompt).

    The prompt takes part so that the rows of a batch that share one seed are not correlated, and the
    position in the batch takes none, so that a request alone samples what it samples in a crowd.
    """
    digest = hashlib.blake2b(f"{seed}/{stream}/".encode(), digest_size=8)
    digest.update(np.asarray(prompt, dtype=np.int64).tobytes())
    return int.from_bytes(digest.digest(), "little")
