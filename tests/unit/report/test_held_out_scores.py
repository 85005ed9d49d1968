"""The table of a road's held-out scores: each model against the first, question by question."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sprat.config.sample import AskConfig
from sprat.errors import TrustError
from sprat.report import write_report
from sprat.report.held_out_scores import held_out_scores
from sprat.trust.run import open_run

FIRST, SECOND = "1100000000", "1111111100"  # ten questions: two right, then six more of them, and none lost


def score(folder: Path, name: str, right: str, *, prefix: str = "q") -> None:
    """A finished run of ``eval`` whose model was right on the questions that ``right`` marks."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "weights").write_text(name)
    ledger = folder / "ledger.jsonl"
    run = open_run(folder / name, stage="eval", recipe=AskConfig(), inputs={"model": model}, seed=0, ledger=ledger)
    if not run.done:
        rows = [
            {
                "key": f"{prefix}{place}",
                "reward": float(mark),
                "correct": int(mark),
                "samples": 1,
                "tokens": 5,
                "cut": 0,
            }
            for place, mark in enumerate(right)
        ]
        (run.artifact / "held_out.jsonl").write_text(json.dumps({"step": 0, "problems": rows}) + "\n")
        share = right.count("1") / len(right)
        facts = {
            "count": len(right),
            "reward": share,
            "accuracy": share,
            "low": 0.0,
            "high": 1.0,
            "response_length": 5.0,
        }
        run.add_facts(held_out_score=facts)
        run.finish()


def test_gains_are_paired_with_the_first_score_on_the_same_questions(tmp_path: Path) -> None:
    score(tmp_path, "before", FIRST)
    score(tmp_path, "after", SECOND)
    score(tmp_path, "others", "1" * 10, prefix="other")
    before, after, others = held_out_scores(tmp_path)
    assert (before.name, before.accuracy, before.gain) == ("before", 0.2, None)
    assert after.gain == pytest.approx(0.6) and after.p_value == 2 / 2**6  # six coins, all of one side
    assert after.gain_low is not None and after.gain_high is not None and 0 < after.gain_low < 0.6 < after.gain_high
    assert others.gain is None, "other questions say nothing of the first ones"
    assert "+60.0 points" in str(after) and "80.0% of 10 right" in str(after)
    page = write_report(tmp_path).read_text()
    assert "Questions that no stage trained on" in page and "+60.0" in page


def test_a_score_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    score(tmp_path, "before", FIRST)
    (tmp_path / "before" / "artefact" / "held_out.jsonl").write_text("{}\n")
    with pytest.raises(TrustError, match="held-out scores cannot be read.*before"):
        held_out_scores(tmp_path)
