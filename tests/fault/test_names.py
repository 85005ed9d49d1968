"""Names come from data and recipes, and are never paths: whatever they say, nothing is written outside.

SPRAT_FUZZ=5000 tries the full number of names.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from sprat.data.document import safe_name
from sprat.errors import ConfigError, SpratError
from sprat.pipeline.pipeline import DataArtifact, Pipeline, read_problems, write_problems
from sprat.pipeline.recipe import load_recipe
from sprat.tasks import Problem

COUNT = int(os.environ.get("SPRAT_FUZZ", "300"))
PARTS = (
    "..", ".", "/", "\\", "//", "~", "\x00", "\n", "\x1b[2J", "%2F", "%2E", "%", "a", "B", "é", "e\u0301", "\u202e",
    "\udcff", "中", "😀", " ", "CON", "x" * 300, ":", "@", "-", "--out",
    "$HOME", "{}", "*", ".jsonl", ".toml", "etc/passwd", "tmp",
)  # fmt: skip
SURE = (
    "",
    ".",
    "..",
    "../x",
    "/tmp/x",
    "a/b",
    "a/../../b",
    "a\x00b",
    "x" * 5000,
    ".hidden",
    "~root",
    "..\\x",
    "\udcff",
    "a\n",
)


def _names(outside: Path) -> list[str]:
    chance = random.Random(0)
    drawn = ["".join(chance.choices((*PARTS, str(outside)), k=chance.randint(1, 6))) for _ in range(COUNT)]
    return [*SURE, str(outside / "x"), *drawn]


def _tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder that may be written to, some levels down, and the current one."""
    folder = tmp_path / "outside" / "a" / "b" / "inside"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def test_titles_and_domains_name_files_in_their_own_folder_and_different_ones_differ(
    inside: Path, tmp_path: Path
) -> None:
    names = _names(tmp_path / "outside")
    before = _tree(tmp_path) - {path for path in _tree(tmp_path) if "inside" in path}
    for number, name in enumerate(names):
        file = inside / f"{safe_name(name)}.jsonl"
        write_problems(file, [Problem("t", number, "q", "a")])
        assert file.parent == inside and file.resolve().parent == inside.resolve()
    assert len(list(inside.iterdir())) == len(set(names))
    last = {name: number for number, name in enumerate(names)}
    for name, number in last.items():
        assert read_problems(inside / f"{safe_name(name)}.jsonl")[0].index == number
    assert {path for path in _tree(tmp_path) if "inside" not in path} == before
    assert safe_name("chain_sum_2digits") == "chain_sum_2digits"  # names that are plain stay as they are


def test_a_run_is_named_by_one_plain_part_or_refused(inside: Path, tmp_path: Path) -> None:
    pipeline = Pipeline(inside, load_recipe("tiny"))
    for name in _names(tmp_path / "outside"):
        try:
            path = pipeline.run_folder(name)
        except ConfigError:
            continue
        assert path.parent == inside and path.name == name and name not in (".", "..")
    assert pipeline.run_folder("rl-seed-3") == inside / "rl-seed-3"
    for name in SURE:
        with pytest.raises(ConfigError):
            pipeline.run_folder(name)


def test_whatever_names_a_recipe_is_read_or_refused_in_one_sentence(inside: Path, tmp_path: Path) -> None:
    (inside / "folder.toml").mkdir()
    os.mkfifo(inside / "pipe.toml")
    names = [*_names(tmp_path / "outside"), "folder.toml", "pipe.toml", "/dev/zero", "/dev/null/x"]
    before = _tree(tmp_path)
    for name in names:
        with pytest.raises(SpratError) as caught:
            load_recipe(name)
        assert isinstance(caught.value, ConfigError), name
    assert _tree(tmp_path) == before


def test_titles_of_a_recipe_reach_the_folder_of_problems_only(inside: Path, tmp_path: Path) -> None:
    for name in [name for name in _names(tmp_path / "outside")[: 3 * len(SURE)] if name and "\udcff" not in name]:
        recipe = load_recipe("tiny").replace(data={"tasks": [{"name": "sums", "title": name}]})
        config = recipe.data.tasks[0]
        artefact = DataArtifact(inside)
        write_problems(artefact.problems_file(config, "test"), [Problem("t", 7, "q", "a")])
        assert artefact.task(config).problems[0].index == 7
    assert {path for path in _tree(tmp_path / "outside") if not path.startswith("a/b/inside/problems/")} == {
        "a", "a/b", "a/b/inside", "a/b/inside/problems"
    }  # fmt: skip


def test_two_tasks_of_one_title_are_refused() -> None:
    with pytest.raises(ConfigError, match="two tasks are called 'sums'"):
        load_recipe("tiny", ('data.unseen=[{name="sums"}]',))
