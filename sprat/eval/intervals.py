"""95 % intervals of what two models are compared by: ratios, quantiles, medians, relative loss. Without torch.

Tokens of one document are no independent draws: a hard page is hard throughout, for both models. So whatever is
measured per token is summed by document, and the interval is that of a ratio of sums over documents (the linearized
ratio estimator of cluster samples: Cochran 1977, Sampling Techniques, section 6.3), with Student's t. A quantile over
tokens has the interval of the share below it, turned back into values (Woodruff 1952, JASA 47:635).

The relative loss of a task is one less the ratio of two accuracies on the same problems. Its interval is the score
interval of Tang, Tang and Chan 2003 (Statistics in Medicine 22:1217): all ratios that a score test does not reject. It
does not shrink to a point where no answer changed: of 100 right answers that stayed right, up to 3.7 % may be lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sprat.errors import DataError

_Z95 = 1.959963984540054
_STEPS = 200  # of a bisection; more than a double has bits
MAX_RATIO = 1e6  # where the search for an upper end stops


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval ``low`` to ``high``, from ``count`` independent draws (documents, problems)."""

    value: float
    low: float
    high: float
    count: int


def t_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz and Stegun 1964, 26.7.5; exact for 1 and 2 degrees).

    Raises:
        DataError: fewer than one degree of freedom.

    >>> round(t_quantile(9), 3), round(t_quantile(29), 3)
    (2.262, 2.045)
    """
    if degrees < 1:
        raise DataError("one draw has no interval", where="t_quantile", todo="measure two or more")
    if degrees <= 2:
        return math.tan(math.pi * 0.475) if degrees == 1 else 0.95 * math.sqrt(2 / (0.05 * 1.95))
    z, n = _Z95, float(degrees)
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )


def ratio_of_sums(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """``sum(numerators) / sum(denominators)`` over documents; a document may weigh more than another.

    Source: Cochran 1977, section 6.3.

    Raises:
        DataError: fewer than two documents, or a sum of denominators that is not positive.

    >>> ratio_of_sums([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    Estimate(value=1.0, low=1.0, high=1.0, count=3)
    """
    count, total = len(numerators), math.fsum(denominators)
    if count < 2 or count != len(denominators) or total <= 0:
        raise DataError(f"no interval from {count} documents", where="ratio_of_sums", todo="measure two or more")
    ratio = math.fsum(numerators) / total
    squares = math.fsum((top - ratio * bottom) ** 2 for top, bottom in zip(numerators, denominators, strict=True))
    half = t_quantile(count - 1) * math.sqrt(count / (count - 1) * squares) / total
    return Estimate(ratio, ratio - half, ratio + half, count)


def share_of_sums(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """``ratio_of_sums`` of a share, whose interval ends at 0 and 1."""
    ratio = ratio_of_sums(numerators, denominators)
    return Estimate(ratio.value, max(0.0, ratio.low), min(1.0, ratio.high), ratio.count)


def clustered_quantile(documents: Sequence[Sequence[float]], share: float) -> Estimate:
    """The smallest value that at least ``share`` of all values of all ``documents`` do not exceed.

    Source: Woodruff 1952.

    Raises:
        DataError: fewer than two documents hold values.

    >>> clustered_quantile([[1.0, 2.0], [3.0, 4.0]], 0.5).value
    2.0
    """
    values = sorted(value for document in documents for value in document)

    def quantile(p: float) -> float:
        return values[min(len(values) - 1, max(0, math.ceil(p * len(values)) - 1))]

    if not values:
        raise DataError("no values", where="clustered_quantile", todo="measure two documents or more")
    middle = quantile(share)
    below = [float(sum(value <= middle for value in document)) for document in documents]
    at = ratio_of_sums(below, [float(len(document)) for document in documents])
    half = at.high - at.value
    return Estimate(middle, quantile(share - half), quantile(share + half), at.count)


def median(values: Sequence[float]) -> Estimate:
    """The median of independent ``values`` with the narrowest symmetric interval of order statistics of 95 %.

    Of fewer than six values the interval is all of them, which covers less.

    >>> median([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    Estimate(value=4.0, low=1.0, high=7.0, count=7)
    """
    count, ordered = len(values), sorted(values)
    if not count:
        raise DataError("no values", where="median", todo="measure one or more")
    outside, lowest = 2 * 0.5**count, 0
    while lowest + 1 < (count + 1) // 2:  # each step leaves two more values outside
        outside += 2 * math.comb(count, lowest + 1) * 0.5**count
        if outside > 0.05:
            break
        lowest += 1
    middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    return Estimate(middle, ordered[lowest], ordered[count - 1 - lowest], count)


def relative_loss(before: Sequence[bool], after: Sequence[bool]) -> Estimate | None:
    """The share of right answers that was lost, ``1 - after / before``; below 0 where there are more than before.

    Args:
        before, after: whether two models were right on the same problems.

    Returns:
        None where ``before`` has no right answer: then nothing can be lost.

    Raises:
        DataError: they are not as long as each other.

    >>> loss = relative_loss([True] * 100, [True] * 100)
    >>> loss.value, round(loss.high, 4)
    (0.0, 0.037)
    """
    if len(before) != len(after):
        raise DataError("nothing to pair", where="relative_loss", todo="give both models the same problems")
    pairs = list(zip(before, after, strict=True))
    both, lost, won = pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True))
    if not both + lost:
        return None
    ratio = (both + won) / (both + lost)

    def score(other: float) -> float:
        return _ratio_score(other, both, lost, won, len(pairs))

    low = _bisect(lambda other: score(other) > _Z95, 0.0, ratio) if ratio else 0.0
    top = max(1.0, 2 * ratio)
    while score(top) > -_Z95 and top < MAX_RATIO:
        top *= 2
    high = _bisect(lambda other: score(other) > -_Z95, ratio, top)
    return Estimate(1 - ratio, 1 - high, 1 - low, len(pairs))


def _ratio_score(ratio: float, both: int, lost: int, won: int, count: int) -> float:
    """Tang's score statistic of "after / before is ``ratio``"; falls with ``ratio``, McNemar's at 1.

    The variance under that hypothesis needs the likeliest share of lost answers under it, the root of a quadratic.
    """
    before, after, any_right = both + lost, both + won, both + lost + won
    a = count * (1 + ratio)
    b = before * ratio**2 - (after + 2 * lost)
    c = lost * (1 - ratio) * any_right / count
    share_lost = (-b + math.sqrt(max(0.0, b * b - 4 * a * c))) / (2 * a)
    variance = a * share_lost + any_right * (ratio - 1)
    distance = after - before * ratio
    if variance <= 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)


def _bisect(is_below: Callable[[float], bool], low: float, high: float) -> float:
    """Where ``is_below`` turns from true to false between ``low`` and ``high``."""
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return (low + high) / 2
