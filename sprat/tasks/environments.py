"""Environments that are built in, each an example of a form: a question of one turn, a tool, a tool in a sandbox.

| name | what it is |
|---|---|
| ``reasoning-gym/NAME`` | questions of reasoning-gym, judged in one step; it draws its own problems |
| ``calculator`` | a tool for questions of yours: exact arithmetic |
| ``python`` | a tool for questions of yours: runs a program in the sandbox of the judge ``code`` |
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sprat.errors import ConfigError
from sprat.tasks.environment import Action
from sprat.tasks.environment_forms import EXPECTED
from sprat.tasks.gym import GymTask
from sprat.tasks.sandbox import require_sandbox, run_program
from sprat.tasks.user_code import import_source

MAX_DIGITS = 1000  # of a number that the calculator makes
MAX_OUTPUT_CHARS = 4000  # of a program, that the model is shown
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


class GymEnvironment:
    """A family of reasoning-gym as an environment of one step.

    Args:
        family: reasoning-gym's name of it, e.g. ``chain_sum``.
    """

    def __init__(self, family: str) -> None:
        self._task = GymTask(family, family, {})

    def reset(self, seed: int) -> tuple[str, dict[str, str]]:
        """Question number ``seed``."""
        self._problem = self._task.generate(seed)
        info = {"answer": self._problem.answer, "canonical": self._problem.canonical}
        return self._problem.question, info

    def step(self, action: Action) -> tuple[str, float, bool]:
        """The judgement of the family, and the end."""
        return "", self._task.score(self._problem, action.strip() or None), True


class Calculator:
    """One tool, ``calculator``; what the last answer is worth is for the questions' judge to say."""

    def reset(self) -> None:
        """There is nothing to begin."""

    def calculator(self, expression: str) -> str:
        """Compute an arithmetic expression.

        Args:
            expression: numbers, + - * / // % ** and parentheses, for example 12*(3+4).
        """
        return calculate(expression)


class PythonTool:
    """One tool, ``python``, in the sandbox of ``sandbox``: no network, no files, bounded time and memory.

    Raises:
        MachineError: this machine cannot hold a sandbox; says what is missing.
    """

    def __init__(self) -> None:
        require_sandbox("environment 'python'")

    def reset(self) -> None:
        """Each program begins anew."""

    def python(self, code: str) -> str:
        """Run a Python program and see what it prints. Nothing is kept from one program to the next.

        Args:
            code: the program; print what you want to see.
        """
        outcome = run_program(code)
        output = outcome.output.decode("utf-8", "replace")
        if len(output) > MAX_OUTPUT_CHARS:
            output = f"{output[:MAX_OUTPUT_CHARS]}\n… ({len(output) - MAX_OUTPUT_CHARS} more characters)"
        if outcome.ended == "wall":
            raise TimeoutError("the machine was too busy to run it")
        ends = {"idle": "it waited for too long", "output": "it printed too much"}
        end = ends.get(outcome.ended, f"it left with exit code {outcome.status}" if outcome.status else "")
        return f"{output}\n({end})".lstrip() if end else output


def calculate(expression: str) -> str:
    """The value of an arithmetic expression, exact for whole numbers.

    Raises:
        ValueError, ZeroDivisionError: it is none, or too large.

    >>> calculate("12 * (3 + 4)"), calculate("7/2"), calculate("-2**10"), calculate("8/2")
    ('84', '3.5', '-1024', '4')
    """
    if len(expression) > MAX_DIGITS:
        raise ValueError("the expression is too long")
    try:
        value = _evaluate(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError, OverflowError):
        raise ValueError(f"{expression.strip()!r:.60} is no arithmetic expression") from None
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return str(value)


def _evaluate(node: ast.AST) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Pow) and (
            abs(right) > MAX_DIGITS or abs(left) > 10**MAX_DIGITS or right != int(right)
        ):
            raise ValueError("the power is too large, or no whole number")
        if isinstance(node.op, ast.Pow) and isinstance(left, int) and left.bit_length() * right > 4 * MAX_DIGITS:
            raise ValueError("the power is too large")
        return _bounded(_OPERATORS[type(node.op)](left, right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _bounded(_OPERATORS[type(node.op)](_evaluate(node.operand)))
    raise ValueError("only numbers, + - * / // % ** and parentheses can be computed")


def _bounded(value: Any) -> Any:
    if isinstance(value, complex) or (isinstance(value, int) and value.bit_length() > 4 * MAX_DIGITS):
        raise ValueError("the number is too large")
    return value


BUILT_IN: dict[str, Callable[[], Any]] = {"calculator": Calculator, "python": PythonTool}


def is_built_in(name: str) -> bool:
    """Whether ``name`` is an environment of this file, and no file of the user's."""
    return name in BUILT_IN or name.startswith("reasoning-gym/")


def check_name(name: str) -> None:
    """See that ``name`` is that of an environment, whose file is there.

    Raises:
        ConfigError: it is not.
    """
    source, colon, attribute = name.rpartition(":")
    if is_built_in(name):
        return
    if not colon or not source or not attribute.isidentifier():
        todo = f"give file.py:Class, or one of {', '.join([*BUILT_IN, 'reasoning-gym/NAME'])}"
        raise ConfigError(f"no environment {name!r}", where="environment", todo=todo)
    if source.endswith(".py") and not Path(source).is_file():
        what, todo = f"no such file {source!r}", "give the path of a Python file"
        raise ConfigError(what, where=f"environment {name}", todo=todo)


def load_environment(name: str) -> Callable[[], Any]:
    """What makes an episode's object: of a built-in environment, ``file.py:Class`` or ``package.module:Class``.

    Raises:
        ConfigError: there is no such environment.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name.startswith("reasoning-gym/"):
        return partial(GymEnvironment, name.removeprefix("reasoning-gym/"))
    check_name(name)
    source, _, attribute = name.rpartition(":")
    where = f"environment {name}"
    found = getattr(import_source(source, where), attribute, None)
    if not callable(found):
        what = f"{source!r} has no {attribute!r}" if found is None else f"{attribute!r} is no class"
        raise ConfigError(what, where=where, todo=EXPECTED)
    make: Callable[[], Any] = found
    return make
