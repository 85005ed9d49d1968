"""How well a model predicts: the loss of tokens in nats, and bits per byte, which no tokenizer can flatter."""

# B batch, T time, D hidden

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from sprat.data.loader import gather_rows
from sprat.data.pack import PackedDataset
from sprat.errors import DataError
from sprat.kernels.ops import linear_cross_entropy
from sprat.model import Transformer
from sprat.model.forward_context import precision


@torch.no_grad()
def total_loss(model: Transformer, packed: PackedDataset, *, rows: int = 32) -> float:
    """The sum of -ln p over all tokens of ``packed`` that carry loss; ``rows`` of it are computed at once."""
    device = model.norm.weight.device
    training = model.training
    model.eval()
    nats, head_VD = 0.0, model.head.dense_weight()
    for start in range(0, packed.num_rows, rows):
        batch = gather_rows(packed, range(start, min(start + rows, packed.num_rows))).to(device)
        with precision(device):
            out = model.hidden(batch.tokens_BT, segments_BT=batch.segments_BT)
        nats += float(linear_cross_entropy(out.x_BTD.flatten(0, 1), head_VD, batch.targets_BT.flatten(), num_items=1))
    model.train(training)
    return nats


def mean_loss(model: Transformer, packed: PackedDataset, *, rows: int = 8) -> float:
    """``total_loss`` for each token that carries it: the cross-entropy that training minimizes.

    Raises:
        DataError: no token carries loss.
    """
    if not packed.num_targets:
        raise DataError("no token carries loss", where="mean_loss", todo="give answers to measure")
    return total_loss(model, packed, rows=rows) / packed.num_targets


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
