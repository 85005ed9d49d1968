"""A stage checks all that it reads before it touches what is there, and says where that went."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sprat.config import MoneyConfig
from sprat.errors import ConfigError, DataError, SpratError
from sprat.road import data, training
from sprat.road.places import Road
from sprat.road.recipe import named
from sprat.tokens import Tokenizer
from sprat.trust import open_run

NAMES = ("data", "pretrain", "sft", "rl-seed0", "distill")


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A road of finished runs that were made with other recipes; the data's tokenizer is real."""
    folder = tmp_path / "road"
    for name in NAMES:
        run = open_run(
            folder / name, stage=name, recipe=MoneyConfig(), inputs={}, seed=0, ledger=folder / "ledger.jsonl"
        )
        Tokenizer.train(["one two three"], 600).save(run.artefact / "tokenizer")
        run.finish()
    (folder / "corpus").mkdir()
    (folder / "corpus" / "documents.jsonl").write_text("kept\n")
    return folder


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _bad_row(road: Road) -> None:
    text = road.folder.parent / "text.jsonl"
    text.write_text(json.dumps({"text": "a good row. " * 100}) + "\n" + json.dumps({"txt": "a slip"}) + "\n")
    data.data(road, text)


def _one_row(road: Road) -> None:
    text = road.folder.parent / "text.txt"
    text.write_text("x")
    data.data(road, text)


@pytest.mark.parametrize(
    ("overrides", "work", "fault"),
    [
        (("rl.rl.reward=my_rewards.py:pay",), lambda road: training.reinforce(road, 0), ConfigError),
        (("rl.rl.reward=no colon",), lambda road: training.reinforce(road, 0), ConfigError),
        ((), _bad_row, DataError),
        ((), _one_row, DataError),
        (('data.tasks=[{name="summs"}]',), data.data, DataError),
        (('data.unseen=[{name="sums", title="t", settings={min_term=1}}]',), data.data, DataError),
        (("pretrain.model.changes.hiden_size=32",), training.pretrain, ConfigError),
        (("pretrain.train.init_from=runs/no-such",), training.pretrain, SpratError),
        ((), training.cold_start, SpratError),  # its input is a run without a model
        ((), training.student, SpratError),
    ],
)
def test_what_fails_leaves_the_finished_run_where_it_was(
    finished: Path, overrides: tuple[str, ...], work: Callable[[Road], None], fault: type[SpratError]
) -> None:
    before = _content(finished)
    with pytest.raises(fault):
        work(Road(finished, named("tiny", overrides)))
    assert _content(finished) == before
    assert not list(finished.glob("*.old-*"))


def test_a_run_that_is_set_aside_is_named_with_its_new_place(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    road = Road(finished, named("tiny"))
    asked: list[bool] = []

    def prepare(goes_on: bool) -> str:
        asked.append((finished / "pretrain" / "run.json").exists() and not goes_on)
        return "ready"

    opened = road.open("pretrain", "pretrain", road.recipe.pretrain, {}, 0, prepare)
    assert opened is not None and opened[1] == "ready" and asked == [True]
    assert str(finished / "pretrain.old-1") in capsys.readouterr().err
    assert (finished / "pretrain.old-1" / "run.json").exists()
    opened[0].finish()
    assert road.open("pretrain", "pretrain", road.recipe.pretrain, {}, 0, prepare) is None
    assert asked == [True] and capsys.readouterr().err == ""


def test_other_ways_of_judging_make_other_runs(tmp_path: Path) -> None:
    """A finished run does not answer for scores that would be taken in another way."""
    inputs = [training.measured(Road(tmp_path, named("tiny", more))) for more in ((), ("eval.max_tokens=99",))]
    assert inputs[0] != inputs[1]
    assert training.measured(Road(tmp_path, named("tiny", ("eval.batch=7",)))) == inputs[0]
