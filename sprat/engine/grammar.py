"""Structured output: a grammar says, before each token, which tokens can still lead to a text of the asked form.

The work is llguidance's: an Earley parser over a lexer of regular-expression derivatives, so a regex costs time
linear in the text, and look-around and back-references are refused. Ours is what makes foreign grammars harmless. A
source is bounded and translated first (``grammar_source``); it is compiled and walked in another process with a
deadline and little memory (``grammar_compiler``); only then is it built here, in the thread that asked, and kept for
the next request. While it runs, each mask has its own bound, and a grammar that goes over it ends its own request.

No tenant waits for the grammar of another. Each has a process of its own, compiles one grammar at a time, and finds
only what it compiled itself; no lock is held meanwhile. What is known is found at once whatever else is compiled.

The grammar begins where the content begins: at once, or after ``</think>``.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Rows
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sprat.engine.grammar_compiler import Compiler
from sprat.engine.grammar_source import prepare, refusal
from sprat.engine.sampling import Response
from sprat.engine.sequence import NOBODY, Tenant
from sprat.engine.think import Thought, tagged
from sprat.errors import EngineError, MachineError
from sprat.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

DEADLINE_SECONDS = 3.0
CACHE_ENTRIES, CACHE_BYTES = 64, 256 << 20
COMPILING = 8  # tenants that compile at one time; more wait for one of them
IDLE = 4  # processes that are kept for the next grammar of their tenant

Known = tuple["LLMatcher | EngineError", int]  # a compiled grammar or why it cannot be used, and its bytes


class Grammars:
    """The compiled grammars of one engine; any thread may ask.

    Args:
        ends: ids that end an answer; only they are allowed when the text is complete.
        deadline: seconds that one grammar may take to compile.
    """

    def __init__(self, tokenizer: Tokenizer, ends: frozenset[int], *, deadline: float = DEADLINE_SECONDS) -> None:
        self._tokenizer, self._ends, self._deadline = tokenizer, sorted(ends), deadline
        self._lock = threading.Lock()  # of what follows; never held while anything is compiled
        self._known: OrderedDict[tuple[Tenant, Response], Known] = OrderedDict()
        self._idle: OrderedDict[Tenant, Compiler] = OrderedDict()
        self._working: dict[Tenant, Compiler] = {}
        self._asking: Counter[Tenant] = Counter()
        self._turns: dict[Tenant, threading.Lock] = {}
        self._places = threading.Semaphore(COMPILING)
        self._words: LLTokenizer | None = None
        self._tag = b"" if tagged(tokenizer) else tokenizer.chat_format.think_tags[1].encode()
        self._over: list[tuple[int, bytes]] | None = None  # tokens that go on behind a byte that can end the tag

    def grammar(self, response: Response, thinking: bool | None, tenant: Tenant = NOBODY) -> Grammar:
        """A grammar at its beginning, for one answer.

        Raises:
            EngineError: it is too large, cannot be compiled, or took too long.
            MachineError: llguidance is not installed.
        """
        key = tenant, response
        known = self._find(key)
        if known is None:
            with self._turn(tenant):
                known = self._find(key)  # a request of the same tenant may have compiled it meanwhile
                if known is None:
                    known = self._compile(response, tenant)
                    self._keep(key, known)
        found = known[0]
        if isinstance(found, EngineError):
            raise found
        with self._lock:
            if self._tag and self._over is None:
                texts = enumerate(self._tokens())
                self._over = [(index, text) for index, text in texts if self._tag[-1:] in text[:-1]]
            matcher = found.deep_copy()
        thought, opening = Thought(self._tokenizer, thinking), self._tokenizer.special_ids.think_open
        return Grammar(matcher, thought, opening, self._ends, self._tag, self._over or [])

    def close(self) -> None:
        """End the other processes; a later grammar starts one anew."""
        with self._lock:
            for compiler in (*self._idle.values(), *self._working.values()):
                compiler.end()
            self._idle.clear()

    def _find(self, key: tuple[Tenant, Response]) -> Known | None:
        """What is known of a grammar of one tenant."""
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)

    def _keep(self, key: tuple[Tenant, Response], known: Known) -> None:
        """Remember a grammar; where there is no room, the tenant that has most gives up its oldest."""
        with self._lock:
            self._known[key] = known
            while len(self._known) > 1:
                entries, nbytes = Counter[Tenant](), Counter[Tenant]()
                for (tenant, _), (_, cost) in self._known.items():
                    entries[tenant] += 1
                    nbytes[tenant] += cost
                if entries.total() <= CACHE_ENTRIES and nbytes.total() <= CACHE_BYTES:
                    return
                held = entries if entries.total() > CACHE_ENTRIES else nbytes
                most = max(held, key=lambda tenant: held[tenant])
                del self._known[next(one for one in self._known if one[0] == most)]

    @contextlib.contextmanager
    def _turn(self, tenant: Tenant) -> Iterator[None]:
        """Wait for the other grammars of the same tenant, and for nobody else's."""
        with self._lock:
            self._asking[tenant] += 1
            turn = self._turns.setdefault(tenant, threading.Lock())
        try:
            with turn:
                yield
        finally:
            with self._lock:
                self._asking[tenant] -= 1
                if not self._asking[tenant]:
                    del self._asking[tenant], self._turns[tenant]

    @contextlib.contextmanager
    def _compiler(self, tenant: Tenant) -> Iterator[Compiler]:
        """The process of one tenant, kept for its next grammar."""
        with self._places:
            with self._lock:
                compiler = self._idle.pop(tenant, None) or Compiler(self._tokens, self._ends, self._deadline)
                self._working[tenant] = compiler
            try:
                yield compiler
            finally:
                with self._lock:
                    del self._working[tenant]
                    self._idle[tenant] = compiler
                    spare = self._idle.popitem(last=False)[1] if len(self._idle) > IDLE else None
                if spare is not None:
                    spare.end()

    def _compile(self, response: Response, tenant: Tenant) -> Known:
        """The compiled grammar and its bytes, or the error that this grammar will always get."""
        try:
            from sprat.engine import grammar_worker
        except ImportError:
            todo = "pip install llguidance"
            raise MachineError("structured output needs llguidance", where="response", todo=todo) from None
        try:
            source = prepare(response)
            with self._compiler(tenant) as compiler:
                answer = compiler.ask({"kind": response.kind, "source": source})
            if "error" in answer:
                return refusal(response, str(answer["error"])), 0
            with self._lock:
                if self._words is None:
                    self._words = grammar_worker.vocabulary(self._tokens(), self._ends)
            return grammar_worker.matcher(self._words, response.kind, source), int(answer["bytes"])
        except EngineError as error:
            return error, 0
        except ValueError as error:
            return refusal(response, str(error)), 0

    def _tokens(self) -> list[bytes]:
        """The bytes of every token."""
        return [self._tokenizer.token_bytes(index) for index in range(self._tokenizer.vocab_size)]


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
