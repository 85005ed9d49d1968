"""Real text for the quality figures: Perl's manual, and the language topics and modules of Python, in turn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

CHARACTERS = 6000  # of each document


def texts(share: int = 0) -> Iterator[str]:
    """Documents of at most ``CHARACTERS``: a section, a topic of Python's help, a module, and so on.

    Shares 0, 1 and 2 hold different documents of the same kinds: quality is measured on 0, and codes that are fitted
    to text are fitted to another. Where Perl's manual cannot be fetched, there are only the other two kinds.
    """
    from sprat.data.sources import perl_manual, python_library
    from sprat.data.sources.source import SourceRequest

    sections = [document.text for document in perl_manual.PACKAGE.read(SourceRequest()).documents]
    topics = [document.text for document in python_library.topics()]
    modules = (document.text for document in itertools.islice(python_library.documents(), share, 400, 10))
    for group in itertools.zip_longest(sections[share::7], topics[share::3], modules):
        yield from (text[:CHARACTERS] for text in group if text and len(text) > CHARACTERS // 4)
