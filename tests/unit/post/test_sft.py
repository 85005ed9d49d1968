"""Fine-tuning teaches the answers and only the answers; the control spends what it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sprat.config import Config, SFTConfig, TrainConfig
from sprat.engine import Engine, Sampling
from sprat.errors import DataError
from sprat.model import Transformer
from sprat.post.sft import build_source, sample_demonstrations, sample_problems, sft
from sprat.tokens import Tokenizer
from sprat.trust.run import Run

Open = Callable[[str, Config], Run]
SFT = SFTConfig(steps=60, batch_rows=8, seq_len=32, checkpoint_every=1000)


def test_problems_are_drawn_by_weight_and_by_key_alone(task: Any) -> None:
    class Other(type(task)):  # type: ignore[misc]
        name = "other"

    mix = [task, Other()]
    drawn = sample_problems(mix, [3.0, 1.0], 400, "key")
    assert 0.68 < sum(one.name == "lucky" for one, _ in drawn) / 400 < 0.82
    assert [problem for _, problem in drawn] == [problem for _, problem in sample_problems(mix, [3.0, 1.0], 400, "key")]
    assert [problem for _, problem in drawn] != [
        problem for _, problem in sample_problems(mix, [3.0, 1.0], 400, "other key")
    ]
    with pytest.raises(DataError, match="one weight"):
        sample_problems(mix, [1.0], 1, "key")


def test_demonstrations_are_terse_as_often_as_asked(task: Any) -> None:
    shown = sample_demonstrations([task], [1.0], count=500, terse_fraction=0.8, seed=1)
    assert 0.74 < sum(one.reasoning == "" for one in shown) / 500 < 0.86
    assert all(one.answer == "7" for one in shown)
    assert {one.reasoning for one in shown if one.reasoning} <= {f"{one.question} 7" for one in shown}


def test_only_the_answers_tokens_carry_loss(tokenizer: Tokenizer) -> None:
    batch = build_source(tokenizer, [("12 train", "1 2", "7")], SFT.replace(batch_rows=1)).batch(0)
    learned = batch.targets_BT[batch.targets_BT >= 0].tolist()
    assert tokenizer.decode(learned) == "<think>1 2</think>7<|eos|>"


def test_what_is_longer_than_a_row_is_left_out_and_counted(
    model: Transformer, tokenizer: Tokenizer, open_stage: Open, caplog: pytest.LogCaptureFixture
) -> None:
    config = SFT.replace(steps=1)
    short, long = ("12 train", "1 2", "7"), ("q", "1 2 3 4 5 6 7 8 9 " * 9, "7")
    row = config.seq_len + 1
    fits = (
        "q",
        "1" * (row - len(tokenizer.encode("<|bos|><|user|>q<|assistant|><think></think>7", parse_special=True)) - 1),
        "7",
    )
    run = open_stage("sft", config)
    sft(model, tokenizer, [short, long, fits, short, long], config, run)
    assert run.facts["demonstrations"] == {"shown": 3, "too_long": 2}
    assert "2 of 5 demonstrations are longer than a row of 33 tokens" in caplog.text
    seen = build_source(tokenizer, [short, long], config).batch(0).tokens_BT
    assert "9 1 2 3" not in " ".join(tokenizer.decode(row) for row in seen.tolist())
    with pytest.raises(DataError, match="shortest of 2 demonstrations has .*, a row holds 33"):
        build_source(tokenizer, [long, long], config)
    with pytest.raises(DataError, match="no demonstrations"):
        build_source(tokenizer, [], config)


@pytest.mark.parametrize("kind", [SFTConfig, TrainConfig])
def test_a_narrow_mix_does_not_move_the_routers_bias(
    kind: type[TrainConfig], model: Transformer, tokenizer: Tokenizer, task: Any, open_stage: Open
) -> None:
    config = kind(steps=3, batch_rows=4, seq_len=32)
    bias = {name: value.clone() for name, value in model.named_buffers() if "correction_bias" in name}
    shown = sample_demonstrations([task], [1.0], count=50, terse_fraction=0.5, seed=0)
    sft(model, tokenizer, shown, config, open_stage("sft", config))
    assert bias and all(torch.equal(value, model.get_buffer(name)) for name, value in bias.items())
    with pytest.raises(ValueError, match="bias_update_speed"):
        SFTConfig(bias_update_speed=0.001)


def test_demonstrations_change_what_the_model_answers(
    model: Transformer, tokenizer: Tokenizer, task: Any, open_stage: Open
) -> None:
    shown = sample_demonstrations([task], [1.0], count=200, terse_fraction=0.5, seed=0)
    sft(model, tokenizer, shown, SFT, open_stage("sft", SFT))
    engine = Engine(model, tokenizer)
    for thinking in (True, False):
        outputs = engine.generate(["5 test", "64 test"], Sampling(temperature=0, max_tokens=24, thinking=thinking))
        assert [output.text for output in outputs] == ["7", "7"]
        assert all(bool(output.reasoning) is thinking for output in outputs)
