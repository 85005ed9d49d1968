"""The engine: requests in, answers out, and one step that moves them all.

The life of a request: ``submit`` renders and checks it and puts it in the queue → ``schedule`` gives it a row →
``run`` computes its prompt once, then one token a step together with all other rows → ``settle`` appends the
token, looks for an end, and lets finished rows go at once → its ``Handle`` delivers text and result.

Who steps? With ``start()`` a background thread does, and any thread may submit, read and cancel. Without
it, whoever waits for a result steps, so a script needs no thread. One lock guards the queue and the rows,
another lets only one step run at a time; the model runs outside the first, so submitting never waits
for it.

Left out here: paged blocks and a prefix index across calls, speculation, grammars. Prompts that
occur more than once in one ``generate`` call are computed once and copied (RL groups).
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Rows

from sprat.engine.handle import Handle
from sprat.engine.intake import Intake, Prompt, banned, ends
from sprat.engine.runner import Runner
from sprat.engine.sample import Samples
from sprat.engine.scheduler import Plan, Scheduler
from sprat.engine.sequence import Delta, Output, Sampling, Sequence
from sprat.errors import EngineError
from sprat.model import Transformer
from sprat.tokens import Tokenizer

WAIT_SECONDS = 0.05  # how long an idle thread sleeps before it looks again


class Engine:
    """Batched generation with a latent KV cache; the same for scripts, rollouts and the server.

    The model is used as it is at every step: weights may change between calls, not within one.

    Args:
        model, tokenizer: from ``sprat.load``.
        max_batch: rows that run together at most.
        max_tokens_cap: sampled tokens of one request at most; None: what the context holds.
        prefill_tokens: prompt tokens that one step computes at most.

    Raises:
        EngineError: the tokenizer has more ids than the model, or a limit is below 1.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 64,
        max_tokens_cap: int | None = None,
        prefill_tokens: int = 8192,
    ) -> None:
        if min(max_batch, prefill_tokens, max_tokens_cap or 1) < 1:
            raise EngineError("a limit of the engine is below 1", where="Engine", todo="give positive numbers")
        if tokenizer.vocab_size > model.config.vocab_size:
            fault = f"the tokenizer has {tokenizer.vocab_size} ids, the model only {model.config.vocab_size}"
            raise EngineError(fault, where="Engine", todo="load the two from the same folder")
        self.model, self.tokenizer = model, tokenizer
        self.scheduler = Scheduler(max_batch, prefill_tokens)
        self.runner = Runner(model, vocab=tokenizer.vocab_size, banned=banned(tokenizer))
        self._intake = Intake(model.config, tokenizer, max_tokens_cap)
        self._ends = ends(model.config, tokenizer)
        self._handles: dict[int, Handle] = {}
        self._shares = itertools.count(1)
        self._lock, self._stepping, self._wake = threading.Lock(), threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._stopping = False

    def step(self) -> list[Handle]:
        """Move every request by one token; the requests that finished thereby.

        Raises:
            EngineError: the model's logits are not finite; all requests in flight have failed.
        """
        with self._stepping:
            plan = self._schedule()
            try:
                samples = self.runner.run(plan)
            except Exception as error:
                self._fail(error)
                raise
            return self._settle(samples)

    def generate(
        self,
        prompts: Rows[Prompt],
        sampling: Sampling | Rows[Sampling] | None = None,
        *,
        cancel: threading.Event | None = None,
    ) -> list[Output]:
        """Answer all prompts; ``sampling.n`` answers each, those of one prompt side by side.

        A prompt is a question (rendered as one user turn), a conversation, or ids that are used as they
        are. Where a prompt occurs several times with the same seed, each occurrence draws from its own
        stream of noise.

        Raises:
            EngineError: a prompt is empty or too long, or the settings do not match the prompts.
        """
        settings = [sampling or Sampling()] * len(prompts) if isinstance(sampling, Sampling | None) else list(sampling)
        if isinstance(prompts, str) or len(settings) != len(prompts):
            fault = "prompts and settings differ in number"
            raise EngineError(fault, where="generate", todo="give lists of one length")
        share = next(self._shares)
        seen: Counter[tuple[int, tuple[int, ...]]] = Counter()
        sequences: list[Sequence] = []
        for prompt, one in zip(prompts, settings, strict=True):
            ids = self._intake.ids(prompt, one)
            for _ in range(one.n):
                name = (one.seed, tuple(ids))
                sequences.append(self._intake.sequence(ids, one, stream=seen[name], share=share, event=cancel))
                seen[name] += 1
        handles = [self._enter(sequence, streams=False) for sequence in sequences]
        return [handle.result() for handle in handles]

    def stream(
        self, prompt: Prompt, sampling: Sampling | None = None, cancel: threading.Event | None = None
    ) -> Iterator[Delta]:
        """Pieces of one answer as they come; ends with a Delta of kind ``done``. Raises as ``submit``."""
        return iter(self.submit(prompt, sampling, cancel=cancel))

    def submit(
        self, prompt: Prompt, sampling: Sampling | None = None, *, cancel: threading.Event | None = None
    ) -> Handle:
        """Put one request in the queue; any thread may.

        Raises:
            EngineError: the prompt is empty or too long, or ``n`` is not 1.
        """
        sampling = sampling or Sampling()
        if sampling.n != 1:
            raise EngineError("one request gives one answer", where="n", todo="submit it n times with n seeds")
        sequence = self._intake.sequence(self._intake.ids(prompt, sampling), sampling, event=cancel)
        return self._enter(sequence, streams=True)

    def add(self, prompt: Prompt, sampling: Sampling | None = None) -> int:
        """``submit``, for callers that step the engine and need only the request's number."""
        sampling = sampling or Sampling()
        sequence = self._intake.sequence(self._intake.ids(prompt, sampling), sampling)
        return self._enter(sequence, streams=False).id

    def cancel(self, number: int) -> bool:
        """Stop request ``number``; False if it is unknown or finished already."""
        handle = self._handles.get(number)
        if handle is None:
            return False
        handle.cancel()
        return True

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._handles)

    def start(self) -> None:
        """Step in a background thread from now on, until ``stop``."""
        if self._thread is None:
            self._stopping = False
            self._thread = threading.Thread(target=self._loop, name="sprat-engine", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the background thread; what is still in flight is cancelled."""
        thread = self._thread
        if thread is None:
            return
        self._stopping = True
        self._wake.set()
        thread.join()
        self._thread = None
        for handle in list(self._handles.values()):
            handle.cancel()
        while self.busy:
            self.step()

    def check(self) -> list[str]:
        """Faults of the engine's own books, none if all is well: leaked rows, rows out of place, wrong lengths."""
        with self._stepping, self._lock:
            running, waiting = self.scheduler.running, self.scheduler.waiting
            faults = [f"row {r} holds request {s.id} of row {s.row}" for r, s in enumerate(running) if s.row != r]
            faults += [f"waiting request {s.id} has row {s.row}" for s in waiting if s.row != -1]
            known = {s.id for s in running} | {s.id for s in waiting}
            if known != set(self._handles) or len(known) != len(running) + len(waiting):
                faults.append(f"requests {sorted(known ^ set(self._handles))} are lost or double")
            # The token sampled last is not in the cache yet.
            lengths = [s.length - 1 for s in running]
            return faults + self.runner.check(lengths)

    def _schedule(self) -> Plan:
        """Let cancelled requests go and admit waiting ones."""
        with self._lock:
            dropped, leaving = self.scheduler.withdraw()
            if leaving:
                self.runner.compact(self.scheduler.remove(leaving))
            for sequence in dropped + leaving:
                self._handles.pop(sequence.id).finish("cancelled")
            return self.scheduler.admit()

    def _settle(self, samples: Samples | None) -> list[Handle]:
        """Give each row its token and let finished rows go."""
        if samples is None:
            return []
        tokens = samples.tokens_B.tolist()
        logprobs = samples.logprobs_B.tolist() if samples.logprobs_B is not None else tokens
        finished: list[Sequence] = []
        with self._lock:
            for sequence, token, logprob in zip(self.scheduler.running, tokens, logprobs, strict=True):
                sequence.token_ids.append(token)
                if sequence.sampling.logprobs:
                    sequence.logprobs.append(logprob)
                stopped = sequence.followed and self._handles[sequence.id].feed(token)
                if stopped or token in self._ends:
                    sequence.finish_reason = "stop"
                elif len(sequence.token_ids) >= sequence.limit:
                    sequence.finish_reason = "length"
                if sequence.finish_reason:
                    finished.append(sequence)
            if finished:
                self.runner.compact(self.scheduler.remove(finished))
            handles = [self._handles.pop(sequence.id) for sequence in finished]
            for handle in handles:
                handle.finish(handle.sequence.finish_reason or "stop")
        return handles

    def _fail(self, error: Exception) -> None:
        """Give ``error`` to all requests in flight and begin anew with empty rows."""
        with self._lock:
            self.scheduler.remove(list(self.scheduler.running))
            self.scheduler.waiting.clear()
            self.runner.reset()
            for handle in self._handles.values():
                handle.fail(error)
            self._handles.clear()

    def _loop(self) -> None:
        """The background thread: step while there is work, sleep while there is none."""
        while not self._stopping:
            if not self.busy:
                self._wake.wait(WAIT_SECONDS)
                self._wake.clear()
                continue
            try:
                self.step()
            except Exception:
                # Every request in flight carries the error already; the next ones deserve an engine.
                continue

    def _drive(self) -> bool:
        """Step once, unless a background thread does that; whether this thread stepped."""
        if self._thread is not None:
            return False
        self.step()
        return True

    def _enter(self, sequence: Sequence, *, streams: bool) -> Handle:
        """Put ``sequence`` in the queue."""
        handle = Handle(sequence, self.tokenizer, self._drive, streams=streams)
        with self._lock:
            self._handles[sequence.id] = handle
            self.scheduler.waiting.append(sequence)
        self._wake.set()
        return handle
