"""What users get: the fast way through packed rows is the same function, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sprat.model import Transformer, documents
from sprat.model.norm import rms_norm
from sprat.model.step import plan

from .conftest import tiny


def packings() -> dict[str, Tensor | None]:
    ragged = torch.tensor([[1] * 5 + [2] * 9 + [3] + [0] * 5, [4] * 20, [5] * 10 + [6] * 10])
    return {"whole rows": None, "ragged": ragged, "single tokens": torch.arange(60).view(3, 20)}


@pytest.mark.parametrize("scores", [1, 1 << 17])
@pytest.mark.parametrize("name", packings())
def test_document_attention_equals_the_masked_form(name: str, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "CHUNK_SCORES", scores)
    monkeypatch.setattr(documents, "WORTH", 9.0)
    model = Transformer.create(tiny(), 0)
    attention, segments = model.layers[0].self_attn, packings()[name]
    generator = torch.Generator().manual_seed(1)
    x_BTD = torch.randn(3, 20, 24, generator=generator).requires_grad_()
    pull = torch.randn(3, 20, 24, generator=generator)
    results = []
    for heads in (0, 3):
        step = plan(
            model.rotary,
            torch.zeros(3, 20, dtype=torch.long),
            segments_BT=segments,
            positions_BT=None,
            cache=None,
            valid_BT=None,
            heads=heads,
        )
        assert (step.documents is None) == (heads == 0)
        out = attention(x_BTD, step)
        results.append((out, *torch.autograd.grad(out, [x_BTD, *attention.parameters()], pull)))
    for masked, fast in zip(*results, strict=True):
        assert (masked - fast).abs().max() < 1e-4


def test_documents_are_cut_only_where_it_pays() -> None:
    turns = torch.ones(300, 2, dtype=torch.complex64)
    short = (torch.arange(32) // 8).expand(4, 32)
    assert documents.cut(short, 4, 32, 2, turns[:32]) is not None
    assert documents.cut(None, 4, 32, 2, turns[:32]) is None  # whole rows
    long = (torch.arange(300) >= 280).long().expand(4, 300)
    assert documents.cut(long, 4, 300, 2, turns) is None


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
