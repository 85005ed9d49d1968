"""Rejection sampling: right answers and no others, to training questions and no others; killed, the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sprat.config import parse
from sprat.config.rl import HeldOutConfig
from sprat.config.sample import SampleConfig
from sprat.data.conversations import read_examples
from sprat.data.example import Conversation
from sprat.data.record import Where
from sprat.errors import ConfigError, DataError, TrainingError
from sprat.formats.load import save
from sprat.model import Transformer
from sprat.post.rl import rejection
from sprat.post.rl.asking import asked
from sprat.post.rl.problem_file import read_problems
from sprat.post.rl.problem_mix import split_task
from sprat.post.rl.questions import Questions
from sprat.post.rl.rejection import KEPT, sample_examples, sift
from sprat.tokens import Message, Tokenizer
from sprat.trust.verify import verify

JUDGE = "def reward(problem, answer):\n    return float(answer.content.strip() == problem.answer)\n"
SMALL: dict[str, Any] = {"samples": 4, "max_tokens": 8, "batch": 8, "verifier": {"workers": 1}}


@pytest.fixture
def place(guesser: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A model that guesses a digit, questions whose answer is 7, and their judge."""
    save(guesser, tokenizer, tmp_path / "model")
    rows = [{"question": f"{n} train", "answer": "7"} for n in range(40)]
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(JUDGE)
    return tmp_path


def questions(place: Path) -> Questions:
    return Questions(place / "ask.jsonl", reward=f"{place / 'judge.py'}:reward")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_kept_is_right_and_of_training_questions_alone(place: Path) -> None:
    talks = [{"prompt": f"How are you, {n}?", "completion": "Fine."} for n in range(50)]
    (place / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    config = SampleConfig(**SMALL, mix_share=0.5)
    run = sample_examples(
        place / "model", questions(place), place / "runs" / "answers", config, mix=place / "talk.jsonl"
    )
    found = read_examples(run.artifact / "examples.jsonl").of_kind(Conversation)
    own = [each for each in found if each.messages[0].content.endswith("train")]
    general = [each for each in found if each.messages[0].content.startswith("How are you")]
    part = split_task(read_problems(place / "ask.jsonl"), HeldOutConfig())
    held_out = {problem.question for problem in part.held_out}
    assert own and {each.messages[-1].content for each in own} == {"7"}
    assert len(held_out) == 8 and not held_out & {each.messages[0].content for each in own}
    assert len(own) == run.facts["kept"] and len(general) == run.facts["mixed"] == min(50, len(own))
    answers = rows_of(run.artifact / "answers.jsonl")
    assert len(answers) == 32 * 4 and run.facts["questions"] == 32
    assert {row["reward"] for row in answers if row["why"] == KEPT} == {1.0}
    assert [str(finding) for finding in verify(place / "runs") if not finding.ok] == []
    # an example is what the model said after the think tags that it wrote itself, and it can be learned from the run
    assert any(each.messages[-1].reasoning for each in own)


def test_killed_between_two_batches_it_goes_on_with_the_same_bits(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, whole = SampleConfig(**SMALL), place / "a" / "answers"
    digest = sample_examples(place / "model", questions(place), whole, config).record["artefact_digest"]
    answered, really = list[int](), rejection._answers

    def dying(*arguments: Any) -> Any:
        answered.append(1)
        if len(answered) == 3:
            raise KeyboardInterrupt
        return really(*arguments)

    monkeypatch.setattr(rejection, "_answers", dying)
    killed = place / "b" / "answers"
    with pytest.raises(KeyboardInterrupt):
        sample_examples(place / "model", questions(place), killed, config)
    assert sample_examples(place / "model", questions(place), killed, config).record["artefact_digest"] == digest
    assert len(answered) == 3 + 2, "a batch that stood was asked again"  # of four
    assert sample_examples(place / "model", questions(place), killed, config).done and len(answered) == 5


def test_made_to_think_every_answer_begins_with_a_thought(place: Path) -> None:
    config = SampleConfig(**SMALL, thinking=True, problems=8)
    with asked(place / "model", questions(place), config) as ready:
        rows = rejection._answers(ready, rejection.training_pairs(ready, config), config)
        free = rejection._answers(ready, rejection.training_pairs(ready, config), config.replace(thinking=False))
    ended = [row for row in rows if row["answer"]["closed"]]
    assert len(rows) == 32 and ended and all(row["answer"]["reasoning"].strip() for row in ended)
    assert any(not row["answer"]["reasoning"].strip() for row in free)


def row(question: str, content: str, **changes: Any) -> dict[str, Any]:
    answer = {"reasoning": changes.pop("reasoning", ""), "content": content, "closed": changes.pop("closed", True)}
    return {"question": question, "answer": answer, "finish": "stop", "reward": 1.0, **changes}


def test_every_answer_that_is_not_kept_has_its_reason() -> None:
    rows = [
        row("a", "7", finish="length"),
        row("a", "7", closed=False),
        row("a", " "),
        row("a", "7", reward=None),
        row("a", "7", reward=0.5),
        row("a", "7"),
        row("a", "7 "),
        row("a", "7", reasoning="so"),
        row("a", "seven"),
        row("b", "7", reward=1 - 1e-9),
    ]
    assert sift(rows, SampleConfig(keep=2)) == [
        rejection.CUT_OFF,
        rejection.CUT_OFF,
        rejection.EMPTY,
        rejection.UNJUDGED,
        rejection.WRONG,
        rejection.KEPT,
        rejection.SAID_BEFORE,
        rejection.KEPT,
        rejection.ENOUGH,
        rejection.KEPT,
    ]
    assert sift(rows, SampleConfig(min_reward=0.5))[4] == rejection.KEPT


@pytest.mark.parametrize(
    ("own", "share", "most"), [(1, 0.25, 0), (3, 0.25, 1), (5, 0.25, 1), (7, 0.3, 3), (10, 0.5, 10), (2, 0.9, 18)]
)
def test_general_examples_are_no_larger_share_than_was_said(own: int, share: float, most: int) -> None:
    turns = [(Message("user", f"{n}?"), Message("assistant", "yes")) for n in range(40)]
    general = [Conversation(each, Where("talk.jsonl", n)) for n, each in enumerate(turns)]
    mixed = rejection._mixed(general, own, SampleConfig(mix_share=share))
    assert len(mixed) == most and most <= share * (own + most) + 1e-9


@pytest.mark.parametrize(("most", "expected"), [(6, [3, 3]), (40, [10, 30]), (0, [10, 50])])
def test_fewer_questions_than_there_are_are_of_all_tasks(most: int, expected: list[int], tmp_path: Path) -> None:
    parts = []
    for name, count in (("few", 10), ("many", 50)):
        rows = [json.dumps({"question": f"{name} {n}"}) + "\n" for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
        parts.append(split_task(read_problems(tmp_path / f"{name}.jsonl"), HeldOutConfig(share=0)))
    ready: Any = SimpleNamespace(parts=parts)
    asked_of = [task.name for task, _ in rejection.training_pairs(ready, SampleConfig(problems=most))]
    assert [asked_of.count(name) for name in ("few", "many")] == expected


def test_an_instruction_is_said_to_models_that_cannot_be_made_to_think_and_never_learned(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, config = list[str](), SampleConfig(**SMALL, problems=4, instruction="Think.")
    with asked(place / "model", questions(place), config) as ready:
        pairs, really = rejection.training_pairs(ready, config), ready.engine.generate

        def listening(prompts: Any, settings: Any) -> Any:
            heard.extend(prompt[-1].content for prompt in prompts)
            return really(prompts, settings)

        monkeypatch.setattr(ready.engine, "generate", listening)
        rejection._answers(ready, pairs, config)
        assert not any("Think." in text for text in heard), "this model has a tag to open"
        monkeypatch.setattr(rejection, "can_choose_to_think", lambda tokenizer: False)
        rows = rejection._answers(ready, pairs, config)
    assert [text.endswith(" train\nThink.") for text in heard[4:]] == [True] * 4
    assert not any("Think." in json.dumps(row["messages"]) for row in rows)


def test_what_cannot_be_is_said_before_anything_is_written(place: Path) -> None:
    out, own = place / "runs" / "answers", questions(place)
    with pytest.raises(ConfigError, match="several samples at temperature 0"):
        parse(SampleConfig, {"samples": 4, "temperature": 0}, where="sample")
    with pytest.raises(ConfigError, match="nobody judges"):
        sample_examples(place / "model", Questions(own.data), out, SampleConfig(**SMALL))
    with pytest.raises(ConfigError, match="no function 'rewrad'"):
        wrong = Questions(own.data, reward=f"{place / 'judge.py'}:rewrad")
        sample_examples(place / "model", wrong, out, SampleConfig(**SMALL))
    with pytest.raises(DataError, match="no such file or folder of examples"):
        sample_examples(place / "model", own, out, SampleConfig(**SMALL), mix=place / "nowhere.jsonl")
    assert not out.exists()
    with pytest.raises(TrainingError, match="not one of 16 answers can be learned: .*paid less than min_reward"):
        sample_examples(place / "model", own, out, SampleConfig(**SMALL, problems=4, min_reward=2.0))
