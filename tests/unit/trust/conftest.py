"""A pipeline of two runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from .runs import finished


@pytest.fixture
def road(tmp_path: Path) -> Path:
    """A pipeline of two runs, the second made from the first."""
    road = tmp_path / "road"
    finished(road, "pretrain")
    finished(road, "sft", b"tuned", model=road / "pretrain")
    return road
