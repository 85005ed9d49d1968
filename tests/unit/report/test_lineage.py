"""Only runs that belong together, by recipe and by the digests of their inputs, are compared; others are named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sprat.config import Config, QuantConfig, RLConfig, TrainConfig
from sprat.report import write
from sprat.report.runs import read_runs
from sprat.trust import open_run
from sprat.trust.run_record import Input

SFT = TrainConfig(steps=3)
OTHER = RLConfig(seed=1, temperature=0.8)


class Shape(Config):
    """A recipe that says which student it makes."""

    student: str
    steps: int = 1


def finish(road: Path, name: str, recipe: Config = SFT, control_of: str = "", made: str = "", **inputs: Input) -> None:
    """Finish run ``name``, made from ``inputs``, whose artefact is ``made``; another one there is set aside."""
    seed = int(name[-1]) if name.startswith("rl-seed") else 0
    run = open_run(road / name, stage=name, recipe=recipe, inputs=inputs, seed=seed, ledger=road / "ledger.jsonl")
    (run.artifact / "model").write_text(made or name)
    for step in range(3):
        run.log(step, reward=0.1 * step, loss=2.0 - step)
    score = {"task": "sums", "label": "greedy", "count": 100, "correct": 50}
    run.add_facts(
        scores=[score], parameters={"total": 9}, size_bytes=7, **({"control_of": control_of} if control_of else {})
    )
    run.finish()


@pytest.fixture
def road(tmp_path: Path) -> Path:
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


def start(road: Path, model: str = "pretrain", judged: str = "0") -> dict[str, Any]:
    """The inputs of a run that starts from ``model``."""
    return {"model": road / model, "data": road / "data", "eval": judged * 64}


def shown(road: Path) -> dict[str, list[str]]:
    """The main stages, each with the controls beside it."""
    found = read_runs(road)
    return {stage.name: [control.name for control in found.controls(stage)] for stage in found.main}


def told(road: Path) -> str:
    """The page's sentence on what is not compared."""
    page = write(road).read_text(encoding="utf-8")
    return "".join(line.split("</p>")[0] for line in page.split('<p class="note">') if "not compared" in line)


def test_a_road_that_hangs_together_is_shown_whole(road: Path) -> None:
    assert shown(road) == {
        "data": [], "pretrain": [], "rl-seed0": ["rft", "sft"], "distill": ["student-scratch"], "quantize": [],
    }  # fmt: skip
    assert told(road) == ""


def test_another_seed_of_the_same_recipe_and_start_is_compared(road: Path) -> None:
    finish(road, "rl-seed1", RLConfig(seed=1), made="seed 1", **start(road))
    page = write(road).read_text(encoding="utf-8")
    assert "<th>seed 0</th><th>seed 1</th><th>spread</th>" in page and told(road) == ""


@pytest.mark.parametrize("case", ["recipe", "start", "judging"])
def test_a_seed_of_another_recipe_or_start_is_named_and_not_compared(road: Path, case: str) -> None:
    recipe = OTHER if case == "recipe" else RLConfig(seed=1)
    finish(road, "rl-seed1", recipe, **start(road, "sft" if case == "start" else "pretrain", str(int(case[0] == "j"))))
    page = write(road).read_text(encoding="utf-8")
    assert "spread" not in page and [stage.name for stage in read_runs(road).seed_runs("rl")] == ["rl-seed0"]
    quality = page.split("<h2>Quality, size and speed")[1].split("</section>")[0]
    assert "rl-seed0" in quality and "rl-seed1" not in quality
    assert told(road) == "rl-seed1 has another recipe or start and is not compared."


def test_what_rl_starts_from_is_part_of_the_road_whatever_an_earlier_walk_called_it(road: Path) -> None:
    finish(road, "rl-seed0", RLConfig(), made="after SFT", **start(road, "sft"))
    finish(road, "rft", control_of="rl", **start(road, "sft"))
    assert list(shown(road).items())[1:] == [("pretrain", []), ("sft", []), ("rl-seed0", ["rft"])]
    assert "SFT on worked examples<small>control" not in write(road).read_text(encoding="utf-8")


def test_sft_that_rl_no_longer_starts_from_is_a_control_of_it(road: Path) -> None:
    shutil.rmtree(road / "sft")
    finish(road, "sft", **start(road))
    assert shown(road)["rl-seed0"] == ["rft", "sft"] and "sft" not in shown(road)


def test_a_student_of_another_teacher_and_what_was_made_from_it_are_not_compared(road: Path) -> None:
    finish(road, "rl-seed0", RLConfig(temperature=0.8), made="cooler", **start(road))
    assert list(shown(road)) == ["data", "pretrain", "rl-seed0"]
    assert told(road) == "distill, quantize have another recipe or start and are not compared."


def test_int4_of_another_student_is_not_compared(road: Path) -> None:
    finish(road, "distill", Shape(student="small", steps=9), made="new", teacher=road / "rl-seed0")
    assert list(shown(road)) == ["data", "pretrain", "rl-seed0", "distill"]
    assert told(road) == "quantize has another recipe or start and is not compared."


def test_a_control_from_another_start_or_of_another_shape_is_not_compared(road: Path) -> None:
    finish(road, "rft", control_of="rl", **start(road, "sft"))
    finish(road, "student-scratch", Shape(student="large"), control_of="distill", data=road / "data")
    assert shown(road)["rl-seed0"] == ["sft"] and shown(road)["distill"] == []
    assert told(road) == "rft, student-scratch have another recipe or start and are not compared."


def test_a_stage_that_was_judged_otherwise_is_not_compared(road: Path) -> None:
    finish(road, "quantize", QuantConfig(), **start(road, "distill", "1"))
    assert list(shown(road)) == ["data", "pretrain", "rl-seed0", "distill"]
    assert told(road) == "quantize has another recipe or start and is not compared."


def test_the_seed_that_the_student_was_made_from_is_the_main_one(road: Path) -> None:
    finish(road, "rl-seed1", RLConfig(seed=1), made="seed 1", **start(road))
    finish(road, "distill", Shape(student="small"), made="new", teacher=road / "rl-seed1", data=road / "data")
    finish(road, "quantize", QuantConfig(), model=road / "distill")
    assert list(shown(road)) == ["data", "pretrain", "rl-seed1", "distill", "quantize"]
    assert [stage.name for stage in read_runs(road).seed_runs("rl")] == ["rl-seed0", "rl-seed1"]
    assert shown(road)["rl-seed1"] == ["rft", "sft"] and told(road) == ""


def test_a_run_of_no_station_stands_on_the_road_only_where_it_was_made_from_it(road: Path) -> None:
    finish(road, "merged", **start(road, "quantize"))
    finish(road, "mystery", made="?")
    assert list(shown(road))[-2:] == ["quantize", "merged"] and told(road) == ""
