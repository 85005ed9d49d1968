"""The README is true: it is short, its links lead somewhere, and its examples run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
MARK = "<!-- run -->"  # stands on the line before a bash block that is run here
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)#\s]+)")


def text() -> str:
    assert README.is_file(), "README.md is missing"
    return README.read_text(encoding="utf-8")


def blocks() -> list[tuple[int, str, str]]:
    """(line, language, code) of every block that must run: all python, and bash after the mark."""
    if not README.is_file():
        return []
    source, found = README.read_text(encoding="utf-8"), []
    for match in FENCE.finditer(source):
        before = source[: match.start()].rstrip().splitlines()
        marked = bool(before) and before[-1].strip() == MARK
        if match[1] == "python" or (match[1] == "bash" and marked):
            found.append((source[: match.start()].count("\n") + 1, match[1], match[2]))
    return found


def test_readme_can_be_read_in_one_sitting() -> None:
    assert len(text().splitlines()) <= 200


def test_readme_links_lead_somewhere() -> None:
    local = [target for target in LINK.findall(text()) if "://" not in target and not target.startswith("mailto:")]
    missing = [target for target in local if not (ROOT / target).exists()]
    assert not missing, missing


def test_readme_shows_both_commands_and_something_to_run() -> None:
    assert "make quickstart" in text() and "make test" in text()
    assert {language for _, language, _ in blocks()} == {"bash", "python"}


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_documents_name_only_files_that_exist(page: Path) -> None:
    source = page.read_text(encoding="utf-8")
    local = [page.parent / target for target in LINK.findall(source) if "://" not in target]
    local += [ROOT / path for path in re.findall(r"`((?:sprat|tests|bench|docs)/[\w/.-]+)`", source)]
    missing = [str(path) for path in local if not path.exists()]
    assert not missing, missing


def test_every_file_that_the_list_of_papers_points_to_names_its_source() -> None:
    rows = [line.strip("|").split("|") for line in (ROOT / "docs" / "papers.md").read_text().splitlines()]
    for technique, source, files in [row for row in rows if len(row) == 3][2:]:
        known = re.findall(r"\d{4}\.\d{5}|[A-Z][\w-]{3,}", source)
        for file in re.findall(r"`([^`]+)`", files):
            text = (ROOT / file).read_text(encoding="utf-8")
            assert any(word in text for word in known), f"{file} says nothing of {technique.strip()}: {source.strip()}"


def test_every_paper_that_the_code_names_is_listed() -> None:
    numbers = re.compile(r"\b\d{4}\.\d{5}\b")
    listed = set(numbers.findall((ROOT / "docs" / "papers.md").read_text(encoding="utf-8")))
    named = {n for path in (ROOT / "sprat").rglob("*.py") for n in numbers.findall(path.read_text(encoding="utf-8"))}
    assert not named - listed, sorted(named - listed)


@pytest.fixture
def newcomer(tiny_pipeline: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A folder with a finished road at runs/quickstart and ``sprat`` on the PATH, as after ``make quickstart``."""
    shutil.copytree(tiny_pipeline, tmp_path / "runs" / "quickstart")
    command = tmp_path / "bin" / "sprat"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sprat "$@"\n')
    command.chmod(0o755)
    path = f"{command.parent}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return tmp_path, {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "line, language, code", blocks(), ids=lambda value: str(value) if isinstance(value, int) else ""
)
def test_readme_example_runs(newcomer: tuple[Path, dict[str, str]], line: int, language: str, code: str) -> None:
    folder, environment = newcomer
    command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"README.md:{line} ended {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}"
