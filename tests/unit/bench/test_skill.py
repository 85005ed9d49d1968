"""Whether RL taught a skill: which gains count, and whose folder may be read."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.skill import judge, overrides, run_seed
from sprat.errors import ConfigError
from sprat.pipeline.recipe import load_recipe


def test_a_gain_is_over_the_base_left_to_itself() -> None:
    found = {
        "RL over base: a": {"mean": 0.06, "lower": 0.01}, "RL over base: b": {"mean": 0.06, "lower": -0.01},
        "RL over base: c": {"mean": -0.03, "lower": -0.1}, "RL over base: mean": {"mean": 0.2, "lower": 0.1},
        "RL over base made to think: a": {"mean": -0.5, "lower": -0.6},
    }  # fmt: skip
    assert judge(found) == (["a"], ["c"])


def test_the_folder_of_another_experiment_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> None:
        ran.append(command)

    monkeypatch.setattr(subprocess, "run", run)
    asked = argparse.Namespace(split="test", controls=False, quick=False)
    folder = tmp_path / "seed0-avx512"
    assert run_seed(folder, 0, "avx512", asked).runs == {} and (folder / "isa").read_text() == "avx512"
    recipe = load_recipe("quickstart", overrides(0, "test", quick=False))
    assert recipe.rl.temperature == 0.6
    (folder / "recipe.toml").write_text(recipe.to_toml())
    run_seed(folder, 0, "avx512", asked)
    assert len(ran) == 2
    with pytest.raises(ConfigError, match="eval.split is test there and dev here"):
        run_seed(folder, 0, "avx512", argparse.Namespace(split="dev", controls=False, quick=False))
    with pytest.raises(ConfigError, match="controls.more.steps is 1800 there and 180 here"):
        run_seed(folder, 0, "avx512", argparse.Namespace(split="test", controls=False, quick=True))
    with pytest.raises(ConfigError, match="seed is 0 there and 1 here"):
        run_seed(folder, 1, "avx512", asked)
    with pytest.raises(ConfigError, match="isa is avx512 there and avx2 here"):
        run_seed(folder, 0, "avx2", asked)
    assert len(ran) == 2
