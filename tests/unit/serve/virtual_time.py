"""An event loop in which waiting takes no time: its clock jumps to the next timer. Same code, same order, every run."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Counts virtual seconds from 0. Where all wait for one another it says so, instead of waiting with them."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self.now


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self.loop = loop

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise AssertionError(f"nothing will ever happen again, and {asyncio.all_tasks(self.loop)} wait for it")
        self.loop.now += timeout
        return super().select(0)


def run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The result of ``main()`` in a loop of its own."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main())


def clock() -> float:
    """The virtual time."""
    return asyncio.get_running_loop().time()
