"""Byte n-grams and PPM: predictors that only count, at the strength at which counting is known to predict.

Both interpolate from the longest context down to the uniform 1/256 by the modified Kneser-Ney rule (Kneser and Ney
1995; Chen and Goodman 1999, section 3). A context that was counted n times before a byte that followed it c times says

    P(byte | context) = (c - D(c)) / n  +  (D(1) N1 + D(2) N2 + D(3) N3) / n * P(byte | context one byte shorter)

where N1, N2, N3 of its successors were counted once, twice and more often; D(0) = 0, and D(c > 3) = D(3). The longest
context counts how often an n-gram occurred, a shorter one after how many different bytes: what a longer context
foretold is no evidence for a shorter one.

**ngram2 ... ngram8** are static tables of the training text. **ppm** is PPM (Cleary and Witten 1984) with contexts of
up to seven bytes, which goes on learning: each byte of the test text is predicted from the training text and all test
bytes before it. The rule above is PPM's: the weight of the shorter context is its escape (with every D a half, method D
of Howard 1993), contexts are blended (Bell, Cleary and Witten 1990), so that nothing is spent on bytes that exclusion
would have to take out, and counting in a shorter context only where the longer one was surprised is PPM's update
exclusion (Moffat 1990).

No loop over bytes is needed. Counts before a place of the test are those of the training text and a running sum over
the earlier test places with the same n-gram, or the same context: sorted by n-gram, that is a cumulative sum. And an
order is P = own + escape * P(shorter), so a model is two numbers for each byte, composed from the longest order down,
while only two orders of the training text are in memory.

Left out: contexts beyond seven bytes, rescaling of old counts, and secondary estimation of the escape, as in PPMd.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sprat.errors import DataError

ORDERS = range(2, 9)  # bytes in an n-gram; eight fill a 64-bit integer
PPM = "ppm"
FALLBACK = (0.0, 0.5, 1.0, 1.5)  # discounts where the formula has none, as in KenLM (Heafield et al. 2013)

Grams = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def probabilities(train: bytes, tests: Sequence[bytes]) -> list[dict[str, Floats]]:
    """What each model gives each byte of each test text, after those before it.

    The time is that of sorting ``train`` eight times, whatever the number of tests; the memory some 60 bytes for each
    byte of ``train`` and 130 for each of the tests.

    Returns:
        For each test the probabilities [bytes of the test] by model: "ngram2" ... "ngram8" and "ppm".

    Raises:
        DataError: a text is empty.
    """
    if not train or not all(tests):
        raise DataError("an empty text has no n-grams", where="baselines", todo="give some text")
    train_array, test_arrays = _bytes(train), [_bytes(test) for test in tests]
    models = [{name: _Model(len(test)) for name in (*map(_name, ORDERS), PPM)} for test in tests]
    longest = min(ORDERS[-1], len(train))
    longer: Grams | None = None
    novel = [np.ones(0, dtype=np.bool_) for _ in tests]  # where the n-gram one byte longer has never been before
    for order in range(longest, 0, -1):
        grams, occurrences = np.unique(_grams(train_array, order), return_counts=True)
        plain = _Table(grams, occurrences)
        continued = plain if longer is None else _Table(grams, _left_contexts(grams, longer, order))
        for number, text in enumerate(test_arrays):
            positions_grams = _grams(text, order)
            counted = np.ones(len(positions_grams), dtype=np.bool_)  # where PPM counts the n-gram once it has seen it
            if longer is not None:
                counted[1:] = novel[number]
            lookup = _TestLookup(plain, positions_grams)
            novel[number] = lookup.is_new()
            models[number][PPM].shorten(*continued.terms(lookup, counted))
            longest_terms, shorter_terms = plain.terms(lookup), continued.terms(lookup)
            for size in (each_order for each_order in ORDERS if min(each_order, longest) >= order):
                models[number][_name(size)].shorten(*(longest_terms if min(size, longest) == order else shorter_terms))
        longer = grams
    return [{name: model.own + model.escape / 256 for name, model in model_by_name.items()} for model_by_name in models]


def _name(order: int) -> str:
    return f"ngram{order}"


class _Model:
    """P = own + escape * P(the contexts that are still to come), [bytes of the test] each."""

    def __init__(self, size: int) -> None:
        self.own, self.escape = np.zeros(size), np.ones(size)

    def shorten(self, own: Floats, escape: Floats) -> None:
        """Go on to the next shorter context; the first bytes of a text have none so long, and skip it."""
        skipped = len(self.own) - len(own)
        self.own[skipped:] += self.escape[skipped:] * own
        self.escape[skipped:] *= escape


class _Table:
    """The n-grams of one order in the training text, with counts, and their contexts."""

    def __init__(self, grams: Grams, counts: Ints) -> None:
        """``grams`` [n] are sorted and different."""
        contexts = grams >> np.uint64(8)
        first = np.flatnonzero(np.append(True, contexts[1:] != contexts[:-1]))
        self.grams, self.counts, self.contexts = grams, counts, contexts[first]
        self.totals = np.add.reduceat(counts, first)
        self.kinds = [np.add.reduceat((np.minimum(counts, 3) == often).astype(np.int64), first) for often in (1, 2, 3)]
        self.discounts = _discounts(counts)

    def terms(self, lookup: _TestLookup, counted: npt.NDArray[np.bool_] | None = None) -> tuple[Floats, Floats]:
        """What the order itself says of each n-gram of a test, and the weight of the shorter context.

        Args:
            lookup: the n-grams [places], in the order of the text, looked up in a table of the same n-grams.
            counted: which of them the model counts as it goes on; None for a model that does not learn here.
        """
        queries, contexts = lookup.grams.queries, lookup.contexts.queries
        count = lookup.grams.values(self.counts)
        total, *kinds = (lookup.contexts.values(each) for each in (self.totals, *self.kinds))
        if counted is not None:
            count = count + _before(queries, [counted])[0]
            steps = [counted & (count == often) for often in (0, 1, 2)]  # a successor comes to be counted once, ...
            added, once, twice, often = _before(contexts, [counted, *steps])
            total, kinds = total + added, [kinds[0] + once - twice, kinds[1] + twice - often, kinds[2] + often]
        nonzero_total = np.maximum(total, 1)
        escape_mass = sum((d * kind for d, kind in zip(self.discounts[1:], kinds, strict=True)), np.zeros(len(queries)))
        own = (count - self.discounts[np.minimum(count, 3)]) / nonzero_total
        return own, np.where(total > 0, escape_mass / nonzero_total, 1.0)


class _TestLookup:
    """N-grams of a test and their contexts, looked up once for all tables of the same n-grams."""

    def __init__(self, table: _Table, grams: Grams) -> None:
        self.grams = _KeyLookup(table.grams, grams)
        self.contexts = _KeyLookup(table.contexts, grams >> np.uint64(8))

    def is_new(self) -> npt.NDArray[np.bool_]:
        """Which n-grams occur for the first time, in the test and in the training text."""
        first = np.zeros(len(self.grams.queries), dtype=np.bool_)
        first[np.unique(self.grams.queries, return_index=True)[1]] = True
        first &= ~self.grams.known
        return first


class _KeyLookup:
    """Where each asked key stands among ``keys``, which are sorted."""

    def __init__(self, keys: Grams, queries: Grams) -> None:
        self.queries = queries
        self.position = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
        self.known: npt.NDArray[np.bool_] = keys[self.position] == queries

    def values(self, values: Ints) -> Ints:
        """The value of each asked key, 0 where it is none of the keys."""
        return np.where(self.known, values[self.position], 0)


def _discounts(counts: Ints) -> Floats:
    """D(0) ... D(3) of an order, from how many n-grams were counted once to four times (Chen and Goodman)."""
    n1, n2, n3, n4 = (int((counts == often).sum()) for often in (1, 2, 3, 4))
    if not (n1 and n2 and n3):
        return np.array(FALLBACK)
    y = n1 / (n1 + 2 * n2)
    discounts = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    sound = all(0 < discount <= often for often, discount in enumerate(discounts) if often)
    return np.array(discounts if sound else FALLBACK)


def _left_contexts(grams: Grams, longer: Grams, order: int) -> Ints:
    """Before how many different bytes each n-gram stood: the n-grams one longer that end with it, [len(grams)].

    The start of the text counts as a byte, for the n-gram that stands nowhere else.
    """
    ends = np.searchsorted(grams, longer & np.uint64((1 << 8 * order) - 1))
    return np.maximum(np.bincount(ends, minlength=len(grams)), 1)


def _before(keys: Grams, flags: Sequence[npt.NDArray[np.bool_]]) -> list[Ints]:
    """For each place, at how many earlier places of the same key each flag is set."""
    order = np.argsort(keys, kind="stable")
    sorted_keys = keys[order]
    starts = np.append(True, sorted_keys[1:] != sorted_keys[:-1])[: len(keys)]
    first, group = np.flatnonzero(starts), np.cumsum(starts) - 1
    sums = []
    for flag in flags:
        running: Ints = np.cumsum(flag[order]) - flag[order]
        result = np.empty(len(keys), dtype=np.int64)
        result[order] = running - running[first][group]
        sums.append(result)
    return sums


def _bytes(text: bytes) -> Grams:
    return np.frombuffer(text, dtype=np.uint8).astype(np.uint64)


def _grams(text: Grams, size: int) -> Grams:
    """Each run of ``size`` bytes as one number, the last byte lowest; none where the text is shorter."""
    count = max(len(text) - size + 1, 0)
    result = np.zeros(count, dtype=np.uint64)
    for offset in range(size):
        result = (result << np.uint64(8)) | text[offset : offset + count]
    return result
