"""What a language model must beat: a compressor and a table of counts.

Bits per byte is how many bits a predictor needs for each byte of a text it has not seen, whatever its
tokens are; so a neural model, gzip and an n-gram table can stand in one column. Below them a model has
learned more than repetition and letter statistics.
"""

from __future__ import annotations

import gzip
import zlib

import numpy as np
import numpy.typing as npt

from sprat.errors import DataError

WINDOW = 1 << 15  # how far DEFLATE looks back, bytes


def gzip_bpb(train: bytes, test: bytes) -> float:
    """Bits per byte of ``test`` under gzip -9, or under DEFLATE that has just read the end of ``train``: the lower.

    Raises:
        DataError: ``test`` is empty.
    """
    _check(test)
    alone = len(gzip.compress(test, compresslevel=9, mtime=0))
    primed = zlib.compressobj(9, zdict=train[-WINDOW:]) if train else zlib.compressobj(9)
    return 8 * min(alone, len(primed.compress(test)) + len(primed.flush())) / len(test)


def ngram_bpb(train: bytes, test: bytes, *, order: int = 3) -> float:
    """Bits per byte of ``test`` under a byte-level n-gram model counted on ``train``.

    Interpolated Witten-Bell (Witten and Bell 1991; Chen and Goodman 1999, section 2.6): a context h that
    was seen n(h) times with t(h) different successors says n(h,c) / (n(h)+t(h)) itself and leaves
    t(h) / (n(h)+t(h)) to the context one byte shorter; the shortest leaves it to the uniform 1/256.

    Args:
        order: bytes in an n-gram, 1 to 8; a context has order - 1.

    Raises:
        DataError: a text is empty or ``order`` is out of range.
    """
    _check(test)
    _check(train)
    if not 1 <= order <= 8:
        raise DataError(f"an n-gram of {order} bytes", where="order", todo="choose 1 to 8")
    learned = np.frombuffer(train, dtype=np.uint8).astype(np.uint64)
    asked = np.frombuffer(test, dtype=np.uint8).astype(np.uint64)
    probability = np.full(len(asked), 1 / 256)
    for size in range(1, min(order, len(train), len(test)) + 1):
        # the first size - 1 bytes of the test have no context of this length and keep what they have
        probability[size - 1 :] = _interpolate(_grams(learned, size), _grams(asked, size), probability[size - 1 :])
    return float(-np.log2(probability).mean())


def _interpolate(
    learned: npt.NDArray[np.uint64], asked: npt.NDArray[np.uint64], shorter: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """P(byte | context) for each n-gram of ``asked``, given that of the context one byte shorter."""
    grams, counts = np.unique(learned, return_counts=True)
    contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
    kinds = np.diff(np.append(first, len(grams)))
    totals = np.add.reduceat(counts, first)
    place = np.minimum(np.searchsorted(grams, asked), len(grams) - 1)
    seen = np.where(grams[place] == asked, counts[place], 0)
    before = asked >> np.uint64(8)
    home = np.minimum(np.searchsorted(contexts, before), len(contexts) - 1)
    weight = np.where(contexts[home] == before, totals[home] + kinds[home], 0)
    mixed = (seen + kinds[home] * shorter) / np.maximum(weight, 1)
    return np.where(weight > 0, mixed, shorter)


def _grams(text: npt.NDArray[np.uint64], size: int) -> npt.NDArray[np.uint64]:
    """Each run of ``size`` bytes as one number, the last byte lowest."""
    count = len(text) - size + 1
    result = np.zeros(count, dtype=np.uint64)
    for place in range(size):
        result = (result << np.uint64(8)) | text[place : place + count]
    return result


def _check(text: bytes) -> None:
    """Refuse an empty text."""
    if not text:
        raise DataError("an empty text has no bits per byte", where="baselines", todo="give some text")
