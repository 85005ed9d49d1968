"""Streamed pieces: whole characters, the think block, stop strings, and the same text as at once."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprat.engine.sequence import Delta
from sprat.engine.text import Reader
from sprat.tokens import Tokenizer, split


def read(reader: Reader, ids: list[int]) -> list[Delta]:
    """All pieces of ``ids``."""
    return [piece for token in ids for piece in reader.push(token)] + reader.close()


def joined(pieces: list[Delta], kind: str) -> str:
    """The text of one channel."""
    return "".join(piece.text for piece in pieces if piece.kind == kind)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), thinking=st.sampled_from([True, False, None]))
def test_pieces_join_to_what_split_gives_at_once(
    tokenizer: Tokenizer, data: st.DataObject, thinking: bool | None
) -> None:
    special = [tokenizer.ids.think_open, tokenizer.ids.think_close, tokenizer.ids.user]
    token = st.one_of(st.integers(0, tokenizer.vocab_size - 1), st.sampled_from(special))
    ids = data.draw(st.lists(token, max_size=150))
    ids = [i for i in ids if i != tokenizer.ids.eos]
    pieces = read(Reader(tokenizer, thinking=thinking), ids)
    answer = split(tokenizer, ids, thinking=thinking)
    assert (joined(pieces, "reasoning"), joined(pieces, "content")) == (answer.reasoning, answer.content)


def test_a_character_of_several_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    ids = [
        token
        for byte in "a€😀b".encode()
        for token in range(tokenizer.vocab_size)
        if tokenizer.token_bytes(token) == bytes([byte])
    ]
    assert len(ids) == 9
    pieces = read(Reader(tokenizer, thinking=False), ids)
    assert [piece.text for piece in pieces] == ["a", "€", "😀", "b"]


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(alphabet="abc \n", max_size=40),
    stops=st.lists(st.text(alphabet="abc ", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_stop_string_across_tokens_cuts_the_text_exactly_there(
    tokenizer: Tokenizer, text: str, stops: list[str]
) -> None:
    places = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(places)[1]] if places else text
    for ids in (tokenizer.encode(text), [i for char in text for i in tokenizer.encode(char)]):
        reader = Reader(tokenizer, thinking=False, stops=stops)
        assert joined(read(reader, ids), "content") == expected
        assert reader.stopped == bool(places)


def test_stop_strings_are_not_sought_in_the_reasoning(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("a cat. b"), tokenizer.ids.think_close, *tokenizer.encode("a cat. b")]
    reader = Reader(tokenizer, thinking=True, stops=["."])
    pieces = read(reader, ids)
    assert joined(pieces, "reasoning") == "a cat. b" and joined(pieces, "content") == "a cat"
    assert reader.stopped and reader.answer().closed


@pytest.mark.parametrize("thinking", [True, None])
def test_think_tags_that_are_ordinary_text_still_part_the_channels(thinking: bool | None) -> None:
    foreign = Tokenizer(_without_think_tokens(), config={"eos_token": "<|endoftext|>"})
    assert foreign.ids.think_close < 0
    said = "12+13 is < 26 </thin </think>it is 25"
    ids = foreign.encode(said if thinking else "<think>" + said)
    pieces = read(Reader(foreign, thinking=thinking), ids)
    answer = split(foreign, ids, thinking=thinking)
    assert joined(pieces, "reasoning") == answer.reasoning == "12+13 is < 26 </thin "
    assert joined(pieces, "content") == answer.content == "it is 25"


def _without_think_tokens() -> str:
    """A tokenizer.json whose only control token is its end."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    text: str = made.to_str()
    return text
