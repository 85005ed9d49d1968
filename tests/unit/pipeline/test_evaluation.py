"""What is measured is what is written: partial credit is no right answer, and each way of asking is its own."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sprat.data.document import Document
from sprat.errors import TrainingError
from sprat.eval.score import StageScore
from sprat.eval.tasks import evaluate_many, pass_at_k
from sprat.pipeline import evaluation
from sprat.pipeline.pipeline import Pipeline
from sprat.pipeline.quantize import relative_loss
from sprat.pipeline.recipe import load_recipe
from sprat.post.calibration import text_rows
from sprat.post.distill import sample_traces
from sprat.tasks import Problem, Sums
from sprat.tokens import Tokenizer


class Output:
    """What ``Engine.generate`` gives, as far as a score reads it."""

    def __init__(self, text: str, reasoning: str) -> None:
        self.text, self.reasoning, self.closed, self.finish_reason = text, reasoning, True, "stop"
        self.token_ids = [1, 2, 3]


class Engine:
    """Answers ``said``, and thinks only where it is made to; notes how it was asked."""

    def __init__(self, said: str) -> None:
        self.said, self.asked = said, list[Any]()

    def generate(self, prompts: list[Any], sampling: Any) -> list[Output]:
        self.asked.append(sampling)
        return [Output(self.said, "so" if sampling.thinking else "") for _ in range(len(prompts) * sampling.n)]


class Almost(Sums):
    """Pays half for "half", and next to all for "almost"."""

    def score(self, problem: Problem, answer: str | None) -> float:
        return {"half": 0.5, "almost": 0.9995, "all": 1.0}.get(str(answer), 0.0)


@pytest.mark.parametrize(("said", "mean", "right"), [("half", 0.5, 0), ("almost", 0.9995, 0), ("all", 1.0, 1)])
def test_right_has_one_meaning_from_the_judge_to_the_report(said: str, mean: float, right: int) -> None:
    engine: Any = Engine(said)
    (score,) = evaluate_many(engine, [Almost("sums")], count=6, thinking=None, max_tokens=4)
    assert (score.correct, score.accuracy) == (6 * right, right) and score.mean == pytest.approx(mean)
    assert pass_at_k(engine, Almost("sums"), 2, 4) == right
    row = evaluation._score_row(score, "greedy", True)
    assert row["mean"] == pytest.approx(mean) and row["accuracy"] == right
    assert [sample["correct"] for sample in row["samples"]] == [bool(right)] * 6
    assert (
        evaluation.accuracy_changes([row], [row])[0]["before"]
        == evaluation.accuracy_changes([row], [row])[0]["after"]
        == right
    )
    assert relative_loss([{**row, "accuracy": 0.5}], [row]) == {"sums": pytest.approx(1 - 2 * right)}
    assert StageScore.from_dict(row).accuracy == right
    if not right:
        with pytest.raises(TrainingError, match="answered none"):
            sample_traces(engine, [Almost("sums")], [1.0], count=3, max_tokens=4)


def test_each_way_of_asking_is_asked_as_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine("all")
    monkeypatch.setattr(evaluation, "Engine", lambda *_, **__: engine)
    monkeypatch.setattr("sprat.pipeline.pipeline.DataArtifact.task", lambda *_: Drawing("sums"))
    rows = evaluation.score_tasks(
        Pipeline(tmp_path, load_recipe("tiny")), None, None, ("greedy", "sampled", "thinking", "direct")
    )  # type: ignore[arg-type]
    assert [sampling.thinking for sampling in engine.asked] == [None, None, True, False]
    assert [sampling.temperature for sampling in engine.asked] == [0, 1, 0, 0]
    thought = {row["label"]: row["thought"] for row in rows}
    assert thought == {"greedy": 0.0, "sampled": 0.0, "thinking": 1.0, "direct": 0.0}


def test_a_task_of_no_weight_is_not_said_to_be_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = 'data.tasks=[{name="sums",title="a"},{name="sums",title="b",weight=0}]'
    monkeypatch.setattr(evaluation, "Engine", lambda *_, **__: Engine("all"))
    monkeypatch.setattr("sprat.pipeline.pipeline.DataArtifact.task", lambda *_: Drawing("sums"))
    rows = evaluation.score_tasks(Pipeline(tmp_path, load_recipe("tiny", (tasks,))), None, None)  # type: ignore[arg-type]
    assert [row["trained"] for row in rows] == [True, False]


class Drawing(Almost):
    """With problems problems, as the data stage leaves them."""

    problems = tuple(range(5))


def test_speed_is_measured_on_questions_of_every_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"sums": ("s1", "s2", "s3"), "sums_of_3": ("t1",)}
    tasks = 'data.tasks=[{name="sums",title="sums"},{name="sums",title="sums_of_3"}]'
    pipeline = Pipeline(tmp_path, load_recipe("tiny", (tasks, "data.unseen=[]")))
    monkeypatch.setattr(
        "sprat.pipeline.pipeline.DataArtifact.task", lambda _, config, __: SimpleNamespace(problems=kept[config.title])
    )
    monkeypatch.setattr(evaluation, "problem_messages", lambda problem: problem)
    assert evaluation._prompts(pipeline, 3) == ["s1", "t1", "s2"]
    assert evaluation._prompts(pipeline, 9) == ["s1", "t1", "s2", "s3"]


def test_no_excerpt_hears_its_neighbour_in_calibration() -> None:
    texts = ["one two three four", "five six", "seven eight nine ten eleven"] * 40
    tokenizer = Tokenizer.train(texts, 300, numbers=10)
    documents = [Document(f"{number}", text, "s", "", "prose") for number, text in enumerate(texts)]
    rows = text_rows(documents, tokenizer, 16)
    said = list[str]()
    for tokens, segments in zip(rows.tokens.tolist(), rows.segments.tolist(), strict=True):
        for segment, run in itertools.groupby(zip(tokens, segments, strict=True), lambda pair: pair[1]):
            if segment:
                ids = [token for token, _ in run]
                assert ids[0] == tokenizer.special_ids.bos, "each begins as the texts that a model is asked"
                said.append(tokenizer.decode(ids[1:]))
    assert set(said) >= set(texts) and all(any(part in text for text in texts) for part in said)
