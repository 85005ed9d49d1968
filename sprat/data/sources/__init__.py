"""Where the default corpus comes from: a source is one module here and one entry of ``SOURCES``.

``sprat.data.corpus.default_corpus`` asks them in this order; a domain that one has need not come of a later one.
"""

from __future__ import annotations

from sprat.data.sources import perl_manual, python_library
from sprat.data.sources.source import Source

SOURCES: tuple[Source, ...] = (perl_manual.PACKAGE.read, python_library.read)
