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

Settings live in numpy arrays with a place per row (``Dials``): a row that moves takes its settings along in
one assignment, and no Python loop over rows runs in a step.

B rows, V vocabulary, K blocks of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sprat.engine.sequence import Sequence
from sprat.errors import EngineError

BLOCK = 64


def uniform(key_B: NDArray[np.uint64], position_B: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number of [0, 1) per row, a pure function of (key, position): SplitMix64 over both."""
    x = key_B + (position_B.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    fraction: NDArray[np.float64] = (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return fraction


class Dials:
    """The sampling settings of up to ``rows`` rows, one array per setting."""

    def __init__(self, rows: int) -> None:
        self.temperature = np.ones(rows, np.float32)
        self.top_k = np.zeros(rows, np.int64)
        self.top_p = np.ones(rows, np.float32)
        self.min_p = np.zeros(rows, np.float32)
        self.key = np.zeros(rows, np.uint64)
        self.position = np.zeros(rows, np.int64)  # tokens sampled so far
        self.ban = np.zeros(rows, np.int64)
        self.logprobs = np.zeros(rows, np.bool_)

    def reserve(self, rows: int) -> None:
        """Have room for ``rows`` rows; what is set stays."""
        for name, array in vars(self).items():
            if len(array) < rows:
                setattr(self, name, np.concatenate((array, np.zeros(rows - len(array), array.dtype))))

    def set(self, row: int, sequence: Sequence) -> None:
        """Give ``row`` the settings of ``sequence``."""
        sampling = sequence.sampling
        self.temperature[row] = sampling.temperature
        self.top_k[row] = sampling.top_k
        self.top_p[row] = sampling.top_p
        self.min_p[row] = sampling.min_p
        self.key[row] = sequence.key
        self.position[row] = len(sequence.token_ids)
        self.ban[row] = sequence.ban
        self.logprobs[row] = sampling.logprobs

    def move(self, source: Rows[int], target: Rows[int]) -> None:
        """Copy the settings of rows ``source`` to rows ``target``."""
        for array in vars(self).values():
            array[target] = array[source]


@dataclass(frozen=True)
class Samples:
    """One token per row, int64 [B], and its log-probability in nats, float32 [B], where asked."""

    tokens_B: Tensor
    logprobs_B: Tensor | None


def sample(logits_BV: Tensor, dials: Dials, banned: Rows[int] = (), vocab: int | None = None) -> Samples:
    """Sample one token for each of the first B rows of ``dials``.

    Args:
        logits_BV: float32.
        dials: settings of at least B rows; positions are not advanced here.
        banned: ids that a row may not sample while its position is below its ``ban``.
        vocab: ids from here on are never sampled (a model's padded vocabulary).

    Raises:
        EngineError: a row has logits that are not finite.
    """
    rows, device = logits_BV.shape[0], logits_BV.device
    heat = dials.temperature[:rows]
    greedy = heat == 0
    heat = np.where(greedy, np.float32(1), heat)
    full_BV = logits_BV
    logits_BV = logits_BV if vocab is None else logits_BV[:, :vocab]
    held = np.nonzero(dials.position[:rows] < dials.ban[:rows])[0]
    if len(held) and banned:
        logits_BV = logits_BV.clone()
        logits_BV[torch.from_numpy(held).to(device)[:, None], torch.tensor(list(banned), device=device)] = -torch.inf
    wanted = bool(dials.logprobs[:rows].any())
    if greedy.all():
        tokens_B, sum_B = logits_BV.argmax(-1), None
        _refuse_nan(logits_BV.gather(1, tokens_B[:, None]))
    else:
        tokens_B, sum_B = _draw(logits_BV, dials, heat)
        if greedy.any():
            tokens_B = torch.where(torch.from_numpy(greedy).to(device), logits_BV.argmax(-1), tokens_B)
    if not wanted:
        return Samples(tokens_B, None)
    scale_B = torch.from_numpy(np.float32(1) / heat).to(device)
    if sum_B is None or logits_BV.shape[1] < full_BV.shape[1]:
        sum_B = torch.logsumexp(full_BV * scale_B[:, None], -1)
    elif logits_BV is not full_BV:
        some = torch.from_numpy(held).to(device)
        sum_B[some] = torch.logsumexp(full_BV[some] * scale_B[some, None], -1)
    return Samples(tokens_B, full_BV.gather(1, tokens_B[:, None])[:, 0] * scale_B - sum_B)


def _draw(logits_BV: Tensor, dials: Dials, heat: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    """Tokens int64 [B] by inverse-CDF sampling at temperature ``heat``, and the log of the sum of exponentials [B]."""
    rows, device = logits_BV.shape[0], logits_BV.device
    weight_BV = logits_BV * torch.from_numpy(np.float32(1) / heat).to(device)[:, None]
    top_B1 = weight_BV.amax(-1, keepdim=True)
    weight_BV -= top_B1
    weight_BV.exp_()
    sum_B = top_B1[:, 0] + weight_BV.sum(-1).log()
    top_k, top_p, min_p = dials.top_k[:rows], dials.top_p[:rows], dials.min_p[:rows]
    cut = np.nonzero((top_k > 0) | (top_p < 1) | (min_p > 0))[0]
    if len(cut):
        at = torch.from_numpy(cut).to(device)
        limits = [torch.from_numpy(a[cut]).to(device) for a in (top_k, top_p, min_p)]
        weight_BV[at] = truncate(weight_BV[at], *limits)
    noise_B = torch.from_numpy(uniform(dials.key[:rows], dials.position[:rows])).to(device)
    return inverse_cdf(weight_BV, noise_B), sum_B


def truncate(weight_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor) -> Tensor:
    """Zero the weights that top-k, then top-p (Holtzman et al. 2020), then min-p (Nguyen et al. 2024) drop.

    Args:
        weight_BV: unnormalised probabilities, float32; the likeliest token always stays.
        top_k_B: int64, 0 keeps all. top_p_B, min_p_B: float32.
    """
    sorted_BV, order_BV = torch.sort(weight_BV, descending=True, stable=True)
    rank_V = torch.arange(weight_BV.shape[1], device=weight_BV.device)
    keep_BV = (rank_V < top_k_B[:, None]) | (top_k_B[:, None] == 0)
    mass_BV = (sorted_BV * keep_BV).double()
    before_BV = mass_BV.cumsum(-1) - mass_BV
    keep_BV &= (before_BV < top_p_B.double()[:, None] * mass_BV.sum(-1, keepdim=True)) | (top_p_B[:, None] >= 1)
    keep_BV &= sorted_BV >= min_p_B[:, None] * sorted_BV[:, :1]
    return torch.zeros_like(weight_BV).scatter_(1, order_BV, sorted_BV * keep_BV)


def inverse_cdf(weight_BV: Tensor, noise_B: Tensor) -> Tensor:
    """The index at which the cumulative weight first exceeds ``noise * total``, int64 [B].

    An entry of weight zero is never chosen. ``noise_B`` is float64 of [0, 1).

    Raises:
        EngineError: the weights of a row are not finite or all zero.
    """
    rows, vocab = weight_BV.shape
    spare = -vocab % BLOCK
    if spare:
        weight_BV = torch.nn.functional.pad(weight_BV, (0, spare))
    blocks_BKV = weight_BV.view(rows, -1, BLOCK)
    outer_BK = blocks_BKV.sum(-1).double().cumsum(-1)
    total_B = outer_BK[:, -1]
    _refuse_nan(total_B)
    goal_B = torch.minimum(noise_B * total_B, torch.nextafter(total_B, torch.zeros_like(total_B)))
    block_B = (outer_BK <= goal_B[:, None]).sum(-1)
    every_B = torch.arange(rows, device=weight_BV.device)
    inner_BV = blocks_BKV[every_B, block_B].double().cumsum(-1)
    start_B = outer_BK.gather(1, (block_B - 1).clamp(min=0)[:, None])[:, 0] * (block_B > 0)
    # The block's sum was rounded on its way, so the goal is held below what the block really holds.
    held_B = inner_BV[:, -1]
    rest_B = torch.minimum(goal_B - start_B, torch.nextafter(held_B, torch.zeros_like(held_B)))
    return block_B * BLOCK + (inner_BV <= rest_B[:, None]).sum(-1)


def _refuse_nan(values: Tensor) -> None:
    """Raise EngineError unless all values are finite."""
    if not bool(torch.isfinite(values).all()):
        todo = "use a checkpoint whose training did not diverge"
        raise EngineError("the model's logits are not finite", where="sampling", todo=todo)
