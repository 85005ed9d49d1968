"""A tiny real model, tokenizer and task for the tests of post-training."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sprat.config import Config, OptimConfig, SFTConfig
from sprat.config.model import ModelConfig
from sprat.formats.load import save
from sprat.model import Transformer
from sprat.post.sft import sft
from sprat.tokens import Tokenizer
from sprat.trust.run import Run, open_run
from tests.lucky import Lucky, lucky_shape, lucky_tokenizer

FAST = OptimConfig(muon_lr=0.02, adam_lr=0.01, warmup_steps=5)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny tensors are slower on two threads."""
    torch.set_num_threads(1)


@pytest.fixture
def task() -> Lucky:
    """The toy task."""
    return Lucky()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Bytes, digits and the special tokens, and next to no merges."""
    return lucky_tokenizer()


@pytest.fixture(scope="session")
def shape(tokenizer: Tokenizer) -> ModelConfig:
    """A mixture of experts of some 40,000 parameters."""
    return lucky_shape(tokenizer)


@pytest.fixture
def model(shape: ModelConfig) -> Transformer:
    """A fresh model, always with the same weights."""
    return Transformer.create(shape, 0)


@pytest.fixture(scope="session")
def guesser(shape: ModelConfig, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    """A model that knows the format and guesses a digit, with or without a think."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("guesser")
    rng = random.Random(0)
    shown = []
    for _ in range(600):
        digit = str(rng.randrange(10))
        shown.append((f"{rng.randrange(100)} train", digit if rng.random() < 0.5 else "", digit))
    config = SFTConfig(steps=50, batch_rows=16, seq_len=32, checkpoint_every=1000, optim=FAST)
    run = open_run(folder / "sft", stage="sft", recipe=config, inputs={}, seed=0, ledger=folder / "ledger.jsonl")
    model = Transformer.create(shape, 0)
    sft(model, tokenizer, shown, config, run)
    return model


@pytest.fixture
def open_stage(tmp_path: Path) -> Callable[[str, Config], Run]:
    """Opens the run folder ``name`` in the test's own road."""

    def opened(name: str, recipe: Config) -> Run:
        return open_run(tmp_path / name, stage=name, recipe=recipe, inputs={}, seed=0, ledger=tmp_path / "ledger.jsonl")

    return opened


@pytest.fixture
def base(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """The model in a folder."""
    save(model, tokenizer, tmp_path / "base")
    return tmp_path / "base"
