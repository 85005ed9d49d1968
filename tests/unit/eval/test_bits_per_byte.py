"""Bits per byte mean bits, and bytes."""

from __future__ import annotations

import math

import pytest
import torch

from sprat.data.pack import PackedDataset
from sprat.errors import DataError
from sprat.eval.bits_per_byte import bits_per_byte, bits_per_byte_by_domain
from sprat.model import Transformer


def test_a_model_that_knows_nothing_pays_the_full_alphabet(model: Transformer, packed: PackedDataset) -> None:
    with torch.no_grad():
        model.head.weight.zero_()
    found = bits_per_byte(model, packed, packed.num_targets)
    assert found == pytest.approx(math.log2(model.config.vocab_size), rel=1e-5)
    assert bits_per_byte(model, packed, packed.num_targets * 2) == pytest.approx(found / 2, rel=1e-6)


def test_the_cut_into_batches_does_not_matter(model: Transformer, packed: PackedDataset) -> None:
    assert bits_per_byte(model, packed, 100, rows=2) == pytest.approx(
        bits_per_byte(model, packed, 100, rows=64), rel=1e-5
    )


def test_domains_are_measured_apart(model: Transformer, packed: PackedDataset) -> None:
    found = bits_per_byte_by_domain(model, {"a": (packed, 100), "b": (packed, 200)})
    assert found["a"] == pytest.approx(2 * found["b"])


def test_a_text_of_no_bytes_is_one_sentence(model: Transformer, packed: PackedDataset) -> None:
    with pytest.raises(DataError, match="no bytes"):
        bits_per_byte(model, packed, 0)
