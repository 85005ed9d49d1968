"""How well a model predicts text: bits per byte, a measure that no tokenizer can flatter."""

from __future__ import annotations

import math
from collections.abc import Mapping

from sprat.data.pack import PackedDataset
from sprat.errors import DataError
from sprat.eval.loss import total_loss
from sprat.model import Transformer


def bits_per_byte(model: Transformer, packed: PackedDataset, bytes_total: int, *, rows: int = 32) -> float:
    """Bits that the model needs for each byte of the packed text: sum of -log2 p(token) / bytes.

    Tokens that nothing predicts (the first of each document) cost nothing here, and their bytes count, so leave
    them out of ``bytes_total`` where documents are short.

    Args:
        packed: the text, all tokens masked as learned.
        bytes_total: UTF-8 bytes of that text.
        rows: rows of a batch.

    Raises:
        DataError: the text has no bytes.
    """
    if bytes_total <= 0:
        raise DataError("a text of no bytes", where="bits_per_byte", todo="give a text that holds something")
    return total_loss(model, packed, rows=rows) / math.log(2) / bytes_total


def bits_per_byte_by_domain(
    model: Transformer, domains: Mapping[str, tuple[PackedDataset, int]], *, rows: int = 32
) -> dict[str, float]:
    """``bits_per_byte`` of each domain: name -> (packed text, its bytes)."""
    return {name: bits_per_byte(model, packed, size, rows=rows) for name, (packed, size) in domains.items()}
