"""What a language model must beat: compressors, and tables of counts.

Bits per byte is how many bits a predictor needs for each byte of a text it has not seen, whatever its
tokens are; so a neural model, gzip and an n-gram table can stand in one column. A model that is above the best of them
has learned less of the text than counting finds there. Each may learn from the whole training text:

- ``gzip``: DEFLATE looks back 32 kB, so it has read the end of the training text (a preset dictionary).
- ``xz``: the size of training and test text in one file less that of the training text, under a window that spans both.
- ``ngram2`` ... ``ngram8`` and ``ppm``: see ``sprat.data.ngram``.

A compressor also gets the test text alone, and the lower of the two counts. Zstandard is left out: it is the same
kind of compressor as xz and weaker on every text tried, by 1 to 3 %, and takes as long.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Mapping

import numpy as np

from sprat.data import ngram
from sprat.errors import DataError

DEFLATE_WINDOW = 1 << 15  # bytes
LZMA_WINDOWS = (1 << 12, 3 << 29)  # least and most, bytes


def baseline_scores(train: bytes, tests: Mapping[str, bytes]) -> dict[str, dict[str, float]]:
    """Bits per byte of each test text under each baseline that knows ``train``.

    Several tests share the work on ``train``, which is nearly all of it; they learn nothing from each other.

    Returns:
        For each test: "gzip", "xz" (not where Python was built without it), "ngram2" ... "ngram8", "ppm".

    Raises:
        DataError: a text is empty.
    """
    for name, text in (("train", train), *tests.items()):
        if not text:
            raise DataError("an empty text has no bits per byte", where=name, todo="give some text")
    sizes = {"gzip": _gzip(train, tests), "xz": _xz(train, tests)}
    scores: dict[str, dict[str, float]] = {}
    for (name, test), models in zip(tests.items(), ngram.probabilities(train, list(tests.values())), strict=True):
        scores[name] = {kind: 8 * by_test[name] / len(test) for kind, by_test in sizes.items() if name in by_test}
        scores[name] |= {kind: float(-np.log2(probabilities).mean()) for kind, probabilities in models.items()}
    return scores


def _gzip(train: bytes, tests: Mapping[str, bytes]) -> dict[str, int]:
    """Bytes of each test under gzip -9, or under DEFLATE that has just read the end of ``train``: the lower."""
    sizes = {}
    for name, test in tests.items():
        primed = zlib.compressobj(9, zdict=train[-DEFLATE_WINDOW:])
        alone = len(gzip.compress(test, compresslevel=9, mtime=0))
        sizes[name] = min(alone, len(primed.compress(test)) + len(primed.flush()))
    return sizes


def _xz(train: bytes, tests: Mapping[str, bytes]) -> dict[str, int]:
    """Bytes of each test as xz -9 packs it, without the container, or that it adds to ``train``: the lower."""
    try:
        import lzma
    except ImportError:
        return {}
    min_window, max_window = LZMA_WINDOWS
    window = min(max(min_window, len(train) + max(map(len, tests.values()), default=0)), max_window)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": window}]

    def size(text: bytes) -> int:
        return len(lzma.compress(text, format=lzma.FORMAT_RAW, filters=filters))

    train_size = size(train)
    return {name: max(1, min(size(test), size(train + test) - train_size)) for name, test in tests.items()}
