"""Quantized models: they compute what their codes say, fit in what they promise, and survive the disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sprat import quant
from sprat.config import QuantConfig
from sprat.config.sizes import size
from sprat.errors import CheckpointError, SpratError
from sprat.model import KVCache, Transformer
from sprat.quant import formats
from sprat.quant.layers import QuantizedWeight, QuantLinear

TOKENS = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))


def tiny(**changes: object) -> Transformer:
    """A mixture of experts with MTP, whose widths no group divides."""
    return Transformer.create(size("pico", vocab_size=96, hidden_size=40, num_nextn_predict_layers=1, **changes), 1)


@pytest.mark.parametrize(
    ("recipe", "tied"),
    [
        (QuantConfig(), False),
        (QuantConfig(), True),
        (QuantConfig(bits=8, head_bits=16), False),
        (QuantConfig(group=64, head_bits=4), True),
    ],
)
def test_a_saved_model_comes_back_bit_for_bit(recipe: QuantConfig, tied: bool, tmp_path: Path) -> None:
    small = quant.quantize_model(tiny(tie_word_embeddings=tied), recipe)
    quant.save(small, tmp_path)
    again = quant.load(tmp_path, materialize=False)
    assert quant.quant_config_of(again) == recipe and quant.is_quantized(tmp_path)
    mine, theirs = small.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    with torch.no_grad():
        assert torch.equal(small(TOKENS), again(TOKENS))
    first = (tmp_path / "model.safetensors").read_bytes()
    quant.save(again, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == first


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


def test_the_size_is_what_four_and_a_half_bits_promise(tmp_path: Path) -> None:
    dense = Transformer.create(size("pico", hidden_size=64, vocab_size=256), 0)
    small = quant.quantize_model(dense)
    packed = [part for part in small.modules() if isinstance(part, QuantizedWeight)]
    four = sum(part.nbytes for part in packed if part.bits == 4)
    weights = sum(part.codes.numel() * 2 for part in packed if part.bits == 4)
    assert four * 8 <= 4.6 * weights
    quant.save(small, tmp_path)
    on_disk = (tmp_path / "model.safetensors").stat().st_size
    assert quant.size_bytes(small) <= on_disk <= quant.size_bytes(small) + 20_000
    assert quant.size_bytes(small) * 5 < quant.size_bytes(dense)


def test_a_spoilt_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    quant.save(quant.quantize_model(tiny()), tmp_path / "good")

    def spoil(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "good", tmp_path / name))

    whole = (spoil("torn") / formats.WEIGHTS).read_bytes()
    (tmp_path / "torn" / formats.WEIGHTS).write_bytes(whole[:-100])
    (spoil("gone") / formats.WEIGHTS).unlink()
    (spoil("recipe") / formats.QUANT_CONFIG).write_text(json.dumps({"method": "other", "version": 1}))
    (spoil("group") / formats.QUANT_CONFIG).write_text(
        json.dumps({"method": formats.METHOD, "version": 1, "group": 64})
    )
    name = "layers.0.self_attn.o_proj.weight.scales"
    for spoilt in ("lost", "nan", "extra"):
        path = spoil(spoilt) / formats.WEIGHTS
        tensors = load_file(path)
        if spoilt == "nan":
            tensors[name][0] = torch.nan
        elif spoilt == "lost":
            del tensors[name]
        else:
            tensors["more"] = torch.zeros(1)
        save_file(tensors, path)
    for spoilt in ("torn", "gone", "recipe", "group", "lost", "nan", "extra", "nothing"):
        with pytest.raises(SpratError) as caught:
            quant.load(tmp_path / spoilt)
        assert caught.value.where and caught.value.todo, spoilt
    with pytest.raises(CheckpointError, match="not quantised"):
        quant.save(tiny(), tmp_path / "dense")
    sick = tiny()
    with torch.no_grad():
        sick.head.weight[0, 0] = torch.inf
    with pytest.raises(CheckpointError, match="not finite"):
        quant.quantize_model(sick)
