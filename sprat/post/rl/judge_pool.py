"""A user's verifier in processes that can be killed: several answers at once, each within its time.

Two kinds of verifier, three ways to run one (``judge_child``):

- A Python function lives in workers (``reward_worker``) that stay and answer one request after the other. A function
  that hangs, in C code too, or that takes its process down, costs its own answer: its worker is killed, another starts.
- A command is started anew for each answer: one JSON line on its stdin and then the end, a number or ``null`` (it
  abstains) as the last line of its stdout, exit code 0. That is the simplest contract, at the price of a start.
- With ``keep_alive`` the command stays and answers line for line: a JSON line in, a line with a number or ``null`` out.

A fault (an exception, no number, a time-out, a crash) pays nothing and is counted: a fault paid 0 would teach that the
answer was wrong. Where the last ``MAX_FAULTS`` answers were all faults, the verifier is broken and the run ends.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from sprat.errors import TrainingError
from sprat.post.rl.judge_child import Child, CommandChild, CrashError, FunctionChild, LineChild
from sprat.post.rl.reward_sources import is_command, split_command
from sprat.post.rl.rewards import FAULTS, Response, Verdict
from sprat.tasks import Problem

MAX_FAULTS = 64  # in a row, after which a verifier is broken


class JudgePool:
    """See the module's text; a ``BatchReward``.

    Args:
        name: the reward, as ``reward_sources`` reads it.
        workers: answers that are judged at once.
        timeout_seconds: for one answer.
        keep_alive: of a command.

    Raises:
        ConfigError: there is no such function or program, or the function is of no form of a reward.
    """

    def __init__(self, name: str, *, workers: int = 4, timeout_seconds: float = 10.0, keep_alive: bool = False) -> None:
        self.name, self.timeout_seconds, self._workers = name, timeout_seconds, workers
        self._children = _children(name, workers, timeout_seconds, keep_alive)
        self._idle: queue.SimpleQueue[Child] = queue.SimpleQueue()
        for child in self._children:
            self._idle.put(child)
        self._lock, self._row_of_faults, self._last_fault, self._broken = threading.Lock(), 0, "", False
        if isinstance(self._children[0], FunctionChild):
            self._children[0].start()

    def pay(self, pairs: Sequence[tuple[Problem, Response]]) -> list[Verdict]:
        """See ``BatchReward``.

        Raises:
            TrainingError: the last answers were faults, all ``MAX_FAULTS`` of them.
        """
        with ThreadPoolExecutor(self._workers) as executor:
            try:
                verdicts = list(executor.map(self._judge, pairs))
            except BaseException:
                self._broken = True  # what waits is not asked any more
                self.close()
                raise
        if self._broken:
            what = f"the reward failed on each of {self._row_of_faults} answers in a row; the last time it "
            raise TrainingError(what + self._last_fault, where=f"reward {self.name}", todo="mend the reward")
        return verdicts

    def close(self) -> None:
        """End all processes."""
        for child in self._children:
            child.kill()

    def _judge(self, pair: tuple[Problem, Response]) -> Verdict:
        if self._broken:
            return Verdict(None, "crashed", "was not asked any more")
        child = self._idle.get()
        try:
            verdict = child.verdict(*pair, self.timeout_seconds)
        except TimeoutError:
            child.kill()
            verdict = Verdict(None, "timeout", f"took longer than {self.timeout_seconds:g} s")
        except CrashError as error:
            child.kill()
            verdict = Verdict(None, "crashed", str(error))
        finally:
            self._idle.put(child)
        with self._lock:
            is_fault = verdict.outcome in FAULTS
            self._row_of_faults = self._row_of_faults + 1 if is_fault else 0
            self._last_fault = verdict.detail if is_fault else self._last_fault
            self._broken = self._broken or self._row_of_faults >= MAX_FAULTS
        return verdict


def _children(name: str, workers: int, timeout_seconds: float, keep_alive: bool) -> list[Child]:
    """As many of the kind that ``name`` is; none is started."""
    if not is_command(name):
        return [FunctionChild(name, timeout_seconds) for _ in range(workers)]
    arguments = split_command(name)
    return [LineChild(arguments) if keep_alive else CommandChild(arguments) for _ in range(workers)]
