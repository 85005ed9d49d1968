"""Runs a user's reward function in a process of its own, which can be killed whatever the function does.

A request is a line of JSON on stdin, and so is its reply on stdout; what the user's code prints goes nowhere near the
replies. A worker whose parent is gone, or that nobody killed in time, ends by itself: the signal of its timer needs no
Python to run.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sprat.post.rl.rewards import Response
    from sprat.tasks import Problem

_GRACE_SECONDS = 5.0  # after which a worker that should have been killed ends itself


def reply_to(function: Any, problem: Any, answer: Any) -> dict[str, Any]:
    """What ``function`` says of ``answer``: ``{"value": number or None}``, or ``{"fault": text}``."""
    from sprat.tasks.user_code import finite_float

    try:
        value = function(problem, answer)
        return {"value": None if value is None else finite_float(value)}
    except (Exception, SystemExit) as error:
        return {"fault": f"raised {type(error).__name__}: {error}"[:500]}


def load(source: str) -> Any:
    """The function that ``file.py:function`` or ``module:function`` names, adapted.

    Raises:
        ConfigError: there is none, or it is of no form of a reward.
    """
    from sprat.errors import ConfigError
    from sprat.post.rl.reward_forms import EXPECTED, adapt
    from sprat.post.rl.reward_sources import split_reward_name
    from sprat.tasks.user_code import import_source

    module_name, attribute = split_reward_name(source)
    where = f"reward {source}"
    function = getattr(import_source(module_name, where), attribute, None)
    if function is None:
        raise ConfigError(f"{module_name!r} has no function {attribute!r}", where=where, todo=EXPECTED)
    return adapt(function, where)


def pack(problem: Problem, answer: Response) -> dict[str, Any]:
    """A request: both as JSON has them, tuples as lists."""
    meta = {"meta": dict(problem.meta)}
    return {"problem": {**vars(problem), **meta}, "answer": asdict(answer)}


def unpack(request: dict[str, Any]) -> tuple[Problem, Response]:
    """What ``pack`` packed."""
    from sprat.post.rl.rewards import Response
    from sprat.tasks import Problem

    return Problem(**request["problem"]), Response(**request["answer"])


def main() -> None:
    """Answer requests until there is none; the first names the function and the time limit of an answer."""
    from sprat.errors import SpratError

    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(2, 1)
    sys.stdin, sys.stdout = open(0, encoding="utf-8"), sys.stderr  # noqa: SIM115

    def say(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    function, seconds = None, 0.0
    for line in requests:
        request = json.loads(line)
        if "source" in request:
            try:
                function, seconds = load(request["source"]), float(request["seconds"])
                say({"ready": True})
            except SpratError as error:
                say({"error": [error.what, error.where, error.todo]})
            continue
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds + _GRACE_SECONDS)
        reply = reply_to(function, *unpack(request))
        signal.setitimer(signal.ITIMER_REAL, 0)
        say(reply)


if __name__ == "__main__":
    main()
