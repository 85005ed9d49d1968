"""Sampled answers as right-padded micro-batches, and the hidden states at which their tokens were chosen.

Where a rollout has the experts that its sampler took, they are taken again (``MoE``): the policy that is trained is
then the one that sampled, also where two experts are as good as equal.

Dims: B rows, T positions, D hidden, N response tokens, L MoE layers, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sprat.config.model import ModelConfig
from sprat.errors import TrainingError
from sprat.model import Routing, Transformer
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
        routes: how many of the sampler's choices of experts were taken again.
        sampled_N: the sampler's log-probabilities, where ``old_N`` are the trainer's.
    """

    x_ND: Tensor
    targets_N: Tensor
    old_N: Tensor
    advantage_N: Tensor
    importance_N: Tensor | None
    routes: RouteCounts
    sampled_N: Tensor | None = None


@dataclass(frozen=True)
class RouteCounts:
    """Of the tokens of some rollouts, in each MoE layer: all choices, those that were replayed, those that would flip.

    Attributes:
        places: tokens that a model computes, times MoE layers.
        replayed: of those, where the sampler's experts were taken.
        flipped: of those, where the router's own choice would have been another.
    """

    places: int = 0
    replayed: int = 0
    flipped: int = 0

    def __add__(self, other: RouteCounts) -> RouteCounts:
        """Both together."""
        return RouteCounts(self.places + other.places, self.replayed + other.replayed, self.flipped + other.flipped)


def forward_responses(
    model: Transformer, rollouts: Sequence[Rollout], advantage_B: Tensor, *, replay_routes: bool = True
) -> ResponseTokens:
    """Run ``model`` over whole rollouts and keep the positions that predict response tokens.

    Rows are padded on the right, where a causal model never looks, so no mask is needed.

    Args:
        replay_routes: take the experts that rollouts have; a model that is not the policy takes its own.

    Raises:
        TrainingError: a rollout's experts are not those of this model.
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
    importance_N = _of_tokens(rollouts, [rollout.importance for rollout in rollouts], device)
    sampled_N = _of_tokens(rollouts, [rollout.sampled_logprobs for rollout in rollouts], device)
    tokens_BT, selected_BT = tokens_BT.to(device), is_response_BT[:, 1:].to(device)
    routes_BTLK = _routes(model.config, rollouts, width - 1) if replay_routes else None
    out = model.hidden(tokens_BT[:, :-1], routes_BTLK=None if routes_BTLK is None else routes_BTLK.to(device))
    tokens = sum(rollout.length - 1 for rollout in rollouts)
    counts = RouteCounts() if routes_BTLK is None else _count(out.routing, routes_BTLK, tokens)
    targets_N = tokens_BT[:, 1:][selected_BT]
    return ResponseTokens(out.x_BTD[selected_BT], targets_N, old_N, advantage_N, importance_N, counts, sampled_N)


def _of_tokens(
    rollouts: Sequence[Rollout], values: Sequence[list[float] | None], device: torch.device
) -> Tensor | None:
    """What ``values`` have for each response token [N]; None where some rollout has none."""
    known = [own for own in values if own is not None]
    if len(known) < len(values):
        return None
    each = [own[place] for rollout, own in zip(rollouts, known, strict=True) for place in rollout.trained_places]
    return torch.tensor(each, device=device)


def _routes(config: ModelConfig, rollouts: Sequence[Rollout], width: int) -> Tensor | None:
    """The sampler's experts, long [B, T, L, K], -1 where nobody knows them; None where nobody does at all.

    Raises:
        TrainingError: they are not of this model.
    """
    if all(rollout.routes is None for rollout in rollouts):
        return None
    layers = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
    routes_BTLK = torch.full((len(rollouts), width, layers, config.num_experts_per_tok), -1, dtype=torch.int64)
    for row, rollout in enumerate(rollouts):
        if rollout.routes is None:
            continue
        experts_TLK = rollout.routes[: rollout.length - 1].long()
        if rollout.routes.shape != (rollout.length, *routes_BTLK.shape[2:]) or not _are_experts(experts_TLK, config):
            where = f"group {rollout.group}, answer {rollout.sample}"
            todo = "sample with the model that is trained, or set replay_routes=false"
            raise TrainingError("the experts of an answer are not those of this model", where=where, todo=todo)
        routes_BTLK[row, : rollout.length - 1] = experts_TLK
    return routes_BTLK


def _are_experts(experts_TLK: Tensor, config: ModelConfig) -> bool:
    """Whether each token has so many different experts of this model in each layer."""
    sorted_TLK = experts_TLK.sort(-1).values
    in_range = bool((sorted_TLK[..., 0] >= 0).all() and (sorted_TLK[..., -1] < config.n_routed_experts).all())
    return in_range and bool((sorted_TLK.diff(dim=-1) > 0).all())


def _count(routing: Sequence[Routing], routes_BTLK: Tensor, tokens: int) -> RouteCounts:
    """What became of the given choices of ``tokens`` tokens."""
    replayed = flipped = 0
    for layer, decided in enumerate(routing):
        given_NK = routes_BTLK[:, :, layer].flatten(0, 1).to(decided.index_NK.device)
        is_given_N = given_NK[:, 0] >= 0
        replayed += int((decided.index_NK == given_NK)[is_given_N].all(-1).sum())
        flipped += int(decided.flipped_N.sum()) if decided.flipped_N is not None else 0
    return RouteCounts(tokens * len(routing), replayed, flipped)


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
