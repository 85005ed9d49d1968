"""A tiny model, tiny text and a run, all real."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sprat.config import OptimConfig, TrainConfig
from sprat.config.model import ModelConfig
from sprat.config.sizes import size
from sprat.data.loader import MixedBatchSource
from sprat.data.pack import PackedDataset, pack
from sprat.model import Transformer
from sprat.trust import Run, open_run

TEXT = b"the quick brown sprat swims past the lazy whale and counts 0 1 2 3 4 5 6 7 8 9. " * 12


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small tensors gain nothing from threads, and the machine is shared."""
    torch.set_num_threads(1)


@pytest.fixture
def shape() -> ModelConfig:
    """A MoE of about 20 k parameters with one MTP module."""
    return size(
        "pico",
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        first_k_dense_replace=0,
        num_nextn_predict_layers=1,
    )


@pytest.fixture
def model(shape: ModelConfig) -> Transformer:
    """Fresh weights of seed 0."""
    return Transformer.create(shape, 0)


@pytest.fixture
def packed() -> PackedDataset:
    """The text in documents of 10 to 40 bytes, several to a row of 32."""
    rng = np.random.default_rng(0)
    cuts = np.cumsum(rng.integers(10, 40, 30)).tolist()
    return pack([(list(TEXT[a:b]), None) for a, b in zip([0, *cuts], cuts, strict=False)], 32)


@pytest.fixture
def source(packed: PackedDataset) -> MixedBatchSource:
    """Four rows a batch."""
    return MixedBatchSource([(packed, 1.0)], 4, 0)


@pytest.fixture
def recipe() -> TrainConfig:
    """Eight steps with a checkpoint after every third and a row after every second."""
    optim = OptimConfig(warmup_steps=2)
    return TrainConfig(steps=8, batch_rows=4, seq_len=32, checkpoint_every=3, log_every=2, optim=optim)


@pytest.fixture
def new_run(tmp_path: Path, recipe: TrainConfig) -> Callable[[str], Run]:
    """Opens (or reopens) the run of a name."""

    def open_it(name: str) -> Run:
        return open_run(
            tmp_path / name, stage="pretrain", recipe=recipe, inputs={}, seed=0, ledger=tmp_path / "ledger.jsonl"
        )

    return open_it
