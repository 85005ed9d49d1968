"""Answers over several versions of the weights, by real processes: trained once, recorded by token, replayed by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import rl_once
from bench.rl_tiny import SLOW_STEPS, make
from sprat.post.rl.audit import audit
from sprat.post.rl.ledger import LEDGER_FILE, RolloutLedger
from sprat.post.rl.replay import replay
from sprat.trust.run_record import read_metrics

PER_STEP, STEPS, STALENESS = 2, 14, 4
CHANGES: dict[str, Any] = {
    "steps": STEPS, "prompts_per_step": PER_STEP, "checkpoint_every": 5, "importance_cap": 2.0,
    "rollout": {"workers": 3, "batch": 1, "staleness": STALENESS, "in_flight": True},
}  # fmt: skip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_an_answer_of_several_versions_is_replayed_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SLOW_STEPS, "1")
    make(tmp_path)
    parent = rl_once.start(tmp_path, "run", CHANGES, 0.01)
    assert parent.wait(600) == 0, (tmp_path / "run.log").read_text()[-3000:]
    folder = tmp_path / "run" / "run"
    ledger = RolloutLedger.read(folder / LEDGER_FILE)
    assert audit(ledger) == []
    counts = []
    for step in range(1, STEPS + 1):
        for one in ledger.rollouts(step):
            assert one.versions == sorted(one.versions) and len(one.versions) == len(one.token_ids)
            assert step - 1 - STALENESS <= one.versions[0] <= one.versions[-1] <= step - 1
            assert one.routes is not None and len(one.routes) == one.length
            counts.append(len(set(one.versions)))
    assert max(counts) >= 3 and len(counts) == STEPS * PER_STEP * 4, json.dumps(sorted(counts))
    ledger.close()
    assert all(row["routes_replayed"] == 1.0 for row in read_metrics(folder) if row.get("live_groups"))
    found = replay(folder, model=tmp_path / "model")
    assert found.is_same and len(found.steps) == STEPS
    assert max(newest - oldest for oldest, newest in (each.versions for each in found.steps)) >= 2
