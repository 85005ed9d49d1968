"""Only runs that belong together, by recipe and by the digests of their inputs, are compared; others are named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sprat.config import Config, QuantConfig, RLConfig, TrainConfig
from sprat.report import write_report
from sprat.report.runs import read_runs
from sprat.trust import open_run
from sprat.trust.run_record import Input

SFT = TrainConfig(steps=3)
OTHER = RLConfig(seed=1, temperature=0.8)


class Shape(Config):
    """A recipe that says which student it makes."""

    student: str
    steps: int = 1


def finish(
    pipeline: Path, name: str, recipe: Config = SFT, control_of: str = "", made: str = "", **inputs: Input
) -> None:
    """Finish run ``name``, made from ``inputs``, whose artefact is ``made``; another one there is set aside."""
    seed = int(name[-1]) if name.startswith("rl-seed") else 0
    run = open_run(
        pipeline / name, stage=name, recipe=recipe, inputs=inputs, seed=seed, ledger=pipeline / "ledger.jsonl"
    )
    (run.artifact / "model").write_text(made or name)
    for step in range(3):
        run.log(step, reward=0.1 * step, loss=2.0 - step)
    score = {"task": "sums", "label": "greedy", "count": 100, "correct": 50}
    run.add_facts(
        scores=[score], parameters={"total": 9}, size_bytes=7, **({"control_of": control_of} if control_of else {})
    )
    run.finish()


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """RL from the pre-trained model with its controls, distilled and quantised."""
    finish(tmp_path, "data")
    read_by_all = {"data": tmp_path / "data", "eval": "0" * 64}
    finish(tmp_path, "pretrain", **read_by_all)
    start = {"model": tmp_path / "pretrain", **read_by_all}
    finish(tmp_path, "sft", control_of="rl", **start)
    finish(tmp_path, "rft", control_of="rl", **start)
    finish(tmp_path, "rl-seed0", RLConfig(), **start)
    finish(tmp_path, "distill", Shape(student="small"), teacher=tmp_path / "rl-seed0", **read_by_all)
    finish(tmp_path, "student-scratch", Shape(student="small", steps=2), control_of="distill", **read_by_all)
    finish(tmp_path, "quantize", QuantConfig(), model=tmp_path / "distill", **read_by_all)
    return tmp_path


def start(pipeline: Path, model: str = "pretrain", judged: str = "0") -> dict[str, Any]:
    """The inputs of a run that starts from ``model``."""
    return {"model": pipeline / model, "data": pipeline / "data", "eval": judged * 64}


def shown(pipeline: Path) -> dict[str, list[str]]:
    """The main stages, each with the controls beside it."""
    found = read_runs(pipeline)
    return {stage.name: [control.name for control in found.controls(stage)] for stage in found.main}


def told(pipeline: Path) -> str:
    """The page's sentence on what is not compared."""
    page = write_report(pipeline).read_text(encoding="utf-8")
    return "".join(line.split("</p>")[0] for line in page.split('<p class="note">') if "not compared" in line)


def test_a_road_that_hangs_together_is_shown_whole(pipeline: Path) -> None:
    assert shown(pipeline) == {
        "data": [], "pretrain": [], "rl-seed0": ["rft", "sft"], "distill": ["student-scratch"], "quantize": [],
    }  # fmt: skip
    assert told(pipeline) == ""


def test_another_seed_of_the_same_recipe_and_start_is_compared(pipeline: Path) -> None:
    finish(pipeline, "rl-seed1", RLConfig(seed=1), made="seed 1", **start(pipeline))
    page = write_report(pipeline).read_text(encoding="utf-8")
    assert "<th>seed 0</th><th>seed 1</th><th>spread</th>" in page and told(pipeline) == ""


@pytest.mark.parametrize("case", ["recipe", "start", "judging"])
def test_a_seed_of_another_recipe_or_start_is_named_and_not_compared(pipeline: Path, case: str) -> None:
    recipe = OTHER if case == "recipe" else RLConfig(seed=1)
    finish(
        pipeline,
        "rl-seed1",
        recipe,
        **start(pipeline, "sft" if case == "start" else "pretrain", str(int(case[0] == "j"))),
    )
    page = write_report(pipeline).read_text(encoding="utf-8")
    assert "spread" not in page and [stage.name for stage in read_runs(pipeline).seed_runs("rl")] == ["rl-seed0"]
    quality = page.split("<h2>Quality, size and speed")[1].split("</section>")[0]
    assert "rl-seed0" in quality and "rl-seed1" not in quality
    assert told(pipeline) == "rl-seed1 has another recipe or start and is not compared."


def test_what_rl_starts_from_is_part_of_the_road_whatever_an_earlier_walk_called_it(pipeline: Path) -> None:
    finish(pipeline, "rl-seed0", RLConfig(), made="after SFT", **start(pipeline, "sft"))
    finish(pipeline, "rft", control_of="rl", **start(pipeline, "sft"))
    assert list(shown(pipeline).items())[1:] == [("pretrain", []), ("sft", []), ("rl-seed0", ["rft"])]
    assert "SFT on worked examples<small>control" not in write_report(pipeline).read_text(encoding="utf-8")


def test_sft_that_rl_no_longer_starts_from_is_a_control_of_it(pipeline: Path) -> None:
    shutil.rmtree(pipeline / "sft")
    finish(pipeline, "sft", **start(pipeline))
    assert shown(pipeline)["rl-seed0"] == ["rft", "sft"] and "sft" not in shown(pipeline)


def test_a_student_of_another_teacher_and_what_was_made_from_it_are_not_compared(pipeline: Path) -> None:
    finish(pipeline, "rl-seed0", RLConfig(temperature=0.8), made="cooler", **start(pipeline))
    assert list(shown(pipeline)) == ["data", "pretrain", "rl-seed0"]
    assert told(pipeline) == "distill, quantize have another recipe or start and are not compared."


def test_int4_of_another_student_is_not_compared(pipeline: Path) -> None:
    finish(pipeline, "distill", Shape(student="small", steps=9), made="new", teacher=pipeline / "rl-seed0")
    assert list(shown(pipeline)) == ["data", "pretrain", "rl-seed0", "distill"]
    assert told(pipeline) == "quantize has another recipe or start and is not compared."


def test_a_control_from_another_start_or_of_another_shape_is_not_compared(pipeline: Path) -> None:
    finish(pipeline, "rft", control_of="rl", **start(pipeline, "sft"))
    finish(pipeline, "student-scratch", Shape(student="large"), control_of="distill", data=pipeline / "data")
    assert shown(pipeline)["rl-seed0"] == ["sft"] and shown(pipeline)["distill"] == []
    assert told(pipeline) == "rft, student-scratch have another recipe or start and are not compared."


def test_a_stage_that_was_judged_otherwise_is_not_compared(pipeline: Path) -> None:
    finish(pipeline, "quantize", QuantConfig(), **start(pipeline, "distill", "1"))
    assert list(shown(pipeline)) == ["data", "pretrain", "rl-seed0", "distill"]
    assert told(pipeline) == "quantize has another recipe or start and is not compared."


def test_the_seed_that_the_student_was_made_from_is_the_main_one(pipeline: Path) -> None:
    finish(pipeline, "rl-seed1", RLConfig(seed=1), made="seed 1", **start(pipeline))
    finish(
        pipeline, "distill", Shape(student="small"), made="new", teacher=pipeline / "rl-seed1", data=pipeline / "data"
    )
    finish(pipeline, "quantize", QuantConfig(), model=pipeline / "distill")
    assert list(shown(pipeline)) == ["data", "pretrain", "rl-seed1", "distill", "quantize"]
    assert [stage.name for stage in read_runs(pipeline).seed_runs("rl")] == ["rl-seed0", "rl-seed1"]
    assert shown(pipeline)["rl-seed1"] == ["rft", "sft"] and told(pipeline) == ""


def test_a_run_of_no_station_stands_on_the_road_only_where_it_was_made_from_it(pipeline: Path) -> None:
    finish(pipeline, "merged", **start(pipeline, "quantize"))
    finish(pipeline, "mystery", made="?")
    assert list(shown(pipeline))[-2:] == ["quantize", "merged"] and told(pipeline) == ""
