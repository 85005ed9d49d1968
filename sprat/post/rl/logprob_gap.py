"""How far the trainer is from the sampler, token by token, and how often their experts differ: columns of a run's log.

Both compute the same weights, and still not the same numbers: sums are taken in another order, the sampler may be
rounded to fewer bits, and a router may find two experts as good as equal. What is trained is then not what sampled. So
both are measured in each step, before a weight moves, and trip wires bound them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sprat.post.rl.batch import ResponseTokens, RouteCounts
from sprat.post.rl.rollout import Rollout


@dataclass
class LogprobGap:
    """The gaps of a step's tokens that the trainer's own weights sampled, and what became of the sampler's experts.

    Others differ because the policy has moved since.

    Args:
        measures: False where nobody asks; it costs nothing then.
    """

    step: int
    measures: bool = True
    gaps: list[Tensor] = field(default_factory=list)
    first: RouteCounts = RouteCounts()  # of the tokens that are compared
    trained: RouteCounts = RouteCounts()  # of all

    def compare(self, trainer_N: Tensor, tokens: ResponseTokens, rollouts: Sequence[Rollout]) -> None:
        """The log-probabilities of ``tokens``, those of ``rollouts``, before a weight moves."""
        if not self.measures:
            return
        is_own_N = torch.tensor([version == self.step - 1 for rollout in rollouts for version in rollout.versions])
        gap_N = (trainer_N.double() - tokens.old_N.double()).abs().cpu()
        self.gaps.append(gap_N[is_own_N] if len(is_own_N) == len(gap_N) else gap_N)
        self.first += tokens.routes

    def metrics(self) -> dict[str, float]:
        """Mean, 99th percentile and largest gap (nats), none where no token counts; shares of routes, where there are.

        ``routes_replayed`` is of all that is trained, ``route_flips`` of what is compared.
        """
        gap_N, metrics = torch.cat(self.gaps) if self.gaps else torch.zeros(0), dict[str, float]()
        if not self.measures:
            return metrics
        if count := len(gap_N):
            place = math.ceil(0.99 * count)
            metrics = {
                "logprob_gap_mean": float(gap_N.mean()),
                "logprob_gap_p99": float(gap_N.kthvalue(place).values),
                "logprob_gap_max": float(gap_N.max()),
            }
        if self.trained.places:
            metrics["routes_replayed"] = self.trained.replayed / self.trained.places
        if self.first.replayed:
            metrics["route_flips"] = self.first.flipped / self.first.replayed
        return metrics
