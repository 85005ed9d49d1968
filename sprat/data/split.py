"""What is held out: whole sources, so that no held-out document shares its source with training.

The rule looks only at a document's source and not at the corpus around it: a larger budget or one file
more moves nothing from one side to the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from sprat.data.document import Document
from sprat.errors import DataError

ONE_IN = 16  # sources held out by hash
BOOKS = "janeaustenr/"
HELD_OUT_BOOK = "janeaustenr/persuasion"
END = 0.05  # of the text, where there is only one source


@dataclass(frozen=True)
class Split:
    """Documents to learn from and documents to be tested on."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    def both(self, where: object) -> Split:
        """The split itself, both sides of which hold something.

        Raises:
            DataError: one of them does not.
        """
        if not self.train or not self.held_out:
            raise DataError("too little text to hold some out", where=str(where), todo="give more files")
        return self


def held_out(document: Document) -> bool:
    """Whether ``document`` is kept from training; its source alone decides."""
    return source_held_out(document.source)


def source_held_out(source: str) -> bool:
    """Whether a source is kept from training: of the novels one whole book, else one source in 16 by hash."""
    if source.startswith(BOOKS):
        return source == HELD_OUT_BOOK
    return _rank(source) % ONE_IN == 0


def split(documents: Sequence[Document]) -> Split:
    """Part ``documents`` by ``held_out``.

    Where that leaves one side empty (a few files of the user's), the source of the lowest hash is held
    out; where there is but one source, the end of its text.
    """
    train = tuple(document for document in documents if not held_out(document))
    test = tuple(document for document in documents if held_out(document))
    sources = sorted({document.source for document in documents}, key=_rank)
    if (train and test) or not documents:
        return Split(train, test)
    if len(sources) > 1:
        train = tuple(document for document in documents if document.source != sources[0])
        return Split(train, tuple(document for document in documents if document.source == sources[0]))
    return _by_place(documents)


def _by_place(documents: Sequence[Document]) -> Split:
    """Hold out the last documents of the only source, or the last part of its only document."""
    if len(documents) > 1:
        cut = min(len(documents) - 1, round(len(documents) * (1 - END)))
        return Split(tuple(documents[:cut]), tuple(documents[cut:]))
    text = documents[0].text
    cut = round(len(text) * (1 - END))
    for mark in ("\n\n", "\n", " "):
        found = text.find(mark, cut)
        if 0 <= found < len(text) - len(mark):
            cut = found + len(mark)
            break
    end = Document(f"{documents[0].id}#end", text[cut:], documents[0].source, documents[0].licence, documents[0].domain)
    return Split((documents[0].with_text(text[:cut]),), (end,))


def _rank(source: str) -> int:
    """A number that only the name of the source decides."""
    return int.from_bytes(hashlib.sha256(source.encode("utf-8", "replace")).digest()[:8], "big")
