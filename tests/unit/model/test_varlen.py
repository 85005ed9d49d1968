"""What users get: the fast way through packed rows is the same function, gradients included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sprat.kernels import fused, native_library
from sprat.model import Transformer, varlen
from sprat.model.forward_context import forward_context
from sprat.model.norm import rms_norm

from .conftest import tiny


def packings() -> dict[str, Tensor | None]:
    ragged = torch.tensor([[1] * 5 + [2] * 9 + [3] + [0] * 5, [4] * 20, [5] * 10 + [6] * 10])
    return {"whole rows": None, "ragged": ragged, "single tokens": torch.arange(60).view(3, 20)}


native = pytest.mark.skipif(native_library() is None, reason="no C++ compiler: stock operators do the work")


@native
@pytest.mark.parametrize("name", packings())
def test_varlen_attention_equals_the_masked_form(name: str) -> None:
    model = Transformer.create(tiny(), 0)
    attention, segments = model.layers[0].self_attn, packings()[name]
    generator = torch.Generator().manual_seed(1)
    x_BTD = torch.randn(3, 20, 24, generator=generator).requires_grad_()
    pull = torch.randn(3, 20, 24, generator=generator)
    results = []
    for use_varlen in (False, True):
        context = forward_context(
            model.rotary,
            torch.zeros(3, 20, dtype=torch.long),
            segments_BT=segments,
            positions_BT=None,
            cache=None,
            valid_BT=None,
            use_varlen=use_varlen,
        )
        assert (context.varlen is None) == (not use_varlen)
        out = attention(x_BTD, context)
        results.append((out, *torch.autograd.grad(out, [x_BTD, *attention.parameters()], pull)))
    for masked, fast in zip(*results, strict=True):
        assert (masked - fast).abs().max() < 1e-4


@native
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    heads=st.integers(1, 3),
    half=st.integers(1, 9),
    nope=st.integers(1, 40),
    value=st.integers(1, 40),
)
def test_any_shape_of_documents_equals_softmax_written_out(
    lengths: list[int], heads: int, half: int, nope: int, value: int
) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens, rope = sum(lengths), 2 * half
    q = torch.randn(tokens, heads, nope + rope, generator=generator).requires_grad_()
    kv = torch.randn(tokens, heads, nope + value, generator=generator).requires_grad_()
    k_rope = torch.randn(tokens, rope, generator=generator).requires_grad_()
    freqs_cis = torch.polar(torch.ones(tokens, half), torch.rand(tokens, half, generator=generator))
    segments = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    metadata = varlen.varlen_metadata(segments[None], 1, tokens, freqs_cis)
    assert metadata is not None and metadata.lengths.tolist() == lengths
    fast = varlen.varlen_attention(q, kv, k_rope, metadata, 0.3)

    def rotated(x: Tensor) -> Tensor:
        real, imaginary = x[..., 0::2], x[..., 1::2]
        cosine, sine = freqs_cis.real[:, None], freqs_cis.imag[:, None]
        return torch.stack((real * cosine - imaginary * sine, real * sine + imaginary * cosine), -1).flatten(-2)

    shared = rotated(k_rope[:, None]).expand(tokens, heads, rope)
    keys, queries = torch.cat((kv[..., :nope], shared), -1), torch.cat((q[..., :nope], rotated(q[..., nope:])), -1)
    scores = torch.einsum("ihd,jhd->hij", queries, keys) * 0.3
    hidden = (segments[:, None] != segments) | torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    plain = torch.einsum("hij,jhv->ihv", scores.masked_fill(hidden, float("-inf")).softmax(-1), kv[..., nope:])
    pull = torch.randn(plain.shape, generator=generator)
    assert (fast - plain).abs().max() < 1e-5
    for ours, theirs in zip(
        torch.autograd.grad(fast, (q, kv, k_rope), pull), torch.autograd.grad(plain, (q, kv, k_rope), pull), strict=True
    ):
        assert (ours - theirs).abs().max() < 1e-4


def test_long_documents_are_left_to_stock_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    freqs_cis = torch.ones(300, 2, dtype=torch.complex64)
    monkeypatch.setattr(varlen, "MAX_SEQLEN", 280)
    assert varlen.varlen_metadata((torch.arange(300) >= 281).long().expand(4, 300), 4, 300, freqs_cis) is None
    monkeypatch.setattr(fused, "native_library", lambda: None)
    assert varlen.varlen_metadata(None, 4, 8, freqs_cis[:8]) is None


def test_norm_gradient_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, generator=generator).requires_grad_()
    weight = torch.randn(5, generator=generator).requires_grad_()
    pull = torch.randn(6, 5, generator=generator)
    plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight
    ours = rms_norm(x, weight, 1e-5)
    assert (plain - ours).abs().max() < 1e-6
    for a, b in zip(
        torch.autograd.grad(plain, (x, weight), pull), torch.autograd.grad(ours, (x, weight), pull), strict=True
    ):
        assert (a - b).abs().max() < 1e-5


def test_norm_in_half_precision_computes_in_single() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 100
    half = rms_norm(x.bfloat16(), torch.ones(64, dtype=torch.bfloat16), 1e-6)
    assert half.dtype == torch.bfloat16
    assert (half.float() - rms_norm(x, torch.ones(64), 1e-6)).abs().max() < 0.03
