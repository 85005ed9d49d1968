"""The engine's tiny tokenizer and tiny model."""

from tests.unit.engine.conftest import model, tokenizer

__all__ = ["model", "tokenizer"]
