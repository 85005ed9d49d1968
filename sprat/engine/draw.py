"""From logits to tokens, all rows at once, each row with its own settings and its own noise.

The usual way, one ``torch.Generator`` per request and ``torch.multinomial`` row by row, costs some 20
microseconds a row: 10 ms for the 512 rows of one RL step, more than the model itself. Sharing one
generator is fast, but then a request's answer depends on who else is in the batch.

Here the noise is a pure function: a 64-bit hash (SplitMix64, Steele et al. 2014) of the request's key
and of the position gives one uniform number per row and step. That number picks the token by the
inverse of the cumulative distribution, so one number a row is enough where Gumbel noise needs one per
vocabulary entry. A request is thus reproducible alone or in a crowd, can be resumed at any position,
and a whole batch costs one exponential and one cumulative sum.

The distribution is kept unnormalised: truncation (top-k, then top-p, then min-p) sets weights to zero
and the uniform number is scaled by what remains, so nothing is divided. The cumulative sum goes over
blocks first and then within the chosen block: long running sums in float32 would lose the tail.

Nothing is sorted whole: sorting 49,152 weights takes 5 ms a row, three decode steps of a small model. Tokens
that cannot survive are found by comparing, and what is left to sort is the head of the distribution. And on a
CPU ``numpy`` looks for the greatest, 40 times faster than ``torch.argmax``.

R rows, V vocabulary, K blocks of the vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sprat.errors import EngineError

BLOCK = 64
HEADS = (2.0**-6, 2.0**-12)  # shares of the greatest weight above which a nucleus usually lies


def uniform(key_R: NDArray[np.uint64], position_R: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number of [0, 1) per row, a pure function of (key, position): SplitMix64 over both."""
    x = key_R + (position_R.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    fraction: NDArray[np.float64] = (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return fraction


def greatest(logits_RV: Tensor) -> NDArray[np.int64]:
    """The likeliest token of each row, the first of equals; int64 [R].

    Raises:
        EngineError: a row's logits are not finite.
    """
    if logits_RV.device.type != "cpu":
        tokens_R = logits_RV.argmax(-1)
        refuse_nan(logits_RV.gather(1, tokens_R[:, None]))
        found: NDArray[np.int64] = tokens_R.cpu().numpy()
        return found
    plain_RV = logits_RV.numpy()
    found = plain_RV.argmax(1)
    if not np.isfinite(plain_RV[np.arange(len(found)), found]).all():
        raise not_finite()
    return found


def draw(
    logits_RV: Tensor,
    temperature_R: NDArray[np.float32],
    top_k_R: NDArray[np.int64],
    top_p_R: NDArray[np.float32],
    min_p_R: NDArray[np.float32],
    noise_R: NDArray[np.float64],
    vocab: int,
) -> tuple[NDArray[np.int64], Tensor]:
    """Sample each row; the reference that a native sampler is held to.

    Args:
        logits_RV: float32; not modified.
        temperature_R: above 0.
        top_k_R: 0 keeps all. top_p_R: 1 keeps all. min_p_R: 0 keeps all.
        noise_R: one number of [0, 1) per row.
        vocab: ids from here on are never drawn.

    Returns:
        tokens int64 [R], and the logarithm of the sum of exp(logits / temperature) over all V, float32 [R].

    Raises:
        EngineError: a row's logits are not finite, or leave nothing to draw.
    """
    device = logits_RV.device
    weight_RV = logits_RV * torch.from_numpy(np.float32(1) / temperature_R).to(device)[:, None]
    top_R1 = weight_RV.amax(-1, keepdim=True)
    weight_RV.sub_(top_R1).exp_()
    sum_R = top_R1[:, 0] + weight_RV.sum(-1).log()
    if vocab < weight_RV.shape[1]:
        weight_RV = weight_RV[:, :vocab]
    for row in np.flatnonzero((top_k_R > 0) | (top_p_R < 1) | (min_p_R > 0)).tolist():
        weight_V = weight_RV[row].cpu().numpy()
        truncate(weight_V, int(top_k_R[row]), float(top_p_R[row]), float(min_p_R[row]))
        if device.type != "cpu":
            weight_RV[row] = torch.from_numpy(weight_V).to(device)
    tokens_R = inverse_cdf(weight_RV, torch.from_numpy(noise_R).to(device))
    return tokens_R.cpu().numpy(), sum_R


def truncate(weight_V: NDArray[np.float32], top_k: int, top_p: float, min_p: float) -> None:
    """Zero, in place, the weights that top-k, then top-p (Holtzman et al. 2020), then min-p (Nguyen et al. 2024) drop.

    The likeliest token always stays; of equal weights the lower id goes before the higher.

    Args:
        weight_V: unnormalised probabilities.
        top_k: 0 keeps all. top_p: 1 keeps all. min_p: 0 keeps all.
    """
    top = weight_V.max()
    if not np.isfinite(top) or top <= 0:
        return  # ``inverse_cdf`` names the fault
    if 0 < top_k < len(weight_V) or top_p < 1:
        keep = _head(weight_V, top_k, top_p)
        kept = weight_V[keep]
        weight_V[:] = 0
        weight_V[keep] = kept
    if min_p > 0:
        weight_V[weight_V < np.float32(min_p) * top] = 0


def _head(weight_V: NDArray[np.float32], top_k: int, top_p: float) -> NDArray[np.int64]:
    """The ids that top-k, then top-p keep, likeliest first.

    The nucleus is the shortest beginning of the sorted weights that holds ``top_p`` of the mass. So every set
    ``weight >= floor`` that holds as much contains it, and only that set need be sorted.
    """
    vocab, limited = len(weight_V), 0 < top_k < len(weight_V)
    if limited:
        floor = np.partition(weight_V, vocab - top_k)[vocab - top_k]
        head = np.flatnonzero(weight_V >= floor)
    else:
        total = float(weight_V.sum(dtype=np.float64))
        for share in (*HEADS, 0.0):
            head = np.flatnonzero(weight_V >= np.float32(share) * weight_V.max())
            if float(weight_V[head].sum(dtype=np.float64)) >= top_p * total:
                break
    order = head[np.argsort(-weight_V[head], kind="stable")]
    if limited:
        order = order[:top_k]
    if top_p >= 1:
        return order
    mass = weight_V[order].astype(np.float64)
    reached = mass.cumsum()
    goal = top_p * (float(reached[-1]) if limited else total)
    return order[: 1 + int((reached[:-1] < goal).sum())]


def inverse_cdf(weight_RV: Tensor, noise_R: Tensor) -> Tensor:
    """The index at which the cumulative weight first exceeds ``noise * total``, int64 [R].

    An entry of weight zero is never chosen. ``noise_R`` is float64 of [0, 1).

    Raises:
        EngineError: the weights of a row are not finite or all zero.
    """
    rows, vocab = weight_RV.shape
    spare = -vocab % BLOCK
    if spare or not weight_RV.is_contiguous():
        weight_RV = torch.nn.functional.pad(weight_RV, (0, spare))
    blocks_RKV = weight_RV.view(rows, -1, BLOCK)
    outer_RK = blocks_RKV.sum(-1).double().cumsum(-1)
    total_R = outer_RK[:, -1]
    refuse_nan(total_R.log())
    goal_R = torch.minimum(noise_R * total_R, torch.nextafter(total_R, torch.zeros_like(total_R)))
    block_R = (outer_RK <= goal_R[:, None]).sum(-1)
    every_R = torch.arange(rows, device=weight_RV.device)
    inner_RV = blocks_RKV[every_R, block_R].double().cumsum(-1)
    start_R = outer_RK.gather(1, (block_R - 1).clamp(min=0)[:, None])[:, 0] * (block_R > 0)
    # The block's sum was rounded on its way, so the goal is held below what the block really holds.
    held_R = inner_RV[:, -1]
    rest_R = torch.minimum(goal_R - start_R, torch.nextafter(held_R, torch.zeros_like(held_R)))
    return block_R * BLOCK + (inner_RV <= rest_R[:, None]).sum(-1)


def refuse_nan(values: Tensor) -> None:
    """Raise EngineError unless all values are finite."""
    if not bool(torch.isfinite(values).all()):
        raise not_finite()


def not_finite() -> EngineError:
    """The error of a model that is broken."""
    todo = "use a checkpoint whose training did not diverge"
    return EngineError("the model's logits are not finite", where="sampling", todo=todo)
