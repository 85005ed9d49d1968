"""Which layers each stage of a pipeline gets, so that no rank has much more to do than another.

Published layouts are balanced by hand: V3's dense layers are cheaper than its sparse ones, the first stage has the
embedding, the last one the head and the MTP module. In a fleet of several chips the fast ones get more layers. The
search is a descent: a layer goes from the busiest rank to another one, or to the next stage, as long as that helps.
"""

# K makers, one for each chip of the pipeline; L layers, S stages, R ranks of the pipeline, T tries

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sprat.plan.layer_time import Rank
from sprat.plan.shapes import ModelShape
from sprat.plan.stage_time import Stage, StageMaker

Counts = npt.NDArray[np.int64]
Loads = npt.NDArray[np.float64]


def balance_layers(makers: Sequence[StageMaker]) -> tuple[int, ...]:
    """Layers of each stage (``StageMaker.layers``) such that the busiest rank has the least to do.

    A plan that names its ``stage_layers`` keeps them, with the MTP modules in the last stage.

    Args:
        makers: one, or one for each rank of the pipeline.
    """
    plan, layers = makers[0].rank.plan, len(makers[0].layers)
    if plan.stage_layers or plan.stages == 1:
        counts = list(plan.split_layers(len(makers[0].shape.layers)))
        counts[-1] += layers - len(makers[0].shape.layers)
        return tuple(counts)
    owner_S = np.array([plan.rank_of_stage(stage) for stage in range(plan.stages)])
    kind_S = owner_S if len(makers) > 1 else np.zeros_like(owner_S)
    before_KL = np.array([_before(maker) for maker in makers])
    ends_S = np.zeros(plan.stages)
    ends_S[0] += _cost(makers[kind_S[0]], 0, 0, is_first=True)
    ends_S[-1] += _cost(makers[kind_S[-1]], 0, 0, is_last=True)
    belongs_SR = np.eye(plan.pipeline)[owner_S]

    def judge(counts_TS: Counts) -> tuple[Loads, Loads, Loads]:
        """Of each try: the busiest rank's seconds, how unevenly stages share, and every rank's."""
        last_TS = np.cumsum(counts_TS, axis=1)
        seconds_TS = ends_S + before_KL[kind_S, last_TS] - before_KL[kind_S, last_TS - counts_TS]
        ranks_TR = seconds_TS @ belongs_SR
        return ranks_TR.max(axis=1), (seconds_TS**2).sum(axis=1), ranks_TR

    counts_S = np.array([layers // plan.stages + (stage < layers % plan.stages) for stage in range(plan.stages)])
    (busiest,), (uneven,), (ranks_R,) = judge(counts_S[None])
    away_SS, unit_SS = np.abs(np.subtract.outer(range(plan.stages), range(plan.stages))), np.eye(plan.stages, dtype=int)
    for _ in range(4 * layers):
        allowed_SS = (away_SS == 1) | ((ranks_R[owner_S] >= 0.999 * busiest)[:, None] & (away_SS > 0))
        givers, takers = np.nonzero(allowed_SS & (counts_S > 0)[:, None])
        tries_TS = counts_S - unit_SS[givers] + unit_SS[takers]
        most_T, uneven_T, ranks_TR = judge(tries_TS)
        best = np.lexsort((uneven_T, np.round(most_T / busiest, 3)))[0]
        if (round(float(most_T[best] / busiest), 3), uneven_T[best]) >= (1.0, uneven):
            break
        counts_S, busiest, uneven, ranks_R = tries_TS[best], most_T[best], uneven_T[best], ranks_TR[best]
    return tuple(int(count) for count in counts_S)


def _cost(maker: StageMaker, first: int, count: int, *, is_first: bool = False, is_last: bool = False) -> float:
    time = maker.stage(first, count, is_first=is_first, is_last=is_last).time()
    return time.forward + time.backward


def _before(maker: StageMaker) -> list[float]:
    """Seconds of all layers before each one, and of all of them."""
    known: dict[tuple[int, ...], float] = {}
    sums = [0.0]
    for number, layer in enumerate(maker.layers):
        key = (
            *(id(maker.price(block)) for block in layer),
            int(number >= len(maker.shape.layers)),
        )  # an MTP module joins
        if key not in known:
            known[key] = _cost(maker, number, 1)
        sums.append(sums[-1] + known[key])
    return sums


def make_stages(shape: ModelShape, ranks: Sequence[Rank], *, mtp: bool = True) -> list[Stage]:
    """All stages in order; ``ranks`` has one entry, or one for each pipeline rank (mixed fleets)."""
    plan = ranks[0].plan
    makers = [StageMaker(shape, rank, mtp=mtp) for rank in ranks]
    stages, first = [], 0
    counts = balance_layers(makers)
    for number, count in enumerate(counts):
        maker = makers[plan.rank_of_stage(number) if len(makers) > 1 else 0]
        stages.append(maker.stage(first, count, is_first=number == 0, is_last=number == len(counts) - 1))
        first += count
    return stages
