"""How large a step is over the course of a run: one factor that multiplies every learning rate."""

from __future__ import annotations

import math

from sprat.config import OptimConfig


def lr_factor(config: OptimConfig, step: int, steps: int) -> float:
    """The factor of ``step`` (from 0) in a run of ``steps``; 1 is the full rate.

    All schedules first warm up linearly over ``warmup_steps``, but over no more than half the run. Then:

    * ``wsd`` holds the full rate and falls linearly over the last ``decay_fraction`` of the run
      (warmup-stable-decay: MiniCPM, arXiv 2404.06395, section 4; linear fall: Hägele et al., arXiv 2405.18392);
    * ``cosine`` falls along half a cosine (Loshchilov and Hutter, arXiv 1608.03983);
    * ``constant`` stays.

    The fall ends at ``final_lr_fraction`` one step *after* the last, so that no step is spent at rate zero.

    >>> [round(lr_factor(OptimConfig(warmup_steps=2, decay_fraction=0.5), step, 8), 2) for step in range(8)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup = min(config.warmup_steps, steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    floor = config.final_lr_fraction
    if config.schedule == "cosine":
        done = (step - warmup) / max(1, steps - warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    falling = _falling(config, steps)
    left = min(1.0, (steps - step) / falling)
    return floor + (1 - floor) * left


def stable_steps(config: OptimConfig, steps: int) -> int:
    """After how many steps of a run of ``steps`` the rate has not yet begun to fall: from there any longer run goes on
    as if it had been meant from the start. All of them with ``constant``, none with ``cosine``.

    >>> stable_steps(OptimConfig(decay_fraction=0.5), 8)
    5
    """
    if config.schedule == "wsd":
        return min(steps, steps - _falling(config, steps) + 1)
    return steps if config.schedule == "constant" else 0


def _falling(config: OptimConfig, steps: int) -> int:
    """Over how many steps ``wsd`` falls."""
    return max(1, round(config.decay_fraction * steps))
