"""Quantized models compute what their codes say, near to what they were made from."""

from __future__ import annotations

import torch

from sprat import quant
from sprat.config import QuantConfig
from sprat.config.sizes import size
from sprat.model import KVCache, Transformer
from sprat.quant.layers import QuantLinear

TOKENS = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))


def tiny(**changes: object) -> Transformer:
    """A mixture of experts with MTP, whose widths no group divides."""
    return Transformer.create(size("pico", vocab_size=96, hidden_size=40, num_nextn_predict_layers=1, **changes), 1)


def test_the_quantised_model_is_the_dense_model_of_its_own_weights() -> None:
    dense = tiny()
    small = quant.quantize_model(dense, materialize=False)
    with torch.no_grad():
        for name, module in small.named_modules():
            if isinstance(module, QuantLinear):
                dense.get_submodule(name).weight.copy_(module.weight)
        for mine, theirs in zip(dense.moe_layers(), small.moe_layers(), strict=True):
            for weight in ("w_gate_EFD", "w_up_EFD", "w_down_EDF"):
                getattr(mine.experts, weight).copy_(getattr(theirs.experts, weight))
        dense.embed_tokens.weight.copy_(small.embed_tokens.weight)
        torch.testing.assert_close(small(TOKENS), dense(TOKENS), atol=1e-6, rtol=1e-5)
        cache = KVCache.create(small.config, 2, 20)
        stepped = torch.cat(
            [small(TOKENS[:, :13], cache=cache)] + [small(TOKENS[:, t : t + 1], cache=cache) for t in range(13, 20)], 1
        )
        torch.testing.assert_close(stepped, dense(TOKENS), atol=1e-4, rtol=1e-4)


def test_the_answers_stay_near_and_the_original_stays_as_it_was() -> None:
    dense = tiny()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    with torch.no_grad():
        exact = dense(TOKENS)
        errors = [
            float((quant.quantize_model(dense, QuantConfig(bits=bits))(TOKENS) - exact).norm() / exact.norm())
            for bits in (8, 4)
        ]
    assert errors[0] < 0.1 and 2 * errors[0] < errors[1] < 0.5, errors
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
