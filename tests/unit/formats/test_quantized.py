"""Quantized models fit in what they promise, and survive the disk."""

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
from sprat.formats import quantized
from sprat.model import Transformer
from sprat.quant.layers import QuantizedWeight

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
    quantized.save(small, tmp_path)
    again = quantized.load(tmp_path, materialize=False)
    assert quant.quant_config_of(again) == recipe and quantized.is_quantized(tmp_path)
    mine, theirs = small.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    with torch.no_grad():
        assert torch.equal(small(TOKENS), again(TOKENS))
    first = (tmp_path / "model.safetensors").read_bytes()
    quantized.save(again, tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == first


def test_the_size_is_what_four_and_a_half_bits_promise(tmp_path: Path) -> None:
    dense = Transformer.create(size("pico", hidden_size=64, vocab_size=256), 0)
    small = quant.quantize_model(dense)
    packed = [part for part in small.modules() if isinstance(part, QuantizedWeight)]
    four = sum(part.nbytes for part in packed if part.bits == 4)
    weights = sum(part.codes.numel() * 2 for part in packed if part.bits == 4)
    assert four * 8 <= 4.6 * weights
    quantized.save(small, tmp_path)
    on_disk = (tmp_path / "model.safetensors").stat().st_size
    assert quant.size_bytes(small) <= on_disk <= quant.size_bytes(small) + 20_000
    assert quant.size_bytes(small) * 5 < quant.size_bytes(dense)


def test_a_spoilt_file_is_refused_in_one_sentence(tmp_path: Path) -> None:
    quantized.save(quant.quantize_model(tiny()), tmp_path / "good")

    def spoil(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "good", tmp_path / name))

    whole = (spoil("torn") / quantized.WEIGHTS).read_bytes()
    (tmp_path / "torn" / quantized.WEIGHTS).write_bytes(whole[:-100])
    (spoil("gone") / quantized.WEIGHTS).unlink()
    (spoil("recipe") / quantized.QUANT_CONFIG).write_text(json.dumps({"method": "other", "version": 1}))
    (spoil("group") / quantized.QUANT_CONFIG).write_text(
        json.dumps({"method": quantized.METHOD, "version": 1, "group": 64})
    )
    name = "layers.0.self_attn.o_proj.weight.scales"
    for spoilt in ("lost", "nan", "extra"):
        path = spoil(spoilt) / quantized.WEIGHTS
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
            quantized.load(tmp_path / spoilt)
        assert caught.value.where and caught.value.todo, spoilt
    with pytest.raises(CheckpointError, match="not quantised"):
        quantized.save(tiny(), tmp_path / "dense")
    sick = tiny()
    with torch.no_grad():
        sick.head.weight[0, 0] = torch.inf
    with pytest.raises(CheckpointError, match="not finite"):
        quant.quantize_model(sick)
