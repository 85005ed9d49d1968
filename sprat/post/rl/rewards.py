"""Rules that pay a sampled answer: the task's own judge, the format, and the user's plug-in.

A reward is a function of the problem and of what the model wrote, never another model: it cannot be
flattered (DeepSeek-R1, arXiv 2501.12948, section 2.2.2). A plug-in is named as ``package.module:function``
or ``path/to/file.py:function``; it is the user's own code and runs with the user's rights, in this process
(``Verifier``) or in processes that can be killed (``judge_pool``).
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from sprat.errors import ConfigError, TrainingError
from sprat.post.rl.reward_sources import split_reward_name
from sprat.tasks import Problem, Task, task_verdict
from sprat.tasks.user_code import TimeUpError, finite_float, import_source, time_limit
from sprat.tokens import Answer, Tokenizer, split_reasoning
from sprat.tokens.chat import resolve_thinking

log = logging.getLogger(__name__)
DEFAULT_TIMEOUT_SECONDS = 10.0  # for one answer, where nobody says otherwise
_EXPECTED_SIGNATURE = "write it as: def function(problem, answer) -> float"


@dataclass(frozen=True)
class Response(Answer):
    """A sampled answer as rewards see it: ``Answer``'s reasoning, content and closed, and

    ``well_formed``: exactly one think, opened first and closed, then a non-empty answer and the end token.
    ``text``: all of it as one text, the think between its tags.
    ``finished``: the model ended by itself; it was not cut off at the limit.
    """

    well_formed: bool = False
    text: str = ""
    finished: bool = True


Reward = Callable[[Problem, Response], float | None]  # None abstains: the answer neither teaches nor counts
Outcome = Literal["paid", "abstained", "raised", "timeout", "crashed"]
FAULTS: tuple[Outcome, ...] = ("raised", "timeout", "crashed")
ENVIRONMENT = "environment "  # how the name of a judge begins that is one


@dataclass(frozen=True)
class Verdict:
    """What a verifier said of one answer: ``reward`` is None where it abstained or failed, and ``detail`` says how."""

    reward: float | None
    outcome: Outcome = "paid"
    detail: str = ""


def verdict_of(reward: float | None) -> Verdict:
    """``reward`` as a verdict: None abstains."""
    return Verdict(None, "abstained") if reward is None else Verdict(reward)


class BatchReward(Protocol):
    """Whoever pays many answers at once; None of them ends a run by itself."""

    def pay(self, pairs: Sequence[tuple[Problem, Response]]) -> list[Verdict]:
        """A verdict for each of ``pairs``, in their order.

        Raises:
            TrainingError: the verifier is broken, and not the answers.
        """
        ...


def parse_response(tokenizer: Tokenizer, ids: Sequence[int], *, thinking: bool | None, finished: bool) -> Response:
    """Read generated ``ids``, which follow a prompt rendered with ``thinking``.

    Control tokens that are out of place do not show in decoded text, so the form is judged on ids.

    Args:
        finished: the model ended by itself (not cut off at the limit).
    """
    thinking = resolve_thinking(tokenizer, thinking)
    answer = split_reasoning(tokenizer, ids, thinking=thinking)
    opening, closing = tokenizer.special_ids.think_open, tokenizer.special_ids.think_close
    if opening < 0 or closing < 0:  # a tokenizer whose tags are ordinary text
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        expected_tags = list(tokenizer.chat_format.think_tags)
        tags = re.findall("|".join(map(re.escape, expected_tags)), text)
        opens_with_think = text.startswith(expected_tags[0])
    else:
        expected_tags = [str(opening), str(closing)]
        tags = [str(index) for index in ids if index in (opening, closing)]
        opens_with_think = list(ids[:1]) == [opening]
    tags_in_prompt = 0 if thinking is None else 1 if thinking else 2  # tags that the prompt ends with
    tags_in_order = tags == expected_tags[tags_in_prompt:] and (opens_with_think or tags_in_prompt > 0)
    well_formed = tags_in_order and finished and bool(answer.content.strip())
    opened, closed = tokenizer.chat_format.think_tags
    begun = f"{opened}{answer.reasoning}{closed if answer.closed else ''}" if answer.reasoning else ""
    return Response(answer.reasoning, answer.content, answer.closed, well_formed, begun + answer.content, finished)


def visible_text(answer: Answer) -> str | None:
    """What the judge may read: the text after the think; None when it is empty or the think never closed."""
    text = answer.content.strip()
    return text if answer.closed and text else None


def accuracy_reward(task: Task) -> Reward:
    """The task's own score (0 to 1) of the visible answer; None where its judge went over its bounds."""

    def reward(problem: Problem, answer: Response) -> float | None:
        verdict = task_verdict(task, problem, visible_text(answer))
        return None if verdict is None else float(verdict)

    return reward


def format_reward(problem: Problem, answer: Response) -> float:
    """1.0 for exactly one closed think (it may be empty) followed by a non-empty, finished answer; else 0.0."""
    return 1.0 if answer.well_formed else 0.0


class TaskJudge:
    """The own judges of ``tasks``, as a ``BatchReward``."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._rewards = {task.name: accuracy_reward(task) for task in tasks}

    def pay(self, pairs: Sequence[tuple[Problem, Response]]) -> list[Verdict]:
        """See ``BatchReward``; whoever is no judge's abstains."""
        verdicts = []
        for problem, answer in pairs:
            judge = next(iter(self._rewards.values())) if len(self._rewards) == 1 else self._rewards.get(problem.task)
            verdicts.append(verdict_of(None if judge is None else judge(problem, answer)))
        return verdicts


class Verifier:
    """A user's reward that returns a finite float, or None where it abstains or fails.

    A verifier meets answers that its author never thought of. So one answer never ends a run: where the function
    raises, takes too long or returns what is no number, the answer abstains (it gets no advantage and no part in its
    group's mean, whatever the scale of the rewards), and the fault is counted and logged. A step in which nothing but
    faults came back ends the run, because then the verifier is broken and not the answer.

    Numbers of any kind are taken (Python's, NumPy's and torch's scalars, booleans).

    Args:
        function: takes (problem, answer).
        name: what the log calls it.
        timeout_seconds: for one answer. The limit is a timer of the process (SIGALRM), so it holds in the main thread
            only, and not against code that neither returns to Python nor checks for signals.

    Attributes:
        num_calls, faults: how often it was called, and failed, since ``pop_faults``.
        last_fault: what happened the last time.
    """

    def __init__(
        self,
        function: Callable[[Problem, Response], object],
        name: str = "",
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    ) -> None:
        self.function, self.name = function, name or getattr(function, "__name__", "reward")
        self.timeout_seconds = timeout_seconds
        self.num_calls, self.faults, self.last_fault = 0, 0, ""

    def __call__(self, problem: Problem, answer: Response) -> float | None:
        """What the user's code pays ``answer``."""
        return self.verdict(problem, answer).reward

    def pay(self, pairs: Sequence[tuple[Problem, Response]]) -> list[Verdict]:
        """See ``BatchReward``; one answer after the other."""
        return [self.verdict(problem, answer) for problem, answer in pairs]

    def verdict(self, problem: Problem, answer: Response) -> Verdict:
        """What the user's code says of ``answer``."""
        self.num_calls += 1
        outcome: Outcome = "raised"
        try:
            with time_limit(self.timeout_seconds):
                value = self.function(problem, answer)
            return Verdict(None, "abstained") if value is None else Verdict(finite_float(value))
        except TimeUpError:
            outcome, fault = "timeout", f"took longer than {self.timeout_seconds:g} s"
        except (Exception, SystemExit) as error:
            fault = f"raised {type(error).__name__}: {error}"
        if not self.faults:
            log.warning("reward %s %s (question %r)", self.name, fault, problem.question)
        self.faults, self.last_fault = self.faults + 1, fault
        return Verdict(None, outcome, fault)

    def pop_faults(self) -> int:
        """The faults since the last call.

        Raises:
            TrainingError: every answer was a fault.
        """
        num_calls, faults = self.num_calls, self.faults
        self.num_calls = self.faults = 0
        if num_calls and faults == num_calls:
            raise all_failed(self.name, num_calls, self.last_fault)
        return faults


def all_failed(name: str, count: int, last_fault: str) -> TrainingError:
    """What is said where the reward ``name`` failed on each of ``count`` answers."""
    kind = "environment" if name.startswith(ENVIRONMENT) else "reward"
    what = f"the {kind} failed on each of {count} answers; the last time it {last_fault}"
    return TrainingError(what, where=place_of(name), todo=f"mend the {kind}")


def place_of(name: str) -> str:
    """What an error says about the place of the judge ``name``: a reward, or ``environment NAME``."""
    return name if name.startswith(ENVIRONMENT) else f"reward {name}"


def load_reward(name: str, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> Verifier:
    """The user's reward ``module:function`` or ``path/file.py:function``, checked and guarded.

    Raises:
        ConfigError: the name has no colon, the module or file cannot be loaded, there is no such
            function, or it does not take exactly (problem, answer).
    """
    source, attribute = split_reward_name(name)
    where = f"reward {name}"
    function = getattr(import_source(source, where), attribute, None)
    if function is None:
        raise ConfigError(f"{source!r} has no function {attribute!r}", where=where, todo=_EXPECTED_SIGNATURE)
    if not callable(function):
        raise ConfigError(f"{attribute!r} is not a function", where=where, todo=_EXPECTED_SIGNATURE)
    try:
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError):
        raise ConfigError(f"{attribute!r} does not take two arguments", where=where, todo=_EXPECTED_SIGNATURE) from None
    return Verifier(function, name, timeout_seconds)
