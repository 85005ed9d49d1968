"""The forms in which people have their environments, as one: begin an episode, take a turn, say what it was worth.

==========================================  =======================================================================
``step(action)`` beside ``reset``            Gymnasium's and OpenEnv's: returns ``(observation, reward, done)``, with
                                             ``info`` behind it, ``(observation, reward, terminated, truncated,
                                             info)``, or an object with those three. It pays.
public methods beside ``reset``              TRL's ``environment_factory``: each method is a tool; an answer that calls
                                             none ends the episode. ``get_reward()`` pays, if there is one.
==========================================  =======================================================================

``reset`` is given what its parameters ask for by name: ``problem``, ``seed``, ``options`` (Gymnasium's, the problem's
columns) or columns of the problem's row (TRL's). It returns None, a text or messages, perhaps with an ``info``.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sprat.errors import ConfigError, SpratError
from sprat.tasks.base import Problem
from sprat.tasks.environment import Action
from sprat.tasks.tool_schema import function_schema
from sprat.tasks.user_code import finite_float

EXPECTED = (
    "write it as: class NAME with reset(self, problem, seed) and step(self, action) -> (observation, reward, done)"
)
MAX_CHARS = 100_000  # of one text that a model is shown
_OWN = ("reset", "step", "close", "get_reward", "render", "state")  # public methods that are no tools
Row = dict[str, Any]


class Episode:
    """An object of the user's, from ``reset`` to the end; what it raises is the user's.

    Args:
        make: makes the object, without arguments.
        where: what a message says about the place.

    Raises:
        ConfigError: it is of none of the forms.
    """

    def __init__(self, make: Callable[[], Any], where: str) -> None:
        self._where = where
        try:
            self._inner = make()
        except SpratError:
            raise
        except (Exception, SystemExit) as error:
            what = f"making it raised {type(error).__name__}: {error}"
            raise ConfigError(what, where=where, todo="let it be made without arguments") from error
        if not callable(getattr(self._inner, "reset", None)):
            raise ConfigError("it has no method reset", where=where, todo=EXPECTED)
        self.has_step = callable(getattr(self._inner, "step", None))
        self.pays = self.has_step or callable(getattr(self._inner, "get_reward", None))
        self._functions, self.schemas = self._find_tools()
        if not self.has_step and not self._functions:
            raise ConfigError("it has neither step nor a method that is a tool", where=where, todo=EXPECTED)
        self.takes_problem = "problem" in _parameters(self._inner.reset)

    def reset(self, problem: Problem | None, seed: int) -> Row:
        """Begin: ``content`` (text or None) or ``messages``, and what ``info`` says of ``answer`` and ``canonical``."""
        columns = {} if problem is None else dict(problem.meta.get("row") or {"question": problem.question})
        if problem is not None:
            columns.setdefault("answer", problem.meta.get("answer_data", problem.answer))
        given = {**columns, "problem": problem, "seed": seed, "options": columns}
        parameters = _parameters(self._inner.reset)
        if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
            named = {*columns, *(parameters.keys() & given.keys())}
        else:
            named = parameters.keys() & given.keys()
        value: Any = self._inner.reset(**{name: given[name] for name in named})
        info: Mapping[str, Any] = {}
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping):
            value, info = value
        if not isinstance(value, str | list | tuple) and hasattr(value, "observation"):
            value = value.observation
        reply: Row = {"content": None, "messages": None, "tools": self.schemas}
        reply |= {name: str(info[name]) for name in ("answer", "canonical") if info.get(name) is not None}
        if (messages := _as_messages(value)) is not None:
            return reply | {"messages": messages}
        return reply | {"content": None if value is None else as_text(value)}

    def step(self, action: Action) -> Row:
        """Take a turn: ``messages`` to the model, ``reward`` (a number or None), ``done``, ``errors`` of tools.

        Raises:
            ValueError: what came back is none of the forms, or the reward is no number.
        """
        if self.has_step:
            value, reward, done = _read_step(self._inner.step(action))
            reward = None if reward is None else finite_float(reward)
            return {"messages": _answer(value, action), "reward": reward, "done": bool(done), "errors": 0}
        if not action.tool_calls:
            return {"messages": [], "reward": self.reward(), "done": True, "errors": 0}
        messages, errors = [], 0
        for call in action.tool_calls:
            text, is_error = self._call(call.name, call.arguments)
            messages.append({"role": "tool", "content": text, "tool_call_id": call.id})
            errors += is_error
        return {"messages": messages, "reward": None, "done": False, "errors": errors}

    def reward(self) -> float | None:
        """What ``get_reward`` says, where there is one."""
        if self.has_step or not self.pays:
            return None
        value = self._inner.get_reward()
        return None if value is None else finite_float(value)

    def close(self) -> None:
        """The object's own ``close``, where it has one."""
        if callable(close := getattr(self._inner, "close", None)):
            close()

    def _call(self, name: str, arguments: Any) -> tuple[str, bool]:
        """The result of a tool, or what went wrong, which the model is told as well."""
        function = self._functions.get(name)
        if function is None:
            return f"error: there is no tool {name!r}", True
        if not isinstance(arguments, Mapping):
            return "error: the arguments are no JSON object", True
        try:
            inspect.signature(function).bind(**arguments)
        except TypeError as error:
            return f"error: {name}: {error}", True
        try:
            return as_text(function(**arguments)), False
        except Exception as error:
            return f"error: {type(error).__name__}: {error}"[:MAX_CHARS], True

    def _find_tools(self) -> tuple[dict[str, Callable[..., Any]], list[Row]]:
        """The functions that may be called by name, and the schemas of all tools."""
        listed = getattr(self._inner, "tools", None)
        if listed is not None and not isinstance(listed, Sequence) and callable(listed):
            listed = listed()
        if listed is None and not self.has_step:
            names = [name for name, _ in inspect.getmembers(type(self._inner), inspect.isfunction)]
            listed = [getattr(self._inner, name) for name in names if name not in _OWN and not name.startswith("_")]
        functions, schemas = dict[str, Callable[..., Any]](), list[Row]()
        for tool in listed or ():
            if isinstance(tool, Mapping):
                schemas.append(dict(tool))
            elif callable(tool):
                schemas.append(function_schema(tool))
                functions[schemas[-1]["function"]["name"]] = tool
            else:
                raise ConfigError(f"a tool is {tool!r:.60}", where=self._where, todo="list functions or JSON schemas")
        return functions, schemas


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _read_step(value: Any) -> tuple[Any, Any, Any]:
    """Observation, reward and done of what ``step`` returned. Raises: ValueError: it is of no form."""
    if isinstance(value, tuple) and len(value) in (3, 4):
        return value[0], value[1], value[2]
    if isinstance(value, tuple) and len(value) == 5:
        return value[0], value[1], value[2] or value[3]
    if isinstance(value, Mapping) and {"reward", "done"} <= value.keys():
        return value.get("observation"), value["reward"], value["done"]
    if hasattr(value, "reward") and hasattr(value, "done"):
        return getattr(value, "observation", value), value.reward, value.done
    raise ValueError(f"step returned {value!r:.80}, which is not (observation, reward, done)")


def _answer(value: Any, action: Action) -> list[Row]:
    """An observation as messages: results of the calls, or else a user's turn."""
    if (messages := _as_messages(value)) is not None:
        return messages
    if not action.tool_calls:
        return [{"role": "user", "content": "" if value is None else as_text(value)}]
    values = value if isinstance(value, list | tuple) and len(value) == len(action.tool_calls) else [value]
    return [
        {"role": "tool", "content": "" if each is None else as_text(each), "tool_call_id": call.id}
        for each, call in zip(values, action.tool_calls, strict=False)
    ]


def _as_messages(value: Any) -> list[Row] | None:
    """A list of messages; None where it is none."""
    rows = value if isinstance(value, list | tuple) else ()
    if not rows or not all(isinstance(row, Mapping) and {"role", "content"} <= row.keys() for row in rows):
        return None
    keys = ("role", "content", "tool_call_id")
    return [{key: str(row[key])[:MAX_CHARS] for key in keys if row.get(key) is not None} for row in rows]


def as_text(value: Any) -> str:
    """What a model is shown of ``value``: a text itself, anything else as JSON."""
    if isinstance(value, str):
        return value[:MAX_CHARS]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    if hasattr(value, "tolist"):
        value = value.tolist()
    try:
        return json.dumps(value, ensure_ascii=False, default=str)[:MAX_CHARS]
    except (TypeError, ValueError, RecursionError):
        return str(value)[:MAX_CHARS]
