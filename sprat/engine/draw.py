"""From logits to tokens, all rows at once, each row with its own settings and its own noise.

The usual way, one ``torch.Generator`` per request and ``torch.multinomial`` row by row, costs some 20
microseconds a row: 10 ms for the 512 rows of one RL step, more than the model itself. Sharing one
generator is fast, but then a request's answer depends on who else is in the batch.

Here the noise is a pure function: a 64-bit hash (SplitMix64, Steele et al. 2014) of the request's key
and of the position gives one uniform number per row and step. That number picks the token by the
inverse of the cumulative distribution, so one number a row is enough where Gumbel noise needs one per
vocabulary entry. A request is thus reproducible alone or in a crowd, can be resumed at any position,
and a whole batch costs one exponential and one cumulative sum.

The distribution is kept unnormalised and the uniform number is scaled by its sum, so nothing is divided. The
cumulative sum goes over blocks first and then within the chosen block: long running sums in float32 would lose
the tail. Nothing is sorted whole either: sorting 49,152 weights takes 5 ms a row, three decode steps of a small
model. What top-k, top-p and min-p keep is found by comparing, and only that is sorted.

All of it runs on the host, in C++ (``kernels/src/sample.h``) or, without that, in numpy: a torch operation costs 5
to 10 microseconds before it does anything, and its argmax is 40 times slower. Only the exponential is torch's. Every
row is summed in an order that does not depend on the other rows.

R rows, V vocabulary, K blocks of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sprat.errors import EngineError
from sprat.kernels import native

BLOCK = 128
HEADS = (2.0**-6, 2.0**-12)  # shares of the greatest weight above which a nucleus usually lies
LEAST = np.float32(1e-45)  # the least float above 0
GREATEST = np.finfo(np.float32).max
GOLDEN, MIX, MIX_AGAIN = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
ONE, S11, S27, S30, S31 = (np.uint64(x) for x in (1, 11, 27, 30, 31))

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]


def uniform(key_R: NDArray[np.uint64], position_R: Integers) -> Doubles:
    """One number of [0, 1) per row, a pure function of (key, position): SplitMix64 over both."""
    x = key_R + (position_R.astype(np.uint64) + ONE) * GOLDEN
    x = (x ^ (x >> S30)) * MIX
    x = (x ^ (x >> S27)) * MIX_AGAIN
    x ^= x >> S31
    fraction: Doubles = (x >> S11) * 2.0**-53
    return fraction


def greatest(logits_RV: Floats, vocab: int) -> Integers:
    """The likeliest of the first ``vocab`` tokens of each row, the first of equals; int64 [R].

    Raises:
        EngineError: a row's logits are not finite.
    """
    tokens_R: Integers = logits_RV[:, :vocab].argmax(1)
    if not np.isfinite(logits_RV[np.arange(len(tokens_R)), tokens_R]).all():
        raise not_finite()
    return tokens_R


@dataclass(frozen=True)
class Scale:
    """What makes log-probabilities of a row's logits; see ``logprob``.

    Attributes:
        top_R: float32, the greatest logit of the vocabulary.
        sum_R: float32, the logarithm of the sum of exp((logit - top) / temperature) over the model's whole vocabulary.
    """

    top_R: Floats
    sum_R: Floats


@dataclass(frozen=True)
class Weights:
    """exp((logits - the row's greatest) / temperature), with sums.

    Attributes:
        weight_RKB: float32 [R, K, BLOCK]; ids behind the vocabulary weigh nothing.
        block_RK: float64, the sums of the blocks.
        scale: of the same rows.
    """

    weight_RKB: Floats
    block_RK: Doubles
    scale: Scale


def weigh(logits_RV: Floats, temperature_R: Floats, vocab: int) -> Weights:
    """Weights of the first ``vocab`` tokens of each row; ``temperature_R`` is above 0.

    The greatest logit is subtracted before anything is divided, so no temperature is too low. Ids behind the
    vocabulary count in ``Scale.sum_R`` alone: however likely, they take nothing from what may be drawn.

    Raises:
        EngineError: a row's logits are not finite.
    """
    weight_RV, top_R = _exponentials(logits_RV[:, :vocab], temperature_R)
    weight_RKB = weight_RV.reshape(len(weight_RV), -1, BLOCK)
    block_RK = np.einsum("rkb->rk", weight_RKB).astype(np.float64)
    sum_R = np.log(block_RK.sum(1))
    if vocab < logits_RV.shape[1]:
        rest_RV, high_R = _exponentials(np.maximum(logits_RV[:, vocab:], -GREATEST), temperature_R)
        above_R = (high_R.astype(np.float64) - top_R) / temperature_R
        sum_R = np.logaddexp(sum_R, np.log(rest_RV.sum(1, dtype=np.float64)) + above_R)
    return Weights(weight_RKB, block_RK, Scale(top_R, np.minimum(sum_R, GREATEST).astype(np.float32)))


def _exponentials(logits_RV: Floats, temperature_R: Floats) -> tuple[Floats, Floats]:
    """exp((logits - top) / temperature) in whole blocks, and top.

    Raises:
        EngineError: a row's logits are not finite.
    """
    rows, width = logits_RV.shape
    top_R = logits_RV.max(1)
    if not np.isfinite(top_R).all():
        raise not_finite()
    weight_RV = np.empty((rows, width + -width % BLOCK), np.float32)
    weight_RV[:, width:] = -np.inf
    inner_RV = weight_RV[:, :width]
    with np.errstate(over="ignore"):  # towards -inf, whose weight is 0
        heat_R = np.minimum(1 / temperature_R.astype(np.float64), GREATEST).astype(np.float32)
        np.subtract(logits_RV, top_R[:, None], out=inner_RV)
        inner_RV *= heat_R[:, None]
    torch.from_numpy(weight_RV).exp_()
    return weight_RV, top_R


def logprob(logit_R: Floats, temperature_R: Floats, scale: Scale) -> Floats:
    """Log-probabilities (nats) of logits at a temperature above 0, float32 [R], finite however low that is."""
    exact_R = (logit_R.astype(np.float64) - scale.top_R) / temperature_R - scale.sum_R
    return np.maximum(exact_R, -np.float64(GREATEST)).astype(np.float32)


def draw(
    logits_RV: Floats,
    temperature_R: Floats,
    top_k_R: Integers,
    top_p_R: Floats,
    min_p_R: Floats,
    noise_R: Doubles,
    vocab: int,
) -> tuple[Integers, Scale]:
    """Sample each row, natively where the kernels are; ``draw_here`` is their reference.

    Args:
        logits_RV: float32, rows contiguous; not modified.
        temperature_R: above 0.
        top_k_R: 0 keeps all. top_p_R: 1 keeps all. min_p_R: 0 keeps all.
        noise_R: one number of [0, 1) per row.
        vocab: ids from here on are never drawn.

    Returns:
        tokens int64 [R], and what makes log-probabilities of the same logits.

    Raises:
        EngineError: a row's logits are not finite.
    """
    kernels, limits = native(), (top_k_R, top_p_R, min_p_R)
    if kernels is None:
        return draw_here(logits_RV, temperature_R, *limits, noise_R, vocab)
    rows = len(noise_R)
    tokens_R, top_R, sum_R = np.empty(rows, np.int64), np.empty(rows, np.float32), np.empty(rows, np.float32)
    if not kernels.sample(logits_RV, vocab, temperature_R, *limits, noise_R, tokens_R, top_R, sum_R):
        raise not_finite()
    return tokens_R, Scale(top_R, sum_R)


def draw_here(
    logits_RV: Floats,
    temperature_R: Floats,
    top_k_R: Integers,
    top_p_R: Floats,
    min_p_R: Floats,
    noise_R: Doubles,
    vocab: int,
) -> tuple[Integers, Scale]:
    """``draw`` in numpy."""
    weights = weigh(logits_RV, temperature_R, vocab)
    cut = np.flatnonzero((top_k_R > 0) | (top_p_R < 1) | (min_p_R > 0)).tolist()
    rows = len(logits_RV)
    tokens_R = inverse_cdf(weights, noise_R) if len(cut) < rows else np.empty(rows, np.int64)
    for row in cut:
        weight_V, total = weights.weight_RKB[row].reshape(-1), float(weights.block_RK[row].sum())
        ids, kept = truncate(weight_V, total, int(top_k_R[row]), float(top_p_R[row]), float(min_p_R[row]))
        reached = kept.cumsum(dtype=np.float64)
        place = int(reached[:-1].searchsorted(noise_R[row] * reached[-1], side="right"))
        tokens_R[row] = ids[place]
    return tokens_R, weights.scale


def truncate(weight_V: Floats, total: float, top_k: int, top_p: float, min_p: float) -> tuple[Integers, Floats]:
    """What top-k, then top-p (Holtzman et al. 2020), then min-p (Nguyen et al. 2024) keep of one row.

    The likeliest token always stays; of equal weights the lower id goes before the higher.

    Args:
        weight_V: unnormalised probabilities, float32, and their sum.
        top_k: 0 keeps all. top_p: 1 keeps all. min_p: 0 keeps all.

    Returns:
        ids in ascending order, and their weights; none is zero.
    """
    lowest = np.float32(min_p) * weight_V.max()
    ids = _head(weight_V, total, top_k, top_p) if top_k > 0 or top_p < 1 else _above(weight_V, lowest)
    kept = weight_V[ids]
    if min_p > 0:
        stays = kept >= lowest
        ids, kept = ids[stays], kept[stays]
    return ids, kept


def _head(weight_V: Floats, total: float, top_k: int, top_p: float) -> Integers:
    """The ids that top-k, then top-p keep, ascending.

    The nucleus is the shortest beginning of the sorted weights that holds ``top_p`` of the mass. So every set
    ``weight >= floor`` that holds as much contains it, and only that set need be sorted.
    """
    limited = 0 < top_k < len(weight_V)
    if limited:
        head = _above(weight_V, np.partition(weight_V, -top_k)[-top_k])
    else:
        top = weight_V.max()
        for share in (*HEADS, 0.0):
            head = _above(weight_V, np.float32(share) * top)
            if float(weight_V[head].sum(dtype=np.float64)) >= top_p * total:
                break
    order = head[np.argsort(-weight_V[head], kind="stable")]
    if limited:
        order = order[:top_k]
    if top_p < 1:
        reached = weight_V[order].cumsum(dtype=np.float64)
        goal = top_p * (float(reached[-1]) if limited else total)
        order = order[: 1 + int(reached[:-1].searchsorted(goal))]
    order.sort()
    return order


def _above(weight_V: Floats, floor: np.float32) -> Integers:
    """The ids whose weight is at least ``floor`` and not zero, ascending."""
    return np.flatnonzero(weight_V >= max(floor, LEAST))


def inverse_cdf(weights: Weights, noise_R: Doubles) -> Integers:
    """The ids at which the cumulative weight first exceeds ``noise * total``, int64 [R].

    An entry of weight zero is never chosen. ``noise_R`` is of [0, 1).
    """
    every_R = np.arange(len(noise_R))
    outer_RK = weights.block_RK.cumsum(1)
    total_R = outer_RK[:, -1]
    goal_R = np.minimum(noise_R * total_R, np.nextafter(total_R, 0))
    block_R = (outer_RK <= goal_R[:, None]).sum(1)
    start_R = outer_RK[every_R, block_R - 1] * (block_R > 0)
    inner_RB = weights.weight_RKB[every_R, block_R].cumsum(1, dtype=np.float64)
    # The block's sum was rounded on its way, so the goal is held below what the block really holds.
    rest_R = np.minimum(goal_R - start_R, np.nextafter(inner_RB[:, -1], 0))
    tokens_R: Integers = block_R * BLOCK + (inner_RB <= rest_R[:, None]).sum(1)
    return tokens_R


class NotFinite(EngineError):
    """A model's logits are not finite."""


def not_finite() -> NotFinite:
    """The error of a model that is broken."""
    todo = "use a checkpoint whose training did not diverge"
    return NotFinite("the model's logits are not finite", where="sampling", todo=todo)
