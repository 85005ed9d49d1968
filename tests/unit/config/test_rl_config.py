"""Every key of a run of RL stands in its page, and the quickstart's station is converted as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sprat.config import RLConfig
from sprat.config.base import load
from sprat.config.rl import RLRunConfig, load_rl_config
from sprat.errors import ConfigError

PAGE = Path(__file__).resolve().parents[3] / "docs" / "rl.md"


def keys_of(table: dict[str, Any], prefix: str = "") -> set[str]:
    nested = (
        keys_of(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key} for key, value in table.items()
    )
    return set().union(*nested)


def test_the_page_names_every_key() -> None:
    page = PAGE.read_text(encoding="utf-8")
    keys = keys_of(RLRunConfig.model_validate({"lora": {}}).model_dump())
    assert [key for key in sorted(keys) if f"`{key}`" not in page] == []
    assert len(keys) > 50


def test_the_station_is_converted_key_by_key_and_watched_by_nobody() -> None:
    station = RLConfig(lr=3e-3, steps=7, seed=5, group_size=4, format_weight=0.3, gate_pass_at_8=0.4)
    run = RLRunConfig.from_station(station)
    assert RLConfig(**{name: getattr(run, name) for name in RLConfig.model_fields}) == station
    assert run.seeding == "step" and run.trip_wires.action == "off" and run.held_out.share == 0 and run.lora is None
    assert (run.loss, run.sample_std, run.std_epsilon, run.overlong_buffer) == ("bnpo", False, 0.0, 0)


def test_adapters_have_a_rate_of_their_own_unless_it_is_said(tmp_path: Path) -> None:
    assert load_rl_config().lr == 1e-5 and load_rl_config(lora=8).lr == 1e-4
    assert load_rl_config(lora=8, overrides=["lr=3e-4"]).lr == 3e-4
    assert load_rl_config(overrides=["lora.rank=4"]).lr == 1e-4
    (tmp_path / "mine.toml").write_text(load_rl_config(lora=8, overrides=["steps=3"]).to_toml())
    assert load(RLRunConfig, tmp_path / "mine.toml") == load_rl_config(lora=8, overrides=["steps=3"])
    with pytest.raises(ConfigError, match=r"trip_wires\.maxkl.*'max_kl'"):
        load_rl_config(overrides=["trip_wires.maxkl=3"])
