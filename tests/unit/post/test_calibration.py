"""What a model is calibrated on: texts as they stand, conversations in the model's own format, enough of both."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from sprat.data.document import Document
from sprat.data.pack import PackedDataset
from sprat.errors import DataError
from sprat.post.calibration import read_calibration, text_rows
from sprat.tokens import Message, Tokenizer, render

QUESTIONS = [(f"What is {number} plus one?", f"It is {number + 1}.") for number in range(80)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([question + answer for question, answer in QUESTIONS], 600)


def write_chats(path: Path) -> Path:
    rows = [json.dumps({"prompt": question, "completion": answer}) for question, answer in QUESTIONS]
    path.write_text("\n".join(rows) + "\n")
    return path


def sequences(rows: PackedDataset) -> list[list[int]]:
    """The documents of all rows."""
    return [
        tokens[segments == number].tolist()
        for tokens, segments in zip(rows.tokens, rows.segments, strict=True)
        for number in sorted(set(segments.tolist()) - {0})
    ]


def test_conversations_are_shown_in_the_models_own_format(tokenizer: Tokenizer, tmp_path: Path) -> None:
    [rows] = read_calibration(write_chats(tmp_path / "chats.jsonl"), tokenizer, 128, 10**6)
    asked = {tuple(render(tokenizer, [Message("user", question)])): answer for question, answer in QUESTIONS}
    shown = sequences(rows)
    assert len(shown) == len(QUESTIONS)
    for ids in shown:
        [(prompt, answer)] = [each for each in asked.items() if tuple(ids[: len(each[0])]) == each[0]]
        assert answer in tokenizer.decode(ids[len(prompt) :]) and ids[-1] in tokenizer.eos_token_ids
    learned = int(rows.loss_mask.sum())
    assert learned == sum(len(ids) for ids in shown) - sum(map(len, asked))  # answers alone


def test_every_answer_of_a_conversation_is_shown_and_only_the_chosen_one_of_a_pair(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    turns = [("user", "What is 1 plus one?"), ("assistant", "It is 2."), ("user", "And 3?"), ("assistant", "It is 4.")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    pair = {"prompt": "What is 5 plus one?", "chosen": "It is 6.", "rejected": "It is 7."}
    for name, row in (("chat", chat), ("pair", pair)):
        others = [json.dumps(row).replace("plus", f"and {word}") for word in ("one", "is", "it")]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(others) + "\n")
    shown = {
        name: read_calibration(tmp_path / f"{name}.jsonl", tokenizer, 40, 10**6)[0].tokens for name in ("chat", "pair")
    }
    said = {name: tokenizer.decode(tokens.flatten().tolist()) for name, tokens in shown.items()}
    assert "It is 2." in said["chat"] and "It is 4." in said["chat"].replace("  ", " ")
    assert "It is 6" in said["pair"] and "It is 7" not in said["pair"]


def test_texts_and_conversations_of_a_folder_get_half_each(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_chats(tmp_path / "chats.jsonl")
    (tmp_path / "a.txt").write_text("It is what it is. " * 15)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "What it is is plus one. " * 200}) + "\n")
    chats, texts = read_calibration(tmp_path, tokenizer, 64, 1024)
    assert texts.tokens.size == 512 and 512 <= (chats.segments > 0).sum() < 512 + 64
    assert texts.loss_mask.all() and 0 < chats.loss_mask.sum() < chats.tokens.size
    said = tokenizer.decode(texts.tokens.flatten().tolist())
    assert "It is what" in said and "plus one. What" in said


def test_few_documents_go_on_until_there_is_enough(tokenizer: Tokenizer) -> None:
    """Three documents of ten thousand characters were once cut at their beginnings, a fifth of what was asked for."""
    documents = [Document(name, f"{name} " * 5000, "s", "", "prose") for name in "abc"]
    rows = text_rows(documents, tokenizer, 64, 8192)
    assert rows.tokens.shape == (8192 // 64, 64)
    order = [tokenizer.decode(ids[1:2]).strip() for ids in sequences(text_rows(documents, tokenizer, 4096, 8192))]
    assert sorted(order[:3]) == ["a", "b", "c"]  # none goes on before all have begun


def test_a_conversation_longer_than_all_that_is_asked_for_is_shown_where_it_answers(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """One of a hundred thousand tokens once was calibrated on whole, all of it at once."""
    long = "What is one plus one? " * 4000
    chats = [{"prompt": f"{number} {long}", "completion": f"It is {number}. " * 40} for number in range(3)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)) + "\n")
    [rows] = read_calibration(tmp_path / "chats.jsonl", tokenizer, 128, 512)
    assert 512 <= (rows.segments > 0).sum() < 512 + 128 and rows.tokens.size <= 2 * 640
    assert all(rows.loss_mask[:, 1:].any(1))
    assert "It is" in tokenizer.decode(rows.tokens.flatten().tolist())


@pytest.mark.parametrize("has_bos", [True, False])
def test_texts_begin_as_a_text_that_the_model_is_asked(
    tokenizer: Tokenizer, has_bos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the token that begins texts, also where an excerpt goes on in another row; if there is one."""
    asked = tokenizer.encode_prompt("It is 4.")
    if not has_bos:
        asked = tokenizer.encode("It is 4.")
        monkeypatch.setattr(tokenizer, "special_ids", dataclasses.replace(tokenizer.special_ids, bos=-1))
    long = "What is one plus one? " * 40
    rows = text_rows([Document("short", "It is 4.", "s", "", "prose")] * 9, tokenizer, 16, 64)
    assert sequences(rows)[0] == asked
    rows = text_rows([Document("long", long, "s", "", "prose")], tokenizer, 16, 128)
    assert len(sequences(rows)) == len(rows.tokens) == 8
    begins = {int(ids[0]) for ids in rows.tokens}
    assert (begins == {asked[0]}) == has_bos
    said = [token for ids in sequences(rows) for token in ids[has_bos:]]
    assert said == tokenizer.encode(long)[: len(said)]  # no token is lost between two rows


def test_what_is_neither_text_nor_a_conversation_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"name": "x", "size": 3}\n')
    with pytest.raises(DataError, match="a row without a text"):
        read_calibration(tmp_path / "rows.jsonl", tokenizer, 64, 1024)
    (tmp_path / "few.jsonl").write_text('{"prompt": "What?", "completion": "It."}\n')
    with pytest.raises(DataError, match="too few to calibrate on"):
        read_calibration(tmp_path / "few.jsonl", tokenizer, 64, 1024)
