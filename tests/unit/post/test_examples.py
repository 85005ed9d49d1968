"""What is supervised is what was meant, and what is left out is counted."""

from __future__ import annotations

import json

import pytest

from sprat.config.finetune import FinetuneConfig
from sprat.data.example import Conversation, Text
from sprat.data.record import Where
from sprat.errors import DataError
from sprat.post.examples import audit, encode_examples, preview
from sprat.tokens import Message, Tokenizer

CONFIG = FinetuneConfig(seq_len=32)


def config(seq_len: int, **examples: str) -> FinetuneConfig:
    return FinetuneConfig.model_validate({"seq_len": seq_len, "examples": examples})


def talk(*messages: Message, line: int = 1) -> Conversation:
    return Conversation(messages, Where("talk.jsonl", line))


SHORT = talk(Message("user", "1 2"), Message("assistant", "3"))
LONG = talk(Message("user", "1 2"), Message("assistant", "7" * 40), Message("user", "3"), Message("assistant", "7"))
PROMPT, ANSWER = ["<|bos|>", "<|user|>", "1", " ", "2", "<|assistant|>"], ["<think>", "</think>", "3", "<|eos|>"]


def test_short_examples_are_shown_whole(tokenizer: Tokenizer) -> None:
    encoded = encode_examples(tokenizer, [SHORT, SHORT], CONFIG)
    [first, second] = encoded.sequences
    assert first == second and tokenizer.decode(first[0]) == "<|bos|><|user|>1 2<|assistant|><think></think>3<|eos|>"
    tokens, learned = 2 * len(PROMPT + ANSWER), 2 * len(ANSWER)
    assert encoded.counts == {"shown": 2, "too_long": 0, "unfit": 0, "tokens": tokens, "learned": learned}
    assert encoded.rows.num_targets == learned


@pytest.mark.parametrize(("how", "shown", "sequences"), [("drop", 1, 1), ("cut", 2, 2), ("split", 2, 4)])
def test_what_is_longer_than_a_row_is_dropped_cut_or_split_as_asked(
    tokenizer: Tokenizer, how: str, shown: int, sequences: int
) -> None:
    encoded = encode_examples(tokenizer, [SHORT, LONG], config(20, too_long=how))
    assert (encoded.counts["shown"], encoded.counts["too_long"]) == (shown, 1)
    assert len(encoded.sequences) == sequences and all(len(ids) <= 21 for ids, _ in encoded.sequences)
    if how == "split":  # neighbours share a token: each token but the first is learned or context exactly once
        whole, _ = encode_examples(tokenizer, [LONG], CONFIG.replace(seq_len=100)).sequences[0]
        pieces = [ids for ids, _ in encoded.sequences[1:]]
        assert [*pieces[0], *(token for ids in pieces[1:] for token in ids[1:])] == whole


def test_an_example_of_which_nothing_fits_is_refused_with_its_length(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="the shortest of 2 examples has 56 tokens, a row holds 17"):
        encode_examples(tokenizer, [LONG, LONG], CONFIG.replace(seq_len=16))


def test_a_conversation_that_has_no_place_in_the_format_is_counted_or_refused_by_its_line(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    bad = talk(Message("user", "1"), Message("system", "2"), Message("assistant", "3"), line=7)
    encoded = encode_examples(tokenizer, [SHORT, bad, bad], CONFIG)
    assert (encoded.counts["shown"], encoded.counts["unfit"]) == (1, 2)
    assert "2 examples have no place" in caplog.text and "not the first (talk.jsonl, line 7)" in caplog.text
    with pytest.raises(DataError, match=r"not the first \(talk.jsonl, line 7\)"):
        encode_examples(tokenizer, [SHORT, bad], config(32, on_bad="refuse"))
    with pytest.raises(DataError, match=r"no example has a place .*not the first \(talk.jsonl, line 7\)"):
        encode_examples(tokenizer, [bad], CONFIG)


@pytest.mark.parametrize("keep", [True, False])
def test_reasoning_is_shown_or_left_out_as_asked(tokenizer: Tokenizer, keep: bool) -> None:
    thought = talk(Message("user", "1"), Message("assistant", "3", reasoning="2"))
    [(ids, _)] = encode_examples(tokenizer, [thought], config(32, reasoning="keep" if keep else "drop")).sequences
    assert tokenizer.decode(ids).endswith("<think>2</think>3<|eos|>" if keep else "<think></think>3<|eos|>")


def test_the_audit_refuses_what_would_teach_a_fault(tokenizer: Tokenizer) -> None:
    [(ids, mask)] = encode_examples(tokenizer, [SHORT], CONFIG).sequences
    audit(tokenizer, [(ids, mask)], whole=True)
    for broken, what in [
        ((ids, [0] * len(ids)), "nothing is learned"),
        ((ids[:-1], mask[:-1]), "which does not end an answer"),
        ((ids, [*mask[:-1], 0]), "which does not end an answer"),
        (([ids[0], *ids], [0, *mask]), "the begin token stands inside"),
    ]:
        with pytest.raises(DataError, match=f"{what}.*sequence 2 of 2"):
            audit(tokenizer, [(ids, mask), broken], whole=True)
    audit(tokenizer, [(ids[:-1], mask[:-1])], whole=False)  # cut, as asked


def test_a_preview_shows_what_is_learned(tokenizer: Tokenizer) -> None:
    [sequence] = encode_examples(tokenizer, [SHORT], CONFIG).sequences
    assert preview(tokenizer, sequence) == [
        ("<|bos|><|user|>1 2<|assistant|>", False),
        ("<think></think>3<|eos|>", True),
    ]


def test_of_a_plain_text_all_is_learned(tokenizer: Tokenizer) -> None:
    [(ids, mask)] = encode_examples(tokenizer, [Text("1 2 3", Where("text.txt", 1))], CONFIG).sequences
    assert tokenizer.decode(ids) == "<|bos|>1 2 3<|eos|>" and all(mask)


def test_a_chat_template_that_cannot_be_followed_is_not_trained_past(tokenizer: Tokenizer) -> None:
    """Asked through another program, the model would see a format that it never learned."""
    table = json.loads(tokenizer.files()["tokenizer_config.json"]) | {"chat_template": "{{ messages | length }}"}
    other = Tokenizer(tokenizer.files()["tokenizer.json"], config=table)
    with pytest.raises(DataError, match="does not write each text once.*examples.template=accept"):
        encode_examples(other, [SHORT], CONFIG)
    accepted = encode_examples(other, [SHORT], config(32, template="accept"))
    assert tokenizer.decode(accepted.sequences[0][0]) == "<|bos|><|user|>1 2<|assistant|>3<|eos|>"
    assert encode_examples(other, [Text("1 2 3", Where("a.txt", 1))], CONFIG).counts["shown"] == 1
