"""Where a grammar allows one text alone, it is written in the tokens that a model knows it by, not letter by letter."""

from __future__ import annotations

import json

from sprat.engine.sampling.grammar_worker import ALLOWED, build_matcher, build_tokenizer

WORDS = [b"name", b"na", b'":', b' "', b"Paris", b"Oslo", b'"}', b'{"']
TOKENS = [bytes([byte]) for byte in range(32, 127)] + [b"\n", *WORDS, b""]
SCHEMA = {
    "type": "object", "properties": {"name": {"enum": ["Paris", "Oslo"]}}, "required": ["name"],
    "additionalProperties": False,
}  # fmt: skip


def test_the_keys_of_a_schema_are_whole_words() -> None:
    matcher = build_matcher(build_tokenizer(TOKENS, [len(TOKENS) - 1]), "schema", json.dumps(SCHEMA))
    matcher.consume_tokens([TOKENS.index(b'{"')])
    mask = matcher.compute_logit_bias()
    assert [token for token, allowed in zip(TOKENS, mask, strict=True) if allowed == ALLOWED[0]] == [b"name"]


def test_a_text_without_tokens_of_its_own_is_spelled_and_a_byte_that_no_token_has_is_left_out() -> None:
    tokenizer = build_tokenizer(TOKENS, [len(TOKENS) - 1])
    ids = tokenizer.tokenize_str('nab name": Oslo')
    assert [TOKENS[index] for index in ids] == [b"na", b"b", b" ", b"name", b'":', b" ", b"Oslo"]
