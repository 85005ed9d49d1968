"""Rules that pay a sampled answer: the task's own judge, the format, and the user's plug-in.

A reward is a function of the problem and of what the model wrote, never another model: it cannot be
flattered (DeepSeek-R1, arXiv 2501.12948, section 2.2.2). A plug-in is named as ``package.module:function``
or ``path/to/file.py:function``; it is the user's own code and runs with the user's rights (see ``Verifier``).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import math
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType

from sprat.errors import ConfigError, TrainingError
from sprat.post.reward_sources import parts
from sprat.tasks import Problem, Task
from sprat.tokens import Answer, Tokenizer, split
from sprat.tokens.chat import settled

log = logging.getLogger(__name__)
SECONDS = 10.0  # for one answer, where nobody says otherwise
_AGAIN = 1.0  # seconds at least from one ring to the next
_SIGNATURE = "write it as: def function(problem, answer) -> float"


@dataclass(frozen=True)
class Response(Answer):
    """A sampled answer as rewards see it: ``Answer``'s reasoning, content and closed, and

    ``well_formed``: exactly one think, opened first and closed, then a non-empty answer and the end token.
    """

    well_formed: bool = False


Reward = Callable[[Problem, Response], float | None]  # None abstains: the answer neither teaches nor counts


def read_response(tokenizer: Tokenizer, ids: Sequence[int], *, thinking: bool | None, finished: bool) -> Response:
    """Read generated ``ids``, which follow a prompt rendered with ``thinking``.

    Control tokens that are out of place do not show in decoded text, so the form is judged on ids.

    Args:
        finished: the model ended by itself (not cut off at the limit).
    """
    thinking = settled(tokenizer, thinking)
    answer = split(tokenizer, ids, thinking=thinking)
    opening, closing = tokenizer.ids.think_open, tokenizer.ids.think_close
    if opening < 0 or closing < 0:  # a tokenizer whose tags are ordinary text
        text = tokenizer.decode(ids, skip_specials=True).strip()
        want = list(tokenizer.format.think_tokens)
        tags = re.findall("|".join(map(re.escape, want)), text)
        first = text.startswith(want[0])
    else:
        want = [str(opening), str(closing)]
        tags = [str(index) for index in ids if index in (opening, closing)]
        first = list(ids[:1]) == [opening]
    given = 0 if thinking is None else 1 if thinking else 2  # tags that the prompt ends with
    placed = tags == want[given:] and (first or given > 0)
    formed = placed and finished and bool(answer.content.strip())
    return Response(answer.reasoning, answer.content, answer.closed, formed)


def visible(answer: Answer) -> str | None:
    """What the judge may read: the text after the think; None when it is empty or the think never closed."""
    text = answer.content.strip()
    return text if answer.closed and text else None


def accuracy(task: Task) -> Callable[[Problem, Response], float]:
    """The task's own score (0 to 1) of the visible answer."""

    def reward(problem: Problem, answer: Response) -> float:
        return float(task.score(problem, visible(answer)))

    return reward


def format_reward(problem: Problem, answer: Response) -> float:
    """1.0 for exactly one closed think (it may be empty) followed by a non-empty, finished answer; else 0.0."""
    return 1.0 if answer.well_formed else 0.0


class Verifier:
    """A user's reward that returns a finite float, or None where it abstains or fails.

    A verifier meets answers that its author never thought of. So one answer never ends a run: where the function
    raises, takes too long or returns what is no number, the answer abstains (it gets no advantage and no part in its
    group's mean, whatever the scale of the rewards), and the fault is counted and told. A step in which nothing but
    faults came back ends the run, because then the verifier is broken and not the answer.

    Numbers of any kind are taken (Python's, NumPy's and torch's scalars, booleans).

    Args:
        function: takes (problem, answer).
        name: by which it is told of.
        seconds: for one answer. The limit is a timer of the process (SIGALRM), so it holds in the main thread only,
            and not against code that neither returns to Python nor checks for signals.

    Attributes:
        asked, faults: how often it was asked, and failed, since ``take_faults``.
        last_fault: what happened the last time.
    """

    def __init__(
        self, function: Callable[[Problem, Response], object], name: str = "", seconds: float = SECONDS
    ) -> None:
        self.function, self.name, self.seconds = function, name or getattr(function, "__name__", "reward"), seconds
        self.asked, self.faults, self.last_fault = 0, 0, ""

    def __call__(self, problem: Problem, answer: Response) -> float | None:
        """What the user's code pays ``answer``."""
        self.asked += 1
        try:
            with _limit(self.seconds):
                value = self.function(problem, answer)
            return None if value is None else _number(value)
        except _TimeUpError:
            fault = f"took longer than {self.seconds:g} s"
        except (Exception, SystemExit) as error:
            fault = f"raised {type(error).__name__}: {error}"
        if not self.faults:
            log.warning("reward %s %s (question %r)", self.name, fault, problem.question)
        self.faults, self.last_fault = self.faults + 1, fault
        return None

    def take_faults(self) -> int:
        """The faults since the last call.

        Raises:
            TrainingError: every answer was a fault.
        """
        asked, faults = self.asked, self.faults
        self.asked = self.faults = 0
        if asked and faults == asked:
            what = f"the reward failed on each of {asked} answers; the last time it {self.last_fault}"
            raise TrainingError(what, where=f"reward {self.name}", todo="mend the function")
        return faults


def load_reward(name: str, seconds: float = SECONDS) -> Verifier:
    """The user's reward ``module:function`` or ``path/file.py:function``, checked and guarded.

    Raises:
        ConfigError: the name has no colon, the module or file cannot be loaded, there is no such
            function, or it does not take exactly (problem, answer).
    """
    source, attribute = parts(name)
    where = f"reward {name}"
    function = getattr(_module(source, name), attribute, None)
    if function is None:
        raise ConfigError(f"{source!r} has no function {attribute!r}", where=where, todo=_SIGNATURE)
    if not callable(function):
        raise ConfigError(f"{attribute!r} is not a function", where=where, todo=_SIGNATURE)
    try:
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError):
        raise ConfigError(f"{attribute!r} does not take two arguments", where=where, todo=_SIGNATURE) from None
    return Verifier(function, name, seconds)


def _module(source: str, name: str) -> ModuleType:
    """Import a dotted module or a Python file."""
    where = f"reward {name}"
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        if not Path(source).is_file():
            raise ConfigError(f"no such file {source!r}", where=where, todo="give the path of a Python file")
        spec = importlib.util.spec_from_file_location(f"sprat_reward_{Path(source).stem}", source)
        if spec is None or spec.loader is None:
            raise ConfigError(f"cannot load {source!r}", where=where, todo="give the path of a Python file")
        folder = str(Path(source).resolve().parent)
        if folder not in sys.path:  # as `python file.py` does; `sources` lists what is imported from there
            sys.path.insert(0, folder)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses, pickle and typing look a module up by its name
        spec.loader.exec_module(module)
        return module
    except ModuleNotFoundError as error:
        todo = "install it or " + ("put it beside the file" if source.endswith(".py") else "give a Python file")
        raise ConfigError(f"no module {error.name!r}", where=where, todo=todo) from None
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        what = f"importing {source!r} raised {type(error).__name__}: {error}"
        raise ConfigError(what, where=where, todo="make the file importable on its own") from error


def _number(value: object) -> float:
    """``value`` as a finite float.

    Raises:
        ValueError: it is none.
    """
    try:
        if isinstance(value, (str, bytes, bytearray)):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{value!r} was returned, which is no number") from None
    if not math.isfinite(number):
        raise ValueError(f"{value!r} was returned, which is not finite")
    return number


class _TimeUpError(BaseException):
    """Not an Exception, so that a verifier's own ``except Exception`` does not swallow it."""


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """Raise ``_TimeUpError`` in the block after ``seconds``, and again and again should it be swallowed.

    A ring that comes just when the block ends must not leave the timer behind: it would end the process later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    over: list[bool] = []

    def ring(number: int, frame: FrameType | None) -> None:
        if not over:
            raise _TimeUpError

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, max(seconds, _AGAIN))
        try:
            yield
        finally:
            over.append(True)  # a ring at this very moment still comes to the outer end
    finally:
        over.append(True)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
