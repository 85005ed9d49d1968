"""The forms in which people have their rewards: a function's own, called with one problem and one answer.

What a function takes decides, by the names of its parameters:

=============================================  ====================================================================
``f(problem, answer)``, two whatever names      Sprat's own: a ``Problem`` and a ``Response``; returns a number or None
``f(completions, **columns)``, ``prompts``      TRL's ``GRPOTrainer``: lists, columns of the data by name; a list
``f(data_source, solution_str, ground_truth)``  verl's ``compute_score``; a number, or a dict with ``score``
``f(queries, prompts, labels)``                 OpenRLHF's ``reward_func``: lists; a list or tensor, or a dict with
                                                ``rewards``
=============================================  ====================================================================

A function that is asynchronous is waited for. Each is called with one answer at a time, so that it can be timed, killed
and counted by itself: a list has one entry, and a function that compares the answers of a batch with each other cannot.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from sprat.errors import ConfigError
from sprat.post.rl.rewards import Response
from sprat.tasks import Problem

Function = Callable[[Problem, Response], object]
EXPECTED = "write it as: def function(problem, answer) -> float (docs/rl.md has the forms of TRL, verl and OpenRLHF)"


def adapt(function: Callable[..., object], where: str) -> Function:
    """``function``, of whichever form, as one of a problem and an answer.

    Raises:
        ConfigError: it is of none of the forms.
    """
    if not callable(function):
        raise ConfigError("not a function", where=where, todo=EXPECTED)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise ConfigError("a function whose parameters cannot be read", where=where, todo=EXPECTED) from None
    if "completion_ids" in parameters and parameters["completion_ids"].default is inspect.Parameter.empty:
        todo = "let it read completions; overlong_buffer and max_tokens are about lengths in tokens"
        raise ConfigError("it takes completion_ids, and rewards here are given texts", where=where, todo=todo)
    function, names = _waited_for(function), set(parameters)
    takes_all = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    for marker, form in (("completions", _trl), ("solution_str", _verl), ("queries", _openrlhf)):
        if marker in names:
            return lambda problem, answer: form(function, names, takes_all, problem, answer)
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        what = f"it takes ({', '.join(parameters)}), which is no form of a reward"
        raise ConfigError(what, where=where, todo=EXPECTED) from None
    return function


def _waited_for(function: Callable[..., object]) -> Callable[..., object]:
    """``function``; what it leaves to be awaited is."""

    @functools.wraps(function)
    def call(*given: object, **named: object) -> object:
        value = function(*given, **named)
        return asyncio.run(value) if inspect.iscoroutine(value) else value

    return call


def columns_of(problem: Problem) -> Mapping[str, Any]:
    """The columns of the problem's row, as its file has them; of a problem that is drawn, its question and answer."""
    row = problem.meta.get("row")
    return row if isinstance(row, Mapping) else {"question": problem.question, "answer": problem.answer}


def answer_data(problem: Problem) -> Any:
    """What the problem's row says is right, as it stands there: any JSON value."""
    return problem.meta.get("answer_data", problem.answer)


def _trl(
    function: Callable[..., object], names: set[str], takes_all: bool, problem: Problem, answer: Response
) -> object:
    """TRL: a batch of one; a conversational prompt, as it was asked, has conversational completions."""
    columns = columns_of(problem)
    prompt = columns.get("prompt", columns.get("messages", problem.question))
    completion: Any = answer.text
    if isinstance(prompt, list):
        prompt = problem.meta.get("messages") or [{"role": "user", "content": problem.question}]
        completion = [{"role": "assistant", "content": answer.text}]
    given = {name: [value] for name, value in columns.items() if name not in ("prompt", "completions")}
    given = {"answer": [answer_data(problem)], **given}
    given |= {"prompts": [prompt], "completions": [completion]}
    return _only(function(**{name: value for name, value in given.items() if takes_all or name in names}), "")


def _verl(
    function: Callable[..., object], names: set[str], takes_all: bool, problem: Problem, answer: Response
) -> object:
    """verl: the whole text of the answer, and what is right."""
    columns = columns_of(problem)
    given = {
        "data_source": columns.get("data_source", problem.task),
        "solution_str": answer.text,
        "ground_truth": answer_data(problem),
        "extra_info": columns.get("extra_info") or dict(columns),
    }
    return _only(function(**{name: value for name, value in given.items() if takes_all or name in names}), "score")


def _openrlhf(
    function: Callable[..., object], names: set[str], takes_all: bool, problem: Problem, answer: Response
) -> object:
    """OpenRLHF: a batch of one; a query is the prompt and the answer behind it."""
    given = {"queries": [problem.question + answer.text], "prompts": [problem.question]}
    given |= {"labels": [answer_data(problem)]}
    return _only(function(**{name: value for name, value in given.items() if takes_all or name in names}), "rewards")


def _only(value: Any, key: str) -> object:
    """The one reward in what a function returned: a number, a list or tensor of one, a dict that has it under ``key``.

    Raises:
        ValueError: there is none, or more than one.
    """
    if isinstance(value, Mapping):
        if key not in value:
            raise ValueError(f"a dict without {key or 'a meaning'!r} was returned")
        value = value[key]
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise ValueError(f"{len(value)} rewards were returned for one answer")
        value = value[0]
    result: object = value
    return result
