"""Exact dedup: a paragraph or document that was seen before is left out.

Repeated text is learned by heart, wastes tokens, and where one copy is held out it turns the test into
a memory test. Copies are found by SHA-256 of the text with blanks and case levelled.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator

from sprat.data.document import Document

LEAST = 100  # characters; a shorter paragraph ("Returns None.") may rightly be said twice
_PARAGRAPHS = re.compile(r"(\n[ \t]*\n\s*)")


def exact(documents: Iterable[Document]) -> Iterator[Document]:
    """``documents`` without those, and without those paragraphs of 100 characters or more, that came before."""
    seen: set[bytes] = set()
    for document in documents:
        if not _new(document.text, seen):
            continue
        parts = _PARAGRAPHS.split(document.text)
        if len(parts) == 1:
            yield document
            continue
        kept = [place for place in range(0, len(parts), 2) if len(parts[place]) < LEAST or _new(parts[place], seen)]
        if 2 * len(kept) == len(parts) + 1:
            yield document
        elif any(parts[place].strip() for place in kept):
            text = "".join(parts[place] + "".join(parts[place + 1 : place + 2]) for place in kept)
            yield document.with_text(text.strip("\n") + "\n")


def _new(text: str, seen: set[bytes]) -> bool:
    """Whether ``text`` is not among ``seen``; it is from now on."""
    key = hashlib.sha256(" ".join(text.casefold().split()).encode("utf-8", "replace")).digest()
    if key in seen:
        return False
    seen.add(key)
    return True
