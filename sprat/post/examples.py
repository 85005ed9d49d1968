"""From conversations to the rows of supervised training, with everything that is left out counted by its reason.

What is supervised is checked and not trusted, because a wrong mask trains without a word: a model that never learned
its end token talks on for ever, a second begin token is text it will never see again, and a conversation without a
learned token only costs time (each was a published bug of a fine-tuning tool). ``audit`` looks at the very rows that
are trained, and refuses them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sprat.config.finetune import ExamplesConfig
from sprat.data import pack
from sprat.errors import DataError
from sprat.tokens import Message, Tokenizer, chat

MaskedIds = tuple[list[int], list[int]]


@dataclass(frozen=True)
class EncodedExamples:
    """Sequences of ids with their masks, each as short as a row.

    Attributes:
        counts: how many conversations were ``shown``, and were ``too_long`` or cut or split for a row; how many
            ``sequences`` they became, of how many ``tokens``, of which so many ``learned``.
    """

    sequences: list[MaskedIds]
    counts: dict[str, int]

    def pack(self, seq_len: int) -> pack.PackedDataset:
        """The sequences in rows of ``seq_len`` inputs."""
        return pack.pack(self.sequences, seq_len)


def encode_examples(
    tokenizer: Tokenizer, conversations: Sequence[Sequence[Message]], config: ExamplesConfig, seq_len: int
) -> EncodedExamples:
    """``conversations`` for rows of ``seq_len`` inputs, audited.

    Raises:
        DataError: a conversation has no place in the model's chat format (says which), none is as short as a row, or
            see ``audit``.
    """
    counts, sequences, shortest = Counter[str](), list[MaskedIds](), 0
    for number, messages in enumerate(conversations):
        if config.reasoning == "drop":
            messages = [replace(message, reasoning=None) for message in messages]
        try:
            encoded = chat.encode_conversation(tokenizer, messages)
        except DataError as error:
            raise DataError(error.what, where=f"conversation {number + 1}", todo=error.todo) from None
        longest = max(len(ids) for ids, _ in encoded)
        shortest = min(shortest or longest, longest)
        if longest > seq_len + 1:
            counts["too_long"] += 1
            encoded = [piece for sequence in encoded for piece in _fit(sequence, seq_len, config.too_long)]
        counts["shown"] += bool(encoded)
        sequences += encoded
    if not sequences:
        what = f"the shortest of {len(conversations)} conversations has {shortest} tokens, a row holds {seq_len + 1}"
        raise DataError(what, where="seq_len", todo="raise seq_len, or set examples.too_long=cut")
    audit(tokenizer, sequences, whole=not counts["too_long"] or config.too_long == "drop")
    counts["sequences"] = len(sequences)
    counts["tokens"] = sum(len(ids) for ids, _ in sequences)
    counts["learned"] = sum(sum(mask) for _, mask in sequences)
    return EncodedExamples(sequences, {"too_long": 0, **counts})


def _fit(sequence: MaskedIds, seq_len: int, how: str) -> list[MaskedIds]:
    """A sequence as those pieces that fit a row and have something to learn."""
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
