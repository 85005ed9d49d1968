"""How one answer is sampled: every setting, checked once, when it is written down.

What a setting does to the distribution, in this order: the model's logits → ``logit_bias`` → penalties →
``bad_words`` → the think budget and the bans on ending the thinking or the answer → ``processors`` → the grammar of
``response`` → ``temperature`` → ``top_k`` → ``top_p`` → ``min_p`` → the token. Log-probabilities are read off before
all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as GenericSequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sprat.engine.response import Response as Response
from sprat.errors import EngineError

TokenIds = GenericSequence[int]

TOP_LOGPROBS = 20
MAX_INT = 2**31 - 1  # what a count may be; the sampler keeps them in arrays
MAX_STOPS, MAX_BAD_WORDS, MAX_BIASES = 64, 1024, 4096


class Processor(Protocol):
    """A rule of one answer; each answer has its own.

    Attributes:
        starts_at: it changes nothing while the output has fewer tokens than these; 0: from the first one on.
        supports_drafts: whether ``draft_ids`` may hold anything; if not, nothing is drafted for its request.
    """

    starts_at: int
    supports_drafts: bool

    def apply(self, logits_V: NDArray[np.float32], output_ids: TokenIds, draft_ids: TokenIds) -> None:
        """Change ``logits_V`` in place, for the token that follows ``output_ids`` and ``draft_ids``.

        What it raises ends its own request alone, and so does an array that it returns instead.

        Args:
            logits_V: float32, one per id of the tokenizer; -inf is "never".
            output_ids: sampled tokens of the answer; grows from call to call, and never changes otherwise.
            draft_ids: drafted tokens behind them.
        """
        ...


@dataclass(frozen=True)
class Sampling:
    """How one request is sampled.

    Args:
        temperature: 0 (in float32) is greedy; otherwise the logits are divided by it, however small it is.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of likeliest tokens whose probability reaches this; 1 keeps all.
        min_p: drop tokens less likely than this share of the likeliest one; 0 drops none.
        max_tokens: sampled tokens at most; None means as many as the context holds.
        fit: whether ``max_tokens`` gives way where context or KV cache hold less, instead of the request being refused.
        seed: same seed, same prompt, same model: same tokens, whatever else is in the batch.
        stop: strings that end the answer; they are cut from the text and never sought in the reasoning.
        stop_token_ids: ids that end the answer, as the model's own end token does.
        min_tokens: before so many tokens, of reasoning or content, nothing ends the answer: end tokens and
            ``stop_token_ids`` are banned, and a stop string that is whole by then is text. Where the form of
            ``response`` is complete, or other rules leave nothing but the end, this gives way.
        ignore_eos: the model's own end tokens end nothing; with ``response`` they still do: so its form ends.
        thinking: True forces a think block, False forbids it, None lets the model decide.
        logprobs: whether to return the log-probability of each sampled token (nats).
        top_logprobs: so many likeliest tokens are returned at each place, 20 at most; needs ``logprobs`` or
            ``prompt_logprobs``.
        prompt_logprobs: whether to return the log-probability of each token of the prompt but the first (nats, at
            temperature 1). Such a prompt is computed whole, whatever is cached. ``max_tokens`` may be 0 then:
            nothing is sampled.
        routes: whether to return the experts that each token of prompt and answer took (``Output.routes``). Such a
            prompt is computed whole, once for all answers to it, whatever is cached.
        min_think_tokens: with thinking=True, ``</think>`` and the end are banned for this many tokens
            (one at least).
        max_think_tokens: after this many tokens of reasoning ``</think>`` is forced; None never forces it.
        n: answers per prompt, each from its own stream of noise.
        frequency_penalty: taken from a token's logit for each time that the answer has it, -2 … 2.
        presence_penalty: taken once from the logit of each token that the answer has, -2 … 2.
        repetition_penalty: logits of tokens of prompt and answer are divided by it where positive, multiplied
            where negative (Keskar et al. 2019, as in transformers); 1 changes nothing.
        logit_bias: id → -100 … 100, added to that token's logit; kept as sorted pairs.
        bad_words: strings or lists of ids that never become complete, in that spelling.
        response: the form that the content must have.
        processors: called once per answer with the prompt's ids; each gives a ``Processor``.

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
    top_logprobs: int = 0
    max_think_tokens: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    response: Response | None = None
    processors: tuple[Callable[[TokenIds], Processor], ...] = ()
    fit: bool = False
    min_tokens: int = 0
    ignore_eos: bool = False
    prompt_logprobs: bool = False
    routes: bool = False

    def __post_init__(self) -> None:
        """Check every value; lists become tuples, so that settings cannot change behind the engine's back."""
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        for name, low in (("top_k", 0), ("min_think_tokens", 0), ("n", 1), ("min_tokens", 0)):
            _integer(name, getattr(self, name), low, MAX_INT)
        _integer("seed", self.seed, None)
        least = {"max_tokens": 0 if self.prompt_logprobs else 1, "max_think_tokens": 1}
        for name in least:
            if (value := getattr(self, name)) is not None:
                _integer(name, value, least[name], MAX_INT)
        _integer("top_logprobs", self.top_logprobs, 0, TOP_LOGPROBS)
        for name in ("stop", "bad_words", "stop_token_ids", "logit_bias", "processors"):
            object.__setattr__(self, name, _CONVERTERS[name](getattr(self, name)))
        self._check_consistency()

    @property
    def is_structured(self) -> bool:
        """Whether all of the content has a form that was asked for."""
        return self.response is not None and self.response.shapes_content

    def _check_consistency(self) -> None:
        """Raise EngineError where settings that are fine alone contradict each other."""
        if self.thinking not in (True, False, None):
            raise EngineError(f"{self.thinking!r} is not a way to think", where="thinking", todo="true, false or null")
        if self.top_logprobs and not (self.logprobs or self.prompt_logprobs):
            raise EngineError("top_logprobs needs logprobs", where="top_logprobs", todo="set logprobs as well")
        if self.max_think_tokens is not None and self.max_think_tokens < self.min_think_tokens:
            fault = f"max_think_tokens is {self.max_think_tokens}, below min_think_tokens {self.min_think_tokens}"
            raise EngineError(fault, where="max_think_tokens", todo="give at least min_think_tokens")
        if self.max_tokens is not None and self.max_tokens < self.min_tokens and not self.fit:
            fault = f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}"
            raise EngineError(fault, where="min_tokens", todo="give at most max_tokens")
        if self.response is not None and not isinstance(self.response, Response):
            fault = f"{type(self.response).__name__} is no form of a response"
            raise EngineError(fault, where="response", todo="use Response.json, .regex, .choice or .tool_calls")


_DEFAULTS = {item.name: item.default for item in fields(Sampling)}


def pack_sampling(sampling: Sampling) -> dict[str, Any]:
    """Settings that are not the default ones, as JSON, for an engine of another process; ``processors`` are code."""
    changed = {name: value for name, default in _DEFAULTS.items() if (value := getattr(sampling, name)) != default}
    if sampling.response is not None:
        changed["response"] = [sampling.response.kind, sampling.response.source]
    return changed


def unpack_sampling(settings: Mapping[str, Any]) -> Sampling:
    """The settings of ``pack_sampling``; they are checked again."""
    if "response" in settings:
        kind, source = settings["response"]
        settings = {**settings, "response": Response(kind, source)}
    return Sampling(**settings)


def _stop_strings(value: Any) -> tuple[str, ...]:
    """Stop strings: one, several or none."""
    stops = (value,) if isinstance(value, str) else _tuple("stop", value)
    if not all(isinstance(text, str) and text for text in stops):
        raise EngineError(f"a stop string must be non-empty text, not {stops!r}", where="stop", todo="correct it")
    return _bounded("stop", stops, MAX_STOPS)


def _bad_words(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """Bad words: non-empty strings or non-empty lists of ids."""
    words = [item if isinstance(item, str) else _ids("bad_words", item) for item in _tuple("bad_words", value)]
    if isinstance(value, str) or not all(words):
        todo = "give a list of non-empty strings or lists of ids"
        raise EngineError(f"bad_words cannot be {value!r:.80}", where="bad_words", todo=todo)
    return _bounded("bad_words", tuple(words), MAX_BAD_WORDS)


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    """Biases by id, in the order of the ids."""
    try:
        pairs = dict(value or {})
    except (TypeError, ValueError):
        raise EngineError("logit_bias is no table", where="logit_bias", todo="give id: bias pairs") from None
    for index, bias in pairs.items():
        _integer("logit_bias", index, 0)
        _number("logit_bias", bias, -100.0, 100.0)
    return _bounded("logit_bias", tuple(sorted(pairs.items())), MAX_BIASES)


def _processor_factories(value: Any) -> tuple[Any, ...]:
    """What makes the processors of an answer."""
    factories = _tuple("processors", value)
    if not all(callable(factory) for factory in factories):
        todo = "give functions from the prompt's ids to a Processor"
        raise EngineError("a processor cannot be made", where="processors", todo=todo)
    return factories


def _ids(name: str, value: Any) -> tuple[int, ...]:
    """Token ids, none below 0."""
    ids = _tuple(name, value)
    for index in ids:
        _integer(name, index, 0)
    return ids


_CONVERTERS: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "stop": _stop_strings,
    "bad_words": _bad_words,
    "stop_token_ids": lambda value: _bounded("stop_token_ids", _ids("stop_token_ids", value), MAX_STOPS),
    "logit_bias": _logit_bias,
    "processors": _processor_factories,
}


def _tuple(name: str, value: Any) -> tuple[Any, ...]:
    """``value`` as a tuple, None as an empty one."""
    try:
        return tuple(value or ())
    except TypeError:
        raise EngineError(f"{name} cannot be {value!r:.80}", where=name, todo="give a list") from None


def _bounded(name: str, values: tuple[Any, ...], limit: int) -> tuple[Any, ...]:
    """``values``, unless there are too many of them."""
    if len(values) > limit:
        raise EngineError(f"{name} has {len(values)} entries", where=name, todo=f"give {limit} at most")
    return values


def _number(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    """Raise EngineError unless ``value`` is a finite number of [low, high] (or of (low, high])."""
    invalid = isinstance(value, bool) or not isinstance(value, int | float)
    if invalid or not low <= value <= high or (open_low and value == low):
        bound = f"above {low:g}" if open_low else f"at least {low:g}"
        todo = f"give a number {bound} and at most {high:g}"
        raise EngineError(f"{name} cannot be {value!r}", where=name, todo=todo)


def _integer(name: str, value: Any, low: int | None, high: int | None = None) -> None:
    """Raise EngineError unless ``value`` is a whole number of at least ``low`` and at most ``high``."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if not is_integer or (low is not None and value < low) or (high is not None and value > high):
        bounds = ("" if low is None else f" of at least {low}") + ("" if high is None else f" and at most {high}")
        raise EngineError(f"{name} cannot be {value!r}", where=name, todo=f"give a whole number{bounds}")
