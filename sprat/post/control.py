"""The control beside RL: what would plain labels have bought for the same compute?

GRPO sees only whether an answer was right. The fair question is what supervised training on the answers
themselves, without any reasoning, reaches from the same cold start with the same FLOPs. This file answers it:
fresh problems of the same mix, demonstrations with an empty think, as many steps as the budget pays for.
It is printed beside RL also where it wins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sprat.config import TrainConfig
from sprat.errors import TrainingError
from sprat.model import Transformer, flops_per_token
from sprat.post.sft import cold_start, sft
from sprat.tasks import Task
from sprat.tokens import Tokenizer, chat
from sprat.train import loop
from sprat.trust.run import Run

_PROBE = 256
_MOST = 50_000


def affordable_steps(model: Transformer, config: TrainConfig, flops: float) -> int:
    """Steps of ``config`` that cost at most ``flops`` (training is three times the forward pass).

    Raises:
        TrainingError: the budget does not pay for one step.
    """
    step = 3 * flops_per_token(model.config, config.seq_len) * config.batch_rows * config.seq_len
    if flops < step:
        what = f"a budget of {flops:.3g} FLOPs does not pay for one step of {step:.3g}"
        raise TrainingError(what, where="control", todo="lower batch_rows")
    return int(flops // step)


def control(
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    weights: Sequence[float],
    config: TrainConfig,
    run: Run,
    *,
    flops: float,
) -> loop.TrainResult:
    """Train ``model`` in place on direct answers for ``flops``; ``config.steps`` is replaced.

    Problems are fresh for the whole budget as far as 50,000 demonstrations reach, then epochs repeat.

    Raises:
        TrainingError: the budget does not pay for one step.
    """
    config = config.replace(steps=affordable_steps(model, config, flops))
    probe = cold_start(tasks, weights, count=_PROBE, terse_fraction=1.0, seed=config.seed)
    length = sum(len(chat.demonstration(tokenizer, *one)[0]) for one in probe) / _PROBE
    wanted = math.ceil(config.steps * config.batch_rows * config.seq_len / length)
    labels = cold_start(tasks, weights, count=min(max(wanted, _PROBE), _MOST), terse_fraction=1.0, seed=config.seed)
    return sft(model, tokenizer, labels, config, run)
