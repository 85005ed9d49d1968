"""The user's own Python: imported, called within a time limit, and what it returns read as a number.

It runs with the user's rights. A fault of it is one sentence, or one answer that does not count, never a traceback.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType

from sprat.errors import ConfigError

_ALARM_INTERVAL_SECONDS = 1.0  # at least, from one alarm to the next


def import_source(source: str, where: str) -> ModuleType:
    """Import a dotted module or a Python file of the user's; ``where`` is what an error says about the place.

    Raises:
        ConfigError: there is none, or importing it raised.
    """
    try:
        if not source.endswith(".py"):
            return importlib.import_module(source)
        if not Path(source).is_file():
            raise ConfigError(f"no such file {source!r}", where=where, todo="give the path of a Python file")
        spec = importlib.util.spec_from_file_location(f"sprat_user_{Path(source).stem}", source)
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


def finite_float(value: object) -> float:
    """``value`` as a finite float.

    Raises:
        ValueError: it is none.
    """
    try:
        if isinstance(value, (str, bytes, bytearray)):
            raise TypeError
        result = float(value)  # type: ignore[arg-type]
    except OverflowError:
        raise ValueError("a number was returned that is too large") from None
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{value!r} was returned, which is no number") from None
    if not math.isfinite(result):
        raise ValueError(f"{value!r} was returned, which is not finite")
    return result


class TimeUpError(BaseException):
    """Not an Exception, so that a verifier's own ``except Exception`` does not swallow it."""


@contextmanager
def time_limit(timeout_seconds: float) -> Iterator[None]:
    """Raise ``TimeUpError`` in the block after ``timeout_seconds``, and again and again should it be swallowed.

    An alarm that comes just when the block ends must not leave the timer behind: it would end the process later.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    finished: list[bool] = []

    def on_alarm(signal_number: int, frame: FrameType | None) -> None:
        if not finished:
            raise TimeUpError

    previous_handler = signal.signal(signal.SIGALRM, on_alarm)
    try:
        signal.setitimer(signal.ITIMER_REAL, timeout_seconds, max(timeout_seconds, _ALARM_INTERVAL_SECONDS))
        try:
            yield
        finally:
            finished.append(True)  # an alarm at this very moment still comes to the outer end
    finally:
        finished.append(True)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous_handler)
