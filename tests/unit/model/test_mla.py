"""What users get: the fast way through packed rows is the same function, gradients included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sprat.kernels import native_library
from sprat.model import Transformer
from sprat.model.forward_context import forward_context

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
