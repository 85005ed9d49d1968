"""Every key of a fine-tuning stands in its page, and what contradicts itself is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sprat.config.base import load, parse
from sprat.config.finetune import DPOConfig, FinetuneConfig
from sprat.errors import ConfigError

PAGE = Path(__file__).resolve().parents[3] / "docs" / "finetune.md"
FIXED = {"bias_update_speed"}  # has but one value


def keys_of(table: dict[str, Any], prefix: str = "") -> set[str]:
    nested = (
        keys_of(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key} for key, value in table.items()
    )
    return set().union(*nested)


def test_the_page_names_every_key() -> None:
    page = PAGE.read_text(encoding="utf-8")
    keys = keys_of(DPOConfig.model_validate({"lora": {}}).model_dump()) - FIXED
    assert [key for key in sorted(keys) if f"`{key}`" not in page] == []
    assert len(keys) > 40


def test_a_recipe_is_written_and_read_as_it_was(tmp_path: Path) -> None:
    given = {"eval": {"prompts": ["why?"]}, "keep_best": True, "device": "cuda:1", "lora": {"rank": 4}}
    config = FinetuneConfig.model_validate(given)
    (tmp_path / "mine.toml").write_text(config.to_toml())
    assert load(FinetuneConfig, tmp_path / "mine.toml") == config


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"init_state": "continue"}, "starts from another's checkpoint"),
        ({"device": "tpu"}, "device"),
        ({"dtype": "float16"}, "dtype"),
        ({"patience": -1}, "patience"),
        ({"examples": {"overlap": "no"}}, "overlap"),
    ],
)
def test_what_cannot_be_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(FinetuneConfig, given, where="mine.toml")
