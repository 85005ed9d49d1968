"""A user's text makes a model, or moves one on; what it learned is measured on text that it never saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sprat.config.pretrain import load_pretrain_config
from sprat.data.dedup import exact_dedup
from sprat.data.ingest import read_texts
from sprat.data.text_split import held_out_sources, split_documents
from sprat.errors import CheckpointError, ConfigError, DataError
from sprat.eval.text_file import evaluate_text
from sprat.formats.load import load, save
from sprat.model import Transformer
from sprat.quant import quantize_model
from sprat.train.pretrain import find_beginning, pretrain
from sprat.trust.verify import verify
from tests.lucky import lucky_shape, lucky_tokenizer

SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "first_k_dense_replace": 0, "num_attention_heads": 2,
         "n_routed_experts": 4, "moe_intermediate_size": 32, "intermediate_size": 64}  # fmt: skip
TINY = {"seq_len": 32, "batch_rows": 8, "vocab_size": 500, "changes": SHAPE, "checkpoint_every": 1000, "log_every": 10}
WORDS = ["the sprat swims", "a whale eats", "the sea is deep", "nets are cast", "fish are small"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Forty files of the same few sentences, and two that say the same."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):
        words = [WORDS[(number * place + place) % len(WORDS)] for place in range(1, 13)]
        (folder / f"{number:02}.txt").write_text(f"{number}: " + ", ".join(words) + ".\n")
    (folder / "copy.txt").write_text((folder / "07.txt").read_text())
    (folder / "page.html").write_text("<p>")
    return folder


def _split(text: Path) -> tuple[list[str], list[str]]:
    documents = list(exact_dedup(read_texts(text)))
    split = split_documents(documents, held_out_sources(documents).__contains__)
    return [document.text for document in split.train], [document.text for document in split.held_out]


def test_a_new_model_learns_the_text_and_the_run_proves_it(text: Path, tmp_path: Path) -> None:
    config = load_pretrain_config(size="pico", table={**TINY, "steps": 40})
    run = pretrain(None, text, tmp_path / "runs" / "base", config)
    before, after = (run.facts[f"validation_{when}"]["bits_per_byte"] for when in ("before", "after"))
    assert after < 0.7 * before
    model, tokenizer = load(run.folder)
    train, held_out = _split(text)
    # what ``sprat eval --text`` says of the held-out texts, in windows as long as a row
    assert evaluate_text(model, tokenizer, held_out, window=32).bits_per_byte == pytest.approx(after, rel=1e-4)
    assert run.facts["documents"] == {"train": len(train), "held_out": len(held_out), "copies": 1}
    assert run.facts["text_left_out"][0]["names"] == ["page.html"] and not set(train) & set(held_out)
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert sum("eval_bits_per_byte" in row for row in rows) == 10
    assert all(finding.ok for finding in verify(tmp_path / "runs"))
    again = pretrain(None, text, tmp_path / "runs" / "base", config)
    assert again.done and again.set_aside is None


def test_more_steps_from_a_checkpoint_are_the_bits_of_a_longer_run(text: Path, tmp_path: Path) -> None:
    table = {**TINY, "steps": 8, "optim": {"warmup_steps": 2, "decay_fraction": 0.5}}
    runs = tmp_path / "runs"
    first = pretrain(None, text, runs / "first", load_pretrain_config(size="pico", table=table))
    whole = pretrain(None, text, runs / "whole", load_pretrain_config(size="pico", table={**table, "steps": 12}))
    more_config = load_pretrain_config(init_from=str(first.folder), overrides=["steps=12"])
    size, model = find_beginning(None, str(first.folder))
    assert (size, model) == ("", first.folder) and more_config.optim.name == "muon"
    more = pretrain(model, text, runs / "more", more_config)
    ours, theirs = load(more.folder)[0].state_dict(), load(whole.folder)[0].state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert 0 < more.record["tokens"] < whole.record["tokens"]  # what the first run paid is not paid again
    assert all(finding.ok for finding in verify(runs))
    afresh = load_pretrain_config(table={"seq_len": 32, "steps": 3})  # from its weights, with a new optimizer
    assert pretrain(first.folder, text, runs / "afresh", afresh).facts["steps"] == 3


def test_a_model_of_anyones_goes_on_with_its_own_tokenizer(text: Path, tmp_path: Path) -> None:
    tokenizer, model = lucky_tokenizer(), Transformer.create(lucky_shape(lucky_tokenizer()), 0)
    save(model, tokenizer, tmp_path / "base")
    save(quantize_model(model), tokenizer, tmp_path / "quantized")
    config = load_pretrain_config(table={"seq_len": 32, "steps": 30, "optim": {"adam_lr": 0.01}})
    run = pretrain(tmp_path / "base", text, tmp_path / "runs" / "on", config)
    before, after = (run.facts[f"validation_{when}"]["bits_per_byte"] for when in ("before", "after"))
    assert after < 0.8 * before and load(run.folder)[1].encode("a whale") == tokenizer.encode("a whale")
    with pytest.raises(ConfigError, match="codes cannot be trained.*--dequantize"):
        pretrain(tmp_path / "quantized", text, tmp_path / "runs" / "no", config)
    borrowed = load_pretrain_config(
        size="pico", table={**{k: v for k, v in TINY.items() if k != "vocab_size"}, "steps": 2}
    )
    new = pretrain(None, text, tmp_path / "runs" / "new", borrowed, tokenizer=tmp_path / "base")
    assert load(new.folder)[1].encode("a whale") == tokenizer.encode("a whale")


def test_epochs_are_counted_in_rows(text: Path, tmp_path: Path) -> None:
    config = load_pretrain_config(size="pico", table={**TINY, "epochs": 2.0})
    run = pretrain(None, text, tmp_path / "runs" / "base", config)
    passes = run.facts["steps"] * 8 * 32 / run.facts["tokens"]
    assert 2 <= passes < 2.6  # the free places of rows are paid for, too


def test_what_cannot_be_is_refused_before_anything_is_touched(text: Path, tmp_path: Path) -> None:
    out, scratch = tmp_path / "runs" / "no", load_pretrain_config(size="pico", table=TINY)
    with pytest.raises(DataError, match="no such file or folder of text"):
        pretrain(None, tmp_path / "nowhere", out, scratch)
    with pytest.raises(ConfigError, match="rows of 4096 tokens do not fit a context of 2048"):
        pretrain(None, text, out, load_pretrain_config(size="pico", table={**TINY, "seq_len": 4096}))
    with pytest.raises(ConfigError, match="perhaps you mean 'optim.muon_lr' or 'optim.adam_lr'"):
        load_pretrain_config(size="pico", overrides=["lr=1"])
    with pytest.raises(ConfigError, match="unknown key 'vocab_size'"):
        load_pretrain_config(overrides=["vocab_size=400"])
    with pytest.raises(CheckpointError, match="no checkpoint to start from"):
        pretrain(None, text, out, load_pretrain_config(size="pico", table=TINY, init_from=str(tmp_path / "runs" / "x")))
    with pytest.raises(ConfigError, match="no model to train"):
        find_beginning(None, "")
    assert not (tmp_path / "runs").exists()
    first = pretrain(None, text, tmp_path / "runs" / "first", scratch.replace(steps=2))
    with pytest.raises(ConfigError, match="a run cannot start from itself"):
        pretrain(first.folder, text, first.folder, load_pretrain_config(init_from=str(first.folder)))
    (text / "more.txt").write_text("another text\n")
    other = load_pretrain_config(size="pico", init_from=str(first.folder), overrides=["steps=4"])
    with pytest.raises(CheckpointError, match="tokenizer was trained on another text"):
        pretrain(None, text, out, other)
    assert not out.exists()
