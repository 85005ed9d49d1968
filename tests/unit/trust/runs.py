"""Small finished runs, and what verify says of them."""

from __future__ import annotations

from pathlib import Path

from sprat.config import TrainConfig
from sprat.trust import open_run, run_record
from sprat.trust.run import Run
from sprat.trust.verify import verify


def finished(pipeline: Path, stage: str, content: bytes = b"weights", **inputs: run_record.Input) -> Run:
    """A small finished run of ``stage`` in ``pipeline``."""
    run = open_run(
        pipeline / stage,
        stage=stage,
        recipe=TrainConfig(steps=3),
        inputs=inputs,
        seed=1,
        ledger=pipeline / "ledger.jsonl",
    )
    if not run.done:
        (run.artifact / "deep").mkdir()
        (run.artifact / "deep" / "model.bin").write_bytes(content)
        run.log(1, loss=2.5)
        run.add_facts(title=stage)
        run.finish(flops=1e6, tokens=100)
    return run


def faults(path: Path) -> list[str]:
    """The texts of the findings that are faults."""
    return [f"{finding.subject}: {finding.text}" for finding in verify(path) if not finding.ok]
