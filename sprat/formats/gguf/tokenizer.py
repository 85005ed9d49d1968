"""The vocabulary of a GGUF file as our tokenizer: its metadata become a tokenizer.json.

Two kinds are read. ``gpt2`` is byte-level BPE: tokens, merges, and the name of the pre-tokenizer before them (see
``pretokenizers``). ``llama`` is SentencePiece BPE with byte fallback: tokens with scores; two neighbors merge
where their join is a token, the best score first, which is the order that is laid down here as merges.

Token types say what a token is for: control and unknown tokens steer the model and are never made from a user's text,
user-defined ones are cut out of the text before all else.
"""

from __future__ import annotations

import json
from typing import Any

from sprat.errors import CheckpointError, DataError
from sprat.formats.gguf.header import Header
from sprat.formats.gguf.pretokenizers import BYTE_LEVEL, IGNORE_MERGES, PRETOKENIZERS, normalizer, pre_tokenizer
from sprat.tokens import Tokenizer
from sprat.tokens.hf_files import parse_generation_config

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens
_LONG = 256  # characters of a token beyond which its splits are not tried
KEY, SAMPLING = "tokenizer.ggml.", "general.sampling."
SAMPLING_NAMES = {
    "temp": "temperature", "penalty_repeat": "repetition_penalty", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
}  # fmt: skip


def read_tokenizer(header: Header) -> Tokenizer:
    """The tokenizer of the model in ``header``.

    Raises:
        CheckpointError: the vocabulary is missing, of an unknown kind, or does not hold together.
    """
    tokens = _texts(header, "tokens")
    types = header.metadata.get(f"{KEY}token_type")
    if not isinstance(types, list) or len(types) != len(tokens):
        types = [NORMAL] * len(tokens)
    kind, vocabulary = header.metadata.get(f"{KEY}model"), dict(reversed([(t, i) for i, t in enumerate(tokens)]))
    if kind == "gpt2":
        table = _byte_level(header, vocabulary)
    elif kind == "llama":
        table = _sentence_piece(header, vocabulary, tokens, types)
    else:
        raise _fault(header, "model", f"a vocabulary of kind {str(kind)[:40]!r} is not known", "use gpt2 or llama")
    table = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(token, index, special=types[index] != USER)
            for index, token in enumerate(tokens)
            if types[index] in (UNKNOWN, CONTROL, USER) and token and vocabulary[token] == index
        ],
        "post_processor": None,
        **table,
    }
    text, where = json.dumps(table, ensure_ascii=False), str(header.path)
    try:
        generation_config = parse_generation_config(_generation(header), where)
        return Tokenizer(text, config=_config(header, tokens), generation_config=generation_config, where=where)
    except DataError as error:
        where = f"{header.path}: {KEY}tokens"
        raise CheckpointError(error.what, where=where, todo="convert the model again") from None


def _byte_level(header: Header, vocabulary: dict[str, int]) -> dict[str, Any]:
    """Normalizer, pre-tokenizer, model and decoder of byte-level BPE."""
    pre = header.metadata.get(f"{KEY}pre", "default")
    if not isinstance(pre, str) or pre not in PRETOKENIZERS:
        todo = f"it is one of {', '.join(PRETOKENIZERS)}"
        raise _fault(header, "pre", f"the cut {str(pre)[:40]!r} is not known", todo)
    merges = []
    for merge in _texts(header, "merges"):
        left, space, right = merge.partition(" ") if not merge.startswith(" ") else (" ", *merge[1:].partition(" ")[1:])
        if not (left and space and right):
            raise _fault(header, "merges", f"{merge[:40]!r} is no pair")
        merges.append([left, right])
    return {
        "normalizer": normalizer(pre),
        "pre_tokenizer": pre_tokenizer(pre),
        "decoder": {**BYTE_LEVEL, "use_regex": True},
        "model": _bpe(vocabulary, merges, whole_first=pre in IGNORE_MERGES),
    }


def _sentence_piece(header: Header, vocabulary: dict[str, int], tokens: list[str], types: list[Any]) -> dict[str, Any]:
    """Normalizer, model and decoder of SentencePiece BPE."""
    scores = header.metadata.get(f"{KEY}scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise _fault(header, "scores", f"there are not {len(tokens)} of them")
    merges: list[tuple[float, int, int, str, str]] = []
    for index, token in enumerate(tokens):
        if types[index] in (UNKNOWN, CONTROL, USER, BYTE) or len(token) > _LONG:
            continue
        for split in range(1, len(token)):
            left, right = token[:split], token[split:]
            if left in vocabulary and right in vocabulary:
                merges.append((float(scores[index]), len(left), len(right), left, right))
    merges.sort(key=lambda row: row[:3], reverse=True)
    prefix = header.metadata.get(f"{KEY}add_space_prefix", True) is not False
    spaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    plain = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    begin = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    end = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    model = _bpe(vocabulary, [[left, right] for *_, left, right in merges])
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*begin, spaced]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": [plain, {"type": "ByteFallback"}, {"type": "Fuse"}, *end]},
        "model": {**model, "unk_token": unknown, "fuse_unk": True, "byte_fallback": True},
    }


def _bpe(vocabulary: dict[str, int], merges: list[list[str]], *, whole_first: bool = False) -> dict[str, Any]:
    return {"type": "BPE", "vocab": vocabulary, "merges": merges, "ignore_merges": whole_first}


def _added(token: str, index: int, *, special: bool) -> dict[str, Any]:
    """One row of added_tokens."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": token, "special": special, **flags}


def _config(header: Header, tokens: list[str]) -> dict[str, Any]:
    """The tokenizer_config.json that goes with it."""
    table: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        index = header.metadata.get(f"{KEY}{key}_token_id")
        if type(index) is int:
            if not 0 <= index < len(tokens):
                raise _fault(header, f"{key}_token_id", f"{index} is no token of {len(tokens)}")
            table[name] = tokens[index]
    spm = header.metadata.get(f"{KEY}model") == "llama"
    table["add_bos_token"] = bool(header.metadata.get(f"{KEY}add_bos_token", spm))
    template = header.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        table["chat_template"] = template
    return table


def _generation(header: Header) -> dict[str, Any]:
    """The ``general.sampling`` keys, which converters write since 2025, under the names of generation_config.json."""
    table: dict[str, Any] = {}
    for key, value in header.metadata.items():
        if key.startswith(SAMPLING):
            name = key.removeprefix(SAMPLING)
            # a 32-bit 0.95 in the file is meant as 0.95
            table[SAMPLING_NAMES.get(name, key)] = float(f"{value:.7g}") if isinstance(value, float) else value
    return table


def _texts(header: Header, key: str) -> list[str]:
    """A list of strings of the metadata."""
    value = header.metadata.get(KEY + key)
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise _fault(header, key, "it is missing or holds no strings")
    return [str(text) for text in value]


def _fault(header: Header, key: str, why: str, todo: str = "convert the model again") -> CheckpointError:
    return CheckpointError(f"key '{KEY}{key}': {why}", where=str(header.path), todo=todo)
