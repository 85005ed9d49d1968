"""A deterministic engine for tests of the server: it says what its script says, in the real engine's own types.

It does by hand what the real one does by a model: deltas, usage, cancelling, refusing. Tokens are words.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from sprat.engine.sampling_params import Sampling
from sprat.engine.sequence import DEFAULT_TENANT, Delta, FinishReason, Output, Tenant, Usage
from sprat.errors import EngineError
from sprat.tokens.chat import Message

Script = Callable[[str, Sampling], tuple[str, str]]


def adds_up(question: str, sampling: Sampling) -> tuple[str, str]:
    """Think a sum out loud, then answer it."""
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    steps, total = [], 0
    for number in numbers:
        steps.append(f"{total} + {number} = {total + number}.")
        total += number
    return " ".join(steps), f"The sum is {total}"


class ScriptedHandle:
    """One scripted answer."""

    def __init__(self, prompt: Sequence[Message], sampling: Sampling, script: Script, pause: float, hold: bool) -> None:
        reasoning, content = script(prompt[-1].content, sampling)
        self.reasoning = "" if sampling.thinking is False else reasoning
        self.content, self.sampling, self.pause = content, sampling, pause
        self.prompt_tokens = sum(len(message.content.split()) for message in prompt)
        self.said = 0
        self.cancelled = threading.Event()
        self.go = threading.Event()
        if not hold:
            self.go.set()
        self.ended = threading.Event()

    def cancel(self) -> None:
        self.cancelled.set()
        self.go.set()

    def __iter__(self) -> Iterator[Delta]:
        said = {"reasoning": "", "content": ""}
        count = {"reasoning": 0, "content": 0}
        reason: FinishReason = "stop"
        pieces = [("reasoning", piece) for piece in re.findall(r"\S+\s*", self.reasoning)]
        pieces += [("content", piece) for piece in re.findall(r"\S+\s*", self.content)]
        for at, (kind, piece) in enumerate(pieces):
            if at >= (self.sampling.max_tokens or 10**9):
                reason = "length"
                break
            if at == 2:
                self.go.wait(60)
            if self.cancelled.wait(self.pause) if self.pause else self.cancelled.is_set():
                reason = "cancelled"
                break
            said[kind] += piece
            count[kind] += 1
            yield Delta("reasoning" if kind == "reasoning" else "content", piece)
        hit = min(2, self.prompt_tokens)
        usage = Usage(self.prompt_tokens, sum(count.values()), count["reasoning"], hit, self.prompt_tokens - hit)
        self.said = usage.completion_tokens
        self.ended.set()
        yield Delta("done", output=Output(said["content"], said["reasoning"], [], None, usage, reason, []))


class ScriptedEngine:
    """Answers every conversation by ``script``.

    Args:
        script: the last question and the sampling to (reasoning, content).
        pause: seconds before each word.
        hold: stop after two words until ``release`` or a cancel.
    """

    def __init__(self, script: Script = adds_up, *, pause: float = 0.0, hold: bool = False) -> None:
        self.script, self.pause, self.hold = script, pause, hold
        self.asked: list[tuple[list[Message], Sampling]] = []
        self.handles: list[ScriptedHandle] = []
        self.running = False

    def submit(
        self,
        prompt: Sequence[Message],
        sampling: Sampling | None = None,
        *,
        tenant: Tenant = DEFAULT_TENANT,
        adapter: str | None = None,
    ) -> ScriptedHandle:
        if "too long" in prompt[-1].content:
            raise EngineError("the prompt has 9999 tokens, the context 128", where="prompt", todo="shorten it")
        sampling = sampling or Sampling()
        handle = ScriptedHandle(prompt, sampling, self.script, self.pause, self.hold)
        self.asked.append((list(prompt), sampling))
        self.handles.append(handle)
        return handle

    def release(self) -> None:
        self.hold = False
        for handle in self.handles:
            handle.go.set()

    def start(self) -> None:
        self.running = True

    def stop(self) -> None:
        self.running = False


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Whether ``condition`` comes true within ``seconds``."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.01)
    return condition()
