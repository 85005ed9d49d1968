"""Who hangs is noticed, and who only works long is not. Time is counted by hand; real processes: tests/fault."""

from __future__ import annotations

import pytest

from sprat.serve.engine_watchdog import Heartbeat, Watchdog


class Machine:
    """A process with its heartbeat, and the watchdog of its server; each may stand still."""

    def __init__(self, limit: float = 60) -> None:
        self.now = 0.0
        self.dog = Watchdog(limit, lambda: self.now)
        self.dog.is_loaded = True
        self.heart = Heartbeat(self.dog.hear, self.dog.interval, lambda: self.now)
        self.mark: int | None = None
        self.heart.watch(lambda: self.mark)

    def run(self, seconds: float, *, is_heard: bool = True, steps: bool = False) -> str:
        """What the watchdog says in the end, or as soon as it says something."""
        end = self.now + seconds
        while self.now < end:
            self.now += self.dog.interval
            if steps and self.mark is not None:
                self.mark += 1
            if is_heard:
                self.dog.hear(self.heart.stuck_seconds())
            if said := self.dog.look():
                return said
        return ""


def test_silence_is_a_hang() -> None:
    machine = Machine(limit=60)
    assert not machine.run(5) and not machine.dog.stalled
    assert not machine.run(9, is_heard=False) and not machine.dog.stalled
    assert not machine.run(3, is_heard=False) and machine.dog.stalled  # not relied on, and not ended
    assert not machine.run(2) and not machine.dog.stalled  # it was a debugger's stop
    assert "said nothing" in machine.run(62, is_heard=False)
    assert machine.dog.hung_seconds == pytest.approx(61)


def test_a_load_has_time_to_speak_and_not_for_ever() -> None:
    machine = Machine(limit=2)
    machine.dog.is_loaded = False
    assert not machine.run(250, is_heard=False)
    assert "said nothing" in machine.run(60, is_heard=False)


def test_a_step_that_never_ends_is_a_hang_though_its_process_is_heard() -> None:
    machine = Machine(limit=60)
    machine.mark = 1
    assert not machine.run(25) and not machine.dog.stalled
    assert not machine.run(15) and machine.dog.stalled
    assert "one step for 6" in machine.run(60) and machine.now < 65


def test_many_steps_idle_hours_and_a_long_load_are_none() -> None:
    machine = Machine(limit=60)
    machine.mark = 1
    assert not machine.run(36_000, steps=True)  # a long prompt, in pieces
    machine.mark = None
    assert not machine.run(36_000) and not machine.dog.stalled  # nothing to do, or a load: no mark
    machine.mark = 1
    assert not machine.run(59)


def test_a_step_of_almost_the_limit_again_and_again_is_none() -> None:
    machine = Machine(limit=60)
    for machine.mark in range(100):
        assert not machine.run(55)


@pytest.mark.parametrize("mark", [None, 1])
def test_who_slept_itself_takes_nobody_for_hung(mark: int | None) -> None:
    """A suspended laptop: hours pass between two looks, for both sides."""
    machine = Machine(limit=60)
    machine.mark = mark
    for _ in range(5):
        machine.run(5)
        machine.now += 36_000
        assert not machine.dog.look()
        machine.dog.hear(machine.heart.stuck_seconds())
        assert not machine.dog.look()


def test_a_short_limit_has_beats_enough() -> None:
    assert Watchdog(1.0).interval <= 0.2 and Watchdog(300.0).interval == 1
    assert not Machine(limit=1).run(100)
