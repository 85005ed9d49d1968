"""The other process: it tries a grammar before the engine builds it, within a deadline (``grammar_worker``)."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sprat.errors import EngineError, MachineError
from sprat.files.json import exchange_json

START_SECONDS = 30.0  # a new process reads the vocabulary first


class CompilerProcess:
    """One process, started with the first grammar and again after one that it did not survive; one thread at a time.

    Args:
        token_bytes: gives the bytes of every token of the vocabulary.
        eos_token_ids: ids that end an answer.
        deadline: seconds that one grammar may take.
    """

    def __init__(self, token_bytes: Callable[[], list[bytes]], eos_token_ids: list[int], deadline: float) -> None:
        self._token_bytes, self._eos_token_ids, self._deadline = token_bytes, eos_token_ids, deadline
        self.process: subprocess.Popen[str] | None = None

    def ask(self, job: dict[str, str]) -> dict[str, Any]:
        """Let the process try a grammar.

        Raises:
            EngineError: it died or took too long; it is ended then.
            MachineError: it cannot be started, whatever the grammar.
        """
        if self.process is not None and self.process.poll() is not None:
            self.kill()
        try:
            process = self.process or self._start()
        except (OSError, ValueError) as error:
            self.kill()
            late = (
                f"it was not up within {START_SECONDS:g} s" if isinstance(error, TimeoutError) else "it ended at once"
            )
            reason = getattr(error, "strerror", None) or late
            fault = f"the compiler of grammars cannot be started: {reason}"
            raise MachineError(fault, where="engine", todo="free memory, or end other programs") from None
        try:
            return exchange_json(process, job, self._deadline)
        except (OSError, ValueError, TimeoutError) as error:
            self.kill()
            timed_out = isinstance(error, TimeoutError)
            fault = f"the grammar took over {self._deadline:g} s" if timed_out else "the grammar broke its compiler"
            raise EngineError(fault, where="response", todo="make it smaller or simpler") from None

    def kill(self) -> None:
        """Kill the process, if there is one; any thread may."""
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what was still to be written to a dead process
                if pipe is not None:
                    pipe.close()

    def _start(self) -> subprocess.Popen[str]:
        """A new process that has read the vocabulary.

        Raises:
            TimeoutError, OSError, ValueError: it could not.
        """
        self.process = process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("grammar_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # an interrupt at the terminal is not meant for it
        )
        assert process.stdin is not None
        header = {"tokens": [text.hex() for text in self._token_bytes()], "ends": self._eos_token_ids}
        process.stdin.write(json.dumps(header) + "\n")
        exchange_json(process, {"kind": "choice", "source": '["a"]'}, START_SECONDS)
        return process
