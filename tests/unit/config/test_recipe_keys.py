"""A slip of the pen in a recipe is told, with the key that was meant."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sprat.config import base
from sprat.config.recipe import PipelineRecipe
from sprat.errors import ConfigError
from sprat.pipeline.recipe import load_recipe


@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        ("pretrain.lr", ["optim.muon_lr", "optim.adam_lr"]),
        ("pretrain.learning_rate", ["optim.muon_lr", "optim.adam_lr"]),
        ("pretrain.muon_lr", ["optim.muon_lr"]),  # the right key in the wrong table
        ("pretrain.optim.lr", ["muon_lr", "adam_lr"]),
        ("pretrain.batch_size", ["batch_rows"]),
        ("pretrain.max_steps", ["steps"]),
        ("pretrain.gradient_accumulation_steps", ["micro_batches"]),
        ("pretrain.optim.warmup", ["warmup_steps"]),
        ("pretrain.optim.max_grad_norm", ["grad_clip"]),
        ("rl.num_generations", ["group_size"]),
        ("rl.beta", ["kl_weight"]),
        ("rl.learning_rate", ["lr"]),
        ("controls.samples", ["rft.samples"]),  # a table too high
        ("sft.stepz", ["steps"]),
        ("eval.max_tokns", ["max_tokens"]),
    ],
)
def test_an_unknown_key_leads_to_the_one_that_was_meant(slip: str, meant: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny", (f"{slip}=1",))
    assert repr(slip) in caught.value.what
    assert str(caught.value).endswith(f" (--set {slip}=1); perhaps you mean {' or '.join(map(repr, meant))}.")


def test_where_nothing_is_near_the_keys_are_listed() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny", ("controls.temperatur_schedule_kind=1",))
    assert caught.value.todo == "there are rft, more, student_examples"
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny", ("eval.qqq=1",))
    assert caught.value.todo == "there are split, max_tokens, batch, side_problems, samples"


def test_every_word_of_others_leads_to_a_key_that_there_is() -> None:
    there = {key.rpartition(".")[2] for key in base._dotted_keys(PipelineRecipe)}
    assert {key for keys in base.SYNONYMS.values() for key in keys} <= there
    assert there & base.SYNONYMS.keys() == {"lr"}  # RL's only rate; where two optimisers work it is one of two


@pytest.mark.parametrize(
    "key",
    [
        "pretrain.seed",
        "pretrain.compile",
        "pretrain.seq_len",
        "distill.seed",
        "rl.seed",
        "name",
    ],
)
def test_a_key_of_an_older_recipe_that_never_counted_is_refused_with_what_counts(key: str) -> None:
    with pytest.raises(ConfigError, match=f"the key '{key}' is gone: .*; remove it"):
        load_recipe("tiny", (f"{key}=3",))


def test_a_key_that_has_another_name_now_is_refused_with_that_name() -> None:
    with pytest.raises(ConfigError, match="'rl.normalise_std' is now called 'rl.normalize_std' .*; write rl.normalize"):
        load_recipe("tiny", ("rl.normalise_std=false",))


# The table that stood inside a station's, and where its keys stand now.
FLAT = {"pretrain.train": "pretrain", "sft.sft": "sft", "rl.rl": "rl", "distill.distill": "distill"}


def test_a_recipe_with_the_nested_tables_of_before_is_mended_by_what_it_is_told(tmp_path: Path) -> None:
    """The quickstart's recipe as it was, word for word, and a key of before in one of them: refused once, with all."""
    path = tmp_path / "mine.toml"
    text = (Path(__file__).parent / "nested_quickstart.toml").read_text(encoding="utf-8")
    text = text.replace("normalize_std", "normalise_std")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path), ("rl.steps=9", "rl.rl.lr=1"))  # the file must be mended first
    assert caught.value.where == str(path) and caught.value.todo == "move them there and rename it"
    told = dict(re.findall(r"the key '(\S+)' is gone: write its keys into \[(\w+)\]", caught.value.what))
    assert told == FLAT and "'rl.rl.normalise_std' is now called 'rl.normalize_std'" in caught.value.what
    for nested, flat in told.items():
        text = text.replace(f"[{nested}]\n", "" if f"\n[{flat}]\n" in text else f"[{flat}]\n")
        text = text.replace(f"[{nested}.", f"[{flat}.")
    path.write_text(text.replace("normalise_std", "normalize_std"), encoding="utf-8")
    assert load_recipe(str(path)) == load_recipe("quickstart")


@pytest.mark.parametrize(
    ("override", "now"),
    [
        ("rl.rl.lr=1e-5", "rl.lr=1e-5"),
        ("sft.sft.steps=9", "sft.steps=9"),
        ("distill.distill.problems=9", "distill.problems=9"),
        ("pretrain.train.optim.muon_lr=0.1", "pretrain.optim.muon_lr=0.1"),
        ("rl.rl.normalise_std=false", "rl.normalize_std=false"),
        ("rl.rl={}", ""),
    ],
)
def test_an_override_of_a_nested_table_is_refused_with_the_flat_one(override: str, now: str) -> None:
    nested = next(table for table in FLAT if override.startswith(table))
    with pytest.raises(ConfigError, match=re.escape(f"'{nested}' is gone: write its keys into [{FLAT[nested]}]")) as e:
        load_recipe("tiny", ("seed=1", override))
    assert (e.value.where, e.value.todo) == (f"--set {override}", f"write {now}" if now else "move them there")
    if now:
        load_recipe("tiny", (now,))  # what it is told to write is taken


@pytest.mark.parametrize(
    ("line", "overrides", "where"),
    [
        ("", ("rl.steps=5", "rl.stepz=2", "rl.lr=0.1"), "--set rl.stepz=2"),
        ("", ("rl.steps=0", "rl.stepz=2", "rl.steps=3"), "--set rl.stepz=2"),  # what a later one mends is no fault
        ("", ("rl.steps=0",), "--set rl.steps=0"),
        (
            "rl = {seeds = [0]}",
            ("rl.init_from=x", "rl.seeds=[1,2]"),
            "--set rl.seeds=[1,2]",
        ),  # one of two that do not go together
        ("rl = {stepz = 2}", ("rl.steps=5",), "mine.toml"),
        ("rl = {stepz = 2}", ("rl.stepz=5", "rl.rl.steps=5"), "--set rl.rl.steps=5"),
        ("rl = {steps = 0}", ("rl.lr=0.1",), "mine.toml"),
        ("rl = {steps = 0}", ("rl.steps=5", "rl.stepz=2"), "--set rl.stepz=2"),
    ],
)
def test_who_brought_a_fault_is_named(
    line: str, overrides: tuple[str, ...], where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(line)
    with pytest.raises(ConfigError) as caught:
        load_recipe("mine.toml", overrides)
    assert caught.value.where == where


@pytest.mark.parametrize("key", ["weight", "distinct"])
def test_a_task_that_is_only_tested_has_no_share_of_the_training(key: str) -> None:
    with pytest.raises(ConfigError, match=f"the key 'data.unseen.0.{key}' is gone: a task that is only tested"):
        load_recipe("tiny", (f'data.unseen=[{{name="sums",title="others",{key}=3}}]',))


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ("data.tasks.1.title=other", "'1' is no entry of a list of 1"),
        ("data.tasks.-1.title=other", "'-1' is no entry"),
        ("data.tasks.x=1", "'x' is no entry"),
        ("data.tasks.0.nothing=1", "unknown key 'data.tasks.0.nothing'"),
        ("data.tasks.0.name.deep=1", "'name' is a value, not a table"),
        (f"data.tasks.{'9' * 5000}.weight=1", "is no entry of a list of 1"),
        ("data.tasks.\u00b2.weight=1", "is no entry of a list of 1"),
        ("dense.0.steps=400", "there is no list 'dense' in the recipe"),
        ("pretrain.optim.betas.0=0.5", "there is no list 'betas' in the recipe"),
        ("rl.steps=20\nrl.lr=7", "an override of more than one key"),
    ],
)
def test_an_entry_of_a_list_goes_by_its_number(said: str, fault: str) -> None:
    recipe = load_recipe("tiny", ("data.tasks.0.title=other", "data.tasks.0.settings.max_value=7"))
    assert recipe.data.tasks[0].title == "other" and recipe.data.tasks[0].settings["max_value"] == 7
    with pytest.raises(ConfigError, match=re.escape(fault)):
        load_recipe("tiny", (said,))
