"""Exact dedup: a paragraph or document that was seen before is left out.

Repeated text is learned by heart, wastes tokens, and where one copy is held out it turns the test into
a memory test. Copies are found by SHA-256 of the text with blanks and case levelled.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator

from sprat.data.document import Document

MIN_PARAGRAPH_CHARS = 100  # characters; a shorter paragraph ("Returns None.") may rightly be said twice
_PARAGRAPHS = re.compile(r"(\n[ \t]*\n\s*)")


def exact_dedup(documents: Iterable[Document]) -> Iterator[Document]:
    """``documents`` without those, and without those paragraphs of 100 characters or more, that came before."""
    seen: set[bytes] = set()
    for document in documents:
        if not _add_if_new(document.text, seen):
            continue
        parts = _PARAGRAPHS.split(document.text)
        if len(parts) == 1:
            yield document
            continue
        paragraphs = list(zip(parts[::2], [*parts[1::2], ""], strict=True))  # each with the blank lines behind it
        unique = [(text, gap) for text, gap in paragraphs if len(text) < MIN_PARAGRAPH_CHARS or _add_if_new(text, seen)]
        if len(unique) == len(paragraphs):
            yield document
        elif any(text.strip() for text, _ in unique):
            text = "".join(text + gap for text, gap in unique)
            yield document.with_text(text.strip("\n") + "\n")


def _add_if_new(text: str, seen: set[bytes]) -> bool:
    """Whether ``text`` is not among ``seen``; it is from now on."""
    key = hashlib.sha256(" ".join(text.casefold().split()).encode("utf-8", "replace")).digest()
    if key in seen:
        return False
    seen.add(key)
    return True
