"""Fresh weights have the published spread, and no two tensors start alike."""

from __future__ import annotations

import pytest
import torch

from sprat.model import Transformer

from .conftest import tiny


def test_spread_is_that_of_gpt2_with_the_residual_stream_kept_even() -> None:
    """0.02 everywhere, and 0.02 / sqrt(2 * layers) for what writes into the stream; gains one, correction zero."""
    model = Transformer.create(tiny(hidden_size=64, moe_intermediate_size=32, initializer_range=0.02), 3)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() == 1:
            assert (tensor == ("norm" in name)).all(), name
        elif tensor.numel() > 2000:
            wanted = 0.02 / 4**0.5 if "o_proj" in name or "down" in name else 0.02
            assert tensor.std().item() == pytest.approx(wanted, rel=0.08), name
            assert abs(tensor.mean().item()) < 0.1 * wanted, name


def test_no_two_tensors_start_alike() -> None:
    model = Transformer.create(tiny(), 0)
    firsts = [tuple(tensor.flatten()[:4].tolist()) for tensor in model.parameters() if tensor.dim() > 1]
    assert len(set(firsts)) == len(firsts)
    first, second = model.moe_layers()[0].experts.w_up_EFD[:2]
    assert not torch.equal(first, second)
