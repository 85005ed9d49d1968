"""A tiny vocabulary of the kind that Llama 2 and Mistral have: SentencePiece BPE that falls back to single bytes."""

from __future__ import annotations

import json
from typing import Any

WORDS = ["▁", "▁a", "▁cat", "cat", "at", "▁s", "[", "]", "▁[", "IN", "INST", "/", "▁é", "é", "<", ">", "|", "▁b"]


def byte_fallback(*extra: dict[str, Any], first: bool = False) -> str:
    """The text of its tokenizer.json.

    Args:
        extra: further rows of added_tokens, at least ``content`` and ``special``.
        first: a space goes before the text only where it begins (Metaspace), not before each piece (Prepend).
    """
    letters = [chr(code) for code in range(0x21, 0x7F)]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [word for word in dict.fromkeys([*WORDS, *letters]) if word not in names]
    vocabulary = {name: index for index, name in enumerate(names)}
    for row in extra:
        vocabulary.setdefault(row["content"], len(vocabulary))
    merges = [
        (word[:cut], word[cut:])
        for word in WORDS
        for cut in range(1, len(word))
        if word[:cut] in vocabulary and word[cut:] in vocabulary
    ]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = [{"content": name, "special": True} for name in names[:3]]
    added = [{**flags, "id": vocabulary[row["content"]], **row} for row in [*special, *extra]]
    swap = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    before = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, swap]}
    scheme = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    table = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None if first else before,
        "pre_tokenizer": scheme if first else None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, strip]},
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": merges,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }
    return json.dumps(table, ensure_ascii=False)
