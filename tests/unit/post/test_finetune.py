"""A model of anyone's learns from examples of anyone's, and the run says what it learned from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sprat.config.finetune import DPOConfig, FinetuneConfig
from sprat.engine import Engine, Sampling
from sprat.errors import ConfigError, DataError
from sprat.eval.text_file import evaluate_text_file
from sprat.formats import peft
from sprat.formats.load import load, save
from sprat.model import Transformer
from sprat.post.finetune import finetune
from sprat.quant import quantize_model
from sprat.tokens import Tokenizer
from sprat.trust.verify import verify

CONFIG = FinetuneConfig.model_validate({"epochs": 30, "seq_len": 32, "optim": {"adam_lr": 0.01}})
ROWS = [{"prompt": str(number), "completion": "7"} for number in range(40)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_a_model_learns_from_examples_and_the_run_proves_it(base: Path, data: Path, tmp_path: Path) -> None:
    run = finetune(base, data, tmp_path / "runs" / "mine", CONFIG)
    facts = json.loads((run.folder / "run.json").read_text())["facts"]
    assert facts["validation_after"]["loss"] < 0.2 < 2 < facts["validation_before"]["loss"]
    assert facts["examples"]["shown"] + facts["validation"]["shown"] == 40 and facts["validation"]["shown"] > 0
    answer = Engine(*load(run.folder)).generate(["99"], Sampling(temperature=0, max_tokens=8))[0]
    assert answer.text == "7" and answer.finish_reason == "stop"
    assert all(finding.ok for finding in verify(tmp_path / "runs"))
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert 27 <= sum("eval_loss" in row for row in rows) <= 32  # before, about once for each epoch, and at the end


def test_adapters_learn_and_lie_beside_the_merged_model(
    guesser: Transformer, tokenizer: Tokenizer, data: Path, tmp_path: Path
) -> None:
    base = tmp_path / "guesser"
    save(guesser, tokenizer, base)
    config = FinetuneConfig.model_validate({**CONFIG.model_dump(), "lora": {"rank": 8}})
    run = finetune(base, data, tmp_path / "runs" / "mine", config)
    assert run.facts["validation_after"]["loss"] < 0.1 < 0.5 < run.facts["validation_before"]["loss"]
    merged, _ = load(run.folder)
    adapted, tokenizer = load(base)
    peft.load_peft(adapted, run.artifact / "adapter")
    ids = torch.tensor([tokenizer.encode("12 train 7")])
    assert torch.allclose(merged(ids), adapted(ids), atol=1e-5)
    frozen = {"embed_tokens.weight", "layers.0.mlp.gate.weight", "norm.weight"}
    before, after = load(base)[0].state_dict(), merged.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in frozen)


def test_pairs_move_the_model_to_what_was_chosen(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": str(number), "chosen": "7", "rejected": "3"} for number in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DPOConfig.model_validate({"epochs": 8, "seq_len": 32, "optim": {"adam_lr": 0.003}})
    run = finetune(base, path, tmp_path / "runs" / "mine", config)
    assert run.facts["validation_before"] == pytest.approx(
        {"loss": 0.6931, "reward_margin": 0, "reward_accuracy": 0}, abs=1e-4
    )
    assert run.facts["validation_after"]["reward_accuracy"] == pytest.approx(1)
    assert run.facts["validation_after"]["loss"] < 0.4
    with pytest.raises(DataError, match="preference pairs are for sprat dpo"):
        finetune(base, path, tmp_path / "runs" / "other", CONFIG)


def test_text_that_is_replayed_is_not_forgotten(base: Path, data: Path, tmp_path: Path) -> None:
    book, runs = tmp_path / "book.txt", tmp_path / "runs"
    book.write_text("a sprat, a whale")
    (tmp_path / "book.jsonl").write_text(json.dumps({"text": book.read_text()}))
    known = finetune(base, tmp_path / "book.jsonl", runs / "known", CONFIG).folder
    alone = finetune(known, data, runs / "alone", CONFIG)
    beside = finetune(known, data, runs / "beside", CONFIG, replay=book)
    bits = {run: evaluate_text_file(*load(run), book).bits_per_byte for run in (known, alone.folder, beside.folder)}
    assert bits[beside.folder] - bits[known] < 0.1 < 1 < bits[alone.folder] - bits[known]
    assert beside.facts["validation_after"]["loss"] < 0.3
    assert beside.facts["replay"] == {"rows": 1, "tokens": len(load(base)[1].encode(book.read_text())) + 1}
    assert set(beside.record["inputs"]) == {"model", "data", "replay"} and all(find.ok for find in verify(runs))
    with pytest.raises(ConfigError, match="DPO replays no text"):
        finetune(base, data, runs / "never", DPOConfig(), replay=book)


def test_the_same_again_is_done_and_other_settings_set_the_run_aside(base: Path, data: Path, tmp_path: Path) -> None:
    first = finetune(base, data, tmp_path / "runs" / "mine", CONFIG.replace(epochs=1.0))
    weights = (first.folder / "artefact" / "model.safetensors").read_bytes()
    torch.manual_seed(9)
    again = finetune(base, data, tmp_path / "runs" / "mine", CONFIG.replace(epochs=1.0))
    assert again.done and (first.folder / "artefact" / "model.safetensors").read_bytes() == weights
    other = finetune(base, data, tmp_path / "runs" / "mine", CONFIG.replace(epochs=2.0))
    assert other.set_aside is not None and other.set_aside.name == "mine.old-1"


def test_what_cannot_be_is_refused_before_anything_is_touched(base: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "mine"
    with pytest.raises(ConfigError, match="rows of 512 tokens do not fit a context of 128"):
        finetune(base, data, out, FinetuneConfig())
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "12345678", "completion": "7"}) + "\n")
    with pytest.raises(DataError, match="a row holds 9"):
        finetune(base, long, out, CONFIG.replace(seq_len=8))
    quantized = tmp_path / "quantized"
    save(quantize_model(load(base)[0]), load(base)[1], quantized)
    with pytest.raises(ConfigError, match="matrices of the model are quantised.*--dequantize"):
        finetune(quantized, data, out, CONFIG)
    assert not out.exists() and not (tmp_path / "runs").exists()
    assert finetune(quantized, data, out, CONFIG.replace(epochs=1.0), dequantize=True).done
