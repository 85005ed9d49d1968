"""A tiny real tokenizer and a tiny real model, made once."""

from __future__ import annotations

import pytest
import torch

from sprat.config.sizes import size
from sprat.model import Transformer
from sprat.tokens import Tokenizer

TEXT = ["the cat sat on the mat; 12 + 13 = 25. é ü 😀 naïve\n\nwhat is it? it is a cat.\n" * 4]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Our own format, some 500 ids."""
    return Tokenizer.train(TEXT, 520)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer) -> Transformer:
    """A mixture of experts with MLA whose logits are spread like those of a trained model."""
    config = size("pico", vocab_size=tokenizer.vocab_size + 7, max_position_embeddings=200)
    model = Transformer.create(config, 3)
    with torch.no_grad():
        model.head.weight.mul_(4)
    return model


@pytest.fixture(scope="session")
def drafter(tokenizer: Tokenizer) -> Transformer:
    """The same with an MTP module and room for longer prompts."""
    config = size("pico", vocab_size=tokenizer.vocab_size, max_position_embeddings=4096, num_nextn_predict_layers=1)
    model = Transformer.create(config, 5)
    with torch.no_grad():
        model.head.weight.mul_(4)
    return model
