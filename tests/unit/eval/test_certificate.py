"""A certificate is read as it was written, and its verdict is by the upper bound of each capability."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sprat.errors import DataError
from sprat.eval.certificate import (
    Certificate,
    CertifiedModel,
    Continuations,
    LayerFlips,
    Machine,
    RouterFlips,
    Speed,
    TaskLoss,
    TextLoss,
    read_certificate,
    write_certificate,
)
from sprat.eval.comparison import Comparison
from sprat.eval.intervals import Estimate


def example() -> Certificate:
    """One with everything in it."""
    each, small = Estimate(0.1, 0.0, 0.2, 30), Estimate(0.01, -0.002, 0.019, 30)
    answers = Comparison("sums", 50, 0.8, 0.78, -0.02, -0.08, 0.04, 2, 1, 1.0, "McNemar, exact")
    text = TextLoss("book <1>", "document", 900, 3000, 64, 1.5, 1.515, each, small, each, each, each, 3.5, each)
    flips = RouterFlips("book <1>", each, each, (LayerFlips(1, each, each), LayerFlips(2, each, each)))
    said = Continuations(8, 64, 5, each, each, each, each, 60.0, 61.5, {"stop": 8}, {"stop": 7, "length": 1})
    model = CertifiedModel("runs/<small>", 1_000_000, "ab" * 32)
    return Certificate(
        model,
        CertifiedModel("runs/mine", 4_000_000, "cd" * 32),
        Machine("Some Processor", 2),
        "2026-01-02T03:04:05+00:00",
        max_loss=0.02,
        tasks=(TaskLoss(answers, Estimate(0.025, -0.05, 0.1, 50)), TaskLoss(replace(answers, task="hard"), None)),
        texts=(text,),
        routing=(flips,),
        continuations=said,
        speeds=(Speed("decode, 1 request", 100.0, 150.0, Estimate(1.5, 1.4, 1.6, 7)),),
        missing=("no Chinese text: offline",),
        settings={"window": 64, "thinking": None},
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write_certificate(example(), tmp_path)
    assert read_certificate(path) == example()
    row = json.loads(path.read_text())
    assert row["failed"] == ["task sums", "task hard"] and row["texts"][0]["loss"]["high"] == 0.019


def test_each_capability_is_held_against_the_bar_by_itself() -> None:
    certificate = example()
    assert [certificate.holds(loss) for loss in certificate.capabilities.values()] == [False, False, True]
    assert replace(certificate, max_loss=0.1).failed == ["task hard"]  # nothing to lose is nothing proved
    without = replace(certificate, max_loss=None)
    assert without.failed == [] and without.holds(None) is None


@pytest.mark.parametrize(
    ("content", "said"),
    [("{}", "model"), ("[]", "not a JSON object"), ("{", "no certificate"), (None, "no such file")],
)
def test_what_is_no_certificate_is_one_sentence(content: str | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=said):
        read_certificate(path)


def test_a_later_version_is_not_guessed_at() -> None:
    with pytest.raises(DataError, match="version 2"):
        Certificate.from_dict({**example().to_dict(), "version": 2})
