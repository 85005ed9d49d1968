"""Change each leaf of the recipe, one at a time: what the stage leaves behind, or what it refuses, must be another.

Every stage is run whole, as the pipeline runs it, at the smallest size; only what is asked of the model afterwards is
left out where a key of its training is changed. What a stage leaves is compared without the recipe that it notes down.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from sprat.config.base import Config, _dotted_keys, _table_class
from sprat.config.recipe import PipelineRecipe
from sprat.data import corpus
from sprat.data.sources import python_library
from sprat.data.sources.source import SourceRequest, SourceText
from sprat.engine import Engine
from sprat.errors import CheckpointError, SpratError
from sprat.model import Transformer
from sprat.pipeline import controls, data, evaluation, quantize, quickstart, training
from sprat.pipeline.pipeline import Pipeline
from sprat.pipeline.recipe import load_recipe
from sprat.post import distill
from sprat.train import checkpoint
from sprat.trust.stage_facts import TextSource

BASE = (
    'data.tasks=[{name="sums",title="sums",settings={min_terms=2,max_terms=2,max_value=12}},'
    '{name="sums",title="sums_of_3",settings={min_terms=3,max_terms=3,max_value=6}}]',
    'data.unseen=[{name="sums",title="sums_of_4",settings={min_terms=4,max_terms=4,max_value=6}}]',
    "data.vocab_size=320", "data.numbers=20", "data.seq_len=48", "data.demonstrations=60", "data.test_problems=10",
    "data.dev_problems=10",
    "data.text_bytes=20000",
    'pretrain.model={size="pico",changes={hidden_size=16,kv_lora_rank=16,moe_intermediate_size=16,intermediate_size=32,'
    "num_hidden_layers=1,first_k_dense_replace=0,num_nextn_predict_layers=1}}",
    "pretrain.steps=6", "pretrain.batch_rows=4", "pretrain.checkpoint_every=2",
    "pretrain.log_every=2", "pretrain.optim.warmup_steps=2", "pretrain.optim.decay_fraction=0.5",
    "sft.steps=6", "sft.batch_rows=4", "sft.seq_len=48", "sft.demonstrations=40",
    "sft.checkpoint_every=2", "sft.log_every=2", "sft.terse_fraction=0.5",
    "sft.optim.warmup_steps=2", "sft.optim.decay_fraction=0.5",
    "sft.optim.muon_lr=0.02", "sft.optim.adam_lr=0.01",
    "rl.steps=3", "rl.prompts_per_step=2", "rl.group_size=4", "rl.max_tokens=4", "rl.kl_weight=0.1",
    "rl.epochs=2", "rl.minibatch=4", "rl.lr=0.02", "rl.checkpoint_every=2", "rl.gate=false",
    "rl.clip_low=0.05", "rl.clip_high=0.05",
    'distill.student={size="pico",changes={hidden_size=16,kv_lora_rank=16,moe_intermediate_size=8,intermediate_size=16,'
    "num_hidden_layers=1,first_k_dense_replace=0,num_nextn_predict_layers=1}}",
    *(f"controls.{one}" for control in ("rft", "more") for one in (
        f"{control}.steps=6", f"{control}.batch_rows=4", f"{control}.checkpoint_every=2", f"{control}.log_every=2",
        f"{control}.optim.warmup_steps=2", f"{control}.optim.decay_fraction=0.5")),
    "controls.rft.seq_len=48", "controls.rft.problems=12", "controls.rft.samples=2", "controls.rft.max_tokens=4",
    "distill.steps=6", "distill.batch_rows=4", "distill.problems=20",
    "distill.checkpoint_every=2", "distill.log_every=2", "distill.text_share=0.25",
    "distill.optim.warmup_steps=2", "distill.optim.decay_fraction=0.5",
    "eval.max_tokens=3", "eval.side_problems=4", "eval.samples=1", "rl.seeds=[0]",
    'dense=[{equal="CPU seconds",size="pico",changes={dense=true,hidden_size=16,num_hidden_layers=1}}]',
)  # fmt: skip
PAYS = """
import time, zlib
def pay(problem, answer):
    time.sleep(0.002)
    return zlib.crc32(repr((problem.question, answer)).encode()) % 3
def pay_otherwise(problem, answer):
    return zlib.crc32(repr((answer, problem.question)).encode()) % 3
"""

# A leaf -> its other value, and what has to be said besides for it to count (said in both runs).
Change = tuple[str, tuple[str, ...]]
LOOP: dict[str, Change] = {
    "steps": ("5", ()),
    "batch_rows": ("8", ()),
    "micro_batches": ("2", ()),
    "init_from": ("{pipeline}/{stage}.before", ()),
    "checkpoint_every": ("3", ()),
    "log_every": ("3", ()),
    "mtp_weight": ("0.5", ()),
    "balance_weight": ("0.1", ()),
    "bias_update_speed": ("0.01", ()),
    "optim.name": ("adamw", ()),
    "optim.muon_lr": ("0.05", ()),
    "optim.adam_lr": ("0.05", ()),
    "optim.weight_decay": ("0.5", ()),
    "optim.momentum": ("0.5", ()),
    "optim.betas": ("[0.5, 0.9]", ()),
    "optim.grad_clip": ("0.01", ()),
    "optim.schedule": ("cosine", ()),
    "optim.warmup_steps": ("0", ()),
    "optim.decay_fraction": ("0.2", ()),
    "optim.final_lr_fraction": ("0.5", ()),
}
RL: dict[str, Change] = {
    "steps": ("2", ()),
    "prompts_per_step": ("3", ()),
    "group_size": ("3", ()),
    "max_tokens": ("5", ()),
    "temperature": ("0.5", ()),
    "lr": ("0.01", ()),
    "decay_fraction": ("0.9", ()),
    "optim": ("muon", ()),
    "clip_low": ("0.001", ()),
    "clip_high": ("0.5", ()),
    "kl_weight": ("0.5", ()),
    "kl_bias_correction": ("true", ()),
    "max_mismatch": ("1e-12", ()),
    "importance_cap": ("0.5", ()),
    "epochs": ("1", ()),
    "minibatch": ("8", ()),
    "format_weight": ("0.7", ("rl.start=sft", "sft.steps=80", "sft.terse_fraction=1.0", "rl.max_tokens=16")),
    "reward": ("{base}/pays.py:pay_otherwise", ()),
    "reward_timeout": ("1e-3", ()),
    "normalize_std": ("false", ()),
    "init_from": ("{pipeline}/rl-seed0.before", ("rl.steps=4",)),
    "checkpoint_every": ("1", ()),
    "grad_clip": ("0.01", ()),
    "gate": ("true", ()),
    "gate_pass_at_8": ("0.9", ("rl.gate=true", "rl.reward=")),
}
SFT: dict[str, Change] = {
    **LOOP,
    "seq_len": ("64", ()),
    "seed": (str(2**63 - 1), ()),
    "demonstrations": ("30", ()),
    "terse_fraction": ("0.9", ()),
}
RFT: dict[str, Change] = {
    **LOOP,
    "seq_len": ("64", ()),
    "seed": (str(2**63 - 1), ()),
    "problems": ("10", ()),
    "samples": ("3", ()),
    "temperature": ("0.5", ()),
    "thinking": ("true", ()),
    "max_tokens": ("5", ()),
}
DISTILL: dict[str, Change] = {
    **LOOP,
    "mode": ("logits", ()),
    "logits_weight": ("0.9", ()),
    "temperature": ("3.0", ()),
    "problems": ("10", ()),
    "qat_fraction": ("1.0", ()),
}
STAGES: dict[str, dict[str, Change]] = {
    "pretrain": {
        **{f"pretrain.{leaf}": change for leaf, change in LOOP.items()},
        "pretrain.model.size": ("nano", ()),
        "pretrain.model.changes": ("{hidden_size=24}", ()),
        "pretrain.text_share": ("0.6", ()),
        "seed": (str(2**63 - 1), ()),
        "money.yuan_per_core_hour": ("7", ()),
        "money.watts_per_core": ("7", ()),
    },
    "sft": {f"sft.{leaf}": change for leaf, change in SFT.items()},
    "rl-seed0": {
        **{f"rl.{leaf}": change for leaf, change in RL.items()},
        "rl.seeds": (f"[{2**63 - 1}]", ()),
        "rl.start": ("sft", ()),
        "seed": ("1", ()),
    },
    "rft": {f"controls.rft.{leaf}": change for leaf, change in RFT.items()},
    "pretrain-more": {f"controls.more.{leaf}": change for leaf, change in LOOP.items()},
    "distill": {
        **{f"distill.{leaf}": change for leaf, change in DISTILL.items()},
        "distill.student.size": ("nano", ()),
        "distill.student.changes": ("{hidden_size=24}", ()),
        "distill.text_share": ("0.5", ()),
        "distill.task_share": ("0.25", ()),
        "distill.verified": ("false", ()),
        "distill.examples": ("7", ("distill.task_share=0.25",)),
    },
    "student-scratch": {"distill.scratch_steps": ("5", ())},
    "student-examples": {"controls.student_examples": ("7", ("controls.student_examples=5",))},
    "pretrain-dense": {
        "dense.size": ("nano", ()),
        "dense.changes": ("{dense=true,num_hidden_layers=1}", ()),
        "dense.steps": ("5", ()),
        "dense.equal": ("parameters", ()),
    },
    "quantize": {
        "quant.rounding": ("nearest", ()),
        "quant.bits": ("8", ()),
        "quant.group": ("64", ('distill.student.changes.moe_intermediate_size=96',)),
        "quant.head_bits": ("4", ()),
    },
    "measured": {
        "eval.max_tokens": ("5", ()),
        "eval.batch": ("3", ()),
        "eval.side_problems": ("3", ()),
        "eval.samples": ("2", ()),
        "eval.split": ("dev", ()),
    },
    "data": {
        "data.vocab_size": ("310", ()),
        "data.numbers": ("10", ()),
        "data.seq_len": ("64", ()),
        "data.text_bytes": ("10000", ()),
        "data.demonstrations": ("50", ()),
        "data.terse_fraction": ("0.9", ()),
        "data.test_problems": ("12", ()),
        "data.dev_problems": ("12", ()),
        "data.tasks.name": ("no-such-task", ()),
        "data.tasks.title": ("another", ()),
        "data.tasks.settings": ("{min_terms=2,max_terms=2,max_value=11}", ()),
        "data.tasks.test_problems": ("2", ()),
        "data.tasks.weight": ("5.0", ()),
        "data.tasks.distinct": ("3", ()),
        "data.unseen.name": ("no-such-task", ()),
        "data.unseen.title": ("another", ()),
        "data.unseen.settings": ("{min_terms=4,max_terms=4,max_value=5}", ()),
        "data.unseen.test_problems": ("11", ()),
    },
}  # fmt: skip
# What changes no figure, and what it changes instead (``Seen``).
ELSEWHERE = {
    "checkpoint_every": "saved",  # how much an interruption costs
    "micro_batches": "rows",  # how much memory a step takes
    "log_every": "metrics",  # how fine the curve is
    "eval.batch": "at_once",  # how many answers are drawn at once
    "money.yuan_per_core_hour": "money",
    "money.watts_per_core": "money",
}


TIMES = ("training_cpu_seconds", "models", "drafts", "tokens_per_second")  # facts that no two runs have alike


@dataclass
class Seen:
    """What stages did since, that no file tells of."""

    saved: list[str] = field(default_factory=list)  # checkpoints
    rows: list[int] = field(default_factory=list)  # of each pass through a model
    at_once: list[int] = field(default_factory=list)  # answers that an engine may draw at once


@dataclass
class Left:
    """What a stage left behind, or why it refused."""

    fault: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    metrics: str = ""
    money: Any = None
    saved: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    at_once: list[int] = field(default_factory=list)

    def same_weights(self, other: Left, tolerance: float) -> bool:
        """Whether no weight differs by more."""
        return self.weights.keys() == other.weights.keys() and all(
            np.allclose(value, other.weights[name], atol=tolerance, rtol=0) for name, value in self.weights.items()
        )

    def result(self) -> list[Any]:
        """All that is a result: neither speed nor place nor price."""
        return [self.fault, self.figures, self.metrics]


@pytest.fixture(scope="module")
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def seen(patched: pytest.MonkeyPatch) -> Seen:
    """Watches checkpoints, passes and engines."""
    seen, save, hidden, start = Seen(), checkpoint.save, Transformer.hidden, Engine.__init__

    def watched_save(folder: Path, *rest: Any, **more: Any) -> Path:
        place = save(folder, *rest, **more)
        seen.saved.append(f"{place.parent.name}/{place.name}")
        return place

    def watched_hidden(self: Transformer, tokens_BT: torch.Tensor, **more: Any) -> Any:
        seen.rows.append(len(tokens_BT))
        return hidden(self, tokens_BT, **more)

    def watched_start(self: Engine, *rest: Any, **more: Any) -> None:
        seen.at_once.append(more.get("max_batch", 0))
        start(self, *rest, **more)

    patched.setattr(checkpoint, "save", watched_save)
    patched.setattr(Transformer, "hidden", watched_hidden)
    patched.setattr(Engine, "__init__", watched_start)
    return seen


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, patched: pytest.MonkeyPatch, seen: Seen) -> Path:
    """A pipeline that was walked by ``BASE`` up to the student; nothing was asked of its models."""
    torch.set_num_threads(1)
    patched.setattr(os, "fsync", lambda file: None)  # no power fails here
    folder = tmp_path_factory.mktemp("leaves")
    (folder / "text").mkdir()
    rng = np.random.default_rng(0)
    for name in "abcd":
        words = rng.choice(["sprat", "whale", "sea", "fish", "small", "net", "tide"], 2400)
        (folder / "text" / f"{name}.txt").write_text(" ".join(words) + ".")
    (folder / "pays.py").write_text(PAYS)

    def taught(*rest: Any, count: int, verified: bool = True, **more: Any) -> distill.Traces:
        first = zlib.crc32(repr(sorted(more.items())).encode()) % 97  # another way of asking, another answer
        numbers = range(first, first + count)
        shown = [distill.Demonstration(f"What is {n} + 1?", f"{n} + 1 = {n + 1}", str(n + 1)) for n in numbers]
        return distill.Traces(shown if verified else shown[1:], count, 8 * count, 8e6 * count)

    patched.setattr(distill, "sample_traces", taught)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("data", "pretrain", "sft", "rl-seed0", "distill", "rft", "pretrain-more"):
            _walk(_pipeline(folder, folder / "road", ()), name, folder, patch)
    return folder


def _pipeline(base: Path, folder: Path, overrides: Sequence[str]) -> Pipeline:
    return Pipeline(folder, load_recipe("tiny", (*BASE, f"rl.reward={base}/pays.py:pay", *overrides)))


def _walk(pipeline: Pipeline, stage: str, base: Path, patch: pytest.MonkeyPatch) -> None:
    """Run ``stage``; what only asks its model afterwards is left out, but where that is what is looked at."""
    if stage != "measured":
        patch.setattr(evaluation, "score_tasks", lambda *rest, **more: [])
        patch.setattr(evaluation, "accuracy_changes", lambda *rest, **more: [])
        patch.setattr(evaluation, "tokens_per_second", lambda *rest, **more: 1.0)
        patch.setattr(training, "_text_facts", lambda *rest, **more: {})
    work: dict[str, Callable[[], None]] = {
        "data": lambda: data.data(pipeline, base / "text"),
        "pretrain": lambda: training.pretrain(pipeline),
        "measured": lambda: training.pretrain(pipeline),
        "pretrain-dense": lambda: training.pretrain(pipeline, pipeline.recipe.dense[0]),
        "sft": lambda: training.sft(pipeline),
        "rft": lambda: controls.rft(pipeline),
        "pretrain-more": lambda: controls.pretrain_more(pipeline),
        "rl-seed0": lambda: training.rl(pipeline, pipeline.recipe.rl.seeds[0]),
        "distill": lambda: training.distill(pipeline),
        "student-scratch": lambda: controls.student_scratch(pipeline),
        "student-examples": lambda: controls.student_examples(pipeline),
        "quantize": lambda: quantize.quantize(pipeline),
    }
    work[stage]()


# What each stage reads of the others (``sft`` where RL starts there).
NEEDS = {
    "data": (),
    "pretrain": ("data",),
    "pretrain-dense": ("data",),
    "student-scratch": ("data",),
    "student-examples": ("data",),
    "sft": ("data", "pretrain"),
    "rft": ("data", "pretrain"),
    "pretrain-more": ("data", "pretrain"),
    "rl-seed0": ("data", "pretrain", "sft"),
    "distill": ("data", "rl-seed0"),
    "quantize": ("data", "rl-seed0", "distill"),
}
_known: dict[tuple[str, tuple[str, ...]], Left] = {}


def _left(base: Path, seen: Seen, stage: str, overrides: tuple[str, ...], changed: str = "") -> Left:
    """What ``stage`` leaves in a pipeline of its own whose earlier stages are those of ``base``."""
    key = (stage, (*overrides, changed))
    if key in _known:
        return _known[key]
    folder = base / f"road-{len(_known)}"
    folder.mkdir()
    run = {"measured": "pretrain"}.get(stage, stage)
    shutil.copy(base / "road" / "ledger.jsonl", folder)
    for name in NEEDS[run]:
        shutil.copytree(base / "road" / name, folder / name)
    if (base / "road" / run).exists() and "init_from" in changed:
        shutil.copytree(base / "road" / run, folder / f"{run}.before")
    said = tuple(one.format(pipeline=folder, base=base, stage=run) if "{pipeline}" in one or "{base}" in one else one
                 for one in (*overrides, *([changed] if changed else [])))  # fmt: skip
    seen.saved.clear(), seen.rows.clear(), seen.at_once.clear()
    left = Left()
    try:
        with pytest.MonkeyPatch.context() as patch:
            pipeline = _pipeline(base, folder, said)
            for earlier in ("sft", "distill"):  # where what is said besides makes another one
                if earlier != run and any(one.startswith(f"{earlier}.") for one in overrides):
                    shutil.rmtree(folder / earlier)
                    _walk(pipeline, earlier, base, patch)
            _walk(pipeline, stage, base, patch)
        names = {"rl-seed0": f"rl-seed{pipeline.recipe.rl.seeds[0]}", "pretrain-dense": pipeline.recipe.dense[0].run}
        name = names.get(stage, run)
        record = json.loads((folder / name / "run.json").read_text())
        outputs = {path: made for path, made in record["outputs"].items() if not path.endswith("state.json")}
        facts = {fact: value for fact, value in record["facts"].items() if fact not in TIMES}
        left.figures = {"outputs": outputs, "tokens": record["tokens"], "flops": record["flops"], **facts}
        left.metrics = (folder / name / "metrics.jsonl").read_text() + name
        left.money = [record["money"], record["energy_joules_estimated"] > 0, record["nano_yuan"] > 0]
        model = folder / name / "artefact" / "model.safetensors"
        left.weights = dict(load_file(model)) if model.exists() and stage != "quantize" else {}
    except SpratError as error:
        left.fault = error.what
    left.saved, left.rows, left.at_once = list(seen.saved), list(seen.rows), list(seen.at_once)
    shutil.rmtree(folder, ignore_errors=True)
    _known[key] = left
    return left


LEAVES = [(stage, leaf) for stage, changes in STAGES.items() for leaf in changes]


@pytest.mark.parametrize(("stage", "leaf"), LEAVES, ids=lambda one: one)
def test_another_value_gives_another_result_or_an_error(base: Path, seen: Seen, stage: str, leaf: str) -> None:
    value, besides = STAGES[stage][leaf]
    written = re.sub(r"^(data\.tasks|data\.unseen|dense)\.", r"\1.0.", leaf)
    before = _left(base, seen, stage, besides)
    after = _left(base, seen, stage, besides, f"{written}={value}")
    if "gate" not in leaf:
        assert not before.fault
    assert "run yet" not in after.fault  # NEEDS names all that the stage reads
    assert not re.search("unknown key|not a table|no entry", after.fault)  # the change was read
    short = next((name for name in ELSEWHERE if leaf.endswith(name)), None)
    if short is None:
        assert before.result() != after.result()
        return
    assert not after.fault
    assert getattr(before, ELSEWHERE[short]) != getattr(after, ELSEWHERE[short])
    tolerance = 1e-2 if short == "micro_batches" else 0  # sums round differently
    assert before.same_weights(after, tolerance)


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_changed_gives_the_same_result(base: Path, seen: Seen, stage: str) -> None:
    """Else another result would say nothing of the leaf that was changed."""
    besides = ("controls.student_examples=5",) if stage == "student-examples" else ()
    before = _left(base, seen, stage, besides)
    after = _left(base, seen, stage, besides, "jobs=1")
    assert before.result() == after.result()


def test_every_leaf_of_the_recipe_is_changed_here() -> None:
    here = {leaf for changes in STAGES.values() for leaf in changes}
    tables = {
        leaf
        for leaf in _dotted_keys(PipelineRecipe)
        if _table_class(PipelineRecipe, tuple(leaf.split("."))) is not None
    }
    assert set(_dotted_keys(PipelineRecipe)) - tables - here == {"jobs", "data.offline"}  # below


def test_jobs_and_offline_reach_who_they_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How many stages run side by side, and whether text is fetched: neither is a result of a stage."""
    asked: list[Any] = []
    monkeypatch.setattr(quickstart, "run_stages", lambda stages, executor, jobs, on_progress: asked.append(jobs))
    monkeypatch.setattr(quickstart, "write_report", lambda out: out)
    for jobs in (1, 3):
        quickstart.quickstart(tmp_path / str(jobs), load_recipe("tiny", (*BASE, f"jobs={jobs}")))

    def fetched(request: SourceRequest) -> SourceText:
        if not request.offline:
            asked.append("fetched")
        return SourceText((), lambda _: TextSource("fetched"))

    monkeypatch.setattr(corpus, "SOURCES", (fetched, python_library.read))
    for offline in ("true", "false"):
        recipe = load_recipe("tiny", (*BASE, f"data.offline={offline}"))
        data._load_corpus(tmp_path / offline, recipe.data, None)
        asked.append(offline)
    assert asked == [1, 3, "true", "fetched", "false"]


@pytest.mark.parametrize(
    ("stage", "changed", "fault"),
    [
        ("pretrain", "pretrain.steps=3", "the recipe ends at step 3"),
        ("pretrain", "pretrain.model.changes.hidden_size=24", "another model"),
        ("pretrain", "pretrain.optim.name=adamw", "another optimiser"),
        ("sft", "sft.optim.name=adamw", "another optimiser"),
        ("distill", "distill.student.changes.hidden_size=24", "another model"),
        ("rl-seed0", "rl.steps=2", "the recipe ends at step 2"),
        ("rl-seed0", "rl.steps=4 rl.optim=muon", "another optimiser"),
    ],
)
def test_a_start_that_does_not_fit_leaves_the_finished_run_where_it_was(
    base: Path, tmp_path: Path, stage: str, changed: str, fault: str
) -> None:
    folder = tmp_path / "road"
    shutil.copytree(base / "road", folder)
    table = {"rl-seed0": "rl"}.get(stage, stage)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    pipeline = _pipeline(base, folder, (*changed.split(), f"{table}.init_from={folder}/{stage}"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match=fault):
        _walk(pipeline, stage, base, patch)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("stage", "changed", "fault"),
    [
        ("pretrain", "pretrain.model.changes.max_position_embeddings=50 eval.max_tokens=45", "context of 50"),
        ("pretrain-dense", "dense.0.changes.max_position_embeddings=50 eval.max_tokens=45", "context of 50"),
        ("distill", "distill.student.changes.max_position_embeddings=50 eval.max_tokens=45", "context of 50"),
        (
            "pretrain",
            "pretrain.model.changes.max_position_embeddings=40 data.seq_len=32 sft.seq_len=32",
            "rows of 48 tokens",
        ),
        ("sft", "eval.max_tokens=2040", "context of 2048"),
        ("rl-seed0", "rl.max_tokens=2040", "context of 2048"),
        ("quantize", "eval.max_tokens=2040", "context of 2048"),
        ("pretrain", "pretrain.model.changes.vocab_size=300 data.vocab_size=300", "300 ids are fewer"),
        ("distill", "distill.student.changes.vocab_size=300 data.vocab_size=300", "300 ids are fewer"),
        ("sft", 'sft.steps=5 data.tasks=[{name="sums",title="new"}]', "no held-out problems"),
    ],
)
def test_what_the_model_cannot_hold_is_refused_before_the_finished_run_is_set_aside(
    base: Path, tmp_path: Path, stage: str, changed: str, fault: str
) -> None:
    folder = tmp_path / "road"
    shutil.copytree(base / "road", folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SpratError, match=fault):
        _walk(_pipeline(base, folder, changed.split()), stage, base, patch)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_the_student_learns_from_rows_of_the_data_whatever_the_recipe_says_since(base: Path, seen: Seen) -> None:
    assert _left(base, seen, "distill", (), "data.seq_len=64").fault == ""


def _beside(base: Path, tmp_path: Path, stage: str) -> Path:
    """A pipeline in which all is done that ``stage`` reads."""
    folder = tmp_path / "road"
    folder.mkdir()
    shutil.copy(base / "road" / "ledger.jsonl", folder)
    for name in NEEDS[stage]:
        shutil.copytree(base / "road" / name, folder / name)
    return folder


@pytest.mark.parametrize(
    ("fraction", "change", "another"),
    [(0.0, "bits=8", False), (0.01, "bits=8", False), (0.5, "bits=8", True), (0.5, "rounding=nearest", False)],
)
def test_another_int4_is_another_student_only_where_it_learns_for_it(
    base: Path, tmp_path: Path, fraction: float, change: str, another: bool
) -> None:
    folder, learns = _beside(base, tmp_path, "distill"), f"distill.qat_fraction={fraction}"
    made = []
    with pytest.MonkeyPatch.context() as patch:
        for quant in ("rounding=gptq", change):
            _walk(_pipeline(base, folder, (learns, f"quant.{quant}")), "distill", base, patch)
            made.append(json.loads((folder / "distill" / "run.json").read_text())["artefact_digest"])
    assert (folder / "distill.old-1").exists() == another
    assert (made[0] != made[1]) == another


def test_the_first_seed_is_asked_more_whichever_it_is(base: Path, tmp_path: Path) -> None:
    folder = _beside(base, tmp_path, "rl-seed0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "score_tasks", lambda *rest, **more: [])
        patch.setattr(evaluation, "accuracy_changes", lambda *rest, **more: [])
        for seeds in ("[0, 1]", "[0, 1]", "[1, 0]"):
            training.rl(_pipeline(base, folder, (f"rl.seeds={seeds}",)), 1)
            assert (folder / "rl-seed1.old-1").exists() == (seeds == "[1, 0]")


def test_other_weights_of_tasks_are_another_input(tmp_path: Path) -> None:
    inputs = [
        training.evaluation_inputs(Pipeline(tmp_path, load_recipe("tiny", (f"data.tasks.0.weight={w}",))))
        for w in (1.0, 1.2)
    ]
    digests = [one["tasks"].digest() for one in inputs if isinstance(one["tasks"], Config)]
    assert len(set(digests)) == 2


def test_another_split_is_another_input_of_the_data(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _beside(base, tmp_path, "distill")
    data.data(_pipeline(base, folder, ()), base / "text")
    assert not (folder / "data.old-1").exists()
    monkeypatch.setattr(data, "SPLIT_SALT", "another")
    data.data(_pipeline(base, folder, ()), base / "text")
    assert (folder / "data.old-1").exists()
