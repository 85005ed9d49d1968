"""What a model is calibrated on: texts as they stand, conversations in the model's own format, enough of both."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from sprat.data.document import Document
from sprat.data.folder import ExclusionTally
from sprat.data.pack import PackedDataset
from sprat.errors import DataError
from sprat.post.calibration import calibration_rows, read_calibration, text_rows
from sprat.tokens import Message, Tokenizer, render

QUESTIONS = [(f"What is {number} plus one?", f"It is {number + 1}.") for number in range(80)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([question + answer for question, answer in QUESTIONS], 600)


def write_chats(path: Path) -> Path:
    rows = [json.dumps({"prompt": question, "completion": answer}) for question, answer in QUESTIONS]
    path.write_text("\n".join(rows) + "\n")
    return path


def rows_of(path: Path, tokenizer: Tokenizer, window: int, num_tokens: int) -> list[PackedDataset]:
    """What the model is shown of ``path``; nothing of it may be unfit."""
    tally = ExclusionTally()
    rows = calibration_rows(read_calibration(path), tokenizer, window, num_tokens, tally)
    assert not tally.excluded()
    return rows


def sequences(rows: PackedDataset) -> list[list[int]]:
    """The documents of all rows."""
    return [
        tokens[segments == number].tolist()
        for tokens, segments in zip(rows.tokens, rows.segments, strict=True)
        for number in sorted(set(segments.tolist()) - {0})
    ]


def test_conversations_are_shown_in_the_models_own_format(tokenizer: Tokenizer, tmp_path: Path) -> None:
    [rows] = rows_of(write_chats(tmp_path / "chats.jsonl"), tokenizer, 128, 10**6)
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
    shown = {name: rows_of(tmp_path / f"{name}.jsonl", tokenizer, 40, 10**6)[0].tokens for name in ("chat", "pair")}
    said = {name: tokenizer.decode(tokens.flatten().tolist()) for name, tokens in shown.items()}
    assert "It is 2." in said["chat"] and "It is 4." in said["chat"].replace("  ", " ")
    assert "It is 6" in said["pair"] and "It is 7" not in said["pair"]


def test_texts_and_conversations_of_a_folder_get_half_each(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_chats(tmp_path / "chats.jsonl")
    (tmp_path / "a.txt").write_text("It is what it is. " * 15)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "What it is is plus one. " * 200}) + "\n")
    chats, texts = rows_of(tmp_path, tokenizer, 64, 1024)
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
    [rows] = rows_of(tmp_path / "chats.jsonl", tokenizer, 128, 512)
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
        read_calibration(tmp_path / "rows.jsonl")
    (tmp_path / "few.jsonl").write_text('{"prompt": "What?", "completion": "It."}\n')
    with pytest.raises(DataError, match="too few to calibrate on"):
        rows_of(tmp_path / "few.jsonl", tokenizer, 64, 1024)


def test_all_files_of_conversations_in_a_folder_are_read_and_the_others_are_named(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As ``sprat sft`` reads them; they once were left out without a word, and so was text that is no UTF-8."""
    rows = [{"prompt": question, "completion": answer} for question, answer in QUESTIONS]
    (tmp_path / "a.json").write_text(json.dumps(rows[:20]))
    (tmp_path / "b.csv").write_text("prompt,completion\n" + "".join(f"{q},{a}\n" for q, a in QUESTIONS[20:40]))
    (tmp_path / "c.ndjson").write_text("no json\n" + "\n".join(map(json.dumps, rows[40:])) + "\n")
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    (tmp_path / "torn.json").write_text('[{"prompt": "1')
    (tmp_path / "old.txt").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "blank.txt").write_text("  ")
    [shown] = rows_of(tmp_path, tokenizer, 64, 10**6)
    assert len(sequences(shown)) == len(QUESTIONS)
    for what in ("1 records: not JSON (c.ndjson:1", "config.json, torn.json", "not UTF-8 text (old.txt)", "blank.txt"):
        assert what in caplog.text


def test_a_conversation_that_has_no_place_in_the_format_is_left_out_and_counted(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """As ``sprat sft`` does it; one call of a tool once stopped all."""
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    turns += [{"role": "tool", "content": "2"}, {"role": "assistant", "content": "It is 2."}]
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in QUESTIONS]
    path, tally = tmp_path / "chats.jsonl", ExclusionTally()
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in [turns, *chats]))
    [shown] = calibration_rows(read_calibration(path), tokenizer, 64, 10**6, tally)
    assert len(sequences(shown)) == len(QUESTIONS)
    assert "1 conversations" in str(tally) and "chats.jsonl:1" in str(tally)
    path.write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(DataError, match=r"no conversation has a place.*chats.jsonl, line 1"):
        calibration_rows(read_calibration(path), tokenizer, 64, 10**6, tally)


def test_a_template_that_cannot_be_followed_is_not_replaced_by_another(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As with ``sprat sft``: the model would be rounded for a format that nobody asks it in."""
    table = json.loads(tokenizer.files()["tokenizer_config.json"]) | {"chat_template": "{{ messages | length }}"}
    other = Tokenizer(tokenizer.files()["tokenizer.json"], config=table)
    with pytest.raises(DataError, match="chat template cannot be followed.*calibrate on text"):
        rows_of(write_chats(tmp_path / "chats.jsonl"), other, 64, 1024)
    (tmp_path / "a.txt").write_text("It is what it is. " * 90)
    assert len(rows_of(tmp_path / "a.txt", other, 64, 256)) == 1


def test_too_few_tokens_are_too_few_in_the_users_words(tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_chats(tmp_path / "chats.jsonl")
    (tmp_path / "a.txt").write_text("It is what it is. " * 15)
    for name, count in (("chats.jsonl", 1), ("a.txt", 1), ("", 3)):
        with pytest.raises(DataError, match=rf"{count} tokens are too few.*\(calibration_tokens\); give at least"):
            rows_of(tmp_path / name, tokenizer, 64, count)
