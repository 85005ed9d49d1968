# size: the engine's whole face: every way to ask it, and to run it
"""The engine: requests in, answers out, and one step that moves them all.

``step()`` is schedule → run → postprocess: the scheduler chooses what is computed and finds blocks for it, the runner
lets the back end compute it and samples, and what was sampled becomes part of the answers. docs/engine.md tells the
life of a request in eight steps.

Who steps? With ``start()`` a background thread does, and any thread may submit, read and cancel. Without
it, whoever waits for a result steps, so a script needs no thread. ``core`` keeps
the books; the model runs outside its lock, so submitting never waits for it.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as GenericSequence
from pathlib import Path
from typing import Any

from sprat.engine.adapter import load_adapters
from sprat.engine.backend import Backend
from sprat.engine.backends import select_backend
from sprat.engine.cache.blocks import determine_num_blocks
from sprat.engine.cache.disk import DiskCache
from sprat.engine.cache.prefix import BlockKeys, model_digest
from sprat.engine.core import EngineCore
from sprat.engine.request import Listener, Prompt, RequestBuilder, RequestHandle, eos_token_ids
from sprat.engine.response import Response
from sprat.engine.sampling.grammar import GrammarCache
from sprat.engine.sampling_params import Sampling
from sprat.engine.scoring import embedding
from sprat.engine.sequence import DEFAULT_TENANT, Delta, EngineLimits, Output, Sequence, Tenant
from sprat.engine.speculation import Speculation, SpeculationMode
from sprat.engine.stats import Stats
from sprat.errors import EngineError, SpratError
from sprat.model import Transformer
from sprat.tokens import Tokenizer

WAIT_SECONDS = 0.05  # how long an idle thread sleeps before it looks again


class Engine:
    """Batched generation over a paged KV cache with a prefix index; the same for scripts, rollouts and the server.

    Args:
        model, tokenizer: from ``sprat.load``.
        backend: what computes; None: the native one where it takes the model, else torch.
        max_batch: requests that run together at most.
        max_tokens_cap: sampled tokens of one request at most; None: what the context holds.
        step_tokens: tokens that one step computes, about: answers first, then pieces of prompts.
        cache_bytes: of the KV cache at most; None: see ``blocks.determine_num_blocks``.
        frozen: the weights will not change any more, so that what was computed is kept for later requests. Without it
            they may change between calls, and whatever is known of prompts is dropped as soon as nobody asks.
        adapter: digest of an adapter that is in the weights.
        adapters: LoRA adapters beside the weights, name → folder in PEFT's layout, that requests choose by name. A
            request without one has the bits that it has where there are none. With ``backend``: give them to that.
        disk: where blocks go that do not fit into the KV cache; needs ``frozen``. The weights are digested once.
        kv_format: of keys and values, where ``backend`` is None: ``f32``, ``f16`` or ``i8`` (for long contexts); None:
            f32 for float32 models, so that they answer as they train, else f16.
        consume: take quantised weights out of ``model``, which cannot compute any more then, instead of having them in
            memory twice.
        speculate: ``off``, ``ngram``, ``mtp``, or ``auto``: whichever the model can and while it pays.

    Attributes:
        before_step: called by ``generate`` before each of its steps, where there is no background thread; it may
            ``update_weights``.

    Raises:
        EngineError: the tokenizer has more ids than the model, a limit is below 1, or settings contradict.
        ConfigError, CheckpointError: an adapter is not of this model, see ``adapter.load_adapters``.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        backend: Backend | None = None,
        max_batch: int = 64,
        max_tokens_cap: int | None = None,
        step_tokens: int = 512,
        cache_bytes: int | None = None,
        frozen: bool = False,
        adapter: str = "",
        adapters: Mapping[str, str | Path] | None = None,
        disk: DiskCache | None = None,
        speculate: SpeculationMode = "auto",
        kv_format: str | None = None,
        consume: bool = False,
    ) -> None:
        if min(max_batch, step_tokens, max_tokens_cap or 1) < 1:
            raise EngineError("a limit of the engine is below 1", where="Engine", todo="give positive numbers")
        if tokenizer.vocab_size > model.config.vocab_size:
            fault = f"the tokenizer has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}"
            raise EngineError(fault, where="Engine", todo="load the two from the same folder")
        if disk is not None and not frozen:
            raise EngineError("blocks on disk need weights that do not change", where="disk", todo="set frozen as well")
        if backend is not None and adapters:
            todo = "make the back end with load_adapters(model, …), or leave it out"
            raise EngineError("adapters beside a back end of its own", where="adapters", todo=todo)
        self.model, self.tokenizer = model, tokenizer
        digest = model_digest(model) if disk is not None else ""
        if backend is None:
            own = load_adapters(model, adapters or {})
            backend = select_backend(model, kv_format, consume=consume, adapters=own)
        self.backend = backend
        eos_ids, context = eos_token_ids(model.config, tokenizer), model.config.context
        num_blocks = determine_num_blocks(self.backend, context, max_batch, cache_bytes, model.norm.weight.device)
        limits = EngineLimits(max_batch, step_tokens, num_blocks, context, max_tokens_cap or context, frozen)
        self.limits = limits
        self._grammars = GrammarCache(tokenizer, eos_ids)
        vocab, names = model.config.vocab_size, [each.name for each in backend.adapters]
        self._request_builder = RequestBuilder(vocab, tokenizer, self._grammars, limits, names, model.config)
        digests = [each.digest for each in backend.adapters]
        keys = BlockKeys(digest, adapter, tokenizer.digest, backend.kv_format, digests)
        speculation = Speculation(speculate, self.backend, tokenizer.vocab_size)
        self.core = EngineCore(self.backend, tokenizer, keys, eos_ids, limits, speculation, disk)
        self._prompt_groups = itertools.count(1)
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._after_step: Callable[[], None] = lambda: None
        self.before_step: Callable[[], None] | None = None

    def sampling(self, **overrides: Any) -> Sampling:
        """Settings of a request: what is said (None says nothing), else what the model's folder says, else our own.

        A ``Sampling`` that a caller makes is taken as it is; where none is given at all, this one is.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        return Sampling(**{**self.tokenizer.generation_config.default_sampling, **given})

    def step(self) -> list[RequestHandle]:
        """Move every request on; the requests that finished thereby.

        Raises:
            EngineError: the model's logits are not finite, or the back end failed. The requests of this step have
                failed with it; those that wait are still there.
        """
        return self.core.step()

    def update_weights(self, write: Callable[[], None], version: int) -> None:
        """Let ``write`` change the model's weights between two steps; what runs goes on with them.

        Answers keep their tokens and log-probabilities, which are those of the weights that sampled each
        (``Output.versions``). Their keys and values are computed anew, as in AReaL (Fu et al. 2025, arXiv 2505.24298).
        So each further token is drawn from a policy that there is, that of ``version`` after all tokens before it, and
        its log-probability is what a trainer with these weights computes. PipelineRL (Piché et al. 2025, arXiv
        2509.19128) keeps the old ones, which costs nothing and samples from a mixture that no trainer can compute.

        Args:
            write: changes the model that the engine was given, in place.
            version: what the new weights are called; those of the beginning are 0.

        Raises:
            EngineError: the engine is frozen.
        """
        if self.limits.frozen:
            raise EngineError("the weights of a frozen engine cannot change", where="frozen", todo="leave it out")
        self.core.update_weights(write, version)

    def generate(
        self,
        prompts: GenericSequence[Prompt],
        sampling: Sampling | GenericSequence[Sampling] | None = None,
        *,
        cancel: threading.Event | None = None,
        tenant: Tenant = DEFAULT_TENANT,
        adapter: str | None | GenericSequence[str | None] = None,
    ) -> list[Output]:
        """Answer all prompts; ``sampling.n`` answers each, those of one prompt side by side.

        A prompt is a question (rendered as one user turn), a conversation (``Message``s, or dicts with ``role`` and
        ``content``), or ids that are used as they are. Where a prompt occurs several times with the same seed, each
        occurrence draws from its own stream of noise.

        Args:
            adapter: name of the adapter of all prompts, or one (or None) for each.

        Raises:
            EngineError: a prompt is empty, too long or none of these, settings or adapters do not match the prompts,
                or there is no such adapter.
        """
        sampling = self.sampling() if sampling is None else sampling
        settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        adapters = [adapter] * len(prompts) if adapter is None or isinstance(adapter, str) else list(adapter)
        if isinstance(prompts, str) or not len(settings) == len(adapters) == len(prompts):
            fault = "prompts, settings and adapters differ in number"
            raise EngineError(fault, where="generate", todo="give lists of one length")
        seen: Counter[tuple[int, str | None, tuple[int, ...]]] = Counter()
        groups: dict[tuple[str | None, tuple[int, ...], bool], int] = {}
        build, sequences = self._request_builder.build, list[Sequence]()
        for prompt, params, own in zip(prompts, settings, adapters, strict=True):
            ids = self._request_builder.tokenize(prompt, params)
            key = own, tuple(ids)
            group = groups.setdefault((*key, params.routes), next(self._prompt_groups))
            for _ in range(params.n):
                stream = seen[params.seed, *key]
                sequence = build(
                    ids, params, tenant=tenant, stream=stream, prompt_group=group, cancel_event=cancel, adapter=own
                )
                sequences.append(sequence)
                seen[params.seed, *key] += 1
        handles = self._enqueue(sequences, streams=False)
        try:
            while self.before_step is not None and not all(handle.finished.is_set() for handle in handles):
                self.before_step()
                self._step_unless_threaded()
            return [handle.result() for handle in handles]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise

    def stream(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        cancel: threading.Event | None = None,
        *,
        tenant: Tenant = DEFAULT_TENANT,
        adapter: str | None = None,
    ) -> Iterator[Delta]:
        """Pieces of one answer as they come; ends with a Delta of kind ``done``. Raises as ``submit``."""
        return iter(self.submit(prompt, sampling, cancel=cancel, tenant=tenant, adapter=adapter))

    def submit(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        cancel: threading.Event | None = None,
        tenant: Tenant = DEFAULT_TENANT,
        adapter: str | None = None,
    ) -> RequestHandle:
        """Put one request in the queue; any thread may. ``adapter``: the name of one.

        Raises:
            EngineError: the prompt is empty or too long, ``n`` is not 1, or there is no such adapter.
        """
        sequences = self.prepare(prompt, [sampling or self.sampling()], tenant, adapter, cancel)
        return self._enqueue(sequences, streams=True)[0]

    def embed(
        self, prompts: GenericSequence[Prompt], adapter: str | None = None, *, tenant: Tenant = DEFAULT_TENANT
    ) -> list[list[float]]:
        """For each prompt the mean of the last norm's output over its tokens, scaled to length 1.

        Whatever runs goes on meanwhile: prompts are computed in pieces, in the fair order and beside answers. They are
        computed whole, also where their beginning is cached.

        Raises:
            EngineError: a prompt is empty, too long or none, there is no such adapter, or the engine was stopped.
        """
        how, builder = Sampling(temperature=0), self._request_builder
        ids = [builder.tokenize(prompt, how) for prompt in prompts]
        sequences = [builder.build(row, how, tenant=tenant, adapter=adapter, embeds=True) for row in ids]
        handles = self._enqueue(sequences, streams=False)
        try:
            for handle in handles:
                handle.result()
            return [embedding(sequence) for sequence in sequences]
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise

    def add(
        self,
        prompt: Prompt,
        sampling: Sampling | None = None,
        *,
        tenant: Tenant = DEFAULT_TENANT,
        adapter: str | None = None,
    ) -> int:
        """``submit``, for callers that step the engine and need only the request's number; raises as it does."""
        sequences = self.prepare(prompt, [sampling or self.sampling()], tenant, adapter)
        return self._enqueue(sequences, streams=False)[0].id

    def prepare(
        self,
        prompt: Prompt,
        samplings: GenericSequence[Sampling],
        tenant: Tenant = DEFAULT_TENANT,
        adapter: str | None = None,
        cancel: threading.Event | None = None,
    ) -> list[Sequence]:
        """Requests for one answer of each setting, which compute their prompt once; ``enqueue`` lets them begin.

        Any thread may; only where ``must_compile`` it takes longer than a moment. Raises as ``submit``.
        """
        if any(sampling.n != 1 for sampling in samplings):
            raise EngineError("one request gives one answer", where="n", todo="submit it n times with n seeds")
        ids = self._request_builder.tokenize(prompt, samplings[0])
        is_shared = len(samplings) > 1 and len({sampling.routes for sampling in samplings}) == 1
        group = next(self._prompt_groups) if is_shared else 0
        return [
            self._request_builder.build(
                ids, sampling, tenant=tenant, prompt_group=group, cancel_event=cancel, adapter=adapter
            )
            for sampling in samplings
        ]

    def must_compile(self, sampling: Sampling, tenant: Tenant) -> bool:
        """Whether ``prepare`` has to compile a grammar for this, which takes seconds at worst."""
        return sampling.response is not None and not self._grammars.is_known(sampling.response, tenant)

    def compile(self, response: Response, tenant: Tenant, *, wait: bool = True) -> bool:
        """Whether a grammar is known, so that ``prepare`` with it takes a moment; ``wait``: it is compiled first.

        Any thread may. Raises EngineError: it cannot be used.
        """
        if wait:
            self._grammars.grammar(response, None, tenant)
        return self._grammars.is_known(response, tenant)

    def enqueue(self, sequences: list[Sequence], listeners: GenericSequence[Listener]) -> None:
        """Queue what ``prepare`` made. Each listener is called in the thread that steps, and must only take note."""
        self._enqueue(sequences, streams=True, listeners=listeners)

    def cancel(self, request_id: int) -> bool:
        """Stop a request, whose blocks are free after the next step; False if it is unknown or finished."""
        if (handle := self.core.handles.get(request_id)) is not None:
            handle.cancel()
        return handle is not None

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.core.handles)

    def stats(self) -> Stats:
        """What was done so far, and what is held now."""
        return self.core.stats()

    def start(self, after_step: Callable[[], None] = lambda: None) -> None:
        """Step in a background thread from now on, until ``stop``; ``after_step`` is called there after each step."""
        if self._thread is None:
            self._stopping, self._after_step = False, after_step
            self._thread = threading.Thread(target=self._run_loop, name="sprat-engine", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the background thread; what is still in flight is cancelled, and what is known goes to disk."""
        thread = self._thread
        if thread is not None:
            self._stopping = True
            self._wake.set()
            thread.join()
            self._thread = None
            for handle in list(self.core.handles.values()):
                handle.cancel()
            while self.busy:
                self._step_unless_threaded()
        self._grammars.close()
        self.core.flush()

    def check(self) -> list[str]:
        """Faults of the engine's own books, none if all is well: leaked slots and blocks, wrong lengths or counts."""
        return self.core.check()

    def _run_loop(self) -> None:
        """The background thread: step while there is work, sleep while there is none."""
        while not self._stopping:
            if not self.busy:
                self._wake.wait(WAIT_SECONDS)
                self._wake.clear()
                continue
            with contextlib.suppress(Exception):  # whoever it concerns has it; the next ones deserve an engine
                self.step()
            self._after_step()

    def _step_unless_threaded(self) -> bool:
        """Step once, unless a background thread does that; whether this thread stepped."""
        if self._thread is not None:
            return False
        with contextlib.suppress(SpratError):  # whoever it concerns has it
            self.step()
        return True

    def _enqueue(
        self, sequences: list[Sequence], *, streams: bool, listeners: GenericSequence[Listener | None] = ()
    ) -> list[RequestHandle]:
        """Queue requests and wake the thread."""
        step, cancellation = self._step_unless_threaded, self.core.cancellation
        pairs = zip(sequences, listeners or [None] * len(sequences), strict=True)
        handles = [RequestHandle(s, self.tokenizer, step, cancellation, streams=streams, listener=n) for s, n in pairs]
        self.core.add_requests(handles)
        self._wake.set()
        return handles
