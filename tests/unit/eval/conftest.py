"""A tiny real model, tokenizer, task and text for the tests of evaluation."""

from __future__ import annotations

import pytest
import torch

from sprat.config.model import ModelConfig
from sprat.data.pack import PackedDataset, pack
from sprat.model import Transformer
from sprat.tokens import Tokenizer
from tests.lucky import Lucky, lucky_shape, lucky_tokenizer

TEXT = b"the quick brown sprat swims past the lazy whale and counts 0 1 2 3 4 5 6 7 8 9. " * 12


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
    """The toy task's tokenizer."""
    return lucky_tokenizer()


@pytest.fixture(scope="session")
def shape(tokenizer: Tokenizer) -> ModelConfig:
    """A mixture of experts of some 40,000 parameters."""
    return lucky_shape(tokenizer)


@pytest.fixture
def model(shape: ModelConfig) -> Transformer:
    """A fresh model, always with the same weights."""
    return Transformer.create(shape, 0)


@pytest.fixture
def packed() -> PackedDataset:
    """The text in documents of 27 bytes, several to a row of 32."""
    return pack([(list(TEXT[start : start + 27]), None) for start in range(0, len(TEXT), 27)], 32)


@pytest.fixture(scope="session")
def trained_model(tokenizer: Tokenizer, shape: ModelConfig) -> Transformer:
    """A model that knows the text."""
    return learn_text(tokenizer, shape)


def learn_text(tokenizer: Tokenizer, shape: ModelConfig) -> Transformer:
    """A model that learned the text by heart, in about a second."""
    torch.set_num_threads(1)
    model = Transformer.create(shape, 0)
    ids = torch.tensor(tokenizer.encode(TEXT.decode())[: 8 * 33]).view(-1, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(50):
        optimizer.zero_grad()
        logits = model(ids[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    return model.eval()
