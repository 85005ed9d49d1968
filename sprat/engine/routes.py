"""Which experts each place of a request took, for those who ask: ``Sampling.routes``.

A trainer that computes an answer again may find two experts as good as equal and take the other one; from there on it
trains another policy than the one that sampled. So it takes the sampler's experts instead ("rollout routing replay",
Ma et al. 2025, arXiv 2510.11370), and for that the engine writes them down, place by place, as it computes them.

What the KV cache holds was computed for somebody else, and nobody knows any more by which experts. So a request that
asks computes its prompt itself, but for what is known of it already: its own places before it was preempted
(``Sequence.num_skippable``), and those of the sibling that computed the same prompt for it.

The weights may change while a request runs (``Engine.update_weights``), and then all of it is computed again. Each
place keeps the experts by which the token behind it was sampled.
"""

# T new tokens of a step, P places of a request, L MoE layers, K experts of a token in each

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sprat.config.model import ModelConfig
from sprat.engine.backend import Batch
from sprat.engine.sequence import ScheduledStep, Sequence


@dataclass(eq=False)
class Routes:
    """The experts of one request.

    Attributes:
        experts_PLK: uint8 where all have a number below 256, else int16.
        num_prompt: places of the prompt that are known; those of the answer are, but for its last token's.
    """

    experts_PLK: NDArray[Any]
    num_prompt: int = 0

    def upto(self, tokens: int, known: int) -> NDArray[Any]:
        """Those of the first ``tokens`` places, 0 from ``known`` on."""
        experts_PLK = self.experts_PLK[:tokens].copy()
        experts_PLK[known:] = 0
        return experts_PLK


def new_routes(config: ModelConfig, places: int) -> Routes | None:
    """Room for ``places`` of a request; None where the model has no experts."""
    layers = sum(config.is_moe(layer) for layer in range(config.num_hidden_layers))
    if not layers:
        return None
    dtype = np.uint8 if config.n_routed_experts <= 256 else np.int16
    return Routes(np.zeros((places, layers, config.num_experts_per_tok), dtype))


def room_for_routes(sequences: list[Sequence], tokens: int) -> NDArray[np.int16] | None:
    """Where the back end writes the experts of a step of ``tokens``; None where none of ``sequences`` asks."""
    for sequence in sequences:
        if sequence.routes is not None:
            return np.empty((tokens, *sequence.routes.experts_PLK.shape[1:]), np.int16)
    return None


def record_routes(batch: Batch, step: ScheduledStep) -> None:
    """Give each request that asks the experts of its tokens of this step, before anything is sampled."""
    if batch.routes_TLK is None:
        return
    starts = batch.starts_S.tolist()
    for number, sequence in enumerate(step.decoding):
        if sequence.routes is not None:  # drafts too; where one is refused, its place is written again
            rows = batch.routes_TLK[starts[number] : starts[number + 1]]
            first = int(batch.positions_T[starts[number]])
            sequence.routes.experts_PLK[first : first + len(rows)] = rows
    for number, chunk in enumerate(step.chunks, len(step.decoding)):
        if chunk.sequence.routes is not None:
            first, stop = max(chunk.start, chunk.sequence.num_routed), chunk.start + chunk.count
            rows = batch.routes_TLK[starts[number] + first - chunk.start : starts[number + 1]]
            chunk.sequence.routes.experts_PLK[first:stop] = rows
            chunk.sequence.routes.num_prompt = max(chunk.sequence.routes.num_prompt, stop)


def share_routes(group: list[Sequence]) -> None:
    """The first of ``group`` has computed the prompt of all of them."""
    owner = group[0].routes
    for sibling in group[1:]:
        if owner is not None and sibling.routes is not None:
            sibling.routes.experts_PLK[: owner.num_prompt] = owner.experts_PLK[: owner.num_prompt]
            sibling.routes.num_prompt = owner.num_prompt
