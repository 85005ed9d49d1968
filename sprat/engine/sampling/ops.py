# size: one noun: what a step does with arrays on the host, from slots to tokens
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
row is summed in an order that does not depend on the other rows. For the few rows of most steps even numpy's way into
an operation is long, so ``add_at`` and ``put_at`` go slot by slot there.

R rows, V vocabulary, K blocks of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sprat.engine.sequence import SMALL_BATCH, SlotIndex
from sprat.errors import EngineError
from sprat.kernels import native

VOCAB_BLOCK = 128
NUCLEUS_FLOORS = (2.0**-6, 2.0**-12)  # shares of the greatest weight above which a nucleus usually lies
SMALLEST = np.float32(1e-45)  # the least float above 0
LARGEST = np.finfo(np.float32).max
GOLDEN, MIX, MIX_AGAIN = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
ONE, S11, S27, S30, S31 = (np.uint64(x) for x in (1, 11, 27, 30, 31))

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]


def add_at(array_S: NDArray[Any], index: SlotIndex, by: int | list[int]) -> None:
    """``array_S[index] += by``; few slots go one by one, see ``ScheduledStep``."""
    if not isinstance(index, list):
        array_S[index] += by
    elif isinstance(by, int):
        for slot in index:
            array_S[slot] += by
    else:
        for slot, more in zip(index, by, strict=True):
            array_S[slot] += more


def put_at(array_S: NDArray[Any], index: SlotIndex, values: list[int]) -> None:
    """``array_S[index] = values``."""
    if isinstance(index, list):
        for slot, value in zip(index, values, strict=True):
            array_S[slot] = value
    else:
        array_S[index] = values


def row_index(count: int) -> SlotIndex:
    """The first ``count`` rows as an index."""
    return list(range(count)) if count <= SMALL_BATCH else np.arange(count)


def uniform(key_R: NDArray[np.uint64], position_R: Integers) -> Doubles:
    """One number of [0, 1) per row, a pure function of (key, position): SplitMix64 over both."""
    x = key_R + (position_R.astype(np.uint64) + ONE) * GOLDEN
    x = (x ^ (x >> S30)) * MIX
    x = (x ^ (x >> S27)) * MIX_AGAIN
    x ^= x >> S31
    fraction: Doubles = (x >> S11) * 2.0**-53
    return fraction


def argmax(logits_RV: Floats, vocab: int) -> Integers:
    """The likeliest of the first ``vocab`` tokens of each row, the first of equals; int64 [R].

    Raises:
        EngineError: a row's logits are not finite.
    """
    tokens_R: Integers = logits_RV[:, :vocab].argmax(1)
    if not np.isfinite(logits_RV[np.arange(len(tokens_R)), tokens_R]).all():
        raise not_finite()
    return tokens_R


@dataclass(frozen=True)
class LogNormalizer:
    """What makes log-probabilities of a row's logits; see ``logprob``.

    Attributes:
        max_R: float32, the greatest logit of the vocabulary.
        log_sum_R: float32, the logarithm of the sum of exp((logit - max) / temperature) over the model's whole
            vocabulary.
    """

    max_R: Floats
    log_sum_R: Floats


class Truncation(NamedTuple):
    """How much of each row's distribution is kept; see ``top_k_top_p``.

    Attributes:
        top_k_R: 0 keeps all. top_p_R: 1 keeps all. min_p_R: 0 keeps all.
    """

    top_k_R: Integers
    top_p_R: Floats
    min_p_R: Floats


@dataclass(frozen=True)
class SoftmaxWeights:
    """exp((logits - the row's greatest) / temperature), with sums.

    Attributes:
        weight_RKB: float32 [R, K, VOCAB_BLOCK]; ids behind the vocabulary weigh nothing.
        block_RK: float64, the sums of the blocks.
        normalizer: of the same rows.
    """

    weight_RKB: Floats
    block_RK: Doubles
    normalizer: LogNormalizer


def softmax_weights(logits_RV: Floats, temperature_R: Floats, vocab: int) -> SoftmaxWeights:
    """Weights of the first ``vocab`` tokens of each row; ``temperature_R`` is above 0.

    The greatest logit is subtracted before anything is divided, so no temperature is too low. Ids behind the
    vocabulary count in ``LogNormalizer.log_sum_R`` alone: however likely, they take nothing from what may be sampled.

    Raises:
        EngineError: a row's logits are not finite.
    """
    weight_RV, max_R = _exponentials(logits_RV[:, :vocab], temperature_R)
    weight_RKB = weight_RV.reshape(len(weight_RV), -1, VOCAB_BLOCK)
    block_RK = np.einsum("rkb->rk", weight_RKB).astype(np.float64)
    log_sum_R = np.log(block_RK.sum(1))
    if vocab < logits_RV.shape[1]:
        rest_RV, rest_max_R = _exponentials(np.maximum(logits_RV[:, vocab:], -LARGEST), temperature_R)
        above_R = (rest_max_R.astype(np.float64) - max_R) / temperature_R
        log_sum_R = np.logaddexp(log_sum_R, np.log(rest_RV.sum(1, dtype=np.float64)) + above_R)
    return SoftmaxWeights(weight_RKB, block_RK, LogNormalizer(max_R, np.minimum(log_sum_R, LARGEST).astype(np.float32)))


def _exponentials(logits_RV: Floats, temperature_R: Floats) -> tuple[Floats, Floats]:
    """exp((logits - max) / temperature) in whole blocks, and max.

    Raises:
        EngineError: a row's logits are not finite.
    """
    rows, width = logits_RV.shape
    max_R = logits_RV.max(1)
    if not np.isfinite(max_R).all():
        raise not_finite()
    weight_RV = np.empty((rows, width + -width % VOCAB_BLOCK), np.float32)
    weight_RV[:, width:] = -np.inf
    inner_RV = weight_RV[:, :width]
    with np.errstate(over="ignore"):  # towards -inf, whose weight is 0
        inverse_R = np.minimum(1 / temperature_R.astype(np.float64), LARGEST).astype(np.float32)
        np.subtract(logits_RV, max_R[:, None], out=inner_RV)
        inner_RV *= inverse_R[:, None]
    torch.from_numpy(weight_RV).exp_()
    return weight_RV, max_R


def logprob(logit_R: Floats, temperature_R: Floats, normalizer: LogNormalizer) -> Floats:
    """Log-probabilities (nats) of logits at a temperature above 0, float32 [R], finite however low that is."""
    exact_R = (logit_R.astype(np.float64) - normalizer.max_R) / temperature_R - normalizer.log_sum_R
    return np.maximum(exact_R, -np.float64(LARGEST)).astype(np.float32)


def sample(
    logits_RV: Floats, temperature_R: Floats, truncation: Truncation, noise_R: Doubles, vocab: int
) -> tuple[Integers, LogNormalizer]:
    """Sample each row, natively where the kernels are; ``sample_numpy`` is their reference.

    Args:
        logits_RV: float32, rows contiguous; not modified.
        temperature_R: above 0.
        noise_R: one number of [0, 1) per row.
        vocab: ids from here on are never sampled.

    Returns:
        tokens int64 [R], and what makes log-probabilities of the same logits.

    Raises:
        EngineError: a row's logits are not finite.
    """
    kernels = native()
    if kernels is None:
        return sample_numpy(logits_RV, temperature_R, truncation, noise_R, vocab)
    rows = len(noise_R)
    tokens_R, max_R, log_sum_R = np.empty(rows, np.int64), np.empty(rows, np.float32), np.empty(rows, np.float32)
    if not kernels.sample(logits_RV, vocab, temperature_R, *truncation, noise_R, tokens_R, max_R, log_sum_R):
        raise not_finite()
    return tokens_R, LogNormalizer(max_R, log_sum_R)


def sample_numpy(
    logits_RV: Floats, temperature_R: Floats, truncation: Truncation, noise_R: Doubles, vocab: int
) -> tuple[Integers, LogNormalizer]:
    """``sample`` in numpy."""
    weights = softmax_weights(logits_RV, temperature_R, vocab)
    top_k_R, top_p_R, min_p_R = truncation
    truncated = np.flatnonzero((top_k_R > 0) | (top_p_R < 1) | (min_p_R > 0)).tolist()
    rows = len(logits_RV)
    tokens_R = inverse_cdf(weights, noise_R) if len(truncated) < rows else np.empty(rows, np.int64)
    for row in truncated:
        weight_V, total = weights.weight_RKB[row].reshape(-1), float(weights.block_RK[row].sum())
        ids, kept_weights = top_k_top_p(weight_V, total, int(top_k_R[row]), float(top_p_R[row]), float(min_p_R[row]))
        cumulative = kept_weights.cumsum(dtype=np.float64)
        index = int(cumulative[:-1].searchsorted(noise_R[row] * cumulative[-1], side="right"))
        tokens_R[row] = ids[index]
    return tokens_R, weights.normalizer


def top_k_top_p(weight_V: Floats, total: float, top_k: int, top_p: float, min_p: float) -> tuple[Integers, Floats]:
    """What top-k, then top-p (Holtzman et al. 2020), then min-p (Nguyen et al. 2024) keep of one row.

    The likeliest token always stays; of equal weights the lower id goes before the higher.

    Args:
        weight_V: unnormalised probabilities, float32, and their sum.
        top_k: 0 keeps all. top_p: 1 keeps all. min_p: 0 keeps all.

    Returns:
        ids in ascending order, and their weights; none is zero.
    """
    lowest = np.float32(min_p) * weight_V.max()
    ids = _top_k_top_p_ids(weight_V, total, top_k, top_p) if top_k > 0 or top_p < 1 else _ids_above(weight_V, lowest)
    weights = weight_V[ids]
    if min_p > 0:
        likely = weights >= lowest
        ids, weights = ids[likely], weights[likely]
    return ids, weights


def _top_k_top_p_ids(weight_V: Floats, total: float, top_k: int, top_p: float) -> Integers:
    """The ids that top-k, then top-p keep, ascending.

    The nucleus is the shortest beginning of the sorted weights that holds ``top_p`` of the mass. So every set
    ``weight >= floor`` that holds as much contains it, and only that set need be sorted.
    """
    limited = 0 < top_k < len(weight_V)
    if limited:
        candidates = _ids_above(weight_V, np.partition(weight_V, -top_k)[-top_k])
    else:
        top = weight_V.max()
        for floor in (*NUCLEUS_FLOORS, 0.0):
            candidates = _ids_above(weight_V, np.float32(floor) * top)
            if float(weight_V[candidates].sum(dtype=np.float64)) >= top_p * total:
                break
    order = candidates[np.argsort(-weight_V[candidates], kind="stable")]
    if limited:
        order = order[:top_k]
    if top_p < 1:
        cumulative = weight_V[order].cumsum(dtype=np.float64)
        target = top_p * (float(cumulative[-1]) if limited else total)
        order = order[: 1 + int(cumulative[:-1].searchsorted(target))]
    order.sort()
    return order


def _ids_above(weight_V: Floats, floor: np.float32) -> Integers:
    """The ids whose weight is at least ``floor`` and not zero, ascending."""
    return np.flatnonzero(weight_V >= max(floor, SMALLEST))


def inverse_cdf(weights: SoftmaxWeights, noise_R: Doubles) -> Integers:
    """The ids at which the cumulative weight first exceeds ``noise * total``, int64 [R].

    An entry of weight zero is never chosen. ``noise_R`` is of [0, 1).
    """
    every_R = np.arange(len(noise_R))
    outer_RK = weights.block_RK.cumsum(1)
    total_R = outer_RK[:, -1]
    target_R = np.minimum(noise_R * total_R, np.nextafter(total_R, 0))
    block_R = (outer_RK <= target_R[:, None]).sum(1)
    start_R = outer_RK[every_R, block_R - 1] * (block_R > 0)
    inner_RB = weights.weight_RKB[every_R, block_R].cumsum(1, dtype=np.float64)
    # The block's sum was rounded on its way, so the target is held below what the block really holds.
    rest_R = np.minimum(target_R - start_R, np.nextafter(inner_RB[:, -1], 0))
    tokens_R: Integers = block_R * VOCAB_BLOCK + (inner_RB <= rest_R[:, None]).sum(1)
    return tokens_R


class NotFinite(EngineError):
    """A model's logits are not finite."""


def not_finite() -> NotFinite:
    """The error of a model that is broken."""
    todo = "use a checkpoint whose training did not diverge"
    return NotFinite("the model's logits are not finite", where="sampling", todo=todo)
