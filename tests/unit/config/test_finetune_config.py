"""The rate of a fine-tuning is the one that docs/finetune.md states, however the adapters were asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from sprat.config.finetune import DPOConfig, FinetuneConfig, FinetuneOptimConfig, load_finetune_config
from sprat.config.model import LoRAConfig


@pytest.mark.parametrize(("stage", "whole", "adapters"), [("sft", 1e-4, 5e-4), ("dpo", 5e-6, 5e-5)])
def test_adapters_have_the_rate_that_is_documented(stage: str, whole: float, adapters: float, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("epochs = 2\n[lora]\nrank = 8\n")
    bare = tmp_path / "bare.toml"
    bare.write_text("epochs = 2\n[optim]\nwarmup_steps = 3\n")
    assert load_finetune_config(stage).optim.adam_lr == whole
    ways = {
        "--lora": load_finetune_config(stage, lora=8),
        "--set": load_finetune_config(stage, overrides=["lora.rank=8"]),
        "--recipe": load_finetune_config(stage, recipe=recipe),
        "--recipe --lora": load_finetune_config(stage, recipe=bare, lora=8),
        "a road's table": load_finetune_config(stage, table={"lora": {"rank": 8}}),
        "Python": (DPOConfig if stage == "dpo" else FinetuneConfig)(lora=LoRAConfig(rank=8)),
    }
    assert {way: config.optim.adam_lr for way, config in ways.items()} == dict.fromkeys(ways, adapters)
    assert {config.lora.rank for config in ways.values() if config.lora} == {8}


def test_a_rate_that_is_stated_holds_for_adapters_too() -> None:
    stated = [
        load_finetune_config("sft", lora=8, overrides=["optim.adam_lr=0.25"]),
        FinetuneConfig(lora=LoRAConfig(), optim=FinetuneOptimConfig(adam_lr=0.25)),
        FinetuneConfig(lora=LoRAConfig()).replace(optim=FinetuneOptimConfig(adam_lr=0.25)),
    ]
    assert [config.optim.adam_lr for config in stated] == [0.25, 0.25, 0.25]
