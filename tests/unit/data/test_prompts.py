"""Questions are found in whatever form people have them, each asked once, and what is none is counted by its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sprat.data.prompts import read_prompts
from sprat.errors import DataError


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def asked(path: Path, **words: Any) -> list[list[tuple[str, str]]]:
    return [[(turn.role, turn.content) for turn in prompt] for prompt in read_prompts(path, **words).prompts]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"question": "2 + 2?", "answer": "4"}, [("user", "2 + 2?")]),
        ({"prompt": "2 + 2?"}, [("user", "2 + 2?")]),
        ({"prompt": [{"role": "user", "content": "2 + 2?"}]}, [("user", "2 + 2?")]),
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, [("user", "Add.\n2, 2")]),
        ({"text": "2 + 2?", "system": "Be brief."}, [("system", "Be brief."), ("user", "2 + 2?")]),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"},
                               {"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
            [("user", "Hi"), ("assistant", "Yes?"), ("user", "2 + 2?")],
        ),
    ],
)  # fmt: skip
def test_each_form_is_a_question_up_to_the_users_last_turn(
    row: dict[str, Any], turns: list[tuple[str, str]], tmp_path: Path
) -> None:
    assert asked(write(tmp_path / "a.jsonl", row)) == [turns]


def test_doubles_are_asked_once_and_what_is_no_question_is_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        {"question": "ﬁve  apples"},
        {"question": "five\napples "},
        {"question": "Five apples"},
        {"answer": "4"},
        {"question": " "},
        {"question": 7},
        {"messages": [{"role": "assistant", "content": "4"}]},
        ["no object"],
    )
    found = read_prompts(path)
    assert [prompt[0].content for prompt in found.prompts] == ["ﬁve  apples", "Five apples"]
    assert {each.why: (each.count, each.names[0]) for each in found.skipped} == {
        "records: a question that an earlier record has": (1, "a.jsonl:2"),
        "records: no question": (2, "a.jsonl:4"),
        "records: an empty turn": (1, "a.jsonl:5"),
        "records: content that is no string": (1, "a.jsonl:6"),
        "records: not an object": (1, "a.jsonl:8"),
    }


def test_other_names_are_mapped_and_a_file_without_questions_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "faq.csv"
    path.write_text("Frage,Antwort\none,two\n")
    assert asked(path, column_map={"prompt": "Frage"}) == [[("user", "one")]]
    with pytest.raises(DataError, match=r"no question in it.*faq.csv, line 2.*--map prompt=COLUMN"):
        read_prompts(path)
