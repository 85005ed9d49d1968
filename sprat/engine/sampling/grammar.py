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
import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sprat.engine.reasoning import ReasoningTracker, has_think_tokens
from sprat.engine.sampling.grammar_compiler import CompilerProcess
from sprat.engine.sampling.grammar_source import grammar_error, translate_source
from sprat.engine.sampling.tool_grammar import translate_tools
from sprat.engine.sampling_params import Response, TokenIds
from sprat.engine.sequence import DEFAULT_TENANT, Tenant
from sprat.errors import EngineError, MachineError
from sprat.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

DEADLINE = 3.0  # seconds
CACHE_ENTRIES, CACHE_BYTES = 64, 256 << 20
MAX_COMPILING = 8  # tenants that compile at one time; more wait for one of them
MAX_IDLE = 4  # processes that are kept for the next grammar of their tenant

CachedGrammar = tuple["LLMatcher | EngineError", int]  # a compiled grammar or why it cannot be used, and its bytes


class GrammarCache:
    """The compiled grammars of one engine; any thread may ask.

    Args:
        eos_token_ids: ids that end an answer; only they are allowed when the text is complete.
        deadline: seconds that one grammar may take to compile.
    """

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: frozenset[int], *, deadline: float = DEADLINE) -> None:
        self._tokenizer, self._eos_token_ids, self._deadline = tokenizer, sorted(eos_token_ids), deadline
        self._lock = threading.Lock()  # of what follows; never held while anything is compiled
        self._cache: OrderedDict[tuple[Tenant, Response], CachedGrammar] = OrderedDict()
        self._idle: OrderedDict[Tenant, CompilerProcess] = OrderedDict()
        self._busy: dict[Tenant, CompilerProcess] = {}
        self._num_waiting: Counter[Tenant] = Counter()
        self._tenant_locks: dict[Tenant, threading.Lock] = {}
        self._compile_slots = threading.Semaphore(MAX_COMPILING)
        self._vocabulary: LLTokenizer | None = None
        self._close_tag = b"" if has_think_tokens(tokenizer) else tokenizer.chat_format.think_tags[1].encode()
        self._overlapping: list[tuple[int, bytes]] | None = None  # tokens that go on behind a byte that can end the tag

    def grammar(self, response: Response, thinking: bool | None, tenant: Tenant = DEFAULT_TENANT) -> GrammarProcessor:
        """A grammar at its beginning, for one answer.

        Raises:
            EngineError: it is too large, cannot be compiled, or took too long.
            MachineError: llguidance is not installed, or its process cannot be started.
        """
        key = tenant, response
        cached = self._lookup(key)
        if cached is None:
            with self._tenant_lock(tenant):
                cached = self._lookup(key)  # a request of the same tenant may have compiled it meanwhile
                if cached is None:
                    cached = self._compile(response, tenant)
                    self._store(key, cached)
        result = cached[0]
        if isinstance(result, EngineError):
            raise result
        with self._lock:
            if self._close_tag and self._overlapping is None:
                texts = enumerate(self._tokens())
                self._overlapping = [(index, text) for index, text in texts if self._close_tag[-1:] in text[:-1]]
            matcher, overlapping = result.deep_copy(), self._overlapping or []
        tracker, open_id = ReasoningTracker(self._tokenizer, thinking), self._tokenizer.special_ids.think_open
        return GrammarProcessor(matcher, tracker, open_id, self._eos_token_ids, self._close_tag, overlapping)

    def is_known(self, response: Response, tenant: Tenant) -> bool:
        """Whether ``grammar`` answers at once."""
        return self._lookup((tenant, response)) is not None

    def close(self) -> None:
        """End the other processes; a later grammar starts one anew."""
        with self._lock:
            for compiler in (*self._idle.values(), *self._busy.values()):
                compiler.kill()
            self._idle.clear()

    def _lookup(self, key: tuple[Tenant, Response]) -> CachedGrammar | None:
        """What is known of a grammar of one tenant."""
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
            return self._cache.get(key)

    def _store(self, key: tuple[Tenant, Response], cached: CachedGrammar) -> None:
        """Keep a grammar; where there is no room, the tenant that has most gives up its oldest."""
        with self._lock:
            self._cache[key] = cached
            while len(self._cache) > 1:
                entries, nbytes = Counter[Tenant](), Counter[Tenant]()
                for (tenant, _), (_, cost) in self._cache.items():
                    entries[tenant] += 1
                    nbytes[tenant] += cost
                if entries.total() <= CACHE_ENTRIES and nbytes.total() <= CACHE_BYTES:
                    return
                usage = entries if entries.total() > CACHE_ENTRIES else nbytes
                tenant_with_most = max(usage, key=lambda tenant: usage[tenant])
                del self._cache[next(key for key in self._cache if key[0] == tenant_with_most)]

    @contextlib.contextmanager
    def _tenant_lock(self, tenant: Tenant) -> Iterator[None]:
        """Wait for the other grammars of the same tenant, and for nobody else's."""
        with self._lock:
            self._num_waiting[tenant] += 1
            lock = self._tenant_locks.setdefault(tenant, threading.Lock())
        try:
            with lock:
                yield
        finally:
            with self._lock:
                self._num_waiting[tenant] -= 1
                if not self._num_waiting[tenant]:
                    del self._num_waiting[tenant], self._tenant_locks[tenant]

    @contextlib.contextmanager
    def _compiler(self, tenant: Tenant) -> Iterator[CompilerProcess]:
        """The process of one tenant, kept for its next grammar."""
        with self._compile_slots:
            with self._lock:
                idle = self._idle.pop(tenant, None)
                compiler = idle or CompilerProcess(self._tokens, self._eos_token_ids, self._deadline)
                self._busy[tenant] = compiler
            try:
                yield compiler
            finally:
                with self._lock:
                    del self._busy[tenant]
                    self._idle[tenant] = compiler
                    surplus = self._idle.popitem(last=False)[1] if len(self._idle) > MAX_IDLE else None
                if surplus is not None:
                    surplus.kill()

    def _compile(self, response: Response, tenant: Tenant) -> CachedGrammar:
        """The compiled grammar and its bytes, or the error that this grammar will always get."""
        try:
            from sprat.engine.sampling import grammar_worker
        except ImportError:
            todo = "pip install llguidance"
            raise MachineError("structured output needs llguidance", where="response", todo=todo) from None
        try:
            is_tools = response.language == "tools"
            sources = list(translate_tools(response)) if is_tools else [translate_source(response)]
            with self._compiler(tenant) as compiler:
                for source in sources:
                    reply = compiler.ask({"kind": response.language, "source": source})
                    if "error" not in reply:
                        break
            if "error" in reply:
                form = json.loads(response.source)["form"] if is_tools else None
                alone = None if form is None else self._compile(Response.json(form), tenant)[0]  # is it the fault?
                fault = alone if isinstance(alone, EngineError) else grammar_error(response, str(reply["error"]))
                return fault, 0
            with self._lock:
                if self._vocabulary is None:
                    self._vocabulary = grammar_worker.build_tokenizer(self._tokens(), self._eos_token_ids)
            return grammar_worker.build_matcher(self._vocabulary, response.language, source), int(reply["bytes"])
        except EngineError as error:
            return error, 0
        except ValueError as error:
            return grammar_error(response, str(error)), 0

    def _tokens(self) -> list[bytes]:
        """The bytes of every token."""
        return [self._tokenizer.token_bytes(index) for index in range(self._tokenizer.vocab_size)]


@dataclass(eq=False)
class GrammarProcessor:
    """The grammar of one answer; see ``processors.Processor``.

    Attributes:
        open_id: the id of ``<think>``, which a model that may think can say first.
        eos_token_ids: ids that end an answer; not before it has its form.
        close_tag, overlapping: where ``</think>`` is text, its bytes, and the tokens that hold its last byte and more
            behind it.
        num_consumed: output tokens that the matcher has seen, or that lie before the content.
    """

    matcher: LLMatcher
    tracker: ReasoningTracker
    open_id: int
    eos_token_ids: list[int]
    close_tag: bytes
    overlapping: list[tuple[int, bytes]]
    num_consumed: int = 0
    starts_at, supports_drafts = 0, True

    def apply(self, logits_V: NDArray[np.float32], output_ids: TokenIds, draft_ids: TokenIds) -> None:
        """See ``Processor``.

        Raises:
            EngineError: the grammar went over its limits.
        """
        tracker = self.tracker.advance(output_ids, draft_ids)
        if tracker.is_reasoning:
            self._mask_while_reasoning(logits_V, tracker.tail)
            return
        content_start, matcher = self.tracker.end, self.matcher
        if content_start is not None:
            matcher.consume_tokens(list(output_ids[max(self.num_consumed, content_start) :]))
            self.num_consumed = len(output_ids)
        drafted = [] if tracker.end is None else list(draft_ids[max(tracker.end - len(output_ids), 0) :])
        count = matcher.try_consume_tokens(drafted) if drafted else 0
        if count == len(drafted):
            self._mask(logits_V, undecided=tracker.end is None)
        if count:
            matcher.rollback(count)

    def _mask(self, logits_V: NDArray[np.float32], *, undecided: bool) -> None:
        """Rule out what the grammar does not allow; ``undecided``: reasoning may still be opened."""
        mask = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        if self.matcher.is_error():
            todo = "make the grammar simpler"
            raise EngineError("the grammar became too complex while it was followed", where="response", todo=todo)
        allowed_V = np.unpackbits(mask, count=len(logits_V), bitorder="little")
        if undecided and self.open_id >= 0:
            allowed_V[self.open_id] = 1
        np.copyto(logits_V, -np.inf, where=allowed_V == 0)

    def _mask_while_reasoning(self, logits_V: NDArray[np.float32], tail: bytes) -> None:
        """While it reasons, rule out the end, and what ends the reasoning and goes on: that would escape the form."""
        logits_V[self.eos_token_ids] = -np.inf
        for index, text in self.overlapping:
            if -1 < (tail + text).find(self.close_tag) < len(tail) + len(text) - len(self.close_tag):
                logits_V[index] = -np.inf
