"""Weights as their file keeps them while a gradient is computed, and as they were before and after."""

from __future__ import annotations

import pytest
import torch

from sprat import quant
from sprat.config import QuantConfig
from sprat.config.sizes import size
from sprat.model import Transformer

KINDS = {"experts": {}, "dense": {"dense": True}, "tied": {"tie_word_embeddings": True}}


def model(kind: str) -> Transformer:
    """One with an MTP module, whose widths no group divides."""
    config = size("pico", vocab_size=96, hidden_size=40, num_nextn_predict_layers=1, **KINDS[kind])  # type: ignore[arg-type]
    return Transformer.create(config, 1)


def loss(net: Transformer) -> torch.Tensor:
    tokens_BT = torch.arange(60).view(3, 20) % 96
    hidden = net.hidden(tokens_BT)
    ahead = net.mtp_hidden(hidden, tokens_BT, depth=1)
    return (net.head(hidden.x_BTD).square().mean() + net.head(ahead.x_BTD).square().mean()) * 100


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [QuantConfig(), QuantConfig(bits=8, group=64, head_bits=4)], ids=["4", "8"])
def test_what_is_computed_meanwhile_is_what_the_quantised_model_computes(kind: str, config: QuantConfig) -> None:
    net = model(kind)
    kept = quant.dequantize_model(quant.quantize_model(net, config))
    with quant.fake_quantize(net, config):
        assert all(torch.equal(value, kept.state_dict()[name]) for name, value in net.state_dict().items())
        total = loss(net)
        total.backward()
    theirs = loss(kept)
    theirs.backward()
    assert torch.equal(total, theirs) and not torch.equal(total, loss(net))
    other = dict(kept.named_parameters())
    for name, weight in net.named_parameters():  # straight through: the gradient there is the gradient here
        assert weight.grad is not None and torch.equal(weight.grad, other[name].grad), name


def test_every_weight_is_again_what_it_was_also_after_a_fault() -> None:
    net = model("experts")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(RuntimeError, match="stop"), quant.fake_quantize(net, QuantConfig()):
        assert any(not torch.equal(value, before[name]) for name, value in net.state_dict().items())
        raise RuntimeError("stop")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
