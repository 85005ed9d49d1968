"""GPTQ: errors that cancel on text, plain rounding where no text speaks, and a model that comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sprat import quant
from sprat.config import QuantConfig
from sprat.config.sizes import size
from sprat.errors import CheckpointError, ConfigError, DataError
from sprat.formats import quantized
from sprat.model import Transformer
from sprat.quant.calibration import calibrate, hessian
from sprat.quant.gptq import GPTQSettings, gptq_quantize
from sprat.quant.int4 import QuantizedTensor, Scheme, dequantize_tensor, quantize_tensor
from sprat.quant.layers import scheme_of

GPTQ = QuantConfig(rounding="gptq")


def text(rows: int, seed: int) -> Tensor:
    """Tokens of which a few are frequent, as in real text."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, 32, generator=generator).pow(3) * 96).long()


def model(**changes: object) -> Transformer:
    """A mixture of experts with MTP, whose widths no group divides."""
    return Transformer.create(size("pico", vocab_size=96, hidden_size=40, num_nextn_predict_layers=1, **changes), 1)


def correlated(rows: int, width: int, seed: int) -> Tensor:
    """Inputs of few directions and a little of all."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(rows, width // 4, generator=generator) @ torch.randn(width // 4, width, generator=generator)
    return few + 0.3 * torch.randn(rows, width, generator=generator)


@pytest.mark.parametrize("width", [40, 128, 200])
def test_outputs_err_half_as_much_as_with_plain_rounding_on_inputs_not_seen(width: int) -> None:
    weight = torch.randn(48, width, generator=torch.Generator().manual_seed(0))
    inputs = correlated(900, width, 1)
    fitted = gptq_quantize(weight.unsqueeze(0), hessian([inputs[:600]]), Scheme(4))
    assert fitted.codes.shape == (1, 48, width // 2) and fitted.scales.shape == (1, 48, -(-width // 32))

    def error(of: Tensor) -> float:
        return float((inputs[600:] @ (of - weight).T).square().mean())

    assert error(dequantize_tensor(fitted)[0]) < 0.5 * error(dequantize_tensor(quantize_tensor(weight)))


@pytest.mark.parametrize("settings", [GPTQSettings(), GPTQSettings("none", 0.1), GPTQSettings(float32=True)])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_codes_are_those_of_the_papers_recursion(bits: int, settings: GPTQSettings) -> None:
    """Hassibi and Stork's step, column by column, with the inverse updated by hand instead of a Cholesky factor."""
    weight = torch.randn(1, 24, 72, generator=torch.Generator().manual_seed(0))
    hessian_EII = hessian([correlated(600, 72, 1) * torch.linspace(0.2, 3, 72)])
    fitted = gptq_quantize(weight, hessian_EII, Scheme(bits), settings)
    scales = fitted.scales[0].double().repeat_interleave(32, -1)[:, :72]
    left, work = hessian_EII[0].double(), weight[0].double().clone()
    left += settings.damping * left.diagonal().mean() * torch.eye(72)
    inverse, expected = torch.linalg.inv(left), torch.zeros(24, 72).double()
    free = torch.ones(72, dtype=torch.bool)
    order = hessian_EII[0].diagonal().argsort(descending=True).tolist()
    for column in range(72) if settings.activation_order == "none" else order:
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        expected[:, column] = (work[:, column] / scales[:, column]).round().clamp(low, high) * scales[:, column]
        wrong = (work[:, column] - expected[:, column]) / inverse[column, column]
        free[column] = False
        work[:, free] -= wrong[:, None] * inverse[column, free]
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    same = (dequantize_tensor(fitted)[0] - expected).abs() < 1e-3 * scales.abs()
    assert same.float().mean() > 0.98  # a code at a tie may fall otherwise in float32, and others follow it


def test_without_correlation_it_is_plain_rounding() -> None:
    weight = torch.randn(2, 16, 72, generator=torch.Generator().manual_seed(0))
    few = [torch.randn(70, 72), torch.randn(0, 72)]  # rows too few to speak for text
    fitted, plain = gptq_quantize(weight, hessian(few), Scheme(4)), quantize_tensor(weight)
    assert torch.equal(fitted.codes, plain.codes) and torch.equal(fitted.scales, plain.scales)


def test_experts_side_by_side_are_fitted_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    hessian_EII = hessian([correlated(200, 40, seed) for seed in range(3)])
    whole = gptq_quantize(weight, hessian_EII, Scheme(4))
    monkeypatch.setattr("sprat.quant.gptq.MAX_HESSIAN_ELEMENTS", 2 * 40 * 40)
    parts = gptq_quantize(weight, hessian_EII, Scheme(4))
    assert torch.equal(whole.codes, parts.codes) and torch.equal(whole.scales, parts.scales)
    for expert in range(3):
        alone = gptq_quantize(weight[expert : expert + 1], hessian_EII[expert : expert + 1], Scheme(4))
        assert torch.equal(alone.codes[0], whole.codes[expert])


def test_channels_that_are_always_zero_are_no_fault() -> None:
    weight, inputs = torch.randn(8, 64), correlated(200, 64, 0)
    inputs[:, 30:] = 0
    back = dequantize_tensor(gptq_quantize(weight.unsqueeze(0), hessian([inputs]), Scheme(4)))[0]
    assert torch.isfinite(back).all() and (back - weight).abs().max() < 0.5 * weight.abs().max()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_that_no_text_lights_is_rounded_to_the_nearest(bits: int) -> None:
    weight, inputs = torch.randn(2, 48, 128, generator=torch.Generator().manual_seed(0)), correlated(400, 128, 0)
    inputs[:, 32:96] = 0
    fitted, plain = (
        gptq_quantize(weight, hessian([inputs, inputs]), Scheme(bits)),
        quantize_tensor(weight, bits=bits),
    )
    assert torch.equal(fitted.scales[..., 1:3], plain.scales[..., 1:3])
    assert torch.equal(dequantize_tensor(fitted)[..., 32:96], dequantize_tensor(plain)[..., 32:96])
    assert not torch.equal(dequantize_tensor(fitted)[..., :32], dequantize_tensor(plain)[..., :32])


def test_a_silent_channel_among_lit_ones_is_not_clipped_for_them() -> None:
    weight = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))
    inputs = torch.zeros(200, 32)
    inputs[:, 0] = torch.randn(200, generator=torch.Generator().manual_seed(1))
    fitted = gptq_quantize(weight, hessian([inputs]), Scheme(4))
    back, plain = (dequantize_tensor(codes) for codes in (fitted, quantize_tensor(weight)))
    silent = [float((each - weight)[..., 1:].square().mean()) for each in (back, plain)]
    assert silent[0] < 1.1 * silent[1]


@pytest.mark.parametrize("experts", [0, 8])
def test_padding_and_neighbours_do_not_vote(experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows packed two to a row and padded give the sums of the same rows one by one, whatever the padding holds."""
    changes = {"n_routed_experts": experts, "first_k_dense_replace": 0} if experts else {"n_routed_experts": 0}
    alone, packed = text(96, 1), torch.full((48, 80), 95)
    segments = torch.zeros(48, 80, dtype=torch.long)
    packed[:, :32], packed[:, 32:64] = alone[:48], alone[48:]
    segments[:, :32], segments[:, 32:64] = 1, 2

    def sums(tokens: Tensor, segments: Tensor | None) -> dict[str, Tensor]:
        """``X^T X`` of each matrix; all are rounded alike, so that no rounding of a sum decides about a code."""
        found: list[Tensor] = []

        def noted(weight: Tensor, hessian_EII: Tensor, scheme: Scheme, settings: object) -> QuantizedTensor:
            found.append(hessian_EII.clone())
            return quantize_tensor(weight, **scheme._asdict())

        monkeypatch.setattr("sprat.quant.calibration.gptq_quantize", noted)
        names = calibrate(model(**changes), tokens, lambda name: scheme_of(GPTQ, name), segments_BT=segments).codes
        return {name: hessian_EII for name, hessian_EII in zip(names, found, strict=True)}

    apart, together, voted = sums(alone, None), sums(packed, segments), sums(packed, None)
    assert apart.keys() == together.keys() and len(apart) > 8
    for name, hessian_EII in apart.items():
        assert (hessian_EII - together[name]).norm() < 0.01 * hessian_EII.norm(), name
        assert (hessian_EII - voted[name]).norm() > 0.1 * hessian_EII.norm(), name


@pytest.mark.parametrize("changes", [{}, {"n_routed_experts": 0}, {"tie_word_embeddings": True}])
def test_a_calibrated_model_is_nearer_to_the_original_on_text_not_seen(changes: dict[str, object]) -> None:
    dense, unseen = model(**changes), text(16, 2)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    with torch.no_grad():
        exact = dense(unseen).log_softmax(-1)

        def divergence(of: Transformer) -> float:
            return float((exact.exp() * (exact - of(unseen).log_softmax(-1))).sum(-1).mean())

        heard: list[tuple[int, int]] = []
        fitted = quant.quantize_model(
            dense, GPTQ, calibration_BT=text(128, 1), on_progress=lambda *now: heard.append(now)
        )
        assert divergence(fitted) < 0.8 * divergence(quant.quantize_model(dense))
    assert quant.quant_config_of(fitted) == GPTQ and heard[-1][0] == heard[-1][1] == len(set(heard))
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())


def test_every_matrix_of_the_stack_is_fitted_and_none_runs_with_what_was() -> None:
    draft = model()
    codes = calibrate(draft, text(128, 1), lambda name: scheme_of(GPTQ, name)).codes
    wanted = set(quant.quantized_weights(quant.quantize_model(model()))) - {"embed_tokens.weight", "head.weight"}
    assert set(codes) == wanted
    for name, weight in draft.named_parameters():
        if name in codes:
            assert torch.equal(weight, dequantize_tensor(codes[name])), name


def test_the_folder_says_how_it_was_rounded_and_folders_of_before_still_load(tmp_path: Path) -> None:
    small = quant.quantize_model(model(), GPTQ, calibration_BT=text(64, 1))
    quantized.save(small, tmp_path)
    assert quant.quant_config_of(quantized.load(tmp_path)) == GPTQ
    told = json.loads((tmp_path / "quant.json").read_text())
    assert told.pop("rounding") == "gptq"
    (tmp_path / "quant.json").write_text(json.dumps(told))
    assert quant.quant_config_of(quantized.load(tmp_path)) == QuantConfig()


def test_no_text_or_a_sick_model_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="text"):
        quant.quantize_model(model(), GPTQ)
    sick = model()
    with torch.no_grad():
        sick.layers[1].input_layernorm.weight[0] = torch.nan  # type: ignore[union-attr,operator,index]
    with pytest.raises(CheckpointError, match="not finite"):
        quant.quantize_model(sick, GPTQ, calibration_BT=text(64, 1))


def test_a_damping_that_is_too_small_is_one_sentence() -> None:
    x_MI = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))  # of 64 channels three directions are heard
    weight_ENI = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(1))
    with pytest.raises(DataError, match="damping"):
        gptq_quantize(weight_ENI, (x_MI.T @ x_MI)[None], Scheme(), GPTQSettings(damping=1e-12))
