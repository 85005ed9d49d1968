"""Dynamic sampling with roles as real processes, killed at random: the bits of one process that was not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from bench import rl_once
from bench.rl_tiny import config_of, make, run
from sprat.post.rl.audit import audit
from sprat.post.rl.ledger import LEDGER_FILE, RolloutLedger

CHANGES: dict[str, Any] = {"steps": 8, "checkpoint_every": 3, "dynamic_sampling": 3}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks for processes in /proc"),
]


def test_workers_and_kills_change_no_group_of_a_step_and_no_bit(tmp_path: Path) -> None:
    make(tmp_path)
    run(tmp_path, "undisturbed", config_of(**CHANGES))
    changes = CHANGES | {"rollout": {"workers": 2, "batch": 2}}
    found = rl_once.kill_at_random(tmp_path, "killed", changes, 0.002, 3, random.Random(5))
    assert found["code"] == 0 and not found["faults"] and sum(found["kills"].values()) == 3, found
    assert rl_once.record(tmp_path, "killed") == rl_once.record(tmp_path, "undisturbed")
    ledgers = [RolloutLedger.read(tmp_path / name / "run" / LEDGER_FILE) for name in ("killed", "undisturbed")]
    assert [audit(ledger) for ledger in ledgers] == [[], []]
    assert ledgers[0].unused() == ledgers[1].unused() != {} and ledgers[0].digest() == ledgers[1].digest()
