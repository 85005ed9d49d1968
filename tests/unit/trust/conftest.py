"""A pipeline of two runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from .runs import finished


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline of two runs, the second made from the first."""
    pipeline = tmp_path / "road"
    finished(pipeline, "pretrain")
    finished(pipeline, "sft", b"tuned", model=pipeline / "pretrain")
    return pipeline
