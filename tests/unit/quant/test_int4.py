"""INT4: codes that fit, an error that is bounded and never worse than the plain choice of scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sprat.config.quant import QuantizeConfig
from sprat.errors import CheckpointError
from sprat.quant import quantize_model, quantized_weights
from sprat.quant.int4 import dequantize_tensor, pack_int4, quantize_tensor, unpack_int4
from tests.unit.quant.families import model_of


def plain(weight: Tensor, group: int) -> Tensor:
    """Round-to-nearest with the largest magnitude over 7 as a float16 scale."""
    width = weight.shape[-1]
    groups = torch.nn.functional.pad(weight, (0, -width % group)).view(*weight.shape[:-1], -1, group)
    scale = (groups.abs().amax(-1, keepdim=True) / 7).half().float().clamp(min=1e-9)
    return ((groups / scale).round().clamp(-8, 7) * scale).flatten(-2)[..., :width]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 5),
    st.sampled_from([32, 64]),
    st.sampled_from([1e-3, 0.02, 1.0, 300.0]),
    st.integers(0, 999),
)
def test_no_group_is_worse_than_plain_rounding(width: int, rows: int, group: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator) * spread
    weight[0, 0] *= 8  # an outlier
    codes = quantize_tensor(weight, group=group)
    back = dequantize_tensor(codes)
    assert back.shape == weight.shape and codes.scales.shape == (rows, -(-width // group))
    assert codes.codes.dtype == torch.uint8 and codes.codes.shape == (rows, (width + 1) // 2)

    def errors(of: Tensor) -> Tensor:
        error = torch.nn.functional.pad((weight - of).double().square(), (0, -width % group))
        return error.view(rows, -1, group).sum(-1)

    assert (errors(back) <= errors(plain(weight, group)) * (1 + 1e-5) + 1e-18).all()
    steps = codes.scales.float().abs().repeat_interleave(group, -1)[:, :width]
    # Inside the range of the codes the error is half a step; beyond it the value sticks to the last code.
    inside = (weight.abs() <= steps * 7) & (steps > 0)
    assert ((weight - back).abs()[inside] <= steps[inside] * 0.5001 + 1e-9).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-8, 7), min_size=1, max_size=65))
def test_two_codes_share_a_byte_and_come_back(codes: list[int]) -> None:
    row = torch.tensor([codes, codes[::-1]], dtype=torch.int8)
    packed = pack_int4(row)
    assert packed.shape == (2, (len(codes) + 1) // 2)
    assert torch.equal(unpack_int4(packed, len(codes)), row)


def test_the_better_of_both_ends_takes_a_fifth_off_the_squared_error_of_gaussian_weights() -> None:
    weight = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    error = (dequantize_tensor(quantize_tensor(weight)) - weight).square().mean()
    assert error < 0.8 * (plain(weight, 32) - weight).square().mean()


def test_no_weight_is_clipped_by_more_than_half_a_code() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(4))
    codes = quantize_tensor(weight)
    steps = codes.scales.float().abs().repeat_interleave(32, -1)
    assert ((weight - dequantize_tensor(codes)).abs() <= 1.0 * steps).all()


def test_values_that_the_codes_can_hold_come_back_exactly() -> None:
    codes = torch.randint(-8, 8, (4, 64), generator=torch.Generator().manual_seed(1))
    codes[:, ::32] = -8
    for scale in (0.0, 0.125, -0.5):
        weight = codes.float() * scale
        assert torch.equal(dequantize_tensor(quantize_tensor(weight)), weight)


def test_eight_bits_keep_a_row_within_half_a_step_and_sixteen_within_bfloat16() -> None:
    weight = torch.randn(9, 70, generator=torch.Generator().manual_seed(2))
    eight = quantize_tensor(weight, bits=8, group=0)
    assert eight.scales.shape == (9, 1) and eight.codes.dtype == torch.int8
    assert (
        (dequantize_tensor(eight) - weight).square().mean(-1) <= (weight.abs().amax(-1) / 127).square() / 12 * 1.3
    ).all()
    sixteen = quantize_tensor(weight, bits=16)
    assert torch.equal(dequantize_tensor(sixteen), weight.bfloat16().float())


def test_large_matrices_in_chunks_are_what_small_ones_are() -> None:
    weight = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(3))
    whole = quantize_tensor(weight)
    for expert in range(3):
        alone = quantize_tensor(weight[expert])
        assert torch.equal(alone.codes, whole.codes[expert]) and torch.equal(alone.scales, whole.scales[expert])


FORMS = {
    "four": QuantizeConfig(head_bits=16),
    "eight": QuantizeConfig(bits=8, head_bits=16),
    "minimums": QuantizeConfig(symmetric=False, head_bits=16),
    "zeros": QuantizeConfig(symmetric=False, zero_points=True, head_bits=16),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [10.0**power for power in range(-9, 7)])
def test_weights_are_kept_to_a_third_or_refused_by_name(form: str, size: float) -> None:
    """A matrix of weights that float16's scales do not reach once became all zeros, or was clipped, without a word."""
    model = model_of("llama")
    linear = model.layers[1].mlp.down_proj  # type: ignore[union-attr]
    with torch.no_grad():
        weight = linear.weight.normal_(generator=torch.Generator().manual_seed(3)).mul_(size).clone()  # type: ignore[union-attr,operator]
    try:
        small = quantize_model(model, FORMS[form])
    except CheckpointError as error:
        assert "layers.1.mlp.down_proj.weight" in str(error) and not 1e-4 <= size <= 1e4
    else:
        kept = quantized_weights(small)["layers.1.mlp.down_proj.weight"].dequantize()
        assert float((kept - weight).norm() / weight.norm()) < 1 / 3
