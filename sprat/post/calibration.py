"""What a model is shown while it is rounded: text, conversations, or both, as rows of tokens.

Text alone is not what a model that answers questions sees: the markers of its chat format, its system turn and the
first token of an answer come in no text. So a file of conversations, in any form that ``sprat sft`` takes, is shown as
the model was trained on it, each turn in the model's own chat format. Where a folder has texts and conversations, each
gets half of the tokens.

Of texts, excerpts of many documents are heard; where the documents are few, they go on until there are enough tokens.
"""

# R rows, W tokens of a row

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sprat.data import ingest
from sprat.data.conversations import read_examples
from sprat.data.document import Document
from sprat.data.example import Example, PreferencePair
from sprat.data.folder import ExclusionTally, warn_of_excluded
from sprat.data.forms import choose_form
from sprat.data.pack import PackedDataset, pack
from sprat.data.record import Record
from sprat.data.records import RECORD_SUFFIXES, read_file, record_kind
from sprat.errors import DataError
from sprat.post.examples import MaskedIds, encode_example, fit_rows
from sprat.tokens import Tokenizer

CALIBRATION_TOKENS = 16_384  # two to three minutes of one core for 135 million weights
_MIN_ROW = 2  # tokens: one is seen, and one is said
EXCERPT_CHARS = 2000  # characters of one document, so that many are heard


@dataclass(frozen=True)
class CalibrationData:
    """What there is to calibrate on: conversations (or preference pairs), and texts."""

    path: Path
    examples: tuple[Example, ...]
    documents: tuple[Document, ...]


def read_calibration(path: Path) -> CalibrationData:
    """The texts and the conversations at ``path``; what is left out of them is said.

    Args:
        path: a file or folder as ``read_texts`` takes it, whose files of rows may also be conversations or preference
            pairs (of which the chosen answer counts), in any form and kind of file that ``read_examples`` takes.

    Raises:
        DataError: see ``read_texts`` and ``read_examples``.
    """
    tally, examples = ExclusionTally(), list[Example]()
    files = ingest.find_text_files(path, tally, also=_has_conversations)
    conversations = [file for file in files if _has_conversations(file)]
    for file in conversations:
        found = read_examples(file)
        warn_of_excluded(found.skipped, file)
        examples += found.examples
    texts = [file for file in files if file not in conversations]
    documents = tuple(ingest.read_text_files(path, texts, tally, may_be_blank=bool(examples)))
    warn_of_excluded(tally.excluded(), path)
    return CalibrationData(path, tuple(examples), documents)


def _has_conversations(file: Path) -> bool:
    """Whether the first good row of ``file`` has no text, and the columns of a conversation."""
    if record_kind(file) not in RECORD_SUFFIXES:
        return False
    try:
        first = next((row for row in read_file(file, str(file)) if isinstance(row, Record)), None)
        if first is None or "text" in first.values:
            return False
        choose_form(first.values, {}, first.where)
    except DataError:  # also of a file that cannot be read on, of which its own reader says more
        return False
    return True


def calibration_rows(
    data: CalibrationData, tokenizer: Tokenizer, window: int, num_tokens: int, tally: ExclusionTally
) -> list[PackedDataset]:
    """Rows of ``window`` tokens of the conversations, and rows of the texts; what there is of both.

    Args:
        num_tokens: of all rows; fewer where there are not as many.
        tally: is told of conversations that the model's chat format has no place for, which are left out.

    Raises:
        DataError: there is not one row of tokens, or see ``conversation_rows``.
    """
    kinds = bool(data.examples) + bool(data.documents)
    share = num_tokens // kinds
    if share < _MIN_ROW:
        todo = f"give at least {_MIN_ROW * kinds}, better {CALIBRATION_TOKENS}"
        raise DataError(f"{num_tokens} tokens are too few to calibrate on", where="calibration_tokens", todo=todo)
    window = min(window, share)
    rows = [conversation_rows(data.examples, tokenizer, window, share, tally)] if data.examples else []
    return [*rows, text_rows(data.documents, tokenizer, window, share)] if data.documents else rows


def conversation_rows(
    examples: Sequence[Example], tokenizer: Tokenizer, window: int, num_tokens: int, tally: ExclusionTally
) -> PackedDataset:
    """Rows of ``window`` tokens of conversations drawn from ``examples``, their answers marked as learned.

    Of a conversation longer than a row the pieces that hold something of an answer are shown; all together have not
    much more than ``num_tokens`` tokens.

    Args:
        tally: is told of those that the model's chat format has no place for.

    Raises:
        DataError: there are not as many tokens as a row has, no conversation has a place in the model's chat format, or
            its chat template cannot be followed.
    """
    if mismatch := tokenizer.chat_format.mismatch:
        what = f"the model's chat template cannot be followed, and it would be shown another format: {mismatch}"
        raise DataError(what, where="--calibrate", todo="calibrate on text")
    chosen = list(examples)
    random.Random(0).shuffle(chosen)
    sequences, count = list[MaskedIds](), 0
    fault: DataError | None = None
    for example in chosen:
        if count >= num_tokens:
            break
        try:
            encoded = encode_example(tokenizer, example, keep_reasoning=True)
        except DataError as error:
            what = f"no conversation has a place in the model's chat format: {error.what}"
            fault = fault or DataError(what, where=str(example.where), todo=error.todo)
            tally.add("conversations that the model's chat format has no place for", example.where.short)
            continue
        for sequence in encoded[:1] if isinstance(example, PreferencePair) else encoded:
            for piece in fit_rows(sequence, window - 1, "split"):
                if count < num_tokens:
                    sequences.append(piece)
                    count += len(piece[0])
    if fault is not None and not sequences:
        raise fault
    _check_enough(count, window)
    return pack(sequences, window - 1)


def text_rows(
    documents: Iterable[Document], tokenizer: Tokenizer, window: int, num_tokens: int = CALIBRATION_TOKENS
) -> PackedDataset:
    """Rows of ``window`` tokens of excerpts of many documents, each with a segment of its own.

    Where the model's texts begin with a token of their own, each segment of a row does: nothing that the model is asked
    comes without it, and to a model the first token of a sequence is unlike all others.

    Raises:
        DataError: there is not one row of text.
    """
    ids: list[int] = []
    segment_ids: list[int] = []
    begin = [tokenizer.special_ids.bos] if tokenizer.special_ids.bos >= 0 and window > 1 else []
    for number, excerpt in enumerate(_excerpts(list(documents)), 1):
        rest = tokenizer.encode(excerpt)
        while rest:  # a row at a time: what goes on in the next one is a segment there
            piece = [*begin, *rest][: window - len(ids) % window]
            rest = rest[len(piece) - len(begin) :]
            ids += piece
            segment_ids += [number] * len(piece)
        if len(ids) >= num_tokens:
            break
    _check_enough(len(ids), window)
    rows = min(len(ids), num_tokens) // window
    tokens, segments = (
        np.array(values[: rows * window], np.int32).reshape(rows, window) for values in (ids, segment_ids)
    )
    return PackedDataset(tokens, segments, np.ones_like(tokens, np.uint8))


def _excerpts(documents: list[Document]) -> Iterator[str]:
    """The beginning of each document, in random order; then what follows it of each that goes on; and so on."""
    random.Random(0).shuffle(documents)
    for start in itertools.count(0, EXCERPT_CHARS):
        documents = [document for document in documents if len(document.text) > start]
        if not documents:
            return
        for document in documents:
            yield document.text[start : start + EXCERPT_CHARS]


def _check_enough(count: int, window: int) -> None:
    """Refuse what is shorter than a row.

    Raises:
        DataError: it is.
    """
    if count < window:
        what = f"{count} tokens of text are too few to calibrate on"
        raise DataError(what, where="--calibrate", todo=f"give at least {window}, better {CALIBRATION_TOKENS}")


def join_rows(parts: Sequence[PackedDataset]) -> tuple[Tensor, Tensor]:
    """All rows [R, W] of ``parts``, tokens (long) and segments."""
    tokens, segments = (
        torch.from_numpy(np.concatenate(arrays)).long()
        for arrays in zip(*((part.tokens, part.segments) for part in parts), strict=True)
    )
    return tokens, segments
