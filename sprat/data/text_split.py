"""What is held out: whole sources, so that no held-out document shares its source with training.

Of the default corpus the rule looks only at a document's source and not at the corpus around it: a larger budget or
one source more moves nothing from one side to the other. The user's own text may be a few files of any size, so
there the sizes count too: what is held out is at most half of the bytes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sprat.data.document import Document
from sprat.errors import DataError

HELD_OUT_ONE_IN = 16  # sources held out by hash
MAX_HELD_OUT_DOCUMENT_BYTES = 8_000  # bytes, of the default corpus; longer ones are cut, so that none decides the test
END_FRACTION = 0.05  # of the text, where there is only one source


@dataclass(frozen=True)
class TextSplit:
    """Documents to learn from and documents to be tested on."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

    def require_both_sides(self, where: object) -> TextSplit:
        """The split itself, both sides of which hold something.

        Raises:
            DataError: one of them does not.
        """
        if not self.train or not self.held_out:
            raise DataError("too little text to hold some out", where=str(where), todo="give more files")
        return self


def is_held_out_source(source: str) -> bool:
    """Whether a source is kept from training: one in 16 by hash."""
    return _source_hash(source) % HELD_OUT_ONE_IN == 0


def held_out_sources(documents: Sequence[Document]) -> frozenset[str]:
    """Which sources of the user's own text are kept from training: one in 16 by hash, at most half of the bytes.

    Where that is none, the source of the lowest hash that holds at most half of the bytes; where there is but one
    source, none.
    """
    sizes = Counter[str]()
    for document in documents:
        sizes[document.source] += document.size
    remaining = sizes.total() / 2
    sources, chosen = sorted(sizes, key=_source_hash), set[str]()
    for source in sources:
        if _source_hash(source) % HELD_OUT_ONE_IN == 0 and sizes[source] <= remaining:
            remaining -= sizes[source]
            chosen.add(source)
    return frozenset(chosen or [source for source in sources if sizes[source] <= remaining][:1])


def split_documents(
    documents: Sequence[Document], is_held_out: Callable[[str], bool] = is_held_out_source
) -> TextSplit:
    """Part ``documents`` by their sources; where none is held out, the end of the text is."""
    train = tuple(document for document in documents if not is_held_out(document.source))
    test = tuple(document for document in documents if is_held_out(document.source))
    return TextSplit(train, test) if test or not documents else _split_at_end(documents)


def _split_at_end(documents: Sequence[Document]) -> TextSplit:
    """Hold out the last documents, or, where the last one holds more than half of the bytes, the end of its text."""
    *starts, total = itertools.accumulate((document.size for document in documents), initial=0)
    last = len(documents) - 1
    cut = next((at for at, start in enumerate(starts) if start >= round(total * (1 - END_FRACTION))), last)
    if total - starts[cut] <= total / 2:
        return TextSplit(tuple(documents[:cut]), tuple(documents[cut:]))
    document = documents[last]
    cut = round(len(document.text) * (1 - END_FRACTION))
    for mark in ("\n\n", "\n", " "):
        position = document.text.find(mark, cut)
        if 0 <= position < len(document.text) - len(mark):
            cut = position + len(mark)
            break
    end = Document(f"{document.id}#end", document.text[cut:], document.source, document.licence, document.domain)
    return TextSplit((*documents[:last], document.with_text(document.text[:cut])), (end,))


def _source_hash(source: str) -> int:
    """A number that only the name of the source decides."""
    return int.from_bytes(hashlib.sha256(source.encode("utf-8", "replace")).digest()[:8], "big")
