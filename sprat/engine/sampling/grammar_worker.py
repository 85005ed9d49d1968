"""Compiles grammars where that can do no harm; run as a process of its own, it imports nothing of ours.

The engine builds a grammar only after this process has built it, walked it for a few tokens, and said what it cost. A
grammar that loops, eats memory or breaks the compiler ends this process, and the engine starts another. One JSON
object a line: first the vocabulary, then a grammar each, and an answer each.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Sequence
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

MAX_MEMORY = 1 << 30  # bytes of address space of this process
ALARM_SECONDS = 60  # a grammar that takes so long ends this process, engine or no engine
WALK_STEPS = 24  # tokens of a walk through a new grammar
ALLOWED = b"\xc8"  # how llguidance marks a token that may come
# One mask then takes some 15 ms at worst, and the lazily built states of one regex some 40 MB.
LIMITS = LLParserLimits(step_lexer_fuel=200_000, step_max_items=50_000, max_lexer_states=20_000, verbose_errors=False)
# Enough to indent by; without a bound a weak model fills its whole answer with blanks.
WHITESPACE = r"[ \n]{1,16}"


class _Vocabulary:
    """What llguidance asks of a tokenizer: the bytes of every token, and which are no text."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], eos_token_ids: Sequence[int]) -> None:
        self.tokens = [text or b"<%d>" % index for index, text in enumerate(tokens)]
        self.special_token_ids = [index for index, text in enumerate(tokens) if not text]
        self.eos_token_id = eos_token_ids[0]
        self._ids = {text: index for index, text in reversed(list(enumerate(tokens))) if text}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """Ids of ``text``, the longest token first: where a grammar allows one text alone, it allows these alone."""
        ids, start = list[int](), 0
        while start < len(text):
            for end in range(min(len(text), start + self._longest), start, -1):
                if (index := self._ids.get(text[start:end])) is not None:
                    ids.append(index)
                    break
            else:
                end = start + 1  # a byte that no token has
            start = end
        return ids


def build_tokenizer(tokens: Sequence[bytes], eos_token_ids: Sequence[int]) -> LLTokenizer:
    """The tokenizer of llguidance for these tokens; empty ones are control tokens."""
    wrapper = TokenizerWrapper(_Vocabulary(tokens, eos_token_ids))
    return LLTokenizer(wrapper, n_vocab=len(tokens), eos_token=list(eos_token_ids))


def build_matcher(tokenizer: LLTokenizer, kind: str, source: str) -> LLMatcher:
    """A compiled grammar at its beginning.

    Raises:
        ValueError: it cannot be compiled within the limits, or nothing matches it.
    """
    if kind == "schema":
        grammar = LLMatcher.grammar_from_json_schema(source, overrides={"whitespace_pattern": WHITESPACE})
    elif kind == "tools":
        grammar = LLMatcher.grammar_from_lark(_tool_grammar(json.loads(source)))
    elif kind == "regex":
        grammar = LLMatcher.grammar_from_regex(source)
    else:
        grammar = LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(one) for one in json.loads(source)))
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise ValueError(error_of(matcher))
    return matcher


def _tool_grammar(source: dict[str, Any]) -> str:
    """Rules in which ``args_0`` and so on are the schemas, each with our bound on blanks."""
    options = {"x-guidance": {"whitespace_pattern": WHITESPACE}}
    schemas = (json.dumps({**schema, **options}) for schema in source["schemas"])
    return "\n".join([source["rules"], *(f"args_{index}: %json {text}" for index, text in enumerate(schemas))])


def error_of(matcher: LLMatcher) -> str:
    """Why a matcher is broken, in one line."""
    text = matcher.get_error().split("<state>")[0].replace("<non-verbose/>", "").strip()
    if text.startswith("NoExtension"):
        return "nothing matches it"
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(line for line in lines if line and set(line) != {"^"})[:300]


def walk(matcher: LLMatcher) -> None:
    """Follow a grammar for a few tokens, a different branch at each.

    Raises:
        ValueError: nothing matches, or a step goes over the limits.
    """
    for step in range(WALK_STEPS):
        mask = matcher.compute_logit_bias()  # a byte a token, 0 where it is not allowed
        if matcher.is_error():
            raise ValueError(error_of(matcher))
        if matcher.is_stopped():
            return
        allowed = mask.find(ALLOWED, step * 7919 % len(mask))
        allowed = allowed if allowed >= 0 else mask.find(ALLOWED)
        if allowed < 0:
            raise ValueError("nothing matches it")
        matcher.consume_token(allowed)


def _resident() -> int:
    """Bytes of memory that this process has; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _try_grammar(tokenizer: LLTokenizer, job: dict[str, Any]) -> dict[str, Any]:
    """What became of one grammar: its cost in bytes, or why it cannot be used."""
    before = _resident()
    try:
        walk(build_matcher(tokenizer, job["kind"], job["source"]))
    except (ValueError, MemoryError, RecursionError) as error:
        return {"error": str(error) or type(error).__name__}
    return {"bytes": max(_resident() - before, 0)}


def main() -> None:
    """Serve until the input ends."""
    header = json.loads(sys.stdin.readline())
    tokenizer = build_tokenizer([bytes.fromhex(text) for text in header["tokens"]], header["ends"])
    with contextlib.suppress(ValueError, OSError):  # not every system can; the deadline still holds
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        signal.alarm(ALARM_SECONDS)  # nobody may be left to end us
        answer = _try_grammar(tokenizer, json.loads(line))
        signal.alarm(0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
