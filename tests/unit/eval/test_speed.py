"""Both models are measured by the same work, in turn."""

from __future__ import annotations

import pytest

from sprat.engine.backends import select_backend
from sprat.eval import speed
from sprat.model import Transformer


def test_each_kind_of_work_has_its_rounds(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves one second with each look: all work takes one second, whatever the machine does."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: float(next(ticks)))
    rounds: list[int] = []
    before, after = select_backend(model), select_backend(model)
    found = speed.compare_speed(before, after, vocab=100, context=128, on_progress=lambda: rounds.append(1))
    assert [(each.what, each.before, each.after) for each in found] == [
        ("prefill, a prompt of 128 tokens", 128.0, 128.0),
        ("decode, 1 request", 24.0, 24.0),
        ("decode, 16 requests", 384.0, 384.0),
    ]
    assert all(each.ratio.value == each.ratio.low == each.ratio.high == 1 and each.ratio.count == 7 for each in found)
    assert len(rounds) == 8
