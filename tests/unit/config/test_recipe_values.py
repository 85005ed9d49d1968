"""A value that no stage can use is refused when the recipe is read, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from sprat.errors import ConfigError
from sprat.road.recipe import named


@pytest.mark.parametrize(
    "value",
    [
        "money.yuan_per_core_hour=inf",
        "money.watts_per_core=inf",
        "pretrain.train.optim.muon_lr=inf",
        "pretrain.train.optim.betas=[0.9, 1.5]",
        'data.tasks=[{name="sums", weight=inf}]',
    ],
)
def test_infinite_and_impossible_numbers_are_refused(value: str) -> None:
    with pytest.raises(ConfigError):
        named("tiny", (value,))


def test_a_date_in_a_recipe_is_a_value_that_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("seed = 2024-01-01\n")
    with pytest.raises(ConfigError, match="seed"):
        named(str(tmp_path / "r.toml"))
