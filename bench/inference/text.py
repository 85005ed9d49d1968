"""Real text for the quality figures: Jane Austen's novels, and the language topics and modules of Python, in turn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

CHARACTERS = 6000  # of each document


def texts() -> Iterator[str]:
    """Documents of at most ``CHARACTERS``: a chapter, a topic of Python's help, a module, and so on.

    Where the novels cannot be fetched, there are only the other two.
    """
    from sprat.data import pythonlib
    from sprat.data.debian import AUSTEN, fetch

    chapters = [document.text for document in fetch([AUSTEN])[0].documents]
    topics = [document.text for document in pythonlib.topics()]
    modules = (document.text for document in itertools.islice(pythonlib.documents(), 0, 400, 10))
    for group in itertools.zip_longest(chapters[::7], topics[::3], modules):
        yield from (text[:CHARACTERS] for text in group if text and len(text) > CHARACTERS // 4)
