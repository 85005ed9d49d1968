"""Quantized tensors come in as they are: bit for bit where our codes can hold them, within a stated error where not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sprat.formats.gguf import blocks
from sprat.formats.gguf.header import GGML_TYPES
from sprat.quant.int4 import QuantizedTensor, dequantize_tensor, unpack_int4
from tests.gguf_files import gguf, random_blocks

KIND = {kind.name: kind for kind in GGML_TYPES.values()}
EXACT, ROUNDED = ("Q4_0", "Q4_1", "Q5_0", "Q8_0"), ("Q4_K", "Q5_1", "Q2_K", "Q3_K", "Q5_K", "Q6_K")


def raw(kind: str) -> Any:
    """Bytes [6, …] of rows of 512 weights."""
    theirs = gguf.GGMLQuantizationType[kind]
    if kind.endswith("_K"):
        return random_blocks((6, 512), theirs)
    return gguf.quants.quantize(np.random.default_rng(1).normal(size=(6, 512)).astype(np.float32), theirs)


def codes(kind: str, rows: Any) -> QuantizedTensor:
    """``rows`` as ``sprat.quant`` keeps them."""
    parts = {
        name: torch.from_numpy(array)
        for name, array in blocks.quantized_parts(kind, rows, KIND[kind].block_bytes).items()
    }
    return QuantizedTensor(parts["codes"], parts["scales"], blocks.PACKED[kind], 32, 512, parts.get("minimums"))


@pytest.mark.parametrize("kind", EXACT + ROUNDED)
def test_codes_stand_for_the_weights_of_the_file(kind: str) -> None:
    rows = raw(kind)
    theirs = torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind]))
    kept = codes(kind, rows)
    assert (kept.minimums is not None) == (kind in blocks.WITH_MINIMUMS)
    if kind in EXACT:
        assert torch.equal(dequantize_tensor(kept), theirs)
    else:
        largest = theirs.abs().unflatten(1, (-1, 32)).amax(-1).repeat_interleave(32, 1)
        assert ((dequantize_tensor(kept) - theirs).abs() <= largest * (1.1e-3 if kind == "Q4_K" else 1 / 250)).all()
    plain = torch.from_numpy(blocks.dequantize(kind, rows, KIND[kind].block_bytes))
    assert torch.equal(plain, dequantize_tensor(kept) if kind in (*EXACT, "Q4_K") else theirs)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_numbers_come_in_exactly(kind: str) -> None:
    rows = raw(kind).view(np.uint8)
    theirs = gguf.quants.dequantize(raw(kind), gguf.GGMLQuantizationType[kind])
    assert np.array_equal(blocks.dequantize(kind, rows, KIND[kind].block_bytes), theirs)


def test_bfloat16_is_rounded_as_torch_rounds() -> None:
    values = np.random.default_rng(2).normal(size=10_000).astype(np.float32) * 1e3
    ours = torch.from_numpy(blocks.bfloat16(values)).view(torch.bfloat16)
    assert torch.equal(ours, torch.from_numpy(values).bfloat16())


def extremes() -> np.ndarray[Any, Any]:
    """Rows of all sizes that a float32 has, zeros, ties of the extreme, halves between two codes."""
    rows = np.random.default_rng(3).normal(size=(400, 64)).astype(np.float32)
    rows *= np.float32(10.0) ** np.random.default_rng(4).integers(-30, 6, (400, 1)).astype(np.float32)
    rows[0] = 0
    rows[1, :] = np.linspace(-1, 1, 64)
    rows[2, :] = (np.arange(64) - 32) / 2
    rows[3, ::2], rows[3, 1::2] = 1, -1
    rows[4, :] = (np.arange(64) % 5 - 2) * 63.5
    rows[5] = -0.0
    return rows


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_weights_are_encoded_bit_for_bit_as_ggml_does(kind: str) -> None:
    rows = extremes()
    with np.errstate(over="ignore"):
        theirs = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind]).view(np.uint8)
        assert np.array_equal(blocks.quantize(kind, rows), theirs)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_codes_go_out_as_they_came_in(kind: str) -> None:
    rows = raw(kind)
    parts = blocks.quantized_parts(kind, rows, KIND[kind].block_bytes)
    kept = unpack_int4(torch.from_numpy(parts["codes"]), 512).numpy() if kind == "Q4_0" else parts["codes"]
    assert np.array_equal(blocks.pack(kind, kept, parts["scales"]), rows)
