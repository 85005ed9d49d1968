"""``sprat eval --lm-eval``: what is said before the harness is asked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sprat.cli.main import app


def test_without_the_harness_one_sentence_says_what_to_install(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as where it is not installed
    done = CliRunner().invoke(app, ["eval", str(model_folder), "--lm-eval", "arc_easy"])
    assert done.exit_code == 9 and done.stdout == ""
    assert done.stderr.startswith("sprat: lm-eval cannot be imported") and done.stderr.count("\n") == 1
    assert "pip install 'sprat[lm-eval]'" in done.stderr


@pytest.mark.parametrize(
    ("words", "option"),
    [
        ("--lm-eval arc_easy --task sums", "--task"),
        ("--lm-eval arc_easy --text book.txt", "--text"),
        ("--lm-eval arc_easy --max-tokens 5", "--max-tokens"),
        ("--lm-eval arc_easy --recipe tiny", "--recipe"),
        ("--lm-eval arc_easy --think", "--think"),
        ("--lm-eval ,", "--lm-eval"),
        ("--task sums --num-fewshot 0", "--num-fewshot"),
        ("--include-path tasks", "--include-path"),
        ("--apply-chat-template", "--apply-chat-template"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words: str, option: str) -> None:
    done = CliRunner().invoke(app, ["eval", "nowhere", *words.split()])
    assert done.exit_code == 2 and f"({option}" in done.stderr
