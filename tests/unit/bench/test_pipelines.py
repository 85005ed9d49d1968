"""Whose folder may be read as a pipeline, what is walked, and whose minutes count; no stage is run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.pipeline_figures import PipelineResult
from bench.pipelines import EXTRA_CONTROLS, check_folder, environment, run_pipeline
from sprat.errors import ConfigError
from sprat.pipeline.recipe import load_recipe

Walk = Callable[..., PipelineResult]


@pytest.fixture
def walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Walk, list[list[str]]]:
    """A folder for a pipeline, a walk whose stages take no time, and the commands that it ran."""
    ran: list[list[str]] = []

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> None:
        ran.append(command)
        folder = Path(command[command.index("--out") + 1])
        given = [word for flag, word in zip(command, command[1:], strict=False) if flag == "--set"]
        (folder / "recipe.toml").write_text(load_recipe("quickstart", (*given, "seed=0")).to_toml())
        if "interrupted" in env:
            raise KeyboardInterrupt
        for name in ("pretrain-dense-parameters", "student-examples") if set(EXTRA_CONTROLS) <= set(given) else ():
            (folder / name).mkdir(exist_ok=True)
            (folder / name / "run.json").write_text('{"facts": {}}')
        (folder / "report.html").touch()

    def go(*overrides: str, isa: str = "avx512", twins: bool = False) -> PipelineResult:
        return run_pipeline(tmp_path / "seed0-avx512", 0, isa, "quickstart", overrides, twins)

    monkeypatch.setattr(subprocess, "run", run)
    return tmp_path / "seed0-avx512", go, ran


def test_a_finished_road_is_read_if_it_is_the_one_that_is_asked(walked: tuple[Path, Walk, list[list[str]]]) -> None:
    folder, go, ran = walked
    assert go().minutes is not None and (folder / "isa").read_text() == "avx512"
    ledger = (folder / "ledger.jsonl").read_text()
    assert '"isa"' in ledger and '"minutes"' in ledger  # else ``sprat verify`` would find two files that nobody wrote
    assert go("jobs=1", "money.watts_per_core=5.0").name == "0-avx512" and len(ran) == 1
    with pytest.raises(ConfigError, match=r"sft.steps is 680 there and 9 here \(.*seed0-avx512\); give another OUT"):
        go("sft.steps=9")
    with pytest.raises(ConfigError, match="eval.split is test there and dev here"):
        go("eval.split=dev")
    with pytest.raises(ConfigError, match="isa is avx512 there and avx2 here"):
        go(isa="avx2")
    with pytest.raises(ConfigError, match="seed is 0 there and 1 here"):
        run_pipeline(folder, 1, "avx512", "quickstart", ())
    assert len(ran) == 1


def test_without_a_note_the_folders_name_must_say_the_instruction_set(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", ("seed=0",))
    for name in ("seed0-avx512", "road"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.toml").write_text(recipe.to_toml())
    check_folder(tmp_path / "seed0-avx512", "avx512", recipe)
    for name, isa in (("seed0-avx512", "avx2"), ("road", "avx512")):
        with pytest.raises(ConfigError, match="isa is noted nowhere"):
            check_folder(tmp_path / name, isa, recipe)


def test_a_road_with_the_nested_tables_of_before_is_refused_for_them(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", ("seed=0",))
    text = (Path(__file__).parents[1] / "config" / "nested_quickstart.toml").read_text(encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"has the table \[pretrain.train\], .*; give another OUT"):
        check_folder(tmp_path, "avx512", recipe)


@pytest.mark.parametrize("text", [None, "seed = ", "seed = 0"])
def test_a_folder_whose_recipe_is_not_known_is_refused(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "run.json").write_text("{}")
    if text is not None:
        (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"no recipe.toml|cannot be read|controls.* is not set there"):
        check_folder(tmp_path, "avx512", load_recipe("quickstart", ("seed=0",)))


def test_a_report_older_than_the_recipe_is_of_another_walk(walked: tuple[Path, Walk, list[list[str]]]) -> None:
    folder, go, ran = walked
    go()
    os.utime(folder / "report.html", ns=(0, 0))
    go()
    assert len(ran) == 2


def test_a_road_in_two_goes_has_no_minutes(
    walked: tuple[Path, Walk, list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, go, _ = walked
    with monkeypatch.context() as context:
        context.setenv("interrupted", "1")
        with pytest.raises(KeyboardInterrupt):
            go()
    assert go().minutes is None and not (folder / "minutes").exists()
    (folder / "minutes").write_text("12.5")  # noted before it was said of what
    assert go().minutes is None


def test_minutes_are_of_this_recipe(walked: tuple[Path, Walk, list[list[str]]]) -> None:
    _, go, _ = walked
    assert go().minutes is not None and go("jobs=1").minutes is None


def test_twins_are_walked_once(walked: tuple[Path, Walk, list[list[str]]]) -> None:
    _, go, ran = walked
    go("jobs=1")
    for _ in range(2):
        assert {"pretrain-dense-parameters", "student-examples"} <= go(twins=True).runs.keys()
    assert len(ran) == 2 and all(word in ran[1] for word in EXTRA_CONTROLS)
    with pytest.raises(ConfigError, match="controls.student_examples is 12000 there and not set here"):
        go()
    with pytest.raises(ConfigError, match="sft.steps"):
        go("sft.steps=9", twins=True)


def test_one_twin_that_is_missing_is_walked(walked: tuple[Path, Walk, list[list[str]]]) -> None:
    folder, go, ran = walked
    go(twins=True)
    (folder / "student-examples" / "run.json").unlink()
    go(twins=True)
    assert len(ran) == 3 and EXTRA_CONTROLS[1] in ran[2]


def test_an_instruction_set_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPRAT_ISA", "avx2")
    assert "SPRAT_ISA" not in environment("avx512")
    assert environment("avx2")["SPRAT_ISA"] == "avx2"
