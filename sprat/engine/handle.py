"""What a caller holds of a request: its pieces as they come, its result, and the way to stop it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator

from sprat.engine.sequence import Delta, FinishReason, Output, Sequence, Usage
from sprat.engine.text import Reader
from sprat.tokens.chat import resolve_thinking, split_reasoning
from sprat.tokens.tokenizer import Tokenizer

WAIT_SECONDS = 0.05  # how long a waiting thread sleeps before it looks again


class Handle:
    """One submitted request.

    Iterate it for its ``Delta``s, from one thread; the last is of kind ``done``. Or ask for ``result()``.
    Both wait for the engine's background thread or, where there is none, step the engine themselves.

    Args:
        drive: steps the engine, unless a background thread does; returns whether it stepped.
        halts: set to tell the engine that somebody cancelled.
        streams: whether pieces are wanted; without it the text is decoded once, at the end.
    """

    def __init__(
        self,
        sequence: Sequence,
        tokenizer: Tokenizer,
        drive: Callable[[], bool],
        halts: threading.Event,
        *,
        streams: bool,
    ) -> None:
        self.sequence, self._halts = sequence, halts
        self.finished = threading.Event()
        self.pieces: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        self._tokenizer, self._drive, self._streams = tokenizer, drive, streams
        sampling = sequence.sampling
        sequence.followed = streams or bool(sampling.stop)
        sequence.watched = sequence.followed or bool(sampling.stop_token_ids)
        self._reader: Reader | None = None
        if sequence.followed:
            self._reader = Reader(
                tokenizer,
                thinking=sampling.thinking,
                stops=sampling.stop,
                structured=sampling.response is not None,
            )
        self._output: Output | None = None
        self._error: Exception | None = None

    @property
    def id(self) -> int:
        """The engine's number of this request."""
        return self.sequence.id

    def cancel(self) -> None:
        """Ask the engine to stop it; what was said so far is kept, with finish_reason ``cancelled``."""
        self.sequence.cancelled = True
        self._halts.set()

    def result(self) -> Output:
        """Wait for the whole answer.

        Raises:
            SpratError: the engine failed while it answered, or could not go on with this request.
        """
        while not self.finished.is_set():
            if not self._drive():
                self.finished.wait(WAIT_SECONDS)
        if self._error is not None:
            raise self._error
        if self._output is None:
            raise RuntimeError("a finished request has no output")
        return self._output

    def __iter__(self) -> Iterator[Delta]:
        """Pieces as they come, then one ``done``; closing the iterator early cancels the request."""
        try:
            while not (self.finished.is_set() and self.pieces.empty()):
                try:
                    waits = self.pieces.empty() and not self._drive()
                    yield self.pieces.get(waits, WAIT_SECONDS)
                except queue.Empty:
                    continue
            if self._error is not None:
                raise self._error
        finally:
            if not self.finished.is_set():
                self.cancel()

    def feed(self, token: int) -> bool:
        """Engine only: follow one sampled token; True if a stop string is complete."""
        if self._reader is None:
            return False
        self._put(self._reader.push(token))
        return self._reader.stopped

    def finish(self, reason: FinishReason) -> None:
        """Engine only: the answer is whole."""
        sequence, reader = self.sequence, self._reader
        sequence.finish_reason = reason
        if reader is not None:
            self._put(reader.close())
            answer = reader.answer()
        else:
            how = sequence.sampling
            shaped = how.response is not None
            answer = split_reasoning(self._tokenizer, sequence.token_ids, thinking=how.thinking, structured=shaped)
        self._output = Output(
            text=answer.content,
            reasoning=answer.reasoning,
            token_ids=sequence.token_ids,
            logprobs=sequence.logprobs if sequence.sampling.logprobs else None,
            usage=self._usage(answer.reasoning),
            finish_reason=reason,
            prompt_ids=sequence.prompt,
            closed=answer.closed,
            top_logprobs=sequence.top_logprobs if sequence.sampling.top_logprobs else None,
        )
        if self._streams:
            self.pieces.put(Delta("done", output=self._output))
        self.finished.set()

    def fail(self, error: Exception) -> None:
        """Engine only: the request cannot be answered; ``result`` and the iteration raise ``error``."""
        self._error = error
        self.finished.set()

    def _put(self, pieces: list[Delta]) -> None:
        """Hand pieces to the reader of this handle, if there is one."""
        if self._streams:
            for piece in pieces:
                self.pieces.put(piece)

    def _usage(self, reasoning: str) -> Usage:
        """Count tokens; the think tags are no reasoning."""
        sequence, ids = self.sequence, self._tokenizer.special_ids
        said, thinking = sequence.token_ids, resolve_thinking(self._tokenizer, sequence.sampling.thinking)
        count = 0
        if min(ids.think_open, ids.think_close) < 0:
            count = min(len(said), len(self._tokenizer.encode(reasoning)))
        elif thinking or (thinking is None and said[:1] == [ids.think_open]):
            opened = 0 if thinking else 1
            inside = said[opened : said.index(ids.think_close)] if ids.think_close in said else said[opened:]
            count = sum(token not in self._tokenizer.eos_token_ids for token in inside)
        prompt, hit = len(sequence.prompt), max(0, sequence.hit)
        return Usage(prompt, len(said), count, hit, prompt - hit)
