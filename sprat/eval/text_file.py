"""How well a model predicts a text of the user's: perplexity of a token, and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sprat.data.ingest import read_texts
from sprat.data.pack import pack
from sprat.errors import DataError
from sprat.eval.bits_per_byte import bits_per_byte
from sprat.model import Transformer
from sprat.tokens import Tokenizer

MAX_WINDOW = 1024  # tokens of one window, where the context holds more


@dataclass(frozen=True)
class TextScore:
    """What a text costs a model.

    Attributes:
        documents, bytes: of the text; bytes in UTF-8.
        tokens: that were predicted.
        window: tokens that the model sees at once at most.
        bits_per_byte: of the text; models with different tokenizers can be compared by it.
        perplexity: exp of the mean loss of a token; says nothing about a model with another tokenizer.
    """

    documents: int
    bytes: int
    tokens: int
    window: int
    bits_per_byte: float
    perplexity: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.bits_per_byte:.3f} bits per byte, perplexity {self.perplexity:.2f} over {self.tokens:,} tokens"


def evaluate_text(
    model: Transformer, tokenizer: Tokenizer, texts: Iterable[str], *, window: int | None = None, rows: int = 8
) -> TextScore:
    """Score texts, each a document.

    A document is cut into windows that share one token, so each token is predicted exactly once, from what precedes it
    in its window: a smaller window costs more. Where the tokenizer has a beginning-of-text token, it goes in front and
    the first token is predicted too; else the first token's bytes cost nothing.

    Args:
        window: tokens that the model sees at once; at most the context, 1024 if not given.
        rows: windows of a batch.

    Raises:
        DataError: nothing to predict, or a window that the model cannot see.
    """
    context = model.config.context
    window = min(context, MAX_WINDOW) if window is None else window
    if not 1 <= window <= context:
        raise DataError(f"a window of {window} tokens", where="window", todo=f"give 1 to {context}")
    bos = tokenizer.special_ids.bos
    num_documents, num_bytes, sequences = 0, 0, []
    for text in texts:
        num_documents, num_bytes = num_documents + 1, num_bytes + len(text.encode("utf-8", "replace"))
        sequences.append(([bos] if bos >= 0 else []) + tokenizer.encode(text))
    packed = pack(((ids, None) for ids in sequences), window)
    bits = bits_per_byte(model, packed, num_bytes, rows=rows)
    nats_per_token = bits * num_bytes * math.log(2) / packed.num_targets
    perplexity = math.exp(nats_per_token) if nats_per_token < 700 else math.inf
    return TextScore(num_documents, num_bytes, packed.num_targets, window, bits, perplexity)


def evaluate_text_file(
    model: Transformer, tokenizer: Tokenizer, path: str | Path, *, window: int | None = None, rows: int = 8
) -> TextScore:
    """Score the text at ``path``: a file or folder as ``sprat.data.ingest.read_texts`` reads it; see ``evaluate_text``.

    Raises:
        DataError: see ``read_texts`` and ``evaluate_text``.
    """
    texts = (document.text for document in read_texts(path))
    return evaluate_text(model, tokenizer, texts, window=window, rows=rows)
