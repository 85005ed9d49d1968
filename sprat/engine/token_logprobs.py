"""Which piece of a streamed answer carries the log-probabilities of which tokens.

A token's log-probability is known at once, its text perhaps tokens later: a character may not be whole, a stop string
may have begun, a tag may be hidden. So tokens wait here, each in its channel, for the next piece of it; those that
no piece comes for leave with an empty one, before the other channel begins or the answer ends. Put one after the other
they are those of the answer, in its order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from sprat.engine.sequence import Delta, Sequence, TokenLogprob


class TokenLogprobs:
    """The tokens of one answer that no piece of text has taken along yet."""

    def __init__(self) -> None:
        self._waiting: dict[Literal["reasoning", "content"], list[TokenLogprob]] = {"reasoning": [], "content": []}

    def push(self, sequence: Sequence, *, reasons: bool) -> None:
        """The latest token of ``sequence``, which belongs to its reasoning or not.

        As long as tags may still open a think block it is not known; it is told with the token that decides.
        """
        top = tuple(sequence.top_logprobs[-1]) if sequence.top_logprobs else ()
        entry = sequence.output_ids[-1], sequence.logprobs[-1], top
        if reasons:  # also the tokens before it that may have been an opening tag, and were
            self._waiting["reasoning"] += [*self._waiting["content"], entry]
            self._waiting["content"] = []
        else:
            self._waiting["content"].append(entry)

    def attach(self, deltas: list[Delta], *, is_last: bool = False) -> list[Delta]:
        """``deltas`` with the tokens that waited for them; ``is_last``: nothing may wait any longer."""
        out: list[Delta] = []
        for delta in deltas:
            if delta.kind == "content":
                self._flush("reasoning", out)
            kind: Literal["reasoning", "content"] = "reasoning" if delta.kind == "reasoning" else "content"
            out.append(replace(delta, logprobs=self._take(kind)))
        if is_last:
            self._flush("reasoning", out)
            self._flush("content", out)
        return out

    def _take(self, kind: Literal["reasoning", "content"]) -> tuple[TokenLogprob, ...]:
        """Those that wait in a channel, which wait no longer."""
        taken, self._waiting[kind] = tuple(self._waiting[kind]), []
        return taken

    def _flush(self, kind: Literal["reasoning", "content"], out: list[Delta]) -> None:
        """Let those that wait in a channel go with an empty piece, if there are any."""
        if taken := self._take(kind):
            out.append(Delta(kind, logprobs=taken))
