"""Sampled answers as right-padded micro-batches, and the hidden states at which their tokens were chosen.

Dims: B rows, T positions, D hidden, N response tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sprat.model import Transformer
from sprat.post.rl.rollout import Rollout

_MAX_MICRO_BATCH_TOKENS = 4096  # padded tokens of one forward pass; bounds memory, not the result


@dataclass(frozen=True)
class ResponseTokens:
    """The response tokens of some rollouts, ready for the head.

    Attributes:
        x_ND: hidden states (with gradient) at the positions before each token.
        targets_N: the tokens, int64.
        old_N: their log-probabilities when they were sampled.
        advantage_N: that of their rollout.
        importance_N: truncated weights of their mismatch; None where rollouts carry none.
    """

    x_ND: Tensor
    targets_N: Tensor
    old_N: Tensor
    advantage_N: Tensor
    importance_N: Tensor | None


def forward_responses(model: Transformer, rollouts: Sequence[Rollout], advantage_B: Tensor) -> ResponseTokens:
    """Run ``model`` over whole rollouts and keep the positions that predict response tokens.

    Rows are padded on the right, where a causal model never looks, so no mask is needed.
    """
    width = max(rollout.length for rollout in rollouts)
    tokens_BT = torch.zeros(len(rollouts), width, dtype=torch.int64)
    is_response_BT = torch.zeros(len(rollouts), width, dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
        tokens_BT[row, : rollout.length] = torch.tensor(rollout.prompt_ids + rollout.token_ids)
        is_response_BT[row, torch.tensor(rollout.trained_places, dtype=torch.int64) + len(rollout.prompt_ids)] = True
    device = model.norm.weight.device
    old = [rollout.logprobs[place] for rollout in rollouts for place in rollout.trained_places]
    old_N = torch.tensor(old, device=device)
    advantage_N = advantage_B.repeat_interleave(is_response_BT.sum(1)).to(device)
    importance_N = None
    if all(rollout.importance is not None for rollout in rollouts):
        weights = [rollout.importance[p] for rollout in rollouts if rollout.importance for p in rollout.trained_places]
        importance_N = torch.tensor(weights, device=device)
    tokens_BT, selected_BT = tokens_BT.to(device), is_response_BT[:, 1:].to(device)
    x_BTD = model.hidden(tokens_BT[:, :-1]).x_BTD
    return ResponseTokens(x_BTD[selected_BT], tokens_BT[:, 1:][selected_BT], old_N, advantage_N, importance_N)


def micro_batches(rollouts: Sequence[Rollout], rows: Sequence[int]) -> Iterator[list[int]]:
    """``rows`` sorted by length and cut so that each part, padded, holds a bounded number of tokens."""
    batch: list[int] = []
    for row in sorted(rows, key=lambda row: (rollouts[row].length, row)):
        if batch and rollouts[row].length * (len(batch) + 1) > _MAX_MICRO_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
