"""The roads `zero` and `r1`: of any model and questions, checked before they start, scored on what none was taught."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import rl_tiny
from sprat.config.rl import HeldOutConfig
from sprat.config.sample import HeldOutOfConfig
from sprat.data.conversations import read_examples
from sprat.data.example import Conversation
from sprat.data.record import Where
from sprat.errors import ConfigError, DataError, SpratError
from sprat.pipeline.road import open_road, read_road, road, states
from sprat.pipeline.road_checks import check_inputs
from sprat.pipeline.road_file import ROAD_FOLDER, RoadFile
from sprat.post.overlap import remove_held_out
from sprat.post.rl.asking import held_out_questions
from sprat.post.rl.problem_file import read_problems
from sprat.post.rl.problem_mix import split_task
from sprat.report import write_report
from sprat.report.held_out_scores import held_out_scores
from sprat.tokens import Message
from sprat.trust.verify import verify

JUDGE = "def reward(problem, answer):\n    return float(answer.content.strip() == problem.answer)\n"
SMALL = [
    "max_tokens=32", "gate=false", "lr=1e-3", "verifier.workers=1", "held_out.problems=12", "steps=4",
    "prompts_per_step=4", "group_size=4", "trip_wires.action=off",
]  # fmt: skip
SMALL_R1 = [
    *SMALL, "seq_len=64", "cold-answers.problems=24", "answers.problems=24", "cold-answers.samples=4",
    "cold.optim.adam_lr=2e-3", "sft.optim.adam_lr=2e-3", "answers.mix_share=0.9",
]  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that thinks of some digits and says the last one; whatever is asked, 7 is right."""
    folder = tmp_path_factory.mktemp("tiny")
    rl_tiny.make(folder)
    return folder


@pytest.fixture
def place(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That policy, sixty questions and their judge, where a user stands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny / "model")
    rows = [{"question": f"{number} train", "answer": "7"} for number in range(60)]
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judge.py").write_text(JUDGE)
    return tmp_path


INPUTS: dict[str, Any] = {"model": "model", "data": "ask.jsonl", "reward": "judge.py:reward"}


def small(name: str, **inputs: Any) -> RoadFile:
    """The road ``name``, with few steps."""
    return open_road(name, INPUTS | inputs, SMALL_R1 if name == "r1" else SMALL)


@pytest.mark.parametrize("name", sorted(path.stem for path in ROAD_FOLDER.glob("*.toml")))
def test_every_packaged_road_is_sound_and_says_what_it_will_do(name: str, place: Path) -> None:
    stages = read_road(open_road(name, INPUTS | {"lora": 4}), "runs")
    check_inputs(stages, models=False)
    assert set(states(stages)) == {"runs"} and not Path("runs").exists()
    trained = [stage for stage in stages if stage.config.uses in ("rl", "sft")]
    assert trained and all(stage.settings.lora.rank == 4 for stage in trained)  # type: ignore[attr-defined]
    evals = [stage for stage in stages if stage.config.uses == "eval"]
    assert len(evals) == len(trained) + 1, "a model that is trained is not scored, or the first one is not"
    scored = {Path(stage.config.model).name for stage in evals}
    assert scored == {"model"} | {stage.name for stage in trained}


@pytest.mark.slow
def test_zero_goes_from_a_model_to_a_better_one_and_proves_it(place: Path) -> None:
    out = place / "runs" / "zero"
    file = small("zero")
    stages = read_road(file, out)
    road(stages, file, out)
    assert [str(finding) for finding in verify(out) if not finding.ok] == []
    before, after = held_out_scores(out)
    assert (before.name, before.model) == ("before", "model") and (after.name, after.model) == ("after", "rl")
    assert before.count == after.count == 12 and before.gain is None and after.gain is not None
    # the score of the stage is that which RL itself measured of the same weights
    rl_facts = json.loads((out / "rl" / "run.json").read_text())["facts"]
    assert rl_facts["validation_before"]["reward"] == before.reward
    assert rl_facts["validation_after"]["reward"] == after.reward
    assert states(read_road(file, out)) == ["done"] * 3
    # the file that is kept walks the same road, from anywhere
    assert states(read_road(out / "road.toml", out)) == ["done"] * 3
    page = write_report(out).read_text()
    assert "Questions that no stage trained on" in page and f"{100 * before.accuracy:.1f}" in page


@pytest.mark.slow
def test_r1_walks_four_trainings_and_none_of_them_sees_a_held_out_question(place: Path) -> None:
    out = place / "runs" / "r1"
    held_out = {p.question for p in split_task(read_problems("ask.jsonl"), HeldOutConfig(problems=12)).held_out}
    # a general file that gives a held-out question away
    [leak, *_] = sorted(held_out)
    talks = [{"prompt": leak, "completion": "7"}] + [
        {"prompt": f"How are you, {n}?", "completion": "7"} for n in range(9)
    ]
    Path("general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    file = small("r1", general="general.jsonl", lora=4)
    stages = read_road(file, out)
    road(stages, file, out)
    assert [str(finding) for finding in verify(out) if not finding.ok] == []
    assert [score.model for score in held_out_scores(out)] == ["model", "cold", "rl-1", "sft", "rl-2"]
    records = {stage.name: json.loads((stage.folder / "run.json").read_text()) for stage in stages}
    # every stage is made of the stage before it, and whatever was asked, of the questions
    for name, made_of in {
        "cold": "cold-answers",
        "rl-1": "cold",
        "answers": "rl-1",
        "sft": "answers",
        "rl-2": "sft",
    }.items():
        inputs = records[name]["inputs"]
        assert records[made_of]["artefact_digest"] in {each["digest"] for each in inputs.values()}
    questions = {
        records[name]["inputs"]["data"]["digest"] for name in ("before", "cold-answers", "rl-1", "answers", "rl-2")
    }
    assert len(questions) == 1
    assert questions == {records[name]["inputs"]["held_out"]["digest"] for name in ("cold", "sft")}
    for name in ("cold-answers", "answers"):
        found = read_examples(out / name / "artefact" / "examples.jsonl").of_kind(Conversation)
        own = [each for each in found if each.messages[-1].reasoning]
        assert own and not held_out & {each.messages[0].content for each in own}
    assert records["sft"]["facts"]["held_out_overlap"]["count"] == 1, "a general example gave a question away"
    page = write_report(out).read_text()
    assert "are not compared" not in page and ">control<" not in page and "SFT on worked examples" not in page


def test_a_cold_start_of_ones_own_takes_the_place_of_answers(place: Path) -> None:
    rows = [{"prompt": f"{n} train", "completion": "<think>7</think>7"} for n in range(60)]
    Path("cold.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = open_road("r1", INPUTS | {"examples": "cold.jsonl"})
    stages: dict[str, Any] = {stage.name: stage for stage in read_road(file, "o")}
    assert "cold-answers" not in stages and stages["cold"].config.data == str(place / "cold.jsonl")
    text = file.to_toml(place / "o")
    assert 'data = "../cold.jsonl"' in text and "{model}" not in text and "[inputs]" not in text


@pytest.mark.parametrize(
    ("inputs", "overrides", "said"),
    [
        ({"model": None}, [], "--model is missing.*--model MODEL"),
        ({"reward": None}, [], "--reward is missing"),
        ({"model": "modle"}, [], "model = 'modle' is no stage, and nothing lies there"),
        ({"data": "aks.jsonl"}, [], r"no such file or folder 'aks.jsonl' \(--data\); give a path that holds from"),
        ({"examples": "cld.jsonl"}, [], r"no such file or folder 'cld.jsonl' \(--examples\)"),
        ({"general": "~/talks"}, [], r"no such file or folder '~/talks' \(--general\)"),
        ({"reward": "jduge.py:reward"}, [], r"no such file or folder 'jduge.py' \(--reward\)"),
        ({}, ["rl1.steps=3"], "no stage, and no stage's key, is called 'rl1'.*rl-1"),
        ({}, ["rl-1.stpes=3"], "unknown key 'stpes'.*'rl-1'.*'steps'"),
        ({}, ["rl-1.steps=0"], "greater than or equal to 1"),
        ({}, ["rl-1.uses=sft"], "'uses' is what a stage is"),
        ({}, ["rl-1.held_out.share=0.5"], "hold out different questions of ask.jsonl"),
        ({}, ["answers.max_tokens=900"], "'answers' may have 900 tokens, and rows of 'sft' hold 512"),
        ({}, ["sft.data=cold"], "data names a stage that writes no examples .it uses sft."),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(
    inputs: dict[str, Any], overrides: list[str], said: str, place: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        read_road(open_road("r1", INPUTS | inputs, overrides), "runs")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("file", "text", "inputs", "said"),
    [
        ("judge.py", "def rewrad(problem, answer): return 1", {}, "no function 'reward'"),
        ("ask.jsonl", '{"anser": "7"}\n', {}, "no question to train on"),
        ("talk.jsonl", '{"colour": "red"}\n', {"general": "talk.jsonl"}, "columns"),
        ("cold.jsonl", "not json\n", {"examples": "cold.jsonl"}, "no good record"),
    ],
)
def test_what_a_late_stage_would_find_is_found_before_the_first(
    file: str, text: str, inputs: dict[str, Any], said: str, place: Path
) -> None:
    (place / file).write_text(text)
    stages = read_road(open_road("r1", INPUTS | inputs), "runs")
    with pytest.raises(SpratError, match=said):
        check_inputs(stages, models=False)
    assert not Path("runs").exists()


def test_a_model_whose_context_is_too_short_is_told_of_with_the_way_out(place: Path) -> None:
    stages = read_road(open_road("r1", INPUTS), "runs")  # rows of 512 tokens, answers of 128
    with pytest.raises(ConfigError, match="do not fit a context of 128.*--set"):
        check_inputs(stages)


def test_a_road_without_inputs_takes_none(place: Path) -> None:
    (place / "mine.toml").write_text('[[stages]]\nname = "before"\nuses = "eval"\nmodel = "model"\ntext = "judge.py"\n')
    with pytest.raises(ConfigError, match="this road takes no --model"):
        open_road("mine.toml", {"model": "model"})
    (place / "mine.toml").write_text('[inputs]\nanything = {}\n[[stages]]\nname = "a"\nuses = "eval"\n')
    with pytest.raises(ConfigError, match="anything"):
        open_road("mine.toml")


def test_a_change_without_a_stage_reaches_every_stage_that_has_the_key(place: Path) -> None:
    stages = {s.name: s for s in read_road(open_road("r1", INPUTS, ["held_out.share=0.5", "max_tokens=9"]), "runs")}
    for name in ("before", "cold-answers", "rl-1", "answers", "rl-2", "after"):
        settings: Any = stages[name].settings
        assert settings.held_out.share == 0.5 and settings.max_tokens == 9
    config: Any = stages["cold"].config
    assert config.held_out.share == 0.5


def test_of_several_questions_in_a_talk_the_last_turn_is_held_out(place: Path) -> None:
    rows = [{"system": "Be short.", "question": f"What is {n} + {n}?", "answer": "7"} for n in range(20)]
    (place / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    [kept, *_] = held_out = held_out_questions(HeldOutOfConfig(data="talks.jsonl"))
    assert len(held_out) == 4
    where, last = Where("x", 1), "What is" + kept.question.rpartition("What is")[2]  # without the system's turn
    asking = Conversation((Message("user", f"Please: {last}"), Message("assistant", "7")), where)
    other = Conversation((Message("user", "What is 400 + 1?"), Message("assistant", "7")), where)
    left, facts = remove_held_out([asking, other], held_out)
    assert left == (other,) and facts["count"] == 1
    with pytest.raises(DataError, match="1 of 1 examples ask what is held out"):
        remove_held_out([asking], held_out)


def test_every_question_that_is_held_out_is_kept_from_being_learned_not_only_those_that_are_asked(place: Path) -> None:
    sides = ["test"] * 10 + ["train"] * 10
    rows = [{"question": f"{n} train", "answer": "7", "split": side} for n, side in enumerate(sides)]
    (place / "sides.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = held_out_questions(HeldOutOfConfig(data="sides.jsonl", problems=2))
    assert {problem.question for problem in found} == {f"{n} train" for n in range(10)}
