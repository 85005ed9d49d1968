"""Ctrl-C outside of a step is not forgotten."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sprat.config import TrainConfig
from sprat.config.model import ModelConfig
from sprat.data.loader import MixedBatchSource
from sprat.model import Transformer
from sprat.train import checkpoint, train
from sprat.trust import Run


def test_ctrl_c_while_the_last_checkpoint_is_written_ends_the_run_there(
    shape: ModelConfig,
    source: MixedBatchSource,
    recipe: TrainConfig,
    new_run: Callable[[str], Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
    save = checkpoint.save

    def interrupted_save(folder: Path, step: int, *state: Any, **options: Any) -> Path:
        if step == recipe.steps:
            signal.raise_signal(signal.SIGINT)
        return save(folder, step, *state, **options)

    monkeypatch.setattr(checkpoint, "save", interrupted_save)
    run = new_run("a")
    with pytest.raises(KeyboardInterrupt):
        train(Transformer.create(shape, 0), source, recipe, run)
    last = checkpoint.latest(run.checkpoints)
    assert last is not None and last.step == recipe.steps
