"""A deterministic engine for tests of the server: it says what its script says, by the real engines' own contract.

It does by hand what a real one does by a model: events, counts, cancelling, refusing. Tokens are words.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import cache

from sprat.engine.response import Response
from sprat.engine.sampling_params import Sampling
from sprat.engine.sequence import DEFAULT_TENANT, Tenant
from sprat.engine.stats import Stats
from sprat.errors import EngineError
from sprat.serve.engine_client import EngineInfo, Job, JobEvent
from sprat.tokens import Tokenizer

Script = Callable[[str, Sampling], tuple[str, str]]


def adds_up(question: str, sampling: Sampling) -> tuple[str, str]:
    """Think a sum out loud, then answer it."""
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    steps, total = [], 0
    for number in numbers:
        steps.append(f"{total} + {number} = {total + number}.")
        total += number
    return " ".join(steps), f"The sum is {total}"


@cache
def scripted_tokenizer() -> Tokenizer:
    """A tokenizer of few words; it spells all others."""
    return Tokenizer.train([f"what is {a} + {b}? the sum is {a + b}." for a in range(30) for b in range(30)], 512)


class ScriptedHandle:
    """One scripted job."""

    def __init__(self, job: Job, question: str, script: Script, pause: float, hold: bool) -> None:
        self.job, self.question, self.script, self.pause = job, question, script, pause
        self.prompt_tokens = len(question.split())
        self.said = 0
        self.cancelled, self.go, self.ended = threading.Event(), threading.Event(), threading.Event()
        if not hold:
            self.go.set()

    def cancel(self) -> None:
        self.cancelled.set()
        self.go.set()

    def _pieces(self, sampling: Sampling) -> Iterator[tuple[str, str]]:
        reasoning, content = self.script(self.question, sampling)
        if sampling.thinking is not False:
            yield from (("reasoning", piece) for piece in re.findall(r"\S+\s*", reasoning))
        yield from (("content", piece) for piece in re.findall(r"\S+\s*", content))

    async def __aiter__(self) -> AsyncIterator[JobEvent]:
        if "too long" in self.question:
            raise EngineError("the prompt has 9999 tokens, the context 128", where="prompt", todo="shorten it")
        yield JobEvent("started", prompt_tokens=self.prompt_tokens, cached_tokens=min(2, self.prompt_tokens))
        for choice, sampling in enumerate(self.job.samplings):
            count, reason = {"reasoning": 0, "content": 0}, "stop"
            for at, (kind, piece) in enumerate(self._pieces(sampling)):
                if at >= (sampling.max_tokens or 10**9):
                    reason = "length"
                    break
                while at == 2 and not self.go.is_set():
                    await asyncio.sleep(0.005)
                await asyncio.sleep(self.pause)
                if self.cancelled.is_set():
                    reason = "cancelled"
                    break
                count[kind] += 1
                self.said += 1
                yield JobEvent(kind, choice, piece)  # type: ignore[arg-type]
            if choice == len(self.job.samplings) - 1:
                self.ended.set()
            yield JobEvent(
                "done",
                choice,
                prompt_tokens=self.prompt_tokens,
                cached_tokens=min(2, self.prompt_tokens),
                completion_tokens=sum(count.values()),
                reasoning_tokens=count["reasoning"],
                finish_reason=reason,  # type: ignore[arg-type]
            )


class ScriptedEngine:
    """Answers every prompt by ``script``.

    Args:
        script: the prompt as text, and the sampling, to (reasoning, content).
        pause: seconds before each word.
        hold: stop after two words until ``release`` or a cancel.
    """

    def __init__(self, script: Script = adds_up, *, pause: float = 0.0, hold: bool = False) -> None:
        self.script, self.pause, self.hold = script, pause, hold
        self.tokenizer = scripted_tokenizer()
        self.info = EngineInfo(1_000_000, 10_000_000, 4096, self.tokenizer.vocab_size, ())
        self.handles: list[ScriptedHandle] = []
        self.alive, self.stalled, self.failure = False, False, None

    @property
    def asked(self) -> list[tuple[str, Sampling]]:
        """Prompts as text, with the sampling of their first answer."""
        return [(handle.question, handle.job.samplings[0]) for handle in self.handles]

    def submit(self, job: Job) -> ScriptedHandle:
        question = self.tokenizer.decode(job.prompt_ids, skip_special_tokens=True)
        handle = ScriptedHandle(job, question, self.script, self.pause, self.hold)
        self.handles.append(handle)
        return handle

    def release(self) -> None:
        self.hold = False
        for handle in self.handles:
            handle.go.set()

    async def start(self) -> None:
        self.alive = True

    async def stop(self) -> None:
        self.alive = False
        for handle in self.handles:
            handle.cancel()

    async def stats(self) -> Stats:
        running = sum(not handle.ended.is_set() for handle in self.handles)
        said = sum(handle.said for handle in self.handles)
        return Stats(running, 0, 1000, running, 0, 1, said, said, 0, 0, 0, 0, 0, 0.0)

    async def compile(self, response: Response, tenant: Tenant) -> None:
        pass

    async def embed(
        self, prompts: Sequence[Sequence[int]], adapter: str | None = None, tenant: Tenant = DEFAULT_TENANT
    ) -> list[list[float]]:
        return [[float(len(prompt)), 1.0] for prompt in prompts]


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether ``condition`` comes true within ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return condition()
