"""The page of one run: of a fine-tuning, finished or not, or of any other kind; whatever it holds stays text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sprat.config import Config
from sprat.config.finetune import DPOConfig, FinetuneConfig
from sprat.errors import TrustError
from sprat.report import write_report
from sprat.trust import Run, open_run
from sprat.trust.stage_facts import Sample, write_samples
from sprat.trust.verify import verify

from .test_hostile import BAD, changed
from .test_report import Page

CONFIG = FinetuneConfig.model_validate(
    {"epochs": 5, "keep_best": True, "lora": {"rank": 8}, "optim": {"adam_lr": 2e-3}}
)
FACTS: dict[str, Any] = {
    "steps": 40,
    "last_step": 30,
    "best": {"step": 20, "metric": "exam", "value": 0.75},
    "validation_before": {"loss": 2.5, "accuracy/exam": 0.25},
    "validation_after": {"loss": 0.5, "accuracy/exam": 0.75},
    "eval_tasks": {"exam": 40},
    "examples": {"shown": 90, "too_long": 2, "unfit": 1, "tokens": 4000, "learned": 1500},
    "validation": {"shown": 10, "too_long": 0, "unfit": 0, "tokens": 400, "learned": 150},
    "skipped": [{"why": "an empty turn", "count": 3, "bytes": 0, "names": ["chat.jsonl:7"]}],
    "overlap": {"count": 2, "how": "drop", "tasks": {"exam": 2}, "names": ["chat.jsonl, line 9"]},
    "tokens_per_second": 321.0,
}


def opened(folder: Path, stage: str = "sft", config: Config = CONFIG) -> Run:
    inputs = {"model": "0" * 64, "task:exam": "1" * 64}
    run = open_run(folder, stage=stage, recipe=config, inputs=inputs, seed=0, ledger=folder.parent / "ledger.jsonl")
    run.add_facts(**FACTS)
    for step in (0, 10, 20, 30):
        if step:
            run.log(step - 5, loss=2.0 - step / 20, grad_norm=1.0, lr_factor=1.0, tokens=step * 100)
        accuracy, loss = {0: 0.25, 10: 0.5, 20: 0.75, 30: 0.5}[step], 2.5 - step / 15
        run.log(step, **{"eval_loss": loss, "eval_accuracy/exam": accuracy})
    return run


def finished(run: Run, answer: str = "x < y") -> Path:
    samples = [Sample(step, "Which?", f"{answer} {step}", "the second") for step in (0, 10, 20, 30)]
    write_samples(run.artifact, samples)
    run.finish(flops=1e12, tokens=3000)
    return run.folder


def test_the_page_of_a_fine_tuning_shows_what_it_learned_and_from_what(tmp_path: Path) -> None:
    folder = finished(opened(tmp_path / "mine"))
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    words = " ".join(" ".join(page.words).split())
    assert page.open == [] and all(link.startswith("#") for link in page.links) and len(page.ids) == len(set(page.ids))
    for said in (
        "Supervised fine-tuning: 30 steps",
        "The model is that of step 20, the best by exam.",
        "Training ended before step 40: no evaluation got better.",
        "75.0 % 59.8–85.8 of 40 problems",  # Wilson's interval of 30 of 40, by hand
        "2.5",
        "x < y 0",
        "step 20 kept",
        "its example says: the second",
        "an empty turn",
        "chat.jsonl:7",
        "ask what a task asks (exam: 2), left out",
        "optim.adam_lr 0.002 0.0001",
        "lora.rank 8",
        "keep_best True False",
        "321 tokens a second",
    ):
        assert said in words, said
    assert "examples.validation" not in words and "lora.alpha" not in words  # defaults
    assert text.count("<svg") == 4  # loss, exam, gradient, rate
    assert all(finding.ok for finding in verify(tmp_path))
    assert write_report(folder).read_text(encoding="utf-8") == text


def test_a_run_that_goes_on_is_shown_as_far_as_it_is(tmp_path: Path) -> None:
    run = opened(tmp_path / "mine")
    run.start_progress(40, 30)
    write_samples(run.checkpoints, [Sample(0, "Which?", "none")])
    words = " ".join(Page(write_report(run.folder).read_text(encoding="utf-8")).words)
    assert "not finished: step 30 of 40" in words and "none" in words and "optim.adam_lr" in words
    run.add_facts(best={"step": 30, "metric": "loss", "value": 0.5})
    (run.checkpoints / "samples.jsonl").unlink()
    finished(run)
    write_report(run.folder)
    assert all(finding.ok for finding in verify(tmp_path))


@pytest.mark.parametrize(("stage", "config"), [("dpo", DPOConfig(beta=0.3)), ("pretrain", Config()), ("other", CONFIG)])
def test_any_kind_of_run_has_a_page(stage: str, config: Config, tmp_path: Path) -> None:
    words = " ".join(Page(write_report(finished(opened(tmp_path / "run", stage, config))).read_text()).words)
    assert "While it learned" in words and ("beta" in words) == (stage == "dpo")


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    folder = finished(opened(tmp_path / "mine"), answer=BAD.replace("\ud800", ""))
    path = folder / "run.json"
    record = json.loads(path.read_text())
    facts = {BAD + name: changed(value) for name, value in record["facts"].items()} | changed(record["facts"])
    path.write_text(json.dumps({**record, "facts": facts, "stage": BAD, "recipe": {BAD: BAD}}))
    rows = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(rows.replace("accuracy/exam", json.dumps("accuracy/" + BAD)[1:-1]))
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)  # refuses a script
    assert (
        page.open == []
        and "<img" not in text
        and "\x00" not in text
        and all(link.startswith("#") for link in page.links)
    )


@pytest.mark.parametrize(
    ("samples", "facts"),
    [
        ('{"step": 1}\n', {}),
        ("[[\n", {}),
        ("", {"best": {"value": 1}}),
        ("", {"skipped": [{"why": "so", "count": 1, "names": 7}]}),
        ("", {"eval_tasks": 7}),
        ("", {"validation_before": [1]}),
    ],
)
def test_what_no_stage_writes_is_one_sentence(samples: str, facts: dict[str, Any], tmp_path: Path) -> None:
    folder = finished(opened(tmp_path / "mine"))
    (folder / "artefact" / "samples.jsonl").write_text(samples)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "facts": {**record["facts"], **facts}}))
    with pytest.raises(TrustError, match="what no stage writes"):
        write_report(folder)
