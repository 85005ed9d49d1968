"""A model of anyone's learns from examples of anyone's, and the run says what it learned from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sprat.config.finetune import FinetuneConfig
from sprat.engine import Engine, Sampling
from sprat.errors import ConfigError, DataError
from sprat.formats.load import load, save
from sprat.model import Transformer
from sprat.post.finetune import Examples, finetune
from sprat.tokens import Message, Tokenizer
from sprat.trust.run import Run
from sprat.trust.verify import verify

CONFIG = FinetuneConfig.model_validate({"epochs": 30, "seq_len": 32, "optim": {"adam_lr": 0.01}})
ROWS = [{"prompt": str(number), "completion": "7"} for number in range(40)]


@pytest.fixture
def base(model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save(model, tokenizer, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_a_model_learns_from_examples_and_the_run_proves_it(base: Path, tmp_path: Path) -> None:
    run = tuned(base, tmp_path / "runs" / "mine")
    facts = json.loads((run.folder / "run.json").read_text())["facts"]
    assert facts["validation_loss"] < 0.2 < 2 < facts["validation_loss_before"]
    assert facts["examples"]["shown"] == 32 and facts["validation"]["shown"] == 8
    answer = Engine(*load(run.folder)).generate(["99"], Sampling(temperature=0, max_tokens=8))[0]
    assert answer.text == "7" and answer.finish_reason == "stop"
    assert all(finding.ok for finding in verify(tmp_path / "runs"))
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert 25 <= sum("eval_loss" in row for row in rows) <= 30  # about once for each epoch


def test_the_same_again_is_done_and_other_settings_set_the_run_aside(base: Path, tmp_path: Path) -> None:
    first = tuned(base, tmp_path / "runs" / "mine", CONFIG.replace(epochs=1.0))
    weights = (first.folder / "artefact" / "model.safetensors").read_bytes()
    torch.manual_seed(9)
    again = tuned(base, tmp_path / "runs" / "mine", CONFIG.replace(epochs=1.0))
    assert again.done and (first.folder / "artefact" / "model.safetensors").read_bytes() == weights
    other = tuned(base, tmp_path / "runs" / "mine", CONFIG.replace(epochs=2.0))
    assert other.set_aside is not None and other.set_aside.name == "mine.old-1"


def test_what_cannot_be_is_refused_before_anything_is_touched(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "mine"
    with pytest.raises(ConfigError, match="rows of 512 tokens do not fit a context of 128"):
        tuned(base, out, FinetuneConfig())
    with pytest.raises(DataError, match="a row holds 9"):
        talks = [[Message("user", "12345678"), Message("assistant", "7")]]
        finetune(base, lambda: Examples(talks, []), out, CONFIG.replace(seq_len=8), inputs={"model": base})
    assert not out.exists() and not (tmp_path / "runs").exists()
