"""Every key of a recipe counts: some stage of the road reads it. A key without effect is a promise that is not kept."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sprat.config import Config
from sprat.errors import ConfigError
from sprat.post import distill
from sprat.report import write
from sprat.road import data, squeeze, training
from sprat.road.places import Road
from sprat.road.recipe import RoadRecipe, named

SMALL = (
    "data.numbers=20", "data.seq_len=64", "data.demonstrations=24", "data.test_problems=10",
    "pretrain.train.steps=3", "pretrain.train.batch_rows=4", "pretrain.train.log_every=1",
    "sft.sft.steps=1", "sft.sft.seq_len=64", "sft.sft.demonstrations=8",
    "rl.rl.steps=1", "rl.rl.prompts_per_step=2", "rl.rl.group_size=2", "rl.rl.max_tokens=4", "rl.rl.kl_weight=0.1",
    "rl.rl.gate=true", "pretrain.model.changes.num_nextn_predict_layers=1",
    "distill.student.changes.num_nextn_predict_layers=1", "distill.distill.steps=1", "distill.distill.problems=2",
    "distill.distill.batch_rows=4",
    "dense={size='pico', changes={dense=true, hidden_size=16}}", "eval.max_tokens=2", "eval.side_problems=2",
)  # fmt: skip
ELSEWHERE = {  # read where this test does not come: by the graph of stages, and where the user gives no text
    ("RoadRecipe", "jobs"), ("RoadRecipe", "dense"), ("DataRecipe", "offline"),
}  # fmt: skip


def _tables(kind: type[Config]) -> Iterator[tuple[str, str]]:
    """(class, key) of every key of ``kind`` and of the tables below it."""
    for name, field in kind.model_fields.items():
        yield kind.__name__, name
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, Config):
                yield from _tables(part)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """The keys that were read since, by code that does more with a recipe than to check it."""
    found: set[tuple[str, str]] = set()
    plain = Config.__getattribute__

    def spy(self: Config, name: str) -> Any:
        if name in type(self).model_fields:
            file = sys._getframe(1).f_code.co_filename
            if "pydantic" not in file and not file.endswith(("road/recipe.py", "config/base.py")):
                found.add((type(self).__name__, name))
        return plain(self, name)

    monkeypatch.setattr(Config, "__getattribute__", spy)
    return found


def test_every_key_is_read_by_some_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: set[tuple[str, str]]
) -> None:
    torch.set_num_threads(1)
    (tmp_path / "text").mkdir()
    for name in "ab":
        (tmp_path / "text" / f"{name}.txt").write_text(f"{name} sprat is a small fish.\n" * 60)
    taught = distill.Traces([distill.Demonstration("What is 1 + 1?", "1 + 1 = 2", "2")] * 4, 4, 8)
    monkeypatch.setattr(distill, "traces", lambda *rest, **more: taught)
    monkeypatch.setattr("sprat.post.readiness.Readiness.check", lambda self: self.fault)
    pays = "def pay(problem, answer, turn=iter(range(9**9))):\n    return next(turn) % 2\n"  # spread in every group
    (tmp_path / "pays.py").write_text(pays)
    road = Road(tmp_path / "road", named("tiny", (*SMALL, f"rl.rl.reward={tmp_path}/pays.py:pay")))
    data.data(road, tmp_path / "text")
    training.pretrain(road)
    training.pretrain(road, "pretrain-dense", road.recipe.dense)
    training.cold_start(road)
    training.reinforce(road, 0)
    training.student(road)
    training.scratch(road)
    squeeze.squeeze(road)
    write(road.folder)
    read |= {("GRPOConfig", name) for kind, name in read if kind == "RLConfig"}  # the same, with a seed
    unread = set(_tables(RoadRecipe)) - read - ELSEWHERE
    assert sorted(unread) == []


@pytest.mark.parametrize(
    "key",
    [
        "pretrain.train.seed",
        "pretrain.train.compile",
        "pretrain.train.seq_len",
        "distill.distill.seed",
        "rl.rl.seed",
        "name",
    ],
)
def test_a_key_of_an_older_recipe_that_never_counted_is_refused_with_what_counts(key: str) -> None:
    with pytest.raises(ConfigError, match=f"the key '{key}' is gone: .*; remove it"):
        named("tiny", (f"{key}=3",))
