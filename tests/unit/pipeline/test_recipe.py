"""Recipes: packaged ones hold, and a slip of the pen is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.pipelines import EXTRA_CONTROLS
from sprat.config.recipe import ModelRecipe
from sprat.config.sizes import size
from sprat.errors import ConfigError, MachineError
from sprat.model.counts import count_parameters
from sprat.pipeline.pipeline import Pipeline
from sprat.pipeline.quickstart import build_stages, check_folder, quickstart
from sprat.pipeline.recipe import RECIPE_FOLDER, load_recipe


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPE_FOLDER.glob("*.toml")))
def test_every_packaged_recipe_is_valid_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "again.toml").write_text(recipe.to_toml())
    assert load_recipe(str(tmp_path / "again.toml")) == recipe


def test_an_unknown_key_names_the_nearest_valid_one() -> None:
    with pytest.raises(ConfigError, match="perhaps you mean 'steps'"):
        load_recipe("quickstart", ("pretrain.stepz=3",))


def test_overrides_reach_the_recipe_and_bad_values_are_refused() -> None:
    changed = load_recipe("tiny", ("rl.steps=7",)).rl
    assert changed.steps == 7 and changed.max_tokens == 24  # what the recipe says beside it stays
    with pytest.raises(ConfigError, match="greater than or equal to 1"):
        load_recipe("tiny", ("rl.steps=0",))
    with pytest.raises(ConfigError, match="no such recipe"):
        load_recipe("no-such-recipe")


def test_the_student_computes_with_at_most_a_quarter_of_the_teachers_parameters() -> None:
    recipe = load_recipe("quickstart")

    def active(model: ModelRecipe) -> int:
        return count_parameters(size(model.size, vocab_size=recipe.data.vocab_size, **model.changes)).active

    assert 4 * active(recipe.distill.student) <= active(recipe.pretrain.model)


def test_the_dense_twin_costs_what_the_sparse_model_costs() -> None:
    recipe = load_recipe("quickstart")
    sparse, dense = (
        count_parameters(size(model.size, vocab_size=recipe.data.vocab_size, **model.changes))
        for model in (recipe.pretrain.model, *recipe.dense)
    )
    assert abs(dense.active / sparse.active - 1) < 0.02 and dense.total < sparse.total


def test_every_stage_needs_only_stages_that_exist(tmp_path: Path) -> None:
    found = build_stages(Pipeline(tmp_path, load_recipe("quickstart")))
    names = {stage.name for stage in found}
    assert all(set(stage.depends_on) <= names for stage in found) and len(names) == len(found)


def test_an_output_that_is_a_file_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="is a file"):
        check_folder(tmp_path / "file")


NESTED_RUN = """text_share = 0.125

[model]
size = "pico"

[train]
steps = 60

[train.optim]
name = "muon"
"""  # what a run of pre-training kept before tables were flat


def test_a_road_of_nested_recipes_is_not_gone_on_with_and_stays_as_it_is(tmp_path: Path) -> None:
    """Its runs would be set aside one by one and made anew, as if their recipe were another."""
    file = tmp_path / "road" / "pretrain" / "recipe.toml"
    file.parent.mkdir(parents=True)
    file.write_text(NESTED_RUN)
    for record in ("open.json", "run.json"):
        (file.parent / record).write_text("{}")
        with pytest.raises(ConfigError, match=r"has the table \[train\], .*pretrain/recipe.toml\); give another"):
            quickstart(tmp_path / "road", load_recipe("tiny"))
        (file.parent / record).unlink()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file] and file.read_text() == NESTED_RUN
    (file.parent / "run.json").write_text("{}")
    file.parent.rename(tmp_path / "road" / "pretrain.old-1")
    for stage in ("pretrain", "sft", "rl", "distill"):
        (tmp_path / "road" / stage).mkdir()
        (tmp_path / "road" / stage / "recipe.toml").write_text(getattr(load_recipe("tiny"), stage).to_toml())
        (tmp_path / "road" / stage / "run.json").write_text("{}")
    check_folder(tmp_path / "road")  # what was set aside before is no hindrance, and flat recipes are none


def test_a_road_beside_the_new_one_is_no_run_of_it(tmp_path: Path) -> None:
    """Its recipe is that of a whole road, which has [distill] to this day."""
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "recipe.toml").write_text(load_recipe("tiny").to_toml())
    assert "\n[distill]\n" in load_recipe("tiny").to_toml()
    check_folder(tmp_path)


def test_a_student_without_its_teacher_is_refused() -> None:
    with pytest.raises(ConfigError, match="teacher"):
        load_recipe("quickstart", ("distill.text_share=0.9",))


def test_a_folder_does_not_hide_the_packaged_recipe_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``sprat quickstart --recipe tiny --out tiny`` makes such a folder itself; a file goes before."""
    expected = load_recipe("tiny")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    assert load_recipe("tiny") == expected
    (tmp_path / "quickstart").write_text(expected.to_toml())
    assert load_recipe("quickstart") == expected


@pytest.mark.parametrize(
    ("twin", "fault"),
    [
        ("{steps=5}", "a dense twin has no experts (dense.0.changes)"),
        ("{changes={dense=true,hidden_size=16}}", "times the teacher's FLOPs (dense.0)"),
        ("{steps=70,changes={dense=true,hidden_size=32,kv_lora_rank=16}}", "times the teacher's FLOPs (dense.0)"),
        ("{equal='parameters',changes={dense=true}}", "times the teacher's parameters (dense.0)"),
        ("{equal='CPU seconds',changes={dense=true}},{equal='CPU seconds',changes={dense=true}}", "in the same"),
    ],
)
def test_a_dense_twin_is_dense_and_equal_in_what_it_says(twin: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(fault)):
        load_recipe("tiny", (f"dense=[{twin}]",))


def test_the_twins_of_the_published_roads_are_equal_in_what_they_say() -> None:
    recipe = load_recipe("quickstart", EXTRA_CONTROLS)
    teacher, *twins = (
        size(model.size, vocab_size=recipe.data.vocab_size, **model.changes)
        for model in (recipe.pretrain.model, *recipe.dense)
    )
    assert [twin.equal for twin in recipe.dense] == ["FLOPs", "CPU seconds", "parameters"]
    assert all(twin.n_routed_experts == 0 for twin in twins)
    assert count_parameters(twins[2]).total / count_parameters(teacher).total == pytest.approx(1, abs=0.01)
