"""What every verb shares: ``--json``, ``--debug``, one sentence for a fault, and the exit code.

A verb is a plain typed function that returns a ``Result``. ``verb`` adds the two options and turns the
result into output: with ``--json`` exactly one JSON object on stdout, else the text meant for a person.
Progress and faults always go to stderr, so that stdout can be piped.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from sprat.errors import MachineError, SpratError

BROKEN_PIPE = 141  # 128 + SIGPIPE, as shells have it
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
INTERNAL_ERROR = 70  # EX_SOFTWARE of sysexits.h: a bug, not bad input

Recipe = Annotated[str, typer.Option("--recipe", metavar="FILE", help="A TOML file, or the name of a built-in recipe.")]
_SET_HELP = "Override one key, as a.b=c; may be repeated."
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help=_SET_HELP)]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Same seed, same threads: same bytes.")]
PipelineFolder = Annotated[Path, typer.Option("--out", metavar="DIR", help="The road: a folder of runs.")]
_MODEL_HELP = "A run folder, a Hugging Face folder, a GGUF file, or a name to fetch: smol."
ModelFolder = Annotated[Path, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]


@dataclass(frozen=True)
class Result:
    """What a verb returns.

    Attributes:
        data: JSON-able facts, printed with ``--json``.
        human: a string or a rich renderable, printed without it; empty prints nothing.
        exit_code: 0, or the documented code of the fault that ``data`` tells of.
        after_output: what goes on once the result is shown, such as serving until Ctrl-C.
    """

    data: Mapping[str, Any]
    human: Any = ""
    exit_code: int = 0
    after_output: Callable[[], None] | None = None


def print_err(text: str) -> None:
    """Print a line on stderr, whatever the output mode."""
    print(text, file=sys.stderr, flush=True)


_as_json: ContextVar[bool] = ContextVar("as_json", default=False)


def output_stream() -> TextIO:
    """Where a verb that prints while it works puts its output: stdout, or stderr with ``--json``."""
    return sys.stderr if _as_json.get() else sys.stdout


_goes_on: ContextVar[bool] = ContextVar("goes_on", default=True)


def begins_anew() -> None:
    """Note that the verb which runs keeps nothing of what it has done so far when it is stopped."""
    _goes_on.set(False)


def verb(function: Callable[..., Result], *, goes_on: bool = True) -> Callable[..., None]:
    """Wrap ``function`` for Typer: adds ``--json`` and ``--debug``, prints its result, maps faults to exit codes.

    Args:
        goes_on: whether it goes on where it was when it is stopped and started again.

    Raises:
        typer.Exit: with the code of ``docs/exit-codes.md`` where it is not 0.
    """

    @functools.wraps(function)
    def command(**options: Any) -> None:
        as_json, debug = options.pop("as_json"), options.pop("debug")
        _as_json.set(as_json)
        _goes_on.set(goes_on)
        try:
            result = function(**options)
            print_result(result, as_json)
            as_json = False  # the one object is out
            if result.after_output is not None:
                result.after_output()
        except (typer.Exit, typer.Abort):
            raise
        except BaseException as error:
            if debug:
                raise
            message, code = describe_error(error)
            print_err(f"sprat: {message}")
            fault = {"type": type(error).__name__, "message": message, "exit_code": code}
            flush_stdout(json.dumps({"error": fault}) + "\n" if as_json else "")
            raise typer.Exit(code) from None
        if result.exit_code:
            raise typer.Exit(result.exit_code)

    signature = inspect.signature(function, eval_str=True)
    flags = {
        "as_json": typer.Option("--json", help="Print one JSON object on stdout."),
        "debug": typer.Option("--debug", help="Show the traceback of a fault."),
    }
    extra_parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])
        for name, option in flags.items()
    ]
    parameters = [*signature.parameters.values(), *extra_parameters]
    command.__signature__ = signature.replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def print_result(result: Result, as_json: bool) -> None:
    """Print ``result`` on stdout: one JSON object, or the text for a person."""
    if as_json:
        print(json.dumps(result.data, ensure_ascii=False, default=str), flush=True)
    elif isinstance(result.human, str):
        if result.human:
            print(result.human, flush=True)
    else:
        from rich.console import Console

        Console().print(result.human)


def flush_stdout(text: str = "") -> None:
    """Put ``text`` on stdout; one that takes nothing more (a full disk, a reader who left) is given up.

    Else Python would try again when it ends, and leave with a code of its own.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def describe_error(error: BaseException) -> tuple[str, int]:
    """One sentence for a person, and the exit code, for any fault.

    >>> describe_error(MachineError("the disk is full", todo="free some space"))
    ('the disk is full; free some space.', 9)
    """
    if isinstance(error, SpratError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        way = "to go on where it was" if _goes_on.get() else "to begin anew: nothing is kept"
        return f"stopped; start the same command again {way}.", INTERRUPTED
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # torch has no type for it
        return "the machine ran out of memory; use a smaller size or batch.", MachineError.exit_code
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("sprat"):
        return f"the package {error.name!r} is not installed; pip install it.", MachineError.exit_code
    if isinstance(error, BrokenPipeError):
        return "nobody reads the output any more.", BROKEN_PIPE
    from sprat.files.atomic import as_machine_error

    converted = as_machine_error(error, getattr(error, "filename", None) or "")
    if converted is not None:
        return str(converted), converted.exit_code
    return f"a fault of Sprat's own: {type(error).__name__}: {error}; --debug shows where.", INTERNAL_ERROR
