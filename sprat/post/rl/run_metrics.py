"""What a run of RL on the user's questions logs of each step, beside what the station logs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch

from sprat.config import RLConfig
from sprat.model import Transformer
from sprat.post.rl.batch import forward_responses, micro_batches
from sprat.post.rl.rewards import FAULTS
from sprat.post.rl.rollout import Rollout
from sprat.train.losses import token_logprob


def run_metrics(rollouts: Sequence[Rollout], step: int, group_size: int) -> dict[str, float]:
    """Faults by kind, answers at the limit, staleness, the second judge's mean, and errors of the means.

    ``staleness``: how many steps older than the trainer's the weights were that sampled a token, on average.
    ``versions_per_answer``: of the weights, where they changed in the middle of one. Errors are standard errors over
    groups, of which each is one draw.
    """
    count = len(rollouts)
    groups = [rollouts[start : start + group_size] for start in range(0, count, group_size)]
    versions = [step - 1 - version for rollout in rollouts for version in rollout.versions]
    metrics = {
        "reward_faults": float(sum(rollout.outcome in FAULTS for rollout in rollouts)),
        "timeouts": float(sum(rollout.outcome == "timeout" for rollout in rollouts)),
        "cut_share": sum(rollout.finish == "length" for rollout in rollouts) / count,
        "staleness": statistics.fmean(versions) if versions else 0.0,
        "reward_error": _standard_error([_mean([each.reward for each in group]) for group in groups]),
    }
    if (spans := [len(set(rollout.versions)) for rollout in rollouts]) and max(spans) > 1:
        metrics["versions_per_answer"] = statistics.fmean(spans)
    seconds = [_mean([each.second for each in group]) for group in groups]
    if any(each is not None for each in seconds):
        means = [each for each in seconds if each is not None]
        metrics |= {"second_reward": statistics.fmean(means), "second_reward_error": _standard_error(seconds)}
    return metrics


@torch.no_grad()
def kl_from_start(reference: Transformer, rollouts: Sequence[Rollout], config: RLConfig) -> float:
    """KL(policy || start) a token, in nats, on the first answer of each group (k3 of Schulman 2020)."""
    first = [rollout for rollout in rollouts if rollout.sample == 0 and rollout.num_sampled]
    if not first:
        return 0.0
    total, count, head_VD = 0.0, 0, reference.head.dense_weight()
    for micro in micro_batches(first, range(len(first))):
        tokens = forward_responses(
            reference, [first[row] for row in micro], torch.zeros(len(micro)), replay_routes=False
        )
        start_N, _ = token_logprob(tokens.x_ND, head_VD, tokens.targets_N, config.temperature)
        log_ratio_N = start_N.double() - tokens.old_N.double()
        total, count = total + float((log_ratio_N.exp() - 1 - log_ratio_N).sum()), count + len(log_ratio_N)
    return total / count


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _standard_error(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else 0.0
