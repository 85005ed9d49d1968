"""Experts that little text reaches: counted and named, judged by all of it, or refused."""

from __future__ import annotations

import pytest
import torch

from sprat import quant
from sprat.config.quant import FewTokens, QuantizeConfig
from sprat.errors import CheckpointError, DataError
from sprat.model import Transformer
from sprat.quant.calibration import calibrate
from sprat.quant.int4 import Scheme, quantize_tensor
from tests.unit.quant.families import model_of, text

STACK = "layers.1.mlp.experts"


def one_idle(family: str = "v3") -> Transformer:
    """A model whose expert 2 is never chosen."""
    model = model_of(family)
    [moe] = model.moe_layers()
    moe.gate.e_score_correction_bias[2] = -100.0
    return model


def squeezed(few_tokens: FewTokens, expert_tokens: int = 0) -> tuple[Transformer, quant.QuantizeFacts]:
    """The model with an idle expert, by GPTQ, and what came up."""
    facts = quant.QuantizeFacts()
    config = QuantizeConfig(rounding="gptq", few_tokens=few_tokens, expert_tokens=expert_tokens)
    small = quant.quantize_model(one_idle(), config, calibration_BT=text(32, 1), facts=facts)
    return small, facts


def test_an_idle_expert_is_named_and_rounded_to_the_nearest() -> None:
    small, facts = squeezed("nearest")
    assert facts.tokens["few_tokens"] == {"handled": "nearest", "count": 1, "names": [f"{STACK}.2"]}
    [moe] = one_idle().moe_layers()
    with torch.no_grad():
        hidden = one_idle().hidden(text(32, 1))
    load = sorted(hidden.routing[0].load_E.tolist())
    seen = facts.tokens["expert_tokens"]  # of the model as it is being rounded: a token at a tie may go elsewhere
    assert seen["min"] == load[0] == 0 and abs(seen["median"] - (load[1] + load[2]) / 2) < 20
    packed = quant.quantized_weights(small)[f"{STACK}.w_gate_EFD"]
    plain = quantize_tensor(moe.experts.w_gate_EFD)
    same = [torch.equal(packed.codes[expert], plain.codes[expert]) for expert in range(4)]
    assert same == [False, False, True, False]


def test_all_tokens_pass_an_expert_that_saw_too_few() -> None:
    """Its codes are those of GPTQ on everything that reached the layer."""
    small, facts = squeezed("all")
    assert facts.tokens["few_tokens"]["count"] == 1
    nearest, _ = squeezed("nearest")
    packed, plain = (quant.quantized_weights(each)[f"{STACK}.w_gate_EFD"] for each in (small, nearest))
    same = [torch.equal(packed.codes[expert], plain.codes[expert]) for expert in range(4)]
    assert same == [True, True, False, True]


def test_a_floor_of_the_users_own_and_a_refusal_by_name() -> None:
    _, facts = squeezed("nearest", expert_tokens=10**6)
    assert facts.tokens["few_tokens"]["count"] == 4
    with pytest.raises(DataError, match=f"0 tokens of text reach expert 2.*{STACK}"):
        squeezed("refuse")
    model = model_of("v3")
    full = calibrate(model, text(64, 1), lambda name: Scheme(), few_tokens="refuse", expert_tokens=1)
    assert full.seen.few == [] and min(full.seen.counts[STACK]) > 0


def test_stacks_that_lie_otherwise_are_refused_by_name() -> None:
    model = model_of("v3")
    [moe] = model.moe_layers()
    moe.experts.w_up_EFD = torch.nn.Parameter(moe.experts.w_up_EFD.mT.contiguous())
    with pytest.raises(CheckpointError, match=rf"stacked as \[4, 48, 32\], not as \[4, 32, 48\].*{STACK}.w_up_EFD"):
        quant.quantize_model(model)


def test_dense_models_tell_nothing_of_experts() -> None:
    facts = quant.QuantizeFacts()
    config = QuantizeConfig(rounding="gptq")
    quant.quantize_model(model_of("llama"), config, calibration_BT=text(32, 1), facts=facts)
    assert facts.tokens == {}


@pytest.mark.parametrize("family", ["llama", "v3"])
def test_a_matrix_of_more_channels_than_tokens_is_named_too(family: str) -> None:
    """It once was rounded to the nearest under the name of GPTQ, without a word."""
    facts, model = quant.QuantizeFacts(), model_of(family)
    config = QuantizeConfig(rounding="gptq")
    short = text(2, 1)  # 64 tokens: 48 channels of the stream, but 80 of a feed-forward
    small = quant.quantize_model(model, config, calibration_BT=short, facts=facts)
    few = [name for name in facts.tokens["few_tokens"]["names"] if "experts" not in name]
    assert few and all(name.endswith("mlp.down_proj") for name in few)
    packed, weights = quant.quantized_weights(small), model.state_dict()
    for name in few:
        assert packed[f"{name}.weight"].rounding == "nearest"
        assert torch.equal(packed[f"{name}.weight"].codes, quantize_tensor(weights[f"{name}.weight"]).codes)
    assert packed["layers.0.self_attn.o_proj.weight"].rounding == "gptq"
    with pytest.raises(DataError, match=f"64 tokens of text reach a matrix of 80 input channels.*{few[0]}"):
        quant.quantize_model(model, config.replace(few_tokens="refuse"), calibration_BT=short)
    every = quant.quantize_model(model, config.replace(few_tokens="all"), calibration_BT=short)
    fitted = quant.quantized_weights(every)[f"{few[0]}.weight"]
    assert fitted.rounding == "gptq" and not torch.equal(fitted.codes, packed[f"{few[0]}.weight"].codes)
