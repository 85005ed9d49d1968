"""A value that no stage can use is refused when the recipe is read, before any work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from sprat.config import ModelConfig
from sprat.config.recipe import PipelineRecipe
from sprat.config.sizes import size
from sprat.errors import ConfigError, DataError
from sprat.pipeline.quickstart import check_recipe
from sprat.pipeline.recipe import load_recipe


@pytest.mark.parametrize(
    "value",
    [
        "money.yuan_per_core_hour=inf",
        "money.watts_per_core=inf",
        "pretrain.optim.muon_lr=inf",
        "pretrain.optim.betas=[0.9, 1.5]",
        'data.tasks=[{name="sums", weight=inf}]',
    ],
)
def test_infinite_and_impossible_numbers_are_refused(value: str) -> None:
    with pytest.raises(ConfigError):
        load_recipe("tiny", (value,))


def test_a_date_in_a_recipe_is_a_value_that_does_not_fit(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("seed = 2024-01-01\n")
    with pytest.raises(ConfigError, match="seed"):
        load_recipe(str(tmp_path / "r.toml"))


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("pretrain.steps=true", "pretrain.steps"),
        ('pretrain.steps="5"', "pretrain.steps"),
        ('sft.terse_fraction="0.5"', "sft.terse_fraction"),
        ("pretrain.text_share=false", "pretrain.text_share"),
        ("rl.importance_cap=true", "rl.importance_cap"),
        ("rl.seeds=[true]", "rl.seeds"),
        ('pretrain.optim.betas=["0.9", 0.95]', "pretrain.optim.betas"),
        ("rl.gate=1", "rl.gate"),
        ("rl.gate=no", "rl.gate"),
        ('data.tasks=[{name="sums", distinct="5"}]', "data.tasks.0.distinct"),
        ("pretrain.model.changes.hidden_size=true", "hidden_size"),
        ('distill.student.changes.rope_theta="1e4"', "rope_theta"),
    ],
)
def test_a_value_of_another_kind_is_refused_and_not_converted(value: str, key: str) -> None:
    with pytest.raises(ConfigError, match="is asked for") as caught:
        check_recipe(load_recipe("tiny", (value,)))
    assert str(caught.value).startswith(f"{key}: ")


def test_a_whole_number_may_stand_where_a_fraction_is_asked_for() -> None:
    recipe = load_recipe("tiny", ("pretrain.optim.muon_lr=1", "pretrain.steps=1e3"))
    assert recipe.pretrain.optim.muon_lr == 1.0 and recipe.pretrain.steps == 1000


def test_published_configs_are_read_as_before() -> None:
    table = size("pico").to_hf() | {"vocab_size": "1024", "tie_word_embeddings": 0, "rms_norm_eps": "1e-6"}
    assert ModelConfig.from_hf(table) == ModelConfig.from_hf(size("pico").to_hf())


@pytest.mark.parametrize("bad", [-1, 2**63, 99999999999999999999])
@pytest.mark.parametrize("key", ["seed", "rl.seeds", "sft.seed"])
def test_a_seed_that_no_generator_takes_is_refused(bad: int, key: str) -> None:
    value = f"[{bad}]" if key == "rl.seeds" else str(bad)
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny", (f"{key}={value}",))
    assert str(caught.value).startswith(key)
    good = f"[{2**63 - 1}]" if key == "rl.seeds" else str(2**63 - 1)
    load_recipe("tiny", (f"{key}={good}",))


def _numbers(kind: type[BaseModel], before: str = "") -> Iterator[str]:
    """The keys of all numbers in ``kind`` that are no lists and no parts of them."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _numbers(field.annotation, f"{before}{name}.")
        elif field.annotation in (int, float, int | None, float | None):
            yield f"{before}{name}"


@pytest.mark.parametrize("key", list(_numbers(PipelineRecipe)))
def test_every_number_of_a_recipe_has_bounds(key: str) -> None:
    """Beyond them torch, NumPy and the clock raise errors of their own."""
    for bad in ("-1e300", "1e300", "-99999999999999999999", "99999999999999999999"):
        with pytest.raises(ConfigError) as caught:
            load_recipe("tiny", (f"{key}={bad}",))
        assert key in str(caught.value)


@pytest.mark.parametrize(
    "task",
    [
        '{name="sums", settings={max_value=1.5}}',
        '{name="sums", settings={min_terms="a"}}',
        '{name="sums", weight=1e300}',
        '{name="sums", distinct=99999999999999999999}',
        '{name="sums", test_problems=99999999999999999999}',
    ],
)
def test_a_task_that_cannot_be_drawn_from_is_refused(task: str) -> None:
    with pytest.raises((ConfigError, DataError)):
        check_recipe(load_recipe("tiny", (f"data.tasks=[{task}]",)))
