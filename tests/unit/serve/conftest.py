"""What several tests of the server share."""

from __future__ import annotations

import pytest

from sprat.config.sizes import size
from sprat.model import Transformer
from sprat.tokens import Tokenizer


@pytest.fixture(scope="session")
def parts() -> tuple[Transformer, Tokenizer]:
    """A model with room for long answers, and its tokenizer."""
    texts = [f"please keep to yourself what opens the door of our house: swordfish-{n}" for n in range(50)]
    tokenizer = Tokenizer.train(texts, 512)
    return Transformer.create(size("pico", vocab_size=tokenizer.vocab_size, max_position_embeddings=4096), 0), tokenizer
