"""A signal before the server is up stops it, also where a library drops the exception."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import pytest

from sprat.serve.stop_signals import stop_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_block_and_nothing_else(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    reached = False
    with stop_signals() as stopped:
        os.kill(os.getpid(), number)
        reached = True
    assert stopped.is_set() and not reached
    assert signal.getsignal(number) is before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_whose_exception_was_dropped_is_remembered() -> None:
    class Dropping:
        def __del__(self) -> None:  # what is raised here is printed by the interpreter, and lost
            os.kill(os.getpid(), signal.SIGINT)

    with stop_signals() as stopped:
        dropping = Dropping()
        with suppress(KeyboardInterrupt):  # it may also come up a moment later
            del dropping
    assert stopped.is_set()
