# size: one noun: a request, from its prompt to what its caller holds
"""A request before and beside the engine: from a prompt to a sequence that will fit, and the handle of its caller.

Everything that can be wrong with a request is found here, in the caller's thread and before it costs anything, as one
EngineError. Its caller then holds a handle: the text as it comes, the result, and the way to stop it.
"""

from __future__ import annotations

import itertools
import queue
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as GenericSequence
from threading import Event
from typing import Any

from sprat.config.model import ModelConfig
from sprat.engine.backend import BLOCK_SIZE
from sprat.engine.detokenizer import Detokenizer
from sprat.engine.routes import new_routes
from sprat.engine.sampling.grammar import GrammarCache
from sprat.engine.sampling.processors import build_processors
from sprat.engine.sampling_params import Sampling
from sprat.engine.sequence import (
    Delta,
    EngineLimits,
    FinishReason,
    Output,
    Scoring,
    Sequence,
    Tenant,
    Usage,
    noise_key,
)
from sprat.engine.token_logprobs import TokenLogprobs
from sprat.errors import DataError, EngineError
from sprat.tokens import Message, Tokenizer, render
from sprat.tokens.chat import resolve_thinking, split_reasoning

WAIT_SECONDS = 0.05  # how long a waiting thread sleeps before it looks again

Listener = Callable[[Delta | Exception], None]  # called with the engine's books locked: it only takes note
Prompt = str | GenericSequence[Message] | GenericSequence[Mapping[str, str]] | GenericSequence[int]


class RequestBuilder:
    """Makes numbered requests for one model.

    Args:
        vocab: ids that the model has.
        adapters: names of the back end's adapters, by their place.
        config: the model's; without it no request is told its experts.
    """

    def __init__(
        self,
        vocab: int,
        tokenizer: Tokenizer,
        grammars: GrammarCache,
        limits: EngineLimits,
        adapters: GenericSequence[str] = (),
        config: ModelConfig | None = None,
    ) -> None:
        self._config = config
        self._adapters = {name: place for place, name in enumerate(adapters)}
        self._vocab, self._tokenizer, self._grammars, self._limits = vocab, tokenizer, grammars, limits
        self._request_ids = itertools.count(1)

    def tokenize(self, prompt: Prompt, sampling: Sampling) -> list[int]:
        """The ids of a prompt: a question, a conversation (a dict is a message too), or ids as they are.

        Raises:
            EngineError: it is none of these, empty or not of this vocabulary; a role is unknown or has no place in the
                chat format; the model shall think and does not.
        """
        given: list[Any] = [None]  # what is no sequence holds no token
        if isinstance(prompt, GenericSequence):
            given = [Message("user", prompt)] if isinstance(prompt, str) else list(prompt)
        parts = [Message(**p) if isinstance(p, Mapping) and p.keys() == {"role", "content"} else p for p in given]
        turns = [part for part in parts if isinstance(part, Message) and isinstance(part.content, str)]
        if not given or (turns and not any(turn.content.strip() for turn in turns)):
            raise EngineError("the prompt is empty", where="prompt", todo="ask something")
        if len(turns) == len(parts):
            try:
                return render(self._tokenizer, turns, thinking=sampling.thinking)
            except DataError as error:
                raise EngineError(error.what, where=error.where, todo=error.todo) from None
        ids = [int(index) for index in parts if isinstance(index, int)]
        if len(ids) != len(parts) or min(ids) < 0 or max(ids) >= self._vocab:
            fault = "the prompt holds what is no token of this model and no message"
            todo = (
                f"give ids of 0 … {self._vocab - 1}, or sprat.tokens.Message or dicts of just role and content (text)"
            )
            raise EngineError(fault, where="prompt", todo=todo)
        return ids

    def build(
        self,
        ids: list[int],
        sampling: Sampling,
        *,
        tenant: Tenant,
        stream: int = 0,
        prompt_group: int = 0,
        cancel_event: Event | None = None,
        adapter: str | None = None,
        embeds: bool = False,
    ) -> Sequence:
        """A new request; ``stream`` numbers the answers that one prompt gets from one seed.

        ``embeds``: no answer is wanted, but the sum of the prompt's hidden states.

        Raises:
            EngineError: it asks for more tokens than the engine gives, or than the context or the KV cache holds; a
                setting names what this vocabulary does not have; the form of its response cannot be followed; there
                is no such adapter.
        """
        limits, max_tokens = self._limits, 0 if embeds else sampling.max_tokens
        scoring: Scoring = "hidden" if embeds else "logprobs" if sampling.prompt_logprobs else ""
        context, cap, cache_tokens = limits.context, limits.max_tokens_cap, limits.num_blocks * BLOCK_SIZE
        available = context - len(ids)
        if max_tokens is None:
            max_tokens = min(cap, max(available, 1))
        if sampling.fit:
            max_tokens = min(max_tokens, cap, max(1, min(available, cache_tokens - len(ids))))
        if max_tokens > cap:
            fault = f"max_tokens is {max_tokens}, and this engine gives {cap} at most"
            raise EngineError(fault, where="max_tokens", todo="ask for less")
        if max_tokens > available:
            fault = f"{len(ids)} prompt tokens and {max_tokens} more exceed the context of {context}"
            raise EngineError(fault, where="prompt", todo="shorten the prompt or lower max_tokens")
        if len(ids) + max_tokens > cache_tokens:
            fault = f"{len(ids)} prompt tokens and {max_tokens} more exceed the memory for {cache_tokens}"
            raise EngineError(fault, where="prompt", todo="ask for less, or give the engine more cache_bytes")
        if adapter is not None and adapter not in self._adapters:
            todo = f"there are {', '.join(map(repr, self._adapters))}" if self._adapters else "leave it out"
            raise EngineError(f"the engine has no adapter {adapter!r}", where="adapter", todo=todo)
        return Sequence(
            id=next(self._request_ids),
            prompt_ids=ids,
            sampling=sampling,
            max_tokens=max_tokens,
            noise_key=noise_key(sampling.seed, stream, ids),
            prompt_group=0 if scoring else prompt_group,  # each is scored by itself
            tenant=tenant,
            cancel_event=cancel_event,
            adapter=-1 if adapter is None else self._adapters[adapter],
            scoring=scoring,
            routes=new_routes(self._config, len(ids) + max_tokens) if sampling.routes and self._config else None,
            min_think_tokens=max(1, sampling.min_think_tokens) if sampling.thinking else 0,
            processors=build_processors(sampling, ids, self._tokenizer, self._grammars, tenant),
        )


class RequestHandle:
    """One submitted request.

    Iterate it for its ``Delta``s, from one thread; the last is of kind ``done``. Or ask for ``result()``.
    Both wait for the engine's background thread or, where there is none, step the engine themselves.

    Args:
        step: steps the engine, unless a background thread does; returns whether it stepped.
        cancellation: set to tell the engine that somebody cancelled.
        streams: whether pieces are wanted; without it the text is decoded once, at the end.
        listener: gets the pieces, and what went wrong, in the place of the iterator.
    """

    def __init__(
        self,
        sequence: Sequence,
        tokenizer: Tokenizer,
        step: Callable[[], bool],
        cancellation: Event,
        *,
        streams: bool,
        listener: Listener | None = None,
    ) -> None:
        self.sequence, self._cancellation = sequence, cancellation
        self.finished = Event()
        self.deltas: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self._tokenizer, self._step, self._streams = tokenizer, step, streams
        self._listener, self._started = listener, False
        sampling = sequence.sampling
        sequence.detokenize = streams or bool(sampling.stop) or sampling.ignore_eos
        sequence.needs_stop_check = sequence.detokenize or bool(sampling.stop_token_ids)
        self._detokenizer: Detokenizer | None = None
        if sequence.detokenize:
            thinking, structured = sampling.thinking, sampling.is_structured
            self._detokenizer = Detokenizer(
                tokenizer,
                thinking=thinking,
                stops=sampling.stop,
                structured=structured,
                min_tokens=sampling.min_tokens,
            )
        self._logprobs = TokenLogprobs() if streams and sampling.logprobs else None
        self._output: Output | None = None
        self._error: Exception | None = None

    @property
    def id(self) -> int:
        """The engine's number of this request."""
        return self.sequence.id

    def cancel(self) -> None:
        """Ask the engine to stop it; its output so far is kept, with finish_reason ``cancelled``."""
        self.sequence.cancelled = True
        self._cancellation.set()

    def result(self) -> Output:
        """Wait for the whole answer.

        Raises:
            SpratError: the engine failed while it answered, or could not go on with this request.
        """
        while not self.finished.is_set():
            if not self._step():
                self.finished.wait(WAIT_SECONDS)
        if self._error is not None:
            raise self._error
        if self._output is None:
            raise RuntimeError("a finished request has no output")
        return self._output

    def __iter__(self) -> Iterator[Delta]:
        """Pieces as they come, then one ``done``; closing the iterator early cancels the request."""
        try:
            while not (self.finished.is_set() and self.deltas.empty()):
                try:
                    waits = self.deltas.empty() and not self._step()
                    yield self.deltas.get(waits, WAIT_SECONDS)
                except queue.Empty:
                    continue
            if self._error is not None:
                raise self._error
        finally:
            if not self.finished.is_set():
                self.cancel()

    def start(self) -> None:
        """Engine only: it was admitted; a listener hears of it once."""
        if self._listener is not None and not self._started:
            self._started = True
            self._listener(Delta("started"))

    def push(self, token: int, *, is_end: bool = False) -> bool:
        """Engine only: follow one sampled token; True if a stop string is complete. ``is_end``: it ends the answer."""
        detokenizer = self._detokenizer
        if detokenizer is None:
            return False
        was_reasoning = detokenizer.is_reasoning
        deltas = detokenizer.push(token)
        if self._logprobs is not None:
            if not is_end:
                self._logprobs.push(self.sequence, reasons=was_reasoning or detokenizer.is_reasoning)
            deltas = self._logprobs.attach(deltas)
        self._emit(deltas)
        return detokenizer.stopped

    def finish(self, reason: FinishReason) -> None:
        """Engine only: the answer is whole."""
        sequence, sampling, detokenizer = self.sequence, self.sequence.sampling, self._detokenizer
        sequence.finish_reason = reason
        if detokenizer is not None:
            deltas = detokenizer.close()
            self._emit(deltas if self._logprobs is None else self._logprobs.attach(deltas, is_last=True))
            answer = detokenizer.answer()
        else:
            thinking, structured = sampling.thinking, sampling.is_structured
            answer = split_reasoning(self._tokenizer, sequence.output_ids, thinking=thinking, structured=structured)
        scored = sampling.prompt_logprobs
        self._output = Output(
            text=answer.content,
            reasoning=answer.reasoning,
            token_ids=sequence.output_ids,
            logprobs=sequence.logprobs if sampling.logprobs else None,
            usage=self._usage(answer.reasoning),
            finish_reason=reason,
            prompt_ids=sequence.prompt_ids,
            closed=answer.closed,
            top_logprobs=sequence.top_logprobs if sampling.logprobs and sampling.top_logprobs else None,
            prompt_logprobs=[None, *sequence.prompt_logprobs] if scored else None,
            prompt_top_logprobs=[None, *sequence.prompt_top_logprobs] if scored and sampling.top_logprobs else None,
            stop="" if detokenizer is None else detokenizer.stop,
            versions=sequence.token_versions(),
            routes=None if sequence.routes is None else sequence.routes.upto(sequence.num_tokens, sequence.num_routed),
        )
        self._emit([Delta("done", output=self._output)])
        self.finished.set()

    def fail(self, error: Exception) -> None:
        """Engine only: the request cannot be answered; ``result`` and the iteration raise ``error``."""
        self._error = error
        if self._listener is not None and not self.finished.is_set():
            self._listener(error)
        self.finished.set()

    def _emit(self, deltas: list[Delta]) -> None:
        """Hand pieces to the caller, if they are wanted."""
        if self._streams:
            put = self._listener or self.deltas.put
            for delta in deltas:
                put(delta)

    def _usage(self, reasoning: str) -> Usage:
        """Count tokens; the think tags are no reasoning."""
        sequence, ids = self.sequence, self._tokenizer.special_ids
        output_ids, thinking = sequence.output_ids, resolve_thinking(self._tokenizer, sequence.sampling.thinking)
        count = 0
        if min(ids.think_open, ids.think_close) < 0:
            count = min(len(output_ids), len(self._tokenizer.encode(reasoning)))
        elif thinking or (thinking is None and output_ids[:1] == [ids.think_open]):
            start = 0 if thinking else 1
            stop = output_ids.index(ids.think_close) if ids.think_close in output_ids else None
            count = sum(token not in self._tokenizer.eos_token_ids for token in output_ids[start:stop])
        prompt, cached = len(sequence.prompt_ids), max(0, sequence.num_cached)
        return Usage(prompt, len(output_ids), count, cached, prompt - cached)


def eos_token_ids(config: ModelConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end an answer: those of the tokenizer and its folder, and those of config.json that are control."""
    eos = config.eos_token_id
    listed = {eos} if isinstance(eos, int) else set(eos or ())
    return tokenizer.eos_token_ids | (listed & tokenizer.control_ids)
