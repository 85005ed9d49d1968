"""Streamed pieces: whole characters, the think block, stop strings, and the same text as at once."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprat.engine.detokenizer import Detokenizer, IncrementalDecoder
from sprat.engine.sequence import Delta
from sprat.tokens import Tokenizer, split_reasoning
from sprat.tokens.hf_files import GenerationConfig
from tests.byte_fallback import byte_fallback


def read(detokenizer: Detokenizer, ids: list[int]) -> list[Delta]:
    """All pieces of ``ids``."""
    return [piece for token in ids for piece in detokenizer.push(token)] + detokenizer.close()


def joined(pieces: list[Delta], kind: str) -> str:
    """The text of one channel."""
    return "".join(piece.text for piece in pieces if piece.kind == kind)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), thinking=st.sampled_from([True, False, None]))
def test_pieces_join_to_what_split_gives_at_once(
    tokenizer: Tokenizer, data: st.DataObject, thinking: bool | None
) -> None:
    special = [tokenizer.special_ids.think_open, tokenizer.special_ids.think_close, tokenizer.special_ids.user]
    token = st.one_of(st.integers(0, tokenizer.vocab_size - 1), st.sampled_from(special))
    ids = data.draw(st.lists(token, max_size=150))
    ids = [i for i in ids if i != tokenizer.special_ids.eos]
    pieces = read(Detokenizer(tokenizer, thinking=thinking), ids)
    answer = split_reasoning(tokenizer, ids, thinking=thinking)
    assert (joined(pieces, "reasoning"), joined(pieces, "content")) == (answer.reasoning, answer.content)


def test_a_character_of_several_tokens_comes_whole(tokenizer: Tokenizer) -> None:
    ids = [
        token
        for byte in "a€😀b".encode()
        for token in range(tokenizer.vocab_size)
        if tokenizer.token_bytes(token) == bytes([byte])
    ]
    assert len(ids) == 9
    pieces = read(Detokenizer(tokenizer, thinking=False), ids)
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
        detokenizer = Detokenizer(tokenizer, thinking=False, stops=stops)
        assert joined(read(detokenizer, ids), "content") == expected
        assert detokenizer.stopped == bool(places)


def test_stop_strings_are_not_sought_in_the_reasoning(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("a cat. b"), tokenizer.special_ids.think_close, *tokenizer.encode("a cat. b")]
    detokenizer = Detokenizer(tokenizer, thinking=True, stops=["."])
    pieces = read(detokenizer, ids)
    assert joined(pieces, "reasoning") == "a cat. b" and joined(pieces, "content") == "a cat"
    assert detokenizer.stopped and detokenizer.answer().closed


@settings(max_examples=200, deadline=None)
@given(
    said=st.lists(st.sampled_from(["\n", "a", " ", "<think>", "</think>", "\n\n"]), max_size=14).map("".join),
    thinking=st.sampled_from([True, False, None]),
    structured=st.booleans(),
)
@pytest.mark.parametrize("tags", ["tokens", "text"])
def test_line_breaks_go_at_the_think_tags_and_nowhere_else(
    tags: str, said: str, thinking: bool | None, structured: bool
) -> None:
    tokenizer = THINKS if tags == "tokens" else BYTE_LEVEL
    ids = tokenizer.encode(said, parse_special=True)
    whole = split_reasoning(tokenizer, ids, thinking=thinking, structured=structured)
    pieces = read(Detokenizer(tokenizer, thinking=thinking, structured=structured), ids)
    assert (joined(pieces, "reasoning"), joined(pieces, "content")) == (whole.reasoning, whole.content)
    reasoning, tag, content = "", "", said
    opened = said.startswith("<think>")
    if tags == "text":  # no part of a form
        opened = said.lstrip().startswith("<think>") and not structured
    if thinking:
        reasoning, tag, content = said.partition("</think>")
    elif thinking is None and opened:
        reasoning, tag, content = said.partition("<think>")[2].partition("</think>")
    if tags == "tokens":  # those that part nothing are hidden
        reasoning, content = (re.sub("</?think>", "", text) for text in (reasoning, content))
    assert whole.reasoning == (reasoning.strip("\n") if tag else reasoning.lstrip("\n"))
    assert whole.content == (content.lstrip("\n") if tag and not structured else content)


@pytest.mark.parametrize("stop", ["2.", "\n2"])
def test_what_stands_before_a_stop_string_keeps_its_line_breaks(stop: str) -> None:
    detokenizer = Detokenizer(BYTE_LEVEL, thinking=None, stops=[stop])
    said = read(detokenizer, BYTE_LEVEL.encode("\n1. 1\n2. 2\n"))
    assert joined(said, "content") == "\n1. 1\n2. 2\n".partition(stop)[0] and detokenizer.stopped


@pytest.mark.parametrize("thinking", [True, None])
def test_think_tags_that_are_ordinary_text_still_part_the_channels(thinking: bool | None) -> None:
    foreign = Tokenizer(_without_think_tokens(), config={"eos_token": "<|endoftext|>"})
    assert foreign.special_ids.think_close < 0
    said = "12+13 is < 26 </thin </think>it is 25"
    ids = foreign.encode(said if thinking else "<think>" + said)
    pieces = read(Detokenizer(foreign, thinking=thinking), ids)
    answer = split_reasoning(foreign, ids, thinking=thinking)
    assert joined(pieces, "reasoning") == answer.reasoning == "12+13 is < 26 </thin "
    assert joined(pieces, "content") == answer.content == "it is 25"


def _without_think_tokens(*more: str) -> str:
    """A tokenizer.json of bytes whose only control tokens are its end and ``more``."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", *more])
    text: str = made.to_str()
    return text


BYTE_LEVEL = Tokenizer(_without_think_tokens(), config={"eos_token": "<|endoftext|>"})
THINKS = Tokenizer(_without_think_tokens("<think>", "</think>"), config={"eos_token": "<|endoftext|>"})
LLAMA_LIKE = Tokenizer(byte_fallback(), config={"eos_token": "</s>"})


def sentence_piece(ids: list[int]) -> str:
    """What SentencePiece reads: the bytes of all tokens, strung together, without the space before the first word."""
    names = {index: name for name, index in json.loads(byte_fallback())["model"]["vocab"].items()}
    shown = [names[index] for index in ids if index > 2]
    data = [bytes([int(n[3:5], 16)]) if n.startswith("<0x") else n.replace("▁", " ").encode() for n in shown]
    return b"".join(data).decode("utf-8", "replace").removeprefix(" ")


BYTES = st.sampled_from(["四", "é", "👩‍🚀", "▁", "\n"]).map(lambda char: [3 + byte for byte in char.encode()])
IDS = st.one_of(BYTES, st.lists(st.integers(0, LLAMA_LIKE.vocab_size - 1).filter(lambda i: i != 2), max_size=3))


@settings(max_examples=60, deadline=None)
@given(st.lists(IDS, max_size=60).map(lambda rows: [i for row in rows for i in row]))
def test_a_byte_fallback_vocabulary_streams_what_sentencepiece_reads(ids: list[int]) -> None:
    expected = sentence_piece(ids)
    assert LLAMA_LIKE.decode(ids, skip_special_tokens=True) == expected
    decoder = IncrementalDecoder(LLAMA_LIKE)
    assert "".join(decoder.push(index) for index in ids) + decoder.flush() == expected


@pytest.mark.parametrize("stops", [(), ("zz",)])
def test_a_long_answer_of_byte_tokens_stays_whole(stops: tuple[str, ...]) -> None:
    ids = [3 + byte for byte in ("四" * 90).encode()]
    pieces = read(Detokenizer(LLAMA_LIKE, thinking=False, stops=stops), ids)
    assert [piece.text for piece in pieces] == ["四"] * 90


def test_a_stray_byte_takes_no_character_with_it() -> None:
    ids = [3 + byte for byte in "四".encode() + b"\xff" + "五".encode()]
    assert LLAMA_LIKE.decode(ids) == "四\ufffd五"


def test_what_a_model_says_in_its_own_markup_is_seen_and_its_end_is_not() -> None:
    told = {"content": "<tool_call>", "special": False}, {"content": "<|end|>", "special": False}
    named = GenerationConfig(
        eos_token_ids=(Tokenizer(byte_fallback(*told), config={"eos_token": "</s>"}).vocab_size - 1,)
    )
    tokenizer = Tokenizer(byte_fallback(*told), config={"eos_token": "</s>"}, generation_config=named)
    tool, end = tokenizer.encode("<tool_call><|end|>", parse_special=True)
    ids = [tool, *tokenizer.encode("cat"), end]
    assert tokenizer.control_ids.isdisjoint(tokenizer.encode("<tool_call><|end|>"))
    assert joined(read(Detokenizer(tokenizer, thinking=False), ids), "content") == "<tool_call> cat"
    assert split_reasoning(tokenizer, ids, thinking=False).content == "<tool_call> cat"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call> cat"


_PLACE = {token_bytes: index for index in range(256) if len(token_bytes := BYTE_LEVEL.token_bytes(index)) == 1}
VOCABULARIES = {
    "byte fallback": (LLAMA_LIKE, [3 + byte for byte in range(256)]),
    "byte level": (BYTE_LEVEL, [_PLACE[bytes([byte])] for byte in range(256)]),
}
RAW = st.one_of(
    st.integers(0, 255).map(lambda byte: bytes([byte])),
    st.sampled_from(["四", "é", "😀", "\ufffd", "a"]).map(str.encode),
    st.sampled_from([b"\xf0\x9f", b"\xe4\xba", b"\x80" * 5, b"\xff", b"\xed\xa0\x80", b"\xe0\x80", b"\xf4\x90"]),
)


@pytest.mark.parametrize("name", VOCABULARIES)
@settings(max_examples=150, deadline=None)
@given(data=st.lists(RAW, max_size=120).map(b"".join))
def test_any_bytes_stream_as_utf8_reads_them(name: str, data: bytes) -> None:
    tokenizer, place = VOCABULARIES[name]
    decoder = IncrementalDecoder(tokenizer)
    said = "".join(decoder.push(place[byte]) for byte in data) + decoder.flush()
    text = data.decode("utf-8", "replace")
    assert said == (text.removeprefix(" ") if name == "byte fallback" else text)  # SentencePiece's first space


@pytest.mark.parametrize("name", VOCABULARIES)
def test_tokens_that_are_not_shown_part_no_character(name: str) -> None:
    tokenizer, place = VOCABULARIES[name]
    ids = [index for byte in "a四😀".encode() for index in [place[byte], *[tokenizer.special_ids.eos] * 20]]
    decoder = IncrementalDecoder(tokenizer)
    assert "".join(decoder.push(index) for index in ids) + decoder.flush() == "a四😀"


@pytest.mark.parametrize("name", VOCABULARIES)
@pytest.mark.parametrize("what", ["hidden", "no token", "stray", "cut", "replaced", "text"])
def test_streaming_costs_the_same_for_every_token(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, place = VOCABULARIES[name]
    text = {"stray": b"\xff", "cut": b"\xe4\xba", "replaced": "\ufffd".encode(), "text": b"a"}.get(what, b"")
    hidden, foreign = tokenizer.special_ids.eos, tokenizer.vocab_size + 5
    ids = [place[byte] for byte in text] or [hidden if what == "hidden" else foreign]
    ids = ids * (3000 // len(ids))
    decode, handed = Tokenizer.decode, []

    def counted(self: Tokenizer, row: list[int], *, skip_special_tokens: bool = False) -> str:
        handed.append(len(row))
        return decode(self, row, skip_special_tokens=skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(index) for index in ids] + [decoder.flush()]
    assert "".join(pieces) == (text * (3000 // max(1, len(text)))).decode("utf-8", "replace")
    assert sum(handed) <= 20 * len(ids)
    if text:  # and it is said as it comes, not at the end
        assert sum(map(bool, pieces)) >= 3000 // len(text) - 1


@pytest.mark.parametrize("said", ["<think>12</think>3", "\n<thin 3", "3"])
def test_blanks_before_the_first_word_are_held_and_not_lost(said: str) -> None:
    ids = BYTE_LEVEL.encode(" \n" * 40 + said)
    detokenizer = Detokenizer(BYTE_LEVEL, thinking=None)
    pieces = read(detokenizer, ids)
    thought = said.startswith("<think>")
    assert joined(pieces, "content") == ("3" if thought else " \n" * 40 + said)
    assert joined(pieces, "reasoning") == ("12" if thought else "")
