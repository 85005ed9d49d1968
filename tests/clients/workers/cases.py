"""Runs the cases of a worker in a client's own environment: one JSON object a line, the case and its fault ("": none).

python workers/openai_cases.py http://127.0.0.1:8000 KEY [case …]
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """The server that is asked: its address, without a slash at its end, and a key that it takes."""

    url: str
    key: str


Case = Callable[[Target], None]


def run(namespace: Mapping[str, Any]) -> None:
    """Run the ``case_…`` functions of a worker's globals: those named on the command line, or all."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    target, names = Target(sys.argv[1], sys.argv[2]), sys.argv[3:]
    for name in names or [name for name in namespace if name.startswith("case_")]:
        began, fault = time.monotonic(), ""
        try:
            namespace[name](target)
        except Exception as error:  # whatever it is, it is this case's fault
            fault = "".join(traceback.format_exception(error, limit=-6))[-3000:]
        row = {"case": name, "fault": fault, "seconds": round(time.monotonic() - began, 2)}
        print(json.dumps(row), file=answers, flush=True)


def raised(kind: type[Exception], function: Callable[[], Any]) -> Any:
    """The exception of class ``kind`` that ``function`` raises; typed loosely, as each client's has its own fields.

    Raises:
        AssertionError: it raised nothing. Another exception passes through.
    """
    try:
        answer = function()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}: {answer!r}"[:500])
