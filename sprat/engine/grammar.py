"""Structured output: a grammar says, before each token, which tokens can still lead to a text of the asked form.

The work is llguidance's: an Earley parser over a lexer of regular-expression derivatives, so a regex costs time
linear in the text, and look-around and back-references are refused. Ours is what makes foreign grammars harmless. A
source is bounded first; it is compiled and walked in another process with a deadline and little memory; only then is
it built here, in the thread that asked, and kept for the next request. While it runs, each mask has its own bound,
and a grammar that goes over it ends its own request.

The grammar begins where the content begins: at once, or after ``</think>``.
"""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence as Rows
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sprat.engine.sampling import Response
from sprat.engine.think import Thought, tagged
from sprat.errors import EngineError, MachineError
from sprat.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

DEADLINE_SECONDS = 3.0
START_SECONDS = 30.0  # a new process reads the vocabulary first
MAX_SOURCE, MAX_DEPTH, MAX_NODES = 64 * 1024, 32, 8192
CACHE_ENTRIES, CACHE_BYTES = 64, 256 << 20


class Grammars:
    """The compiled grammars of one engine; any thread may ask. The other process starts with the first grammar.

    Args:
        ends: ids that end an answer; only they are allowed when the text is complete.
        deadline: seconds that one grammar may take to compile.
    """

    def __init__(self, tokenizer: Tokenizer, ends: frozenset[int], *, deadline: float = DEADLINE_SECONDS) -> None:
        self._tokenizer, self._ends, self._deadline = tokenizer, sorted(ends), deadline
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None
        self._words: LLTokenizer | None = None
        self._known: OrderedDict[Response, tuple[LLMatcher | EngineError, int]] = OrderedDict()
        self._tag = b"" if tagged(tokenizer) else tokenizer.format.think_tokens[1].encode()
        self._over: list[tuple[int, bytes]] | None = None  # tokens that go on behind a byte that can end the tag

    def grammar(self, response: Response, thinking: bool | None) -> Grammar:
        """A grammar at its beginning, for one answer.

        Raises:
            EngineError: it is too large, cannot be compiled, or took too long.
            MachineError: llguidance is not installed.
        """
        with self._lock:
            if response not in self._known:
                self._known[response] = self._compile(response)
                while len(self._known) > 1 and self._crowded():
                    self._known.popitem(last=False)
            self._known.move_to_end(response)
            found = self._known[response][0]
            if isinstance(found, EngineError):
                raise found
            if self._tag and self._over is None:
                texts = ((index, self._tokenizer.token_bytes(index)) for index in range(self._tokenizer.vocab_size))
                self._over = [(index, text) for index, text in texts if self._tag[-1:] in text[:-1]]
            if self._tag and thinking is None:
                thinking = False  # tags that are text are no part of the asked form
            thought = Thought(self._tokenizer, thinking)
            matcher, opening = found.deep_copy(), self._tokenizer.ids.think_open
            return Grammar(matcher, thought, opening, self._ends, self._tag, self._over or [])

    def close(self) -> None:
        """End the other process; a later grammar starts it anew."""
        with self._lock:
            self._end()

    def _crowded(self) -> bool:
        """Whether more grammars are kept than there is room for."""
        return len(self._known) > CACHE_ENTRIES or sum(cost for _, cost in self._known.values()) > CACHE_BYTES

    def _compile(self, response: Response) -> tuple[LLMatcher | EngineError, int]:
        """The compiled grammar and its bytes, or the error that this grammar will always get."""
        try:
            from sprat.engine import grammar_worker
        except ImportError:
            todo = "pip install llguidance"
            raise MachineError("structured output needs llguidance", where="response", todo=todo) from None
        try:
            source = _bounded(response)
            if self._words is None:
                self._words = grammar_worker.vocabulary(self._tokens(), self._ends)
            answer = self._ask({"kind": response.kind, "source": source})
            if "error" in answer:
                return _refusal(response, str(answer["error"])), 0
            return grammar_worker.matcher(self._words, response.kind, source), int(answer["bytes"])
        except EngineError as error:
            return error, 0
        except ValueError as error:
            return _refusal(response, str(error)), 0

    def _tokens(self) -> list[bytes]:
        """The bytes of every token."""
        return [self._tokenizer.token_bytes(index) for index in range(self._tokenizer.vocab_size)]

    def _ask(self, job: dict[str, str]) -> dict[str, Any]:
        """Let the other process try a grammar.

        Raises:
            EngineError: it died or took too long; it is ended then.
        """
        if self._worker is not None and self._worker.poll() is not None:
            self._end()
        fresh = self._worker is None
        if self._worker is None:
            self._worker = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("grammar_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # an interrupt at the terminal is not meant for it
            )
        worker = self._worker
        assert worker.stdin is not None and worker.stdout is not None
        try:
            if fresh:
                head = {"tokens": [text.hex() for text in self._tokens()], "ends": self._ends}
                worker.stdin.write(json.dumps(head) + "\n")
                self._tell(worker, {"kind": "choice", "source": '["a"]'}, START_SECONDS)
            return self._tell(worker, job, self._deadline)
        except (OSError, ValueError, TimeoutError) as error:
            self._end()
            slow = isinstance(error, TimeoutError)
            fault = f"the grammar took over {self._deadline:g} s" if slow else "the grammar broke its compiler"
            raise EngineError(fault, where="response", todo="make it smaller or simpler") from None

    def _tell(self, worker: subprocess.Popen[str], job: dict[str, str], seconds: float) -> dict[str, Any]:
        """Send a job and wait for its answer.

        Raises:
            TimeoutError: there is none in time. OSError, ValueError: the process is dead.
        """
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write(json.dumps(job) + "\n")
        worker.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(worker.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                raise TimeoutError
        answer: dict[str, Any] = json.loads(worker.stdout.readline())
        return answer

    def _end(self) -> None:
        """Kill the other process, if there is one."""
        worker, self._worker = self._worker, None
        if worker is None:
            return
        worker.kill()
        worker.wait()
        for pipe in (worker.stdin, worker.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:
                continue  # what was still to be written to a dead process


class Grammar:
    """The grammar of one answer; see ``processors.Processor``.

    Args:
        opening: the id of ``<think>``, which a model that may think can say first.
        ends: ids that end an answer; not before it has its form.
        tag, over: where ``</think>`` is text, its bytes, and the tokens that hold its last byte and more behind it.
    """

    wakes, speculates = 0, True

    def __init__(
        self,
        matcher: LLMatcher,
        thought: Thought,
        opening: int,
        ends: list[int],
        tag: bytes,
        over: list[tuple[int, bytes]],
    ) -> None:
        self._matcher, self._thought = matcher, thought
        self._opening, self._ends, self._tag, self._over = opening, ends, tag, over
        self._consumed = 0  # settled tokens that the matcher has seen, or that lie before the content

    def apply(self, logits_V: NDArray[np.float32], said: Rows[int], ahead: Rows[int]) -> None:
        """See ``Processor``.

        Raises:
            EngineError: the grammar went over its limits.
        """
        thought = self._thought.follow(said, ahead)
        if thought.reasons:
            self._keep_apart(logits_V, thought.tail)
            return
        settled, matcher = self._thought.end, self._matcher
        if settled is not None:
            matcher.consume_tokens(list(said[max(self._consumed, settled) :]))
            self._consumed = len(said)
        drafted = [] if thought.end is None else list(ahead[max(thought.end - len(said), 0) :])
        count = matcher.try_consume_tokens(drafted) if drafted else 0
        if count == len(drafted):
            self._mask(logits_V, undecided=thought.end is None)
        if count:
            matcher.rollback(count)

    def _mask(self, logits_V: NDArray[np.float32], *, undecided: bool) -> None:
        """Rule out what the grammar does not allow; ``undecided``: reasoning may still be opened."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            todo = "make the grammar simpler"
            raise EngineError("the grammar became too complex while it was followed", where="response", todo=todo)
        allowed_V = np.unpackbits(mask, count=len(logits_V), bitorder="little")
        if undecided:
            allowed_V[self._opening] = 1
        np.copyto(logits_V, -np.inf, where=allowed_V == 0)

    def _keep_apart(self, logits_V: NDArray[np.float32], tail: bytes) -> None:
        """While it reasons, rule out the end, and what ends the reasoning and goes on: that would escape the form."""
        logits_V[self._ends] = -np.inf
        for index, text in self._over:
            if -1 < (tail + text).find(self._tag) < len(tail) + len(text) - len(self._tag):
                logits_V[index] = -np.inf


def _bounded(response: Response) -> str:
    """The source as it is compiled.

    Raises:
        EngineError: it is too long, too deep, or no JSON schema.
    """
    source = response.source
    if len(source.encode("utf-8", "replace")) > MAX_SOURCE:
        todo = f"use {MAX_SOURCE // 1024} KiB at most"
        raise EngineError("the grammar is too long", where="response", todo=todo)
    if response.kind == "regex":
        return source
    try:
        tree = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise _refusal(response, str(error)) from None
    if not isinstance(tree, dict | bool if response.kind == "schema" else list):
        raise _refusal(response, "it is no JSON object")
    level, nodes = [tree], 0
    for _ in range(MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        nodes += len(level)
    if level or nodes > MAX_NODES:
        todo = f"nest {MAX_DEPTH} levels at most and {MAX_NODES} values in all"
        raise EngineError("the grammar is too large", where="response", todo=todo)
    return json.dumps(tree)


def _refusal(response: Response, why: str) -> EngineError:
    """The error of a grammar that cannot be used."""
    return EngineError(f"the {response.kind} cannot be used: {why}", where="response", todo="correct or simplify it")
