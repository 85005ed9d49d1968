"""No trainer takes a model of which it could move next to nothing, and each says what it moves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import sprat
from sprat import quant
from sprat.config import Config, DistillConfig, RLConfig, SFTConfig
from sprat.errors import TrainingError
from sprat.model import Transformer
from sprat.post.distill import distill
from sprat.post.rl.grpo import grpo
from sprat.post.sft import build_source, sft
from sprat.tokens import Tokenizer
from sprat.train import loop
from sprat.trust.run import Run

Open = Callable[[str, Config], Run]
SFT = SFTConfig(steps=2, batch_rows=2, seq_len=32)
DISTILL = DistillConfig(steps=2, batch_rows=2)
RL = RLConfig(steps=1, prompts_per_step=2, group_size=2, max_tokens=4, gate=False)
SHOWN = [("12 train", "1 2", "7")] * 4


def trainers(tokenizer: Tokenizer, teacher: Transformer, task: Any) -> dict[str, tuple[Config, Any]]:
    source = build_source(tokenizer, SHOWN, SFT)
    return {
        "loop": (SFT, lambda model, run: loop.train(model, source, SFT, run)),
        "sft": (SFT, lambda model, run: sft(model, tokenizer, SHOWN, SFT, run)),
        "distill": (DISTILL, lambda model, run: distill(model, teacher, source, DISTILL, run)),
        "rl": (RL, lambda model, run: grpo(model, tokenizer, [task], [1.0], RL, run, gate=False)),
    }


@pytest.mark.parametrize("name", ["loop", "sft", "distill", "rl"])
def test_every_trainer_refuses_codes_and_says_what_it_moves(
    name: str, model: Transformer, tokenizer: Tokenizer, task: Any, open_stage: Open, caplog: Any
) -> None:
    config, train = trainers(tokenizer, model, task)[name]
    whole = sum(weight.numel() for weight in model.parameters())
    small = quant.quantize_model(model)
    with pytest.raises(TrainingError, match=rf"quantised: .* of {whole:,} parameters.*dequantize"):
        train(small, open_stage(f"{name}-small", config))
    back = quant.dequantize_model(small)
    run = open_stage(name, config)
    with caplog.at_level(logging.INFO, logger="sprat"):
        train(back, run)
    assert run.facts["trained"] == {"trainable": whole, "total": whole}
    assert f"trains {whole:,} of {whole:,} parameters" in caplog.text


def test_a_model_that_is_partly_frozen_is_said_aloud(
    model: Transformer, tokenizer: Tokenizer, open_stage: Open, caplog: Any
) -> None:
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match="no parameter"):
        sft(model, tokenizer, SHOWN, SFT, open_stage("frozen", SFT))
    model.norm.weight.requires_grad_(True)
    run = open_stage("sft", SFT)
    sft(model, tokenizer, SHOWN, SFT, run)
    assert run.facts["trained"]["trainable"] == 32
    assert [record.levelname for record in caplog.records if "trains 32 of" in record.getMessage()] == ["WARNING"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_folder_comes_back_dense_when_asked(
    tied: bool, shape: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    small = quant.quantize_model(Transformer.create(shape.replace(tie_word_embeddings=tied), 3))
    sprat.save(small, tokenizer, tmp_path)
    dense, _ = sprat.load(tmp_path, dequantize=True)
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(dense(tokens), small(tokens), rtol=1e-5, atol=1e-5)
    assert not quant.quantized_weights(dense) and (dense.head.weight is dense.embed_tokens.weight) is tied
    assert {weight.dtype for weight in dense.parameters()} == {torch.float32}
    assert quant.quantized_weights(sprat.load(tmp_path)[0])
