"""A fine-tuning starts from another one's checkpoint: its weights or adapters alone, or its optimizer as well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sprat.config.finetune import DPOConfig, FinetuneConfig
from sprat.errors import CheckpointError
from sprat.formats.load import save
from sprat.model import Transformer
from sprat.post.finetune import finetune
from sprat.tokens import Tokenizer
from sprat.trust.verify import verify

SETTINGS: dict[str, Any] = {
    "seq_len": 32,
    "optim": {"adam_lr": 0.01, "schedule": "constant", "warmup_steps": 0},
    "eval": {"samples": 0},
}


def config(**changes: Any) -> FinetuneConfig:
    return FinetuneConfig.model_validate(SETTINGS | changes)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(n), "completion": "7"}) + "\n" for n in range(40)))
    return path


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_going_on_with_the_optimizer_is_one_longer_run(
    lora: dict[str, Any] | None, base: Path, data: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    first = finetune(base, data, runs / "first", config(steps=6, lora=lora, keep_checkpoint=True))
    more = config(steps=10, lora=lora, init_from=f"{first.folder}@6", init_state="continue")
    second = finetune(base, data, runs / "second", more)
    whole = finetune(base, data, runs / "whole", config(steps=10, lora=lora))
    weights = [load_file(run.artifact / "model.safetensors") for run in (second, whole)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert second.facts["validation_before"] == first.facts["validation_after"]
    assert finetune(base, data, runs / "second", more).done and all(finding.ok for finding in verify(runs))


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_a_fresh_start_takes_the_weights_alone_and_counts_from_one(
    lora: dict[str, Any] | None, base: Path, data: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    first = finetune(base, data, runs / "first", config(steps=6, lora=lora, keep_checkpoint=True))
    new = config(steps=4, lora=lora, init_from=str(first.folder), optim={"adam_lr": 0.002})
    second = finetune(base, data, runs / "second", new)
    assert second.facts["validation_before"] == first.facts["validation_after"]
    assert second.facts["last_step"] == 4 and "init_from" in second.identity["inputs"]
    if lora is None:  # the artefact of a run is a model, from which the same training gives the same
        same = finetune(first.folder, data, runs / "same", config(steps=4, optim={"adam_lr": 0.002}))
        weights = [load_file(run.artifact / "model.safetensors") for run in (second, same)]
        assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_dpo_goes_on_with_the_reference_that_it_had(base: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": str(number), "chosen": "7", "rejected": "3"} for number in range(30)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {**SETTINGS, "seq_len": 32, "keep_checkpoint": True}
    first = finetune(base, pairs, tmp_path / "runs" / "a", DPOConfig.model_validate({**settings, "steps": 4}))
    more = {**settings, "steps": 8, "init_from": str(first.folder), "init_state": "continue"}
    second = finetune(base, pairs, tmp_path / "runs" / "b", DPOConfig.model_validate(more))
    whole = finetune(base, pairs, tmp_path / "runs" / "c", DPOConfig.model_validate({**settings, "steps": 8}))
    assert second.facts["validation_after"] == whole.facts["validation_after"]


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_touched(
    base: Path, data: Path, shape: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    runs, lora = tmp_path / "runs", {"rank": 4}
    first = finetune(base, data, runs / "first", config(steps=2, lora=lora))
    out, start = runs / "second", str(first.folder)
    save(Transformer.create(shape, 1), tokenizer, tmp_path / "other")
    with pytest.raises(CheckpointError, match="over other frozen weights"):
        finetune(tmp_path / "other", data, out, config(steps=2, lora=lora, init_from=start))
    for other in ({"rank": 2}, None):
        with pytest.raises(CheckpointError, match="of another model"):
            finetune(base, data, out, config(steps=2, lora=other, init_from=start))
    with pytest.raises(CheckpointError, match=r"there is \[2\]"):
        finetune(base, data, out, config(steps=2, lora=lora, init_from=f"{start}@7"))
    with pytest.raises(CheckpointError, match="the recipe ends at step 2"):
        finetune(base, data, out, config(steps=2, lora=lora, init_from=start, init_state="continue"))
    plain = finetune(base, data, runs / "plain", config(steps=2))
    with pytest.raises(CheckpointError, match="keep_checkpoint"):
        finetune(base, data, out, config(steps=2, init_from=str(plain.folder)))
    assert not out.exists()
