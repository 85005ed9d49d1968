"""What a user sees while a model is trained, and what is decided by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sprat.config.finetune import DPOConfig, FinetuneConfig
from sprat.engine import Engine, Sampling
from sprat.errors import ConfigError, DataError, MachineError
from sprat.files import atomic
from sprat.formats.load import load, save
from sprat.model import Transformer
from sprat.post.finetune import finetune
from sprat.tokens import Tokenizer
from sprat.train import checkpoint
from sprat.train.selection import Selection
from sprat.trust.stage_facts import read_samples
from sprat.trust.verify import verify

SETTINGS: dict[str, Any] = {"epochs": 10, "seq_len": 32, "optim": {"adam_lr": 0.01}, "eval": {"max_tokens": 4}}
CONFIG = FinetuneConfig.model_validate(SETTINGS)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(n), "completion": "7"}) + "\n" for n in range(40)))
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n} test", "answer": "7"}) + "\n" for n in range(50, 58)))
    return path


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lora", [None, {"rank": 4, "dora": True}])
def test_evaluations_are_logged_and_training_does_not_notice(
    lora: dict[str, Any] | None, guesser: Transformer, tokenizer: Tokenizer, data: Path, questions: Path, tmp_path: Path
) -> None:
    save(guesser, tokenizer, tmp_path / "guesser")
    config = FinetuneConfig.model_validate({**SETTINGS, "epochs": 4, "lora": lora})
    seen = finetune(tmp_path / "guesser", data, tmp_path / "a" / "run", config, eval_tasks=[str(questions)])
    blind_config = config.replace(eval={"samples": 0}, eval_every=1000)
    blind = finetune(tmp_path / "guesser", data, tmp_path / "b" / "run", blind_config)
    weights = [load_file(run.artifact / "model.safetensors") for run in (seen, blind)]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    accuracies = [row["eval_accuracy/questions"] for row in rows_of(seen.folder) if "eval_accuracy/questions" in row]
    assert len(accuracies) >= 4 and rows_of(seen.folder)[0]["step"] == 0
    engine = Engine(*load(seen.folder))
    outputs = engine.generate([f"{n} test" for n in range(50, 58)], Sampling(temperature=0, max_tokens=4))
    assert sum(output.text == "7" for output in outputs) / 8 == accuracies[-1]
    assert seen.facts["validation_after"]["accuracy/questions"] == accuracies[-1]
    samples = read_samples(seen.artifact)
    assert {sample.step for sample in samples} == {row["step"] for row in rows_of(seen.folder) if "eval_loss" in row}
    assert all(each.expected == "7" and each.prompt.isdecimal() for each in samples)
    assert seen.identity["inputs"]["task:questions"]["digest"] and all(f.ok for f in verify(tmp_path / "a"))


def test_the_artefact_is_the_best_evaluations_model_and_training_ends_where_none_gets_better(
    base: Path, data: Path, tmp_path: Path
) -> None:
    """Answers without a rule are learned by heart, so the loss on those kept back rises again."""
    data.write_text("".join(json.dumps({"prompt": str(n), "completion": str(n**3 % 7)}) + "\n" for n in range(40)))
    changes = {"keep_best": True, "patience": 3, "epochs": 60.0, "optim": {"adam_lr": 0.03, "schedule": "constant"}}
    changes |= {"examples": {"validation": 0.2}}
    run = finetune(base, data, tmp_path / "runs" / "mine", CONFIG.replace(**changes))
    measured = {row["step"]: row["eval_loss"] for row in rows_of(run.folder) if row.get("eval_loss") and row["step"]}
    best = min(measured, key=measured.__getitem__)
    assert run.facts["best"] == {"step": best, "metric": "loss", "value": measured[best]}
    assert run.facts["validation_after"]["loss"] == measured[best]
    steps = sorted(measured)
    assert len(steps) - 1 - steps.index(best) == 3 and run.facts["last_step"] == steps[-1] < run.facts["steps"]
    until = CONFIG.replace(**{**changes, "keep_best": False, "steps": run.facts["steps"]})
    other = finetune(base, data, tmp_path / "runs" / "last", until)
    assert other.facts["validation_after"]["loss"] == measured[steps[-1]] > measured[best]


@pytest.mark.parametrize(
    ("scores", "patience", "min_delta", "step", "stops"),
    [
        ([3, 2, 1], 1, 0.0, 3, []),
        ([3, 2, 4, 5], 2, 0.0, 2, [4]),
        ([3, 2.9, 2.8, 1], 2, 0.5, 4, [3]),
        ([3, None, 1, 9], 1, 0.0, 3, [4]),
        ([1, 2, 3, 4], 0, 0.0, 1, []),
    ],
)  # fmt: skip
def test_the_best_and_the_patience(
    scores: list[float | None], patience: int, min_delta: float, step: int, stops: list[int]
) -> None:
    selection, found = Selection(patience=patience, min_delta=min_delta), []
    for number, score in enumerate(scores, 1):
        selection.add(number, {"eval_loss": score})
        found += [number] if selection.is_exhausted else []
    assert selection.step == step and found[:1] == stops[:1]
    again = Selection(patience=patience, min_delta=min_delta)
    again.replay([{"step": 0, "eval_loss": -1}, *({"step": n, "eval_loss": s} for n, s in enumerate(scores, 1))])
    assert (again.step, again.is_exhausted) == (selection.step, selection.is_exhausted)
    higher = Selection("x", higher=True)
    higher.replay([{"step": 1, "eval_x": 0.5}, {"step": 2, "eval_x": 0.7}, {"step": 3, "eval_x": 0.7}])
    assert higher.step == 2 and higher.value == 0.7


def test_a_full_disk_loses_nothing(base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG.replace(keep_best=True, epochs=4.0)
    whole = finetune(base, data, tmp_path / "whole" / "run", config)
    steps, out = list[int](), tmp_path / "full" / "run"
    fsync = atomic.fsync

    def full(path: Path) -> None:
        if path.name.startswith(".step-") and len(steps) >= 2:
            raise OSError(28, "No space left on device", str(path))
        steps.extend([int(path.name.partition(".tmp")[0][6:])] if path.name.startswith(".step-") else [])
        fsync(path)

    monkeypatch.setattr(atomic, "fsync", full)
    with pytest.raises(MachineError, match="disk"):
        finetune(base, data, out, config)
    assert [path.name for path in sorted((out / "checkpoints").glob("step-*"))] == [f"step-{n:08d}" for n in steps]
    monkeypatch.setattr(atomic, "fsync", fsync)
    again = finetune(base, data, out, config)
    assert again.record["artefact_digest"] == whole.record["artefact_digest"]
    assert checkpoint.latest(out / "checkpoints") is None


def test_what_nobody_measures_is_refused(base: Path, data: Path, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "mine"
    with pytest.raises(ConfigError, match="nothing called 'exams' is measured.*there is loss, questions"):
        finetune(base, data, out, CONFIG.replace(keep_best=True, best_metric="exams"), eval_tasks=[str(questions)])
    with pytest.raises(ConfigError, match="nothing called 'loss' is measured.*keep some examples back"):
        finetune(base, data, out, CONFIG.replace(patience=1, examples={"validation": 0}))
    with pytest.raises(DataError, match="two tasks of one name"):
        finetune(base, data, out, CONFIG, eval_tasks=[str(questions), str(questions)])
    with pytest.raises(DataError, match="cannot be asked"):
        finetune(base, data, out, CONFIG.replace(eval={"prompts": ["1" * 500]}))
    assert not out.exists()


@pytest.mark.parametrize(("how", "shown"), [("drop", 36), ("keep", 40)])
def test_examples_that_say_what_is_asked_are_left_out_and_named(
    how: str, shown: int, base: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = tmp_path / "asked.jsonl"  # the first stands within a longer turn
    rows = ["what is the 7 and 8", "11", " 12? ", "13"]
    asked.write_text("".join(json.dumps({"question": row, "answer": "7"}) + "\n" for row in rows))
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    lines[3]["prompt"] = "tell me: what is the 7, and 8"
    lines[14]["prompt"] = "1 11"  # a short question within another is no overlap
    data.write_text("".join(json.dumps(row) + "\n" for row in lines))
    config = CONFIG.replace(epochs=1.0, seq_len=64, examples={"overlap": how})
    run = finetune(base, data, tmp_path / "runs" / "mine", config, eval_tasks=[str(asked)])
    names = [f"{data.name}, line {line}" for line in (4, 12, 13, 14)]
    found = {"count": 4, "how": how, "tasks": {"asked": 4}, "names": names}
    assert run.facts["overlap"] == found and "examples.jsonl, line 12" in caplog.text
    assert run.facts["examples"]["shown"] + run.facts["validation"]["shown"] == shown
    with pytest.raises(DataError, match="4 of 40 examples ask what asked asks.*examples.overlap=keep"):
        config = CONFIG.replace(examples={"overlap": "refuse"})
        finetune(base, data, tmp_path / "runs" / "other", config, eval_tasks=[str(asked)])


def test_replayed_text_and_later_turns_that_say_what_is_asked_are_left_out(
    base: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"question": "what is the 7 and 8", "answer": "7"}) + "\n")
    book = tmp_path / "book.jsonl"
    texts = ["1 2 3 4 5 6", "they ask: what is the 7, and 8? it is 7", "9 9 9 9"]
    book.write_text("".join(json.dumps({"text": text, "id": str(n)}) + "\n" for n, text in enumerate(texts)))
    config = CONFIG.replace(steps=1, seq_len=64, eval={"samples": 0, "max_tokens": 2})
    options: dict[str, Any] = {"replay": book, "eval_tasks": [str(asked)]}
    run = finetune(base, data, tmp_path / "runs" / "mine", config, **options)
    assert run.facts["replay"]["overlap"]["count"] == 1 and "1 of 3 documents of replayed text" in caplog.text
    kept = config.replace(examples={"overlap": "keep"})
    other = finetune(base, data, tmp_path / "runs" / "kept", kept, **options)
    assert other.facts["replay"]["tokens"] > run.facts["replay"]["tokens"]
    with pytest.raises(DataError, match="documents of replayed text ask what asked asks"):
        refused = config.replace(examples={"overlap": "refuse"})
        finetune(base, data, tmp_path / "runs" / "never", refused, **options)
    turns = [("user", "1"), ("assistant", "2"), ("user", "what is the 7 and 8"), ("assistant", "7")]
    chosen = [{"role": role, "content": text} for role, text in turns]
    rejected = [*chosen[:1], {"role": "assistant", "content": "3"}]
    rows = [{"prompt": str(n), "chosen": "7", "rejected": "8"} for n in range(5)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"chosen": chosen, "rejected": rejected}]))
    settings = DPOConfig.model_validate({"steps": 1, "seq_len": 64, "eval": {"samples": 0, "max_tokens": 2}})
    preferred = finetune(base, pairs, tmp_path / "runs" / "dpo", settings, eval_tasks=[str(asked)])
    assert preferred.facts["overlap"]["names"] == ["pairs.jsonl, line 6"]


def test_the_best_that_is_worse_than_the_start_is_said(
    base: Path, data: Path, questions: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoiled = CONFIG.replace(
        steps=2, eval_every=1, keep_best=True, eval={"samples": 0}, optim={"adam_lr": 5.0, "warmup_steps": 0}
    )
    run = finetune(base, data, tmp_path / "runs" / "spoiled", spoiled)
    assert run.facts["validation_after"]["loss"] > run.facts["validation_before"]["loss"]
    assert "no evaluation was better than before the first step: loss" in caplog.text
    caplog.clear()
    better = spoiled.replace(optim={"adam_lr": 0.01, "warmup_steps": 0})
    run = finetune(base, data, tmp_path / "runs" / "better", better)
    assert run.facts["validation_after"]["loss"] < run.facts["validation_before"]["loss"]
    assert "no evaluation was better" not in caplog.text
    loss = tmp_path / "loss.jsonl"
    loss.write_bytes(questions.read_bytes())
    with pytest.raises(ConfigError, match="'loss' is a task's name and that of what is measured.*rename"):
        finetune(base, data, tmp_path / "runs" / "never", spoiled, eval_tasks=[str(loss)])
