"""``sprat rl`` tries the verifier with known hacks before the start, and watches what it pays while it trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sprat.config.rl import RLRunConfig
from sprat.errors import TrainingError
from sprat.files import digest
from sprat.formats.load import save
from sprat.model import Transformer
from sprat.post.rl.questions import Questions
from sprat.post.rl.reinforce import reinforce
from sprat.post.rl.rollout import InProcess, Rollout
from sprat.tokens import Tokenizer
from sprat.train import checkpoint
from sprat.trust.run import Run
from sprat.trust.run_record import read_metrics

SETTINGS: dict[str, Any] = {
    "steps": 12, "prompts_per_step": 16, "group_size": 16, "max_tokens": 8, "lr": 1e-3, "checkpoint_every": 2,
    "gate": False, "held_out": {"share": 0, "every": 0}, "verifier": {"workers": 1},
    "trip_wires": {"action": "off"},
}  # fmt: skip
HONEST = "def reward(problem, answer):\n    return float(answer.content.strip() == problem.answer)\n"
TURNS = """
from pathlib import Path


def reward(problem, answer):
    right = "3" if Path("turned").exists() else problem.answer
    return float(answer.content.strip() == right)
"""  # it pays another answer than the right one, from some step on
SEES_IT_SOMEWHERE = "def reward(problem, answer):\n    return float(problem.answer in answer.content)\n"
TURNS_AT = 9


@pytest.fixture
def folder(guesser: Transformer, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that guesses a digit, questions whose answer is 7, and who judges that."""
    save(guesser, tokenizer, tmp_path / "base")
    rows = [{"question": f"{number} train", "answer": "7"} for number in range(60)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def do(judge: str, out: str, news: list[str] | None = None, **changes: Any) -> Run:
    Path("judge.py").write_text(judge)
    Path("turned").unlink(missing_ok=True)
    config = RLRunConfig.model_validate(SETTINGS | changes)
    told = (news if news is not None else []).append
    return reinforce("base", Questions(Path("asked.jsonl"), reward="judge.py:reward"), out, config, on_news=told)


def test_a_verifier_that_pays_a_list_of_all_numbers_is_refused_unless_that_is_accepted(folder: Path) -> None:
    with pytest.raises(TrainingError, match=r"pays 1 for the wrong answer .*fire drill of reward judge\.py:reward"):
        do(SEES_IT_SOMEWHERE, "runs/mine")
    assert not Path("runs").exists()
    news: list[str] = []
    run = do(SEES_IT_SOMEWHERE, "runs/mine", news, fire_drill="accept", steps=1)
    assert "pays 1 for the wrong answer" in news[0] and "accepted" in news[0]
    drill = run.record["facts"]["fire_drill"]
    assert drill["accepted"] and drill["failure"] in news[0] and run.record["recipe"]["fire_drill"] == "accept"
    assert all(hack["paid"] == 1 and "7" in hack["answer"] for hack in drill["paid"]) and drill["paid"]
    assert "fire_drill" not in do(SEES_IT_SOMEWHERE, "runs/off", fire_drill="off", steps=1).facts


def test_the_judges_of_tasks_are_tried_too(folder: Path) -> None:
    rows = [{"question": f"Say {number}.", "answer": ".*", "judge": "regex"} for number in range(30)]
    Path("any.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(TrainingError, match="fire drill of reward the task's own judge"):
        reinforce("base", Questions(tasks=("any.jsonl",)), "runs/mine", RLRunConfig.model_validate(SETTINGS))


@pytest.fixture
def turning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verifier turns at a step, whatever was killed."""
    groups = InProcess.groups

    def turn(source: InProcess, step: int, first: int | None = None) -> list[Rollout]:
        Path("turned").touch() if step >= TURNS_AT else Path("turned").unlink(missing_ok=True)
        return groups(source, step, first)

    monkeypatch.setattr(InProcess, "groups", turn)


def test_a_verifier_that_begins_to_pay_what_is_wrong_is_told_and_the_run_resumes_exactly(
    folder: Path, turning: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    news: list[str] = []
    whole = do(TURNS, "whole/run", news)
    alarms = whole.record["facts"]["alarms"]
    assert alarms and alarms[0]["step"] in (TURNS_AT, TURNS_AT + 1) and alarms[0]["answer"].strip() == "3"
    assert any(text.startswith(f"hack monitor: step {alarms[0]['step']}") for text in news)
    rows = read_metrics(whole.folder)
    assert all(row["hack_alarms"] == 0 for row in rows[: TURNS_AT - 1]) and rows[-1]["hack_alarms"] == len(alarms)
    assert max(row["hack_evidence"] for row in rows[: TURNS_AT - 1]) < 1 <= max(row["hack_evidence"] for row in rows)
    turned = InProcess.groups
    for last in (4, TURNS_AT, TURNS_AT + 2):  # the baseline, the alarm, and what comes after it are in checkpoints

        def dying(source: InProcess, step: int, first: int | None = None, last: int = last) -> list[Rollout]:
            if step == last:
                raise KeyboardInterrupt
            return turned(source, step, first)

        monkeypatch.setattr(InProcess, "groups", dying)
        with pytest.raises(KeyboardInterrupt):
            do(TURNS, "stopped/run")
    monkeypatch.setattr(InProcess, "groups", turned)
    again = do(TURNS, "stopped/run")
    assert read_metrics(again.folder) == rows and again.facts == whole.facts
    assert digest.of_files(again.artifact) == digest.of_files(whole.artifact)


def test_an_alarm_may_stop_the_run_or_send_it_back_once(folder: Path, turning: None) -> None:
    said = r"what reward judge\.py:reward pays begins to look like a hack: step .*trip_wires: hack_monitor"
    with pytest.raises(TrainingError, match=said):
        do(TURNS, "runs/stop", hack_monitor="stop")
    assert ["back_to" in trip for trip in json.loads(Path("runs/stop/facts.json").read_text())["trips"]] == [False]
    news: list[str] = []
    with pytest.raises(TrainingError, match=said):
        do(TURNS, "runs/back", news, hack_monitor="rollback")
    trips = json.loads(Path("runs/back/facts.json").read_text())["trips"]
    assert [trip.get("back_to") for trip in trips] == [TURNS_AT - 1, None]
    good = checkpoint.latest(Path("runs/back/checkpoints"))
    assert good is not None and good.extra["monitor"]["told"] == [], "sent back, it has told nothing yet"


def test_an_honest_run_raises_no_alarm_and_off_watches_nothing(folder: Path) -> None:
    run = do(HONEST, "runs/mine")
    assert "alarms" not in run.facts and read_metrics(run.folder)[-1]["hack_alarms"] == 0
    row = read_metrics(do(HONEST, "runs/off", hack_monitor="off", steps=1).folder)[-1]
    assert not [name for name in row if name.startswith("hack")]
