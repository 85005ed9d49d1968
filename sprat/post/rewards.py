"""Rules that pay a sampled answer: the task's own judge, the format, and the user's plug-in.

A reward is a function of the problem and of what the model wrote, never another model: it cannot be
flattered (DeepSeek-R1, arXiv 2501.12948, section 2.2.2). A plug-in is named as ``package.module:function``
or ``path/to/file.py:function``; it is the user's own code and runs with the user's rights.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from sprat.errors import ConfigError, TrainingError
from sprat.tasks import Problem, Task
from sprat.tokens import Answer, Tokenizer, split
from sprat.tokens.chat import settled

_SIGNATURE = "write it as: def function(problem, answer) -> float"


@dataclass(frozen=True)
class Response(Answer):
    """A sampled answer as rewards see it: ``Answer``'s reasoning, content and closed, and

    ``well_formed``: exactly one think, opened first and closed, then a non-empty answer and the end token.
    """

    well_formed: bool = False


Reward = Callable[[Problem, Response], float]


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


def accuracy(task: Task) -> Reward:
    """The task's own score (0 to 1) of the visible answer."""

    def reward(problem: Problem, answer: Response) -> float:
        return float(task.score(problem, visible(answer)))

    return reward


def format_reward(problem: Problem, answer: Response) -> float:
    """1.0 for exactly one closed think (it may be empty) followed by a non-empty, finished answer; else 0.0."""
    return 1.0 if answer.well_formed else 0.0


def load_reward(name: str) -> Reward:
    """The user's reward ``module:function`` or ``path/file.py:function``, checked and guarded.

    The returned function raises TrainingError, naming the plug-in, when the user's code raises or
    returns anything but a finite number.

    Raises:
        ConfigError: the name has no colon, the module or file cannot be loaded, there is no such
            function, or it does not take exactly (problem, answer).
    """
    source, colon, attribute = name.rpartition(":")
    if not colon or not source or not attribute:
        todo = "write module:function or file.py:function"
        raise ConfigError(f"cannot read the reward {name!r}", where="reward", todo=todo)
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
    return _guarded(function, name)


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
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ModuleNotFoundError as error:
        todo = "install it or give the path of a Python file"
        raise ConfigError(f"no module {error.name!r}", where=where, todo=todo) from None
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        what = f"importing {source!r} raised {type(error).__name__}: {error}"
        raise ConfigError(what, where=where, todo="make the file importable on its own") from error


def _guarded(function: Callable[..., object], name: str) -> Reward:
    """``function`` with its faults turned into one sentence."""

    def reward(problem: Problem, answer: Response) -> float:
        try:
            value = function(problem, answer)
        except Exception as error:
            what = f"the reward raised {type(error).__name__}: {error}"
            where = f"reward {name}, question {problem.question!r}"
            raise TrainingError(what, where=where, todo="mend the function") from error
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            what = f"the reward returned {value!r}"
            raise TrainingError(what, where=f"reward {name}", todo="return a finite number")
        return float(value)

    return reward
