"""Codes with a minimum, and scales that clip: less error, exact zero points, and the same on disk and natively."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sprat import quant
from sprat.config.quant import QuantizeConfig
from sprat.engine.backend import Batch
from sprat.engine.backends.native import NativeBackend
from sprat.formats import quantized
from sprat.kernels import native, unavailable_reason
from sprat.quant.gptq import gptq_quantize, nearest_quantize
from sprat.quant.int4 import QuantizedTensor, Scheme, dequantize_tensor, quantize_tensor, unpack_int4
from tests.unit.quant.families import divergence, model_of, text

ASYMMETRIC = Scheme(symmetric=False)


def plain_asymmetric(weight: Tensor, group: int) -> Tensor:
    """The published rounding: least and greatest weight at the ends of the codes, float16 scale and minimum."""
    width = weight.shape[-1]
    out = torch.empty_like(weight)
    for at in range(0, width, group):
        part = weight[..., at : at + group]
        low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
        scale, low = ((high - low) / 15).half().float().clamp(min=1e-9), low.half().float()
        out[..., at : at + group] = ((part - low) / scale).round().clamp(0, 15) * scale + low
    return out


@pytest.mark.parametrize("width", [40, 128, 200])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_minimum_never_costs_more_than_plain_rounding_and_serves_lopsided_weights(width: int, group: int) -> None:
    weight = torch.randn(48, width, generator=torch.Generator().manual_seed(0)).abs() + 0.5
    packed = quantize_tensor(weight, **ASYMMETRIC._replace(group=group)._asdict())
    assert packed.minimums is not None and packed.minimums.shape == packed.scales.shape

    def error(of: Tensor) -> float:
        return float((of - weight).square().mean())

    assert error(dequantize_tensor(packed)) < 0.25 * error(dequantize_tensor(quantize_tensor(weight, group=group)))
    if width % group == 0:
        assert error(dequantize_tensor(packed)) <= error(plain_asymmetric(weight, group)) * (1 + 1e-5)


def test_a_grid_that_is_there_already_is_found_again() -> None:
    codes = torch.randint(0, 16, (64, 128), generator=torch.Generator().manual_seed(0)).float()
    codes[:, ::32], codes[:, 1::32] = 0, 15
    weight = codes * 0.125 - 0.75
    assert torch.equal(dequantize_tensor(quantize_tensor(weight, symmetric=False)), weight)


def test_integer_zero_points_stand_for_the_same_weights_to_the_last_bit() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-5, 2, 64).unsqueeze(1)
    packed = quantize_tensor(weight, symmetric=False, zero_points=True, clip="mse")
    assert packed.minimums is not None
    scales = packed.scales.double()
    zero = (-packed.minimums.double() / scales.where(scales > 0, 1)).round()
    assert zero.min() >= 0 and zero.max() <= 15
    codes = (unpack_int4(packed.codes, packed.width) & 15).double().unflatten(-1, (-1, 32))
    integer = ((codes - zero.unsqueeze(-1)) * scales.unsqueeze(-1)).flatten(-2)  # as AWQ's and GPTQ's runtimes have it
    assert torch.equal(dequantize_tensor(packed).double(), integer)
    free = quantize_tensor(weight, symmetric=False)
    assert (dequantize_tensor(packed) - weight).norm() < 1.15 * (dequantize_tensor(free) - weight).norm()


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_errs_less_on_weights_with_outliers_and_what_is_loud_counts(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    weight[:, ::32] *= 2
    whole = quantize_tensor(weight, group=128, symmetric=symmetric)
    clipped = quantize_tensor(weight, group=128, symmetric=symmetric, clip="mse")

    def errors(packed: QuantizedTensor) -> Tensor:
        return (dequantize_tensor(packed).view_as(weight) - weight).square()

    assert errors(clipped).sum() < 0.95 * errors(whole).sum()
    importance = torch.ones(128)
    importance[1::2] = 100.0
    scheme = Scheme(4, 128, symmetric, "mse")
    weighted = nearest_quantize(weight.unsqueeze(0), torch.diag(importance).unsqueeze(0), scheme)
    assert (errors(weighted) * importance).sum() < (errors(clipped) * importance).sum()


def test_gptq_errs_less_than_the_nearest_on_the_same_asymmetric_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, 48, 128, generator=generator) + 0.3
    few = torch.randn(900, 32, generator=generator) @ torch.randn(32, 128, generator=generator)
    inputs = few + 0.3 * torch.randn(900, 128, generator=generator)
    hessian_EII = (inputs.T @ inputs).unsqueeze(0)
    fitted = gptq_quantize(weight, hessian_EII, ASYMMETRIC)
    nearest = nearest_quantize(weight, hessian_EII, ASYMMETRIC)
    assert fitted.minimums is not None and torch.equal(fitted.minimums, nearest.minimums)  # type: ignore[arg-type]

    def error(of: QuantizedTensor) -> float:
        return float((inputs @ (dequantize_tensor(of)[0] - weight[0]).T).square().mean())

    assert error(fitted) < 0.5 * error(nearest)


@pytest.mark.parametrize("family", ["llama", "v3"])
def test_a_model_with_minimums_comes_back_from_disk(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    small = quant.quantize_model(model, QuantizeConfig(symmetric=False, group=128, head_bits=4))
    quantized.save(small, tmp_path)
    again, tokens = quantized.load(tmp_path), text(4, 3)
    with torch.no_grad():
        assert torch.equal(again(tokens), small(tokens))
    assert all(packed.minimums is not None for packed in quant.quantized_weights(again).values())
    symmetric = quant.quantize_model(model, QuantizeConfig(group=128, head_bits=4))
    assert divergence(model, small, text(16, 4)) < divergence(model, symmetric, text(16, 4))


@pytest.mark.skipif(native() is None, reason=unavailable_reason())
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("family", ["llama", "v3"])
def test_every_group_runs_natively_with_and_without_minimums(family: str, group: int, symmetric: bool) -> None:
    """Rows are rounded to bytes on the way in, which costs about a hundredth."""
    small = quant.quantize_model(model_of(family), QuantizeConfig(symmetric=symmetric, group=group))
    assert NativeBackend.accepts(small) is None
    tokens = text(1, 9)
    backend = NativeBackend(small, threads=1, kv_format="f32")
    backend.reserve(1)
    places = torch.arange(32, dtype=torch.int32).numpy()
    table = places[:1].reshape(1, 1)
    batch = Batch(tokens[0].int().numpy(), places, torch.tensor([0, 32]).int().numpy(), table, places)
    with torch.no_grad():
        expected = small(tokens)[0]
    error = (backend.run(batch) - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.median() < 0.03
