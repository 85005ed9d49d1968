"""Sampled answers for tests, each different, whatever sampled them."""

from __future__ import annotations

import random

import numpy as np
import torch

from sprat.post.rl.rewards import Response
from sprat.post.rl.rollout import Rollout


def rollout(group: int, sample: int, *, seed: int = 0, routes: bool = False, version: int = 0) -> Rollout:
    """Answer ``sample`` of ``group``; another ``seed`` gives another."""
    rng = random.Random(f"{seed}/{group}/{sample}")
    tokens = [rng.randrange(300) for _ in range(rng.randrange(1, 9))]
    prompt = [rng.randrange(300) for _ in range(3)] if sample < 0 else [7, group, 5]
    logprobs = [float(np.float32(-rng.random())) for _ in tokens]
    shape = (len(prompt) + len(tokens), 2, 3)
    return Rollout(
        task="lucky",
        prompt_ids=prompt,
        token_ids=tokens,
        logprobs=logprobs,
        response=Response("why\n", "é\U0001f600 7", True, True),
        reward=None if rng.random() < 0.2 else rng.choice([0.1 + 0.2, -1e-300, 1.0, 7.25]),
        score=rng.random(),
        prefill_tokens=3,
        group=group,
        sample=sample,
        problem_id=f"row {group}",
        versions=[version] * (len(tokens) - 1) + [version + 1],
        routes=torch.randint(0, 255, shape, dtype=torch.uint8) if routes else None,
        finish="length",
    )


def answers(group: int, size: int = 2, *, seed: int = 0, version: int = 0) -> list[Rollout]:
    """All answers of ``group``."""
    return [rollout(group, sample, seed=seed, version=version) for sample in range(size)]
