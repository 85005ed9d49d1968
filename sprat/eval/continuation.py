"""Long greedy continuations of two models: where they part, and whether either ends up saying the same over and over.

Squeezed models often answer short questions as before and fall into loops in long texts, which no task of one-word
answers shows. Openings go in as they are, without a chat template, so that any model can be asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from sprat.engine import Engine, Output, Sampling
from sprat.errors import DataError
from sprat.eval.certificate import Continuations
from sprat.eval.comparison import paired_interval
from sprat.eval.intervals import Estimate, median
from sprat.eval.score import wilson_interval

MAX_PERIOD = 64  # tokens of what is repeated
MIN_REPEATED = 32  # tokens that repeat what stands a period before


def has_loop(ids: Sequence[int]) -> bool:
    """Whether some piece of up to 64 tokens stands three times in a row, over 32 tokens or more beyond the first.

    That is: for some period ``p`` of 1 to 64, ``max(2 p, 32)`` tokens in a row equal the token ``p`` places before.

    >>> has_loop([1, 2, 3] * 12), has_loop(list(range(100)))
    (True, False)
    """
    array = np.asarray(ids)
    for period in range(1, min(MAX_PERIOD, len(array) - 1) + 1):
        unequal = np.flatnonzero(array[period:] != array[:-period])
        ends = np.concatenate(([-1], unequal, [len(array) - period]))
        if int(np.diff(ends).max()) - 1 >= max(2 * period, MIN_REPEATED):
            return True
    return False


def first_divergence(before: Sequence[int], after: Sequence[int]) -> int | None:
    """The index of the first token that differs (an end counts as one), None where all are alike.

    >>> first_divergence([1, 2, 3], [1, 2]), first_divergence([1], [1])
    (2, None)
    """
    for index, (a, b) in enumerate(zip(before, after, strict=False)):
        if a != b:
            return index
    return None if len(before) == len(after) else min(len(before), len(after))


def compare_continuations(
    before: Engine, after: Engine, prompts: Sequence[Sequence[int]], *, max_tokens: int
) -> Continuations:
    """Continue each of ``prompts`` (ids) greedily with both engines, ``max_tokens`` at most.

    Raises:
        DataError: no prompt. EngineError: one is empty or too long.
    """
    if not prompts:
        raise DataError("no openings to continue", where="prompts", todo="give one or more")
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens, fit=True)
    rows = [list(prompt) for prompt in prompts]
    return compare_outputs(before.generate(rows, sampling), after.generate(rows, sampling), max_tokens)


def compare_outputs(before: Sequence[Output], after: Sequence[Output], max_tokens: int) -> Continuations:
    """Two models' continuations of the same openings, side by side."""
    count = len(before)
    indexes = [first_divergence(a.token_ids, b.token_ids) for a, b in zip(before, after, strict=True)]
    never = float(max_tokens)
    middle = median([never if index is None else float(index) for index in indexes])
    loops = [[float(has_loop(output.token_ids)) for output in outputs] for outputs in (before, after)]
    shares = [Estimate(sum(row) / count, *wilson_interval(sum(row), count), count) for row in loops]
    difference = Estimate(shares[1].value - shares[0].value, *paired_interval(*loops), count)
    return Continuations(
        prompts=count,
        max_tokens=max_tokens,
        diverged=sum(index is not None for index in indexes),
        first_divergence=None if middle.value >= never else middle,
        loops_before=shares[0],
        loops_after=shares[1],
        loops_difference=difference,
        tokens_before=sum(len(output.token_ids) for output in before) / count,
        tokens_after=sum(len(output.token_ids) for output in after) / count,
        finish_before=dict(Counter(output.finish_reason for output in before)),
        finish_after=dict(Counter(output.finish_reason for output in after)),
    )
