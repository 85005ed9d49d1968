"""Scales that learn: their gradient is that of the dense weights by the chain rule, and codes stay what they are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from sprat import quant
from sprat.config.quant import QuantizeConfig
from sprat.errors import ConfigError
from sprat.model import Transformer
from sprat.quant.scales import keep_scales, learn_scales
from tests.unit.quant.families import model_of, text

CONFIGS = {"symmetric": QuantizeConfig(), "minimums": QuantizeConfig(symmetric=False), "wide": QuantizeConfig(group=64)}


def loss(model: Transformer) -> Tensor:
    return model(text(4, 3)).square().mean()


def by_group(values: Tensor, size: int) -> Tensor:
    """Sums of neighbors [..., G], written down once more: a loop over slices."""
    return torch.stack([part.sum(-1) for part in values.split(size, -1)], -1)


@pytest.mark.parametrize("family", ["llama", "v3"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_gradient_of_a_scale_is_that_of_its_weights(family: str, kind: str) -> None:
    """d loss / d change = sum over the group of d loss / d w · (w - minimum); of a dense copy by torch."""
    small = quant.quantize_model(model_of(family), CONFIGS[kind])
    dense = quant.dequantize_model(small)
    loss(dense).backward()
    old = {name: packed.to_tensor() for name, packed in quant.quantized_weights(small).items()}
    learned = learn_scales(small)
    assert len(learned) == len(old) - (1 if small.config.tie_word_embeddings else 2)  # not embedding and head
    loss(small).backward()
    for name, packed in quant.quantized_weights(small).items():
        if name in ("embed_tokens.weight", "head.weight"):
            continue
        weight = dense.get_parameter(name)
        minimums = old[name].minimums
        floor = 0 if minimums is None else minimums.float().repeat_interleave(packed.group, -1)[..., : packed.width]
        assert weight.grad is not None
        expected = by_group(weight.grad * (weight.detach() - floor), packed.group)
        torch.testing.assert_close(packed.get_parameter("change").grad, expected, atol=1e-6, rtol=1e-3)
    frozen = [name for name, p in small.named_parameters() if p.requires_grad and not name.endswith("change")]
    assert not frozen


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_kept_has_the_same_codes_and_the_learned_scales(kind: str) -> None:
    small = quant.quantize_model(model_of("v3"), CONFIGS[kind])
    before, names = copy.deepcopy(small.state_dict()), set(small.state_dict())
    for packed in learn_scales(small):
        packed.change.data.fill_(0.5)
    keep_scales(small)
    after = small.state_dict()
    assert set(after) == names
    for name, tensor in after.items():
        is_inner = name.endswith(".scales") and not name.startswith(("embed_tokens", "head"))
        assert torch.equal(tensor, (before[name].float() * 1.5).half() if is_inner else before[name]), name
    for packed in learn_scales(small):
        packed.change.data.fill_(0.5)
    keep_scales(small, learned=False)
    assert all(torch.equal(tensor, small.state_dict()[name]) for name, tensor in after.items())


def test_matrices_by_name_keep_eight_bits() -> None:
    model = model_of("v3")
    config = QuantizeConfig(rounding="gptq", eight_bits=("down_proj", "layers.0.self_attn"))
    packed = quant.quantized_weights(quant.quantize_model(model, config, calibration_BT=text(32, 1)))
    wide = {name for name, each in packed.items() if each.bits == 8} - {"embed_tokens.weight", "head.weight"}
    stack = "layers.1.mlp.experts.w_down_EDF"  # published as model.layers.1.mlp.experts.0.down_proj.weight, …
    assert wide == {name for name in packed if "down_proj" in name or "layers.0.self_attn" in name} | {stack}
    named = quant.quantize_model(model, QuantizeConfig(head_bits=4, eight_bits=("lm_head", "model.layers.1.mlp")))
    wide_names = {name for name, each in quant.quantized_weights(named).items() if each.bits == 8}
    assert wide_names == {"head.weight", *(name for name in packed if "layers.1.mlp" in name)}
    with pytest.raises(ValueError, match="at least 1 character"):
        QuantizeConfig(eight_bits=("",))  # which is in all names
    assert {packed[name].group for name in wide} <= {32}
    with pytest.raises(ConfigError, match="no matrix of the model is called 'down_prj'"):
        quant.quantize_model(model, config.replace(eight_bits=("down_prj",)), calibration_BT=text(32, 1))
