"""A reward pays what was asked for, and a broken plug-in says what is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from sprat.errors import ConfigError, TrainingError
from sprat.post.rewards import Response, accuracy, format_reward, load_reward, read_response
from sprat.tasks import Problem, Sums
from sprat.tokens import Tokenizer

PROBLEM = Problem("sums", 0, "What is 1 + 2?", "3", {})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["What is 1 + 2? 3 = 3\n"] * 4, 480)


@pytest.mark.parametrize(
    ("text", "formed"),
    [
        ("<think>1 + 2 = 3</think>3", True),
        ("<think></think>3", True),
        ("3", False),
        ("<think>1 + 2</think>", False),
        ("<think>1 + 2", False),
        ("</think>3", False),
        ("<think>1</think><think>2</think>3", False),
        ("<think>1</think>3</think>", False),
        ("3<think>1</think>", False),
    ],
)
def test_format_pays_exactly_one_closed_think_and_an_answer(tokenizer: Tokenizer, text: str, formed: bool) -> None:
    ids = [*tokenizer.encode(text, specials=True), tokenizer.ids.eos]
    response = read_response(tokenizer, ids, thinking=None, finished=True)
    assert format_reward(PROBLEM, response) == float(formed)


def test_an_answer_that_was_cut_off_has_no_form_but_may_be_right(tokenizer: Tokenizer) -> None:
    response = read_response(
        tokenizer, tokenizer.encode("<think></think>3", specials=True), thinking=None, finished=False
    )
    assert format_reward(PROBLEM, response) == 0.0
    assert accuracy(Sums("sums"))(PROBLEM, response) == 1.0


@pytest.mark.parametrize(("thinking", "text"), [(True, "1 + 2 = 3</think>3"), (False, "3")])
def test_tags_of_the_prompt_count_for_the_form(tokenizer: Tokenizer, thinking: bool, text: str) -> None:
    ids = tokenizer.encode(text, specials=True)
    assert read_response(tokenizer, ids, thinking=thinking, finished=True).well_formed
    assert not read_response(tokenizer, ids, thinking=not thinking, finished=True).well_formed


def test_the_judge_reads_only_what_follows_the_think(tokenizer: Tokenizer) -> None:
    judge = accuracy(Sums("sums"))
    for text, score in [("<think>9</think>3", 1.0), ("<think>3</think>9", 0.0), ("<think>3", 0.0)]:
        ids = tokenizer.encode(text, specials=True)
        assert judge(PROBLEM, read_response(tokenizer, ids, thinking=None, finished=True)) == score


def test_a_users_reward_is_loaded_from_a_file_and_from_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_reward.py").write_text("def brief(problem, answer):\n    return -len(answer.content)\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in (f"{tmp_path}/my_reward.py:brief", "my_reward:brief"):
        assert load_reward(name)(PROBLEM, Response("", "four", True)) == -4.0


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("", "nothing", "cannot read the reward"),
        ("", "no_such_package:f", "no module 'no_such_package'"),
        ("", "{file}:", "cannot read the reward"),
        ("", "{folder}/absent.py:f", "no such file"),
        ("x = 1", "{file}:f", "no function 'f'"),
        ("f = 1", "{file}:f", "is not a function"),
        ("def f(problem): return 1.0", "{file}:f", "does not take two arguments"),
        ("import nowhere_at_all", "{file}:f", "no module 'nowhere_at_all'"),
        ("1 / 0", "{file}:f", "ZeroDivisionError"),
        ("def f(:", "{file}:f", "SyntaxError"),
    ],
)
def test_a_reward_that_cannot_be_loaded_says_why(tmp_path: Path, content: str, name: str, words: str) -> None:
    file = tmp_path / "plug.py"
    file.write_text(content)
    with pytest.raises(ConfigError, match=words):
        load_reward(name.format(file=file, folder=tmp_path))


@pytest.mark.parametrize("body", ["return 'much'", "return float('nan')", "return None", "raise KeyError('x')"])
def test_a_reward_that_misbehaves_is_named(tmp_path: Path, body: str) -> None:
    (tmp_path / "plug.py").write_text(f"def f(problem, answer):\n    {body}\n")
    with pytest.raises(TrainingError, match="plug.py:f"):
        load_reward(f"{tmp_path}/plug.py:f")(PROBLEM, Response("", "3", True))
