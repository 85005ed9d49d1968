"""A stage checks all that it reads before it touches what is there, and says where that went."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sprat.config import MoneyConfig, OptimConfig
from sprat.config.sizes import size
from sprat.errors import CheckpointError, ConfigError, DataError, SpratError
from sprat.files import digest
from sprat.model import Transformer
from sprat.pipeline import controls, data, quantize, training
from sprat.pipeline.pipeline import Pipeline
from sprat.pipeline.quickstart import quickstart
from sprat.pipeline.recipe import load_recipe
from sprat.tokens import Tokenizer
from sprat.train import checkpoint, optim
from sprat.trust import Run, open_run
from sprat.trust.verify import verify

NAMES = ("data", "pretrain", "sft", "rl-seed0", "distill")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["one two three"], 600)


@pytest.fixture
def finished(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A pipeline of finished runs that were made with other recipes; the data's tokenizer is real."""
    folder = tmp_path / "road"
    for name in NAMES:
        run = open_run(
            folder / name, stage=name, recipe=MoneyConfig(), inputs={}, seed=0, ledger=folder / "ledger.jsonl"
        )
        tokenizer.save(run.artifact / "tokenizer")
        run.finish()
    (folder / "corpus").mkdir()
    (folder / "corpus" / "documents.jsonl").write_text("kept\n")
    return folder


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _bad_row(pipeline: Pipeline) -> None:
    text = pipeline.folder.parent / "text.jsonl"
    text.write_text(json.dumps({"text": "a good row. " * 100}) + "\n" + json.dumps({"txt": "a slip"}) + "\n")
    data.data(pipeline, text)


def _one_row(pipeline: Pipeline) -> None:
    text = pipeline.folder.parent / "text.txt"
    text.write_text("x")
    data.data(pipeline, text)


@pytest.mark.parametrize(
    ("overrides", "work", "fault"),
    [
        (("rl.reward=my_rewards.py:pay",), lambda pipeline: training.rl(pipeline, 0), ConfigError),
        (("rl.reward=no colon",), lambda pipeline: training.rl(pipeline, 0), ConfigError),
        ((), _bad_row, DataError),
        ((), _one_row, DataError),
        (('data.tasks=[{name="summs"}]',), data.data, DataError),
        (('data.unseen=[{name="sums", title="t", settings={min_term=1}}]',), data.data, DataError),
        (("pretrain.model.changes.hiden_size=32",), training.pretrain, ConfigError),
        (("pretrain.init_from=runs/no-such",), training.pretrain, SpratError),
        ((), training.sft, SpratError),  # its input is a run without a model
        ((), training.distill, SpratError),
    ],
)
def test_what_fails_leaves_the_finished_run_where_it_was(
    finished: Path, overrides: tuple[str, ...], work: Callable[[Pipeline], None], fault: type[SpratError]
) -> None:
    before = _content(finished)
    with pytest.raises(fault):
        work(Pipeline(finished, load_recipe("tiny", overrides)))
    assert _content(finished) == before
    assert not list(finished.glob("*.old-*"))


def test_a_run_that_is_set_aside_is_named_with_its_new_place(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = Pipeline(finished, load_recipe("tiny"))
    asked: list[bool] = []

    def prepare(goes_on: bool) -> str:
        asked.append((finished / "pretrain" / "run.json").exists() and not goes_on)
        return "ready"

    opened = pipeline.open_run("pretrain", "pretrain", pipeline.recipe.pretrain, {}, prepare)
    assert opened is not None and opened[1] == "ready" and asked == [True]
    assert str(finished / "pretrain.old-1") in capsys.readouterr().err
    assert (finished / "pretrain.old-1" / "run.json").exists()
    opened[0].finish()
    assert pipeline.open_run("pretrain", "pretrain", pipeline.recipe.pretrain, {}, prepare) is None
    assert asked == [True] and capsys.readouterr().err == ""


def test_other_ways_of_judging_make_other_runs(tmp_path: Path) -> None:
    """A finished run does not answer for scores that would be taken in another way."""
    inputs = [
        training.evaluation_inputs(Pipeline(tmp_path, load_recipe("tiny", more)))
        for more in ((), ("eval.max_tokens=99",))
    ]
    assert inputs[0] != inputs[1]
    assert training.evaluation_inputs(Pipeline(tmp_path, load_recipe("tiny", ("eval.batch=7",)))) == inputs[0]


def test_a_run_may_start_from_the_one_in_its_own_folder(tmp_path: Path) -> None:
    """The old one is set aside with its checkpoint; the new one knows it by digest, open, resumed and finished."""
    folder = tmp_path / "road" / "pretrain"
    model = Transformer.create(size("pico", vocab_size=64, hidden_size=16, intermediate_size=16, kv_lora_rank=16), 0)
    first = Pipeline(tmp_path / "road", load_recipe("tiny"))
    opened = first.open_run("pretrain", "pretrain", first.recipe.pretrain, {}, bool)
    assert opened is not None
    for step in (20, 40):
        checkpoint.save(opened[0].checkpoints, step, model, optim.build(model, OptimConfig()), {"n": step})
    wanted = digest.of_folder(folder / "checkpoints" / "step-00000040")

    init_from = str(folder)
    again = Pipeline(tmp_path / "road", load_recipe("tiny", (f"pretrain.init_from={init_from}",)))

    def start() -> Run | None:
        found = again.open_run("pretrain", "pretrain", again.recipe.pretrain, {}, lambda resuming: (model,), print)
        return found and found[0]

    run = start()
    assert run is not None and run.set_aside == folder.with_name("pretrain.old-1")
    for _ in range(2):  # the second is a start after a kill
        assert run is not None and run.identity["inputs"]["init_from"]["digest"] == wanted
        found = checkpoint.find_start(init_from, run.folder, wanted)
        assert found.folder == folder.with_name("pretrain.old-1") / "checkpoints" / "step-00000040"
        checkpoint.save(run.checkpoints, 60, model, optim.build(model, OptimConfig()), {"n": 60})
        run = start()
        assert run is not None and run.set_aside is None
    run.finish()
    said = " ".join(map(str, verify(folder.parent)))
    assert "1 inputs" in said and "not here" not in said, "what it started from is checked where it was set aside"
    assert start() is None and len(list(folder.parent.glob("*.old-*"))) == 1
    with pytest.raises(CheckpointError, match=r"there is \[20, 40\]"):
        checkpoint.find_start(f"{folder}@30", folder)
    shutil.rmtree(folder.with_name("pretrain.old-1"))
    assert start() is None, "also where what it started from was deleted"
    assert all(finding.ok for finding in verify(folder.parent))


def test_a_recipe_that_a_late_stage_would_refuse_is_refused_before_the_first(tmp_path: Path) -> None:
    for slip in ("rl.reward=pays.py:pay", 'data.tasks=[{name="summs"}]', "distill.student.size=picoo"):
        with pytest.raises(SpratError):
            quickstart(tmp_path / "road", load_recipe("tiny", (slip,)))
    assert not (tmp_path / "road").exists()


@pytest.mark.parametrize(
    "slip",
    ["pretrain.micro_batches=3", "pretrain.batch_rows=1", "distill.batch_rows=1", "rl.seeds=[]",
     "rl.seeds=[0, 0]", "data.tasks=[{name='sums', weight=0}]", "sft.micro_batches=4"],
)  # fmt: skip
def test_what_does_not_hold_together_is_refused_by_the_recipe(slip: str) -> None:
    with pytest.raises(ConfigError):
        load_recipe("tiny", (slip,))


def test_one_checkpoint_cannot_start_three_seeds() -> None:
    with pytest.raises(ConfigError, match="give one seed"):
        load_recipe("tiny", ("rl.init_from=runs/a/rl-seed0", "rl.seeds=[0, 1]"))
    assert load_recipe("tiny", ("rl.init_from=runs/a/rl-seed0", "rl.seeds=[1]")).rl.init_from


WORK: dict[str, Callable[[Pipeline], None]] = {
    "data": data.data,
    "pretrain": training.pretrain,
    "sft": training.sft,
    "rl-seed0": lambda pipeline: training.rl(pipeline, 0),
    "distill": training.distill,
    "quantize": quantize.quantize,
    "rft": controls.rft,
    "pretrain-more": controls.pretrain_more,
    "student-scratch": controls.student_scratch,
}


@pytest.mark.parametrize(
    ("stage", "there", "verb"),
    [
        ("pretrain", (), "data"),
        ("sft", (), "data"),
        ("sft", ("data",), "train"),
        ("rl-seed0", ("data",), "train"),
        ("rl-seed0 rl.start=sft", ("data", "pretrain"), "sft"),
        ("distill", ("data", "pretrain", "sft"), "rl"),
        ("quantize", ("data", "rl-seed0"), "distill"),
        ("quantize", ("data", "distill"), "rl"),
        ("rft", ("data",), "train"),
        ("pretrain-more rl.start=sft", ("data", "pretrain"), "sft"),
        ("student-scratch", (), "data"),
    ],
)
def test_a_stage_before_its_turn_names_the_verb_that_is_missing(
    finished: Path, stage: str, there: tuple[str, ...], verb: str
) -> None:
    for name in set(NAMES) - set(there):
        shutil.rmtree(finished / name)
    before = _content(finished)
    with pytest.raises(DataError if verb == "data" else CheckpointError, match=f"run `sprat {verb} --out {finished}` "):
        name, *said = stage.split()
        WORK[name](Pipeline(finished, load_recipe("tiny", tuple(said))))
    assert _content(finished) == before


def test_a_stage_on_an_unfinished_one_names_the_verb_that_ends_it(finished: Path) -> None:
    (finished / "pretrain" / "run.json").rename(finished / "pretrain" / "open.json")
    with pytest.raises(CheckpointError, match="pretrain is not finished .*; run `sprat train --out "):
        training.sft(Pipeline(finished, load_recipe("tiny")))


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("pretrain.model.changes.max_position_embeddings=10", "pretrain.model.changes.max_position_embeddings"),
        ("pretrain.model.changes.vocab_size=100", "pretrain.model.changes.vocab_size"),
        ("distill.student.changes.max_position_embeddings=95", "distill.student.changes.max_position_embeddings"),
        ("distill.student.changes.vocab_size=511", "distill.student.changes.vocab_size"),
        (
            "dense=[{equal='CPU seconds',changes={dense=true,max_position_embeddings=10}}]",
            "dense.0.changes.max_position_embeddings",
        ),
        ("dense=[{equal='CPU seconds',changes={dense=true,vocab_size=10}}]", "dense.0.changes.vocab_size"),
        ("data.seq_len=4096", "data.seq_len"),
        ("sft.seq_len=4096", "sft.seq_len"),
        ("rl.max_tokens=2048", "rl.max_tokens"),
        ("eval.max_tokens=2048", "eval.max_tokens"),
        ("pretrain.model.changes.hidden_size=99999999999999999999", "hidden_size"),
        ("pretrain.model.changes.name=x", "name"),
        ("pretrain.model.changes.dense=3", "dense"),
    ],
)
def test_a_model_that_its_recipe_cannot_use_is_refused_when_it_is_read(value: str, key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("tiny", (value,))
    assert key in str(caught.value)
