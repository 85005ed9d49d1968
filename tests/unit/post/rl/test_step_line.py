"""The line of a step says the numbers that matter and the cost, and leaves out what is not there."""

from __future__ import annotations

import json
from pathlib import Path

from sprat.post.rl.step_line import spent_so_far, step_line

ROW = {
    "step": 7, "reward": 0.4167, "reward_error": 0.02, "accuracy": 0.375, "live_groups": 0.625, "response_length": 41.6,
    "cut_share": 0.0, "entropy": 0.913, "kl_start": 0.0123, "clip_fraction": 0.004, "mismatch_mean": 1.1e-6,
    "staleness": 0.0, "reward_faults": 2.0, "hack_evidence": 0.31,
}  # fmt: skip


def test_a_step_in_one_line() -> None:
    said = "step 7/60: reward 0.417 ± 0.039, right 38%, taught 62%, 42 tokens, entropy 0.91, KL 0.012, clipped 0.4%, "
    assert step_line(ROW, 60, 12.34) == said + "gap 1e-06, faults 2, hacks 31%, 12.3 s"


def test_what_others_measure_is_shown_where_it_is_there() -> None:
    row = {**ROW, "logprob_gap_mean": 2e-4, "route_flips": 0.015, "staleness": 1.5, "second_reward": 0.2}
    line = step_line(row | {"sampled_groups": 14.0, "abstained": 0.25, "cut_share": 0.5}, 60, 1.0, "so far nothing")
    for said in ("gap 0.0002,", "flips 1.5%", "age 1.5", "second judge 0.200", "of 14 questions", "abstained 25%"):
        assert said in line, said
    assert "cut 50%" in line and line.endswith("1.0 s, so far nothing")
    assert "entropy" not in step_line({"step": 1, "reward": 0.0}, 2, 1.0), "nothing was trained"


def test_the_cost_so_far_is_that_of_the_run_and_its_price(tmp_path: Path) -> None:
    assert spent_so_far(tmp_path, 5) == ""
    state = {"device_seconds": 90.0, "wall_seconds": 50.0, "nano_yuan": 2_500_000}
    (tmp_path / "spent.json").write_text(json.dumps(state))
    assert spent_so_far(tmp_path, 12345) == "so far 90 s of CPU, 12.3k tokens, ¥0.0025"
    (tmp_path / "spent.json").write_text(json.dumps(state | {"device_seconds": 7200.0, "nano_yuan": 0}))
    assert spent_so_far(tmp_path, 0) == "so far 120 min of CPU, 0.0k tokens, ¥0"
