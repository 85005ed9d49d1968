"""From conversations to the rows of supervised training, with everything that is left out counted by its reason.

What is supervised is checked and not trusted, because a wrong mask trains without a word: a model that never learned
its end token talks on for ever, a second begin token is text it will never see again, and a conversation without a
learned token only costs time (each was a published bug of a fine-tuning tool). ``audit`` looks at the very rows that
are trained, and refuses them.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from sprat.config.finetune import FinetuneConfig
from sprat.data import pack
from sprat.data.example import Example, PreferencePair, Text
from sprat.data.folder import ExclusionTally
from sprat.errors import DataError
from sprat.tokens import Message, Tokenizer, chat

log = logging.getLogger(__name__)
MaskedIds = tuple[list[int], list[int]]  # ids, and 1 for those that are learned
MaskedPair = tuple[MaskedIds, MaskedIds]  # the chosen answer and the rejected one, each after its prompt
CHOSEN, REJECTED = 1, 2  # segment numbers of a pair's row


@dataclass(frozen=True)
class EncodedExamples:
    """Examples as rows.

    Attributes:
        sequences: ids and masks; of a preference pair the chosen answer's, then the rejected one's.
        rows: the same, packed.
        counts: how many examples were ``shown``, were ``too_long``, or were ``unfit``: of what the model's chat format
            has no place for; and of what is shown the ``tokens`` and those ``learned``.
    """

    sequences: list[MaskedIds]
    rows: pack.PackedDataset
    counts: dict[str, int]


def encode_examples(tokenizer: Tokenizer, examples: Sequence[Example], config: FinetuneConfig) -> EncodedExamples:
    """``examples`` in rows of ``config.seq_len`` inputs, audited.

    Raises:
        DataError: the model's chat template cannot be followed (but with ``template="accept"``), its format has no
            place for an example (with ``on_bad="refuse"``, or for any), none is as short as a row, or see ``audit``.
    """
    mismatch = tokenizer.chat_format.mismatch
    if mismatch and config.examples.template == "refuse" and any(not isinstance(each, Text) for each in examples):
        what = f"the model's chat template cannot be followed, and it would learn another format: {mismatch}"
        todo = "train plain texts, or set examples.template=accept and ask the model through Sprat alone"
        raise DataError(what, where="chat template", todo=todo)
    counts = Counter[str](shown=0, too_long=0, unfit=0)
    sequences, pairs, shortest, fault = list[MaskedIds](), list[MaskedPair](), 0, ""
    how, seq_len, tally = config.examples.too_long, config.seq_len, ExclusionTally()
    for example in examples:
        try:
            encoded = encode_example(tokenizer, example, keep_reasoning=config.examples.reasoning == "keep")
        except DataError as error:
            if config.examples.on_bad == "refuse":
                raise DataError(error.what, where=str(example.where), todo=error.todo) from None
            fault = fault or f"{error.what} ({example.where})"
            counts["unfit"] += 1
            continue
        is_pair = isinstance(example, PreferencePair)
        longest = _longest(encoded, is_pair)
        shortest = min(shortest or longest, longest)
        if longest > seq_len + 1:
            counts["too_long"] += 1
            treatment = "left out" if is_pair or how == "drop" else how
            tally.add(f"longer than a row of {seq_len + 1} tokens, {treatment}", example.where.short)
        if encoded := _fit_rows(encoded, is_pair, config):
            counts["shown"] += 1
            sequences += encoded
            pairs += [(encoded[0], encoded[1])] if is_pair else []
    if not sequences:
        if not shortest:
            raise DataError(f"no example has a place in the model's chat format: {fault}", where="data")
        what = f"the shortest of {len(examples)} examples has {shortest} tokens, a row holds {seq_len + 1}"
        raise DataError(what, where="seq_len", todo="raise seq_len, or set examples.too_long=cut")
    if fault:
        log.warning("%s examples have no place in the model's chat format, the first: %s", counts["unfit"], fault)
    for each in tally.excluded():
        log.warning("of %s examples %s", len(examples), each)
    audit(tokenizer, sequences, whole=how == "drop" or bool(pairs))
    counts["tokens"] = sum(len(ids) for ids, _ in sequences)
    counts["learned"] = sum(sum(mask) for _, mask in sequences)
    rows = pack_pairs(pairs, seq_len) if pairs else pack.pack(sequences, seq_len)
    return EncodedExamples(sequences, rows, dict(counts))


def has_rows(tokenizer: Tokenizer, example: Example, config: FinetuneConfig) -> bool:
    """Whether ``encode_examples`` would show anything of ``example``."""
    try:
        encoded = encode_example(tokenizer, example, keep_reasoning=config.examples.reasoning == "keep")
    except DataError:
        return False
    return bool(_fit_rows(encoded, isinstance(example, PreferencePair), config))


def encode_example(tokenizer: Tokenizer, example: Example, *, keep_reasoning: bool) -> list[MaskedIds]:
    """The sequences of an example; of a pair, that of each answer.

    Raises:
        DataError: the model's chat format has no place for it.
    """
    if isinstance(example, Text):
        ids = text_ids(tokenizer, example.text)
        return [(ids, [1] * len(ids))]

    def turns(messages: Sequence[Message]) -> list[Message]:
        return [message if keep_reasoning else replace(message, reasoning=None) for message in messages]

    if isinstance(example, PreferencePair):
        prompt = [replace(message, weight=0.0) for message in turns(example.prompt)]
        return [
            chat.encode_conversation(tokenizer, [*prompt, *turns(answer)], example.tools)[-1]
            for answer in (example.chosen, example.rejected)
        ]
    return chat.encode_conversation(tokenizer, turns(example.messages), example.tools)


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """A whole text as it is learned: after the token that begins texts, where there is one, and with an end."""
    special = tokenizer.special_ids
    return [*([special.bos] if special.bos >= 0 else []), *tokenizer.encode(text), special.eos]


def pack_pairs(pairs: Sequence[MaskedPair], seq_len: int) -> pack.PackedDataset:
    """One row of ``seq_len`` inputs for each pair, which must fit: the chosen answer is segment 1, the other one 2.

    Raises:
        DataError: there is none, or one is longer than a row.
    """
    shape = (len(pairs), seq_len + 1)
    packed = pack.PackedDataset(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.uint8))
    if not pairs:
        raise DataError("no pairs", where="dpo", todo="give at least one prompt with two answers")
    for row, pair in enumerate(pairs):
        if (length := sum(len(ids) for ids, _ in pair)) > seq_len + 1:
            what = f"a pair of {length} tokens is longer than a row of {seq_len + 1}"
            raise DataError(what, where=f"pair {row + 1}", todo="raise seq_len, or leave it out")
        start = 0
        for segment, (ids, mask) in zip((CHOSEN, REJECTED), pair, strict=True):
            place = slice(start, start := start + len(ids))
            packed.tokens[row, place], packed.segments[row, place] = ids, segment
            packed.loss_mask[row, place] = mask
    return packed


def _longest(encoded: Sequence[MaskedIds], is_pair: bool) -> int:
    """Tokens of an example's longest sequence; of a pair, which shares a row, of both."""
    lengths = [len(ids) for ids, _ in encoded]
    return sum(lengths) if is_pair else max(lengths)


def _fit_rows(encoded: list[MaskedIds], is_pair: bool, config: FinetuneConfig) -> list[MaskedIds]:
    """The sequences of an example as what of them is shown in rows of ``config.seq_len`` inputs."""
    if is_pair:
        return encoded if _longest(encoded, is_pair) <= config.seq_len + 1 else []
    return [piece for each in encoded for piece in fit_rows(each, config.seq_len, config.examples.too_long)]


def fit_rows(sequence: MaskedIds, seq_len: int, how: Literal["drop", "cut", "split"]) -> list[MaskedIds]:
    """A sequence as those pieces that fit a row of ``seq_len`` inputs and have something to learn."""
    ids, mask = sequence
    if len(ids) <= seq_len + 1:
        return [sequence]
    starts = {"drop": range(0), "cut": range(1), "split": range(0, len(ids) - 1, seq_len)}[how]
    pieces = [(ids[start : start + seq_len + 1], mask[start : start + seq_len + 1]) for start in starts]
    return [(piece, learned) for piece, learned in pieces if any(learned[1:])]


def audit(tokenizer: Tokenizer, sequences: Sequence[MaskedIds], *, whole: bool) -> None:
    """Refuse sequences that would teach what the model must not learn.

    Args:
        whole: whether every answer is there up to its end.

    Raises:
        DataError: nothing is learned of a sequence, an answer does not end with a token that ends an answer, or holds
            one within; or a sequence has a begin token that is not its first.
    """
    bos = tokenizer.special_ids.bos
    for number, (ids, mask) in enumerate(sequences):
        where = f"sequence {number + 1} of {len(sequences)}"
        if len(ids) != len(mask) or not any(mask):
            raise DataError("nothing is learned of an example", where=where, todo="give it an answer with a weight")
        if bos >= 0 and bos not in tokenizer.eos_token_ids and bos in ids[1:]:
            todo = "take the begin token out of the texts or of the chat template"
            raise DataError("the begin token stands inside an example", where=where, todo=todo)
        spans = [[token for token, _ in span] for learned, span in _spans(ids, mask) if learned]
        broken = [span for span in spans if span[-1] not in tokenizer.eos_token_ids]
        if whole and broken:
            what = f"an answer ends with {tokenizer.decode(broken[0][-8:])!r}, which does not end an answer"
            raise DataError(what, where=where, todo="report this: its chat format is not understood")


def _spans(ids: Sequence[int], mask: Sequence[int]) -> list[tuple[int, list[tuple[int, int]]]]:
    """Runs of tokens that are learned, or are not."""
    pairs = zip(ids, mask, strict=True)
    return [(learned, list(span)) for learned, span in itertools.groupby(pairs, key=lambda pair: pair[1])]


def preview(tokenizer: Tokenizer, sequence: MaskedIds) -> list[tuple[str, bool]]:
    """The text of a sequence in runs, each with whether it is learned; control tokens are shown."""
    return [(tokenizer.decode([token for token, _ in span]), bool(learned)) for learned, span in _spans(*sequence)]
