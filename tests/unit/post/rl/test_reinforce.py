"""RL of any model on the user's questions and verifier is a run: it learns, proves itself, and goes on after a stop."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import sprat
from sprat.config.rl import RLRunConfig
from sprat.errors import ConfigError, TrainingError
from sprat.files import digest
from sprat.formats.load import load, save
from sprat.formats.peft import load_peft
from sprat.model import Transformer
from sprat.model.lora import merge_lora
from sprat.post.rl.questions import Questions
from sprat.post.rl.reinforce import reinforce
from sprat.post.rl.rollout import InProcess, Rollout
from sprat.tokens import Tokenizer
from sprat.train import checkpoint
from sprat.trust.run_record import read_metrics
from sprat.trust.stage_facts import read_samples
from sprat.trust.verify import verify

SMALL: dict[str, Any] = {
    "steps": 8,
    "prompts_per_step": 8,
    "group_size": 8,
    "max_tokens": 10,
    "lr": 3e-3,
    "checkpoint_every": 2,
    "gate": False,
    "held_out": {"every": 4, "problems": 40, "share": 0.4},
    "verifier": {"workers": 1},
}
SEVEN = "def reward(problem, answer):\n    return float(answer.content.strip() == problem.answer)\n"


@pytest.fixture
def folder(guesser: Transformer, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that guesses a digit, a hundred questions whose answer is 7, and who judges that."""
    save(guesser, tokenizer, tmp_path / "base")
    rows = [{"question": f"{number} train", "answer": "7"} for number in range(100)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(SEVEN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(**changes: Any) -> RLRunConfig:
    return RLRunConfig.model_validate(SMALL | changes)


def mine(**changes: Any) -> Questions:
    return Questions(**({"data": Path("asked.jsonl"), "reward": "judge.py:reward"} | changes))


def test_held_out_problems_are_answered_better_and_the_run_proves_itself(folder: Path) -> None:
    news: list[str] = []
    run = reinforce("base", mine(), "runs/mine", settings(), on_news=news.append)
    rows = read_metrics(run.folder)
    assert [row["step"] for row in rows] == list(range(9))
    assert [row["step"] for row in rows if "eval_reward" in row] == [0, 4, 8]
    change, comparison = run.facts["held_out"]["change"], run.facts["held_out"]["comparison"]
    assert change["count"] == comparison["count"] == 40
    assert change["difference"] > 0.3 and change["p_value"] < 1e-3 and comparison["p_value"] < 1e-3
    assert 0 < change["low"] < change["difference"] <= change["high"] <= 1
    assert run.facts["validation_after"]["accuracy"] == rows[-1]["eval_accuracy"] == comparison["second"]
    assert run.facts["problems"] == [{"task": "asked", "trained": 60, "held_out": 40}]
    names = {"entropy", "clip_fraction", "mismatch", "staleness", "cut_share", "tokens", "petaflops", "kl_start"}
    assert names <= set(rows[1]) and rows[1]["kl_start"] < 1e-6 < rows[-1]["kl_start"]
    samples = read_samples(run.artifact)
    assert [sample.step for sample in samples] == [0] * 4 + [4] * 4 + [8] * 4
    assert {sample.expected for sample in samples} == {"7"}
    assert all(sample.reward == float(sample.answer.strip() == "7") for sample in samples)
    assert {"reward", "reward/judge.py", "data", "model"} == set(run.record["inputs"])
    assert not [finding for finding in verify("runs") if not finding.ok]
    assert news[0].startswith("the fire drill: ") and news[0].endswith("none was paid")
    assert run.facts["fire_drill"]["paid"] == [] and run.facts["fire_drill"]["hacks"] > 100
    assert "40 held-out problems before training" in news[1]
    lines = [text for text in news if re.match(r"step \d+/8: reward \d", text)]
    assert len(lines) == 8 and all(re.search(r"so far \d+ s of CPU, [\d.]+k tokens, ¥0", text) for text in lines)
    assert f"right {rows[-1]['accuracy']:.0%}, taught {rows[-1]['live_groups']:.0%}" in lines[-1]
    assert "hacks 0%" in lines[0] and f" {rows[-1]['tokens'] / 1000:.1f}k tokens" in lines[-1]
    model, tokenizer = sprat.load(run.folder)
    assert not torch.equal(model.norm.weight, load("base")[0].norm.weight)


def test_the_record_counts_the_questions_that_leave_room_for_an_answer(folder: Path) -> None:
    with (folder / "asked.jsonl").open("a") as file:
        file.writelines(json.dumps({"question": f"{n} train" + " again" * 400}) + "\n" for n in range(10))
    run = reinforce("base", mine(), "runs/mine", settings(steps=1, prompts_per_step=2, held_out={"every": 0}))
    (counts,) = run.facts["problems"]
    assert counts["trained"] + counts["held_out"] == 100


def test_another_judge_is_another_run_and_the_same_one_is_done(folder: Path) -> None:
    config = settings(steps=2, fire_drill="off")
    first = reinforce("base", mine(), "runs/mine", config)
    again = reinforce("base", mine(), "runs/mine", config)
    assert again.done and again.set_aside is None and again.record == first.record
    Path("judge.py").write_text(SEVEN + "# another\n")
    other = reinforce("base", mine(), "runs/mine", config)
    assert other.set_aside is not None
    Path("judge.py").write_text(
        SEVEN + "# another\n\ndef other(problem, answer):\n    return 1.0 * len(answer.content)\n"
    )
    third = reinforce("base", mine(reward="judge.py:reward"), "runs/mine", config)
    fourth = reinforce("base", mine(reward="judge.py:other"), "runs/mine", config)
    assert third.set_aside is not None and fourth.set_aside is not None


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    lora: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(lora=lora, steps=5, held_out={"every": 2})
    whole = reinforce("base", mine(), "whole/run", config)
    groups = InProcess.groups

    def dying(source: InProcess, step: int) -> list[Rollout]:
        if step == 4:
            raise KeyboardInterrupt
        return groups(source, step)

    monkeypatch.setattr(InProcess, "groups", dying)
    with pytest.raises(KeyboardInterrupt):
        reinforce("base", mine(), "stopped/run", config)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    run = reinforce("base", mine(), "stopped/run", config)
    assert digest.of_files(run.artifact) == digest.of_files(whole.artifact)
    assert read_metrics(run.folder) == read_metrics(whole.folder)
    assert run.facts == whole.facts


def test_adapters_are_sampled_as_they_are_trained_and_taken_away_in_pefts_layout(folder: Path) -> None:
    run = reinforce("base", mine(), "runs/mine", settings(lora={"rank": 4}, lr=1e-2, steps=4))
    assert all(row["mismatch_mean"] < 1e-4 for row in read_metrics(run.folder) if "mismatch_mean" in row)
    whole, tokenizer = load(run.folder)
    adapted, _ = load("base")
    start = adapted.norm.weight.clone()
    ids = torch.tensor([tokenizer.encode("7 train")])
    before = adapted(ids)
    load_peft(adapted, run.artifact / "adapter")
    merge_lora(adapted)
    torch.testing.assert_close(adapted(ids), whole(ids), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, whole(ids), atol=1e-2) and torch.equal(start, whole.norm.weight)
    assert [path.name for path in (run.artifact / "checkpoint").iterdir()] == ["step-00000004"]
    onward = reinforce("base", mine(), "runs/more", settings(lora={"rank": 4}, steps=1, init_from=str(run.folder)))
    (_, row) = read_metrics(onward.folder)
    assert row["step"] == 1 and row["kl_start"] < 1e-6, "its own start is where the other one ended"
    steps = settings(lora={"rank": 4}, lr=1e-2, steps=6, init_from=str(run.folder), init_state="continue")
    assert [row["step"] for row in read_metrics(reinforce("base", mine(), "runs/on", steps).folder)] == [4, 5, 6]


def test_tasks_bring_their_judges_and_a_reward_before_them_makes_them_the_second(folder: Path) -> None:
    rows = [{"question": f"{number} train", "answer": "7"} for number in range(30)]
    Path("exam.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = reinforce("base", Questions(tasks=("exam.jsonl",)), "runs/own", settings(steps=2))
    assert "second_reward" not in read_metrics(own.folder)[1] and "task-0" in own.record["inputs"]
    before = Questions(tasks=("exam.jsonl",), reward="judge.py:reward")
    both = reinforce("base", before, "runs/both", settings(steps=2))
    assert all(row["second_reward"] == row["reward"] for row in read_metrics(both.folder) if row["step"])
    drawn = reinforce("base", Questions(tasks=("sums",), reward="judge.py:reward"), "runs/sums", settings(steps=1))
    assert drawn.record["inputs"]["tasks"]["settings"] == {"names": ["sums"]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": None}, "no questions"),
        ({"reward": ""}, "nobody judges"),
        ({"reward": "nowhere.py:f"}, "no such file"),
        ({"reward": "no-such-program --x"}, "no program 'no-such-program'"),
        ({"second_reward": "judge.py:none"}, "no function 'none'"),
        ({"data": None, "tasks": ("asked.jsonl",), "column_map": {"question": "x"}}, "no --data"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_touched(changes: dict[str, Any], said: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        reinforce("base", mine(**changes), "runs/mine", settings())
    assert not Path("runs").exists()


BAD = {
    "constant": ("return 1.0", r"paid each of \d+ answers 1, so there is nothing to learn"),
    "never pays": ("return 0.0", r"paid each of \d+ answers 0, so there is nothing to learn"),
    "no number": ("return float('nan')", "failed on each of .*nan was returned, which is not finite"),
    "raises": ("raise KeyError('price')", "failed on each of .*KeyError: 'price'"),
    "slow": ("import time; time.sleep(60)", "failed on each of .*took longer than 0.2 s"),
    "crashes": ("import os; os._exit(9)", "failed on each of .*exit code 9"),
    "abstains": ("return None", "abstained from each of"),
    "pays at random": (
        "import random; return float(random.random() < 0.5)",
        "otherwise when it was asked again.*chance",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_verifier_is_named_by_a_sentence_before_anything_is_touched(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sprat.post.rl.judge_pool.MAX_FAULTS", 8)
    body, said = BAD[kind]
    Path("judge.py").write_text(f"def reward(problem, answer):\n    {body}\n")
    config = settings(gate=True, gate_problems=4, reward_timeout=0.2 if kind == "slow" else 30.0)
    with pytest.raises(TrainingError, match=f"(?s){said}.*reward judge.py:reward"):
        reinforce("base", mine(), "runs/mine", config)
    assert not Path("runs").exists()


@pytest.mark.parametrize("kind", ["constant", "never pays", "no number", "crashes"])
def test_without_the_gate_a_bad_verifier_moves_no_weight(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sprat.post.rl.judge_pool.MAX_FAULTS", 20)
    body, _ = BAD[kind]
    Path("judge.py").write_text(f"def reward(problem, answer):\n    {body}\n")
    config = settings(trip_wires={"no_spread": 2}, held_out={"every": 0}, fire_drill="off")
    try:
        run = reinforce("base", mine(), "runs/mine", config)  # paid 1 each time: all is right, nothing is left to learn
        trained, start = load(run.folder)[0].state_dict(), load("base")[0].state_dict()
        assert all(torch.equal(value, trained[name]) for name, value in start.items())
        assert "nothing left to learn" in run.facts["trips"][0]["sentence"] and run.facts["last_step"] == 2
    except TrainingError as error:
        assert kind != "constant" and "judge.py:reward" in str(error)
        assert not Path("runs/mine/run.json").exists()


LIAR = """
def reward(problem, answer):
    return float(answer.content.strip() == "3")

def honest(problem, answer):
    return float(answer.content.strip() != "3")
"""


def test_a_verifier_that_pays_against_the_second_judge_sends_the_run_back_and_then_ends_it(folder: Path) -> None:
    Path("judge.py").write_text(LIAR)
    wires = {"window": 3, "no_spread": 0, "max_kl": 0, "min_entropy": 0}
    config = settings(steps=60, trip_wires=wires, held_out={"every": 0, "problems": 4}, checkpoint_every=3)
    news: list[str] = []
    with pytest.raises(TrainingError, match=r"judge\.py:reward rose from .* second judge's fell .*trip_wires: judges"):
        reinforce("base", mine(second_reward="judge.py:honest"), "runs/mine", config, on_news=news.append)
    trips = json.loads(Path("runs/mine/facts.json").read_text())["trips"]
    assert [trip["wire"] for trip in trips] == ["judges", "judges"]
    assert trips[0]["back_to"] % 3 == 0 and trips[0]["back_to"] < trips[0]["step"] and "back_to" not in trips[1]
    assert any("back to step" in text for text in news)
    rows = read_metrics(Path("runs/mine"))
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows}), "what was undone has no row"
    stops = settings(**(config.model_dump() | {"trip_wires": wires | {"action": "stop"}}))
    with pytest.raises(TrainingError, match="trip_wires: judges"):
        reinforce("base", mine(second_reward="judge.py:honest"), "runs/stop", stops)
    assert len(json.loads(Path("runs/stop/facts.json").read_text())["trips"]) == 1


def test_a_run_that_was_sent_back_and_killed_goes_on_with_the_lower_rate(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wires = {"window": 2, "max_kl": 0.05, "no_spread": 0}
    config = settings(steps=30, trip_wires=wires, held_out={"every": 0, "share": 0})
    groups, seen = InProcess.groups, list[int]()

    def dying(source: InProcess, step: int) -> list[Rollout]:
        if seen and step <= seen[-1]:  # it was sent back just now
            raise KeyboardInterrupt
        seen.append(step)
        return groups(source, step)

    sentences = []
    for name in ("whole", "killed"):
        if name == "killed":
            monkeypatch.setattr(InProcess, "groups", dying)
            with pytest.raises(KeyboardInterrupt):
                reinforce("base", mine(), f"{name}/run", config)
            monkeypatch.setattr(InProcess, "groups", groups)
        with pytest.raises(TrainingError, match="trip_wires: kl") as caught:
            reinforce("base", mine(), f"{name}/run", config)
        sentences.append(str(caught.value).replace(name, ""))
        good = checkpoint.latest(Path(name, "run", "checkpoints"))
        assert good is not None and good.extra["lr"] == config.lr / 2
    assert sentences[0] == sentences[1] and seen
    assert read_metrics(Path("killed/run")) == read_metrics(Path("whole/run"))
