"""The baselines are as strong as the tools they are named after, and no probability is lost or made up."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprat.data import ngram
from sprat.data.baselines import baseline_scores
from sprat.errors import DataError

ENGLISH = Path(json.__file__).read_bytes()
NOISE = np.random.default_rng(0).bytes(100_000)
LICENCES = Path("/usr/share/common-licenses")
LONGEST = 8


def bits(train: bytes, test: bytes) -> dict[str, float]:
    return baseline_scores(train, {"test": test})["test"]


def last(train: bytes, tests: list[bytes]) -> dict[str, list[float]]:
    """What each model gives the last byte of each test."""
    told = ngram.probabilities(train, tests)
    return {name: [float(one[name][-1]) for one in told] for name in told[0]}


def test_a_repetition_is_found_as_far_back_as_each_window_reaches() -> None:
    near, far = bits(NOISE, NOISE[-20_000:]), bits(NOISE, NOISE[:20_000])
    assert near["gzip"] < 0.3 and near["xz"] < 0.3
    assert 8 <= far["gzip"] < 8.1, "DEFLATE looks back 32 kB"
    assert far["xz"] < 0.3 and far["ppm"] < 0.3, "these have all the training text"
    assert bits(b"b", b"a" * 20_000)["gzip"] < 0.1


@pytest.mark.parametrize(("tool", "framing"), [("gzip", 18), ("xz", 68)])
def test_the_compressors_reach_the_sizes_of_the_command_line(tool: str, framing: int) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"no {tool} on this machine")

    def size(text: bytes) -> int:
        return len(subprocess.run([tool, "-9", "-c"], input=text, capture_output=True, check=True).stdout)

    train, test = ENGLISH[:8_000], ENGLISH[8_000:]
    alone, after = (bits(known, test)[tool] * len(test) / 8 for known in (b"\0", train))
    assert size(test) - framing <= alone <= size(test), "a text that knows nothing is of no use"
    if tool == "xz":
        assert after == pytest.approx(size(train + test) - size(train), abs=8)  # padding and lengths in the index
    else:
        assert after < alone, "the command line cannot be told what went before"


def test_the_models_are_kneser_ney_by_hand() -> None:
    # "aab": too few counts for a formula, so D = 0.5, 1, 1.5; before a, b and ab stands one kind of byte (a), and
    # before aa the start
    found = ngram.probabilities(b"aab", [b"ab"])[0]
    first = (1 - 0.5) / 2 + 0.5 * 2 / 2 / 256  # a, without context: each of a and b was counted once
    after = (1 - 0.5) / 2 + 0.5 * 2 / 2 * first  # b after a: aa and ab were counted once, and b is as likely as a
    assert found["ngram2"] == pytest.approx([first, after])
    learned = (1 - 0.5) / 3 + (0.5 + 1) / 3 / 256  # b, now that a was counted twice
    assert found["ppm"] == pytest.approx([first, (1 - 0.5) / 2 + 0.5 * 2 / 2 * learned])


def grams(text: bytes, size: int) -> list[bytes]:
    return [text[i : i + size] for i in range(len(text) - size + 1)]


class Slow:
    """Chen and Goodman (1999), section 3, in dictionaries: one n-gram after the other, one byte after the other."""

    def __init__(self, train: bytes, order: int) -> None:
        self.order = min(order, len(train))
        self.seen = {gram for size in range(1, self.order + 1) for gram in grams(train, size)}
        self.after: dict[bytes, Counter[int]] = defaultdict(Counter)  # context -> next byte -> its count
        for gram in grams(train, self.order):
            self.after[gram[:-1]][gram[-1]] += 1  # each time
        for size in range(1, self.order):
            for wider in set(grams(train, size + 1)):
                self.after[wider[1:-1]][wider[-1]] += 1  # each byte that stands before it
            if not self.after[train[: size - 1]][train[size - 1]]:
                self.after[train[: size - 1]][train[size - 1]] = 1  # only the start stands before it
        self.discount = [[], *(self.discounts(size) for size in range(1, self.order + 1))]

    def learn(self, text: bytes) -> None:
        """Count the n-grams that end ``text``: the longest each time, others where what stands before them is new."""
        ends = [text[len(text) - size :] for size in range(1, min(self.order, len(text)) + 1)]
        for gram, wider in zip(ends, [*ends[1:], None], strict=True):
            if wider is None or wider not in self.seen:
                self.after[gram[:-1]][gram[-1]] += 1
        self.seen |= set(ends)

    def discounts(self, size: int) -> list[float]:
        counts = [n for context, row in self.after.items() if len(context) == size - 1 for n in row.values() if n]
        n1, n2, n3, n4 = (counts.count(often) for often in (1, 2, 3, 4))
        if not n1 or not n2 or not n3:
            return [0, 0.5, 1, 1.5]
        y = n1 / (n1 + 2 * n2)
        d = [0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        return d if d[2] > 0 and d[3] > 0 else [0, 0.5, 1, 1.5]

    def probability(self, byte: int, before: bytes) -> float:
        p = 1 / 256
        for size in range(1, min(self.order, len(before) + 1) + 1):
            row = self.after.get(before[len(before) - size + 1 :], Counter())
            if n := sum(row.values()):
                d = self.discount[size]
                left = sum(d[min(c, 3)] for c in row.values())
                p = (row[byte] - d[min(row[byte], 3)] + left * p) / n
        return p


def assert_like_dictionaries(train: bytes, test: bytes) -> None:
    found = ngram.probabilities(train, [test])[0]
    for order in range(2, LONGEST + 1):
        static = Slow(train, order)
        assert found[f"ngram{order}"] == pytest.approx([static.probability(b, test[:i]) for i, b in enumerate(test)])
    ppm = Slow(train, LONGEST)
    for place, byte in enumerate(test):
        assert found["ppm"][place] == pytest.approx(ppm.probability(byte, test[:place]))
        ppm.learn(test[: place + 1])


@given(st.text("abc", min_size=1, max_size=60), st.text("abcd", min_size=1, max_size=30))
@settings(max_examples=40, deadline=None)
def test_sorting_counts_what_dictionaries_count(train: str, test: str) -> None:
    assert_like_dictionaries(train.encode(), test.encode())


def test_real_text_with_fitted_discounts_counts_as_dictionaries_do() -> None:
    assert_like_dictionaries(ENGLISH[:6_000], ENGLISH[6_000:6_800])


@given(st.integers(0, len(ENGLISH) - 3_000), st.binary(max_size=4), st.integers(0, 12))
@settings(max_examples=5, deadline=None)
def test_all_256_continuations_share_one(start: int, noise: bytes, size: int) -> None:
    train = ENGLISH[start : start + 3_000]
    before = train[100 : 100 + size] + noise + train[200 : 200 + size]
    for name, values in last(train, [before + bytes([byte]) for byte in range(256)]).items():
        assert sum(values) == pytest.approx(1), name
        assert min(values) > 0, name


def test_a_text_of_all_bytes_and_texts_shorter_than_the_order_have_finite_bits() -> None:
    every = bytes(range(256))
    for train, test in ((every, every), (every * 3, every[::-1]), (b"a", b"b"), (b"ab", every), (every, b"xy")):
        found = bits(train, test)
        assert all(0 < value < math.inf for value in found.values()), found
    assert bits(every * 3, every)["ppm"] < 3
    one = bits(b"a", b"b")
    assert one["ngram2"] == one["ngram8"] == one["ppm"] == pytest.approx(-math.log2(0.5 / 256))  # D(1) of one byte


def test_ppm_learns_from_the_test_itself() -> None:
    found = bits(b"nothing like it", NOISE[:4_000] * 2)
    assert found["ppm"] < 5.5 < 7.9 < found["ngram8"], "half of it is a repetition"


@pytest.mark.parametrize(
    ("train", "test", "digest", "ppmd"),
    [
        (("GPL-2",), "GPL-3", "c73a1d6d329a638777bb7a1723174ae80191a1e99f76765af8fc81cf859358b8", 7175),
        (
            ("Apache-2.0", "GPL-2", "GPL-3", "LGPL-2.1", "MPL-2.0"),
            "GFDL-1.3",
            "b366182c8824dcfeb37f6688335b7dd35605231d07df93a3c0c78e5c6c2f0b60",
            4918,
        ),
    ],
)
def test_ppm_needs_at_most_three_per_cent_more_than_ppmd(
    train: tuple[str, ...], test: str, digest: str, ppmd: int
) -> None:
    """``ppmd``: bytes that the test adds to the training text under PPMd var. H of order 6 (pyppmd 1.3.1)."""
    if not all((LICENCES / name).is_file() for name in (*train, test)):
        pytest.skip(f"Debian's {LICENCES} is not there")
    known, asked = b"".join((LICENCES / name).read_bytes() for name in train), (LICENCES / test).read_bytes()
    if hashlib.sha256(known + asked).hexdigest() != digest:
        pytest.skip("these licences have other words than those that PPMd was measured on")
    assert bits(known, asked)["ppm"] * len(asked) / 8 <= 1.03 * ppmd


def test_several_tests_learn_nothing_from_each_other() -> None:
    texts = {"a": ENGLISH[:1_000], "b": ENGLISH[:1_000] + b"!", "c": NOISE[:500]}
    together = baseline_scores(ENGLISH[2_000:6_000], texts)
    assert together == {name: bits(ENGLISH[2_000:6_000], text) for name, text in texts.items()}
    assert set(together["a"]) == {"gzip", "xz", "ppm", *(f"ngram{order}" for order in range(2, 9))}
    assert together["a"]["ppm"] < together["a"]["ngram2"] < 8 < together["c"]["ngram2"]


def test_an_empty_text_is_refused_by_its_name() -> None:
    with pytest.raises(DataError, match=r"empty text .*\(prose\)"):
        baseline_scores(b"a", {"prose": b""})
    with pytest.raises(DataError, match=r"empty text .*\(train\)"):
        baseline_scores(b"", {"prose": b"a"})
    with pytest.raises(DataError, match="empty"):
        ngram.probabilities(b"a", [b"b", b""])
