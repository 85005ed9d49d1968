"""A tiny real model, tokenizer and task for the tests of post-training."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sprat.config import Config, OptimConfig, SFTConfig
from sprat.config.model import ModelConfig
from sprat.config.sizes import size
from sprat.model import Transformer
from sprat.post.sft import sft
from sprat.tasks import Problem, Split
from sprat.tokens import Tokenizer
from sprat.trust.run import Run, open_run

FAST = OptimConfig(muon_lr=0.02, adam_lr=0.01, warmup_steps=5)


class Lucky:
    """Whatever the question, the answer is 7: the smallest thing that a policy can learn from rewards."""

    name = "lucky"

    def problem(self, split: Split, index: int) -> Problem:
        """Question ``index``; the number of terms is 1 or 2."""
        return Problem(self.name, index, f"{index % 100} {split}", "7", {"num_terms": 1 + index % 2})

    def score(self, problem: Problem, answer: str | None) -> float:
        """1.0 for 7."""
        return float(answer is not None and answer.strip() == problem.answer)

    def chain_of_thought(self, problem: Problem) -> str:
        """The chain of thought."""
        return f"{problem.question} 7"


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
    return Tokenizer.train(["7 train test 1 2 3\n"] * 4, 300, numbers=10)


@pytest.fixture(scope="session")
def shape(tokenizer: Tokenizer) -> ModelConfig:
    """A mixture of experts of some 40,000 parameters."""
    return size(
        "pico",
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        num_attention_heads=2,
        n_routed_experts=4,
        moe_intermediate_size=32,
        intermediate_size=64,
        max_position_embeddings=128,
        num_nextn_predict_layers=0,
    )


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
