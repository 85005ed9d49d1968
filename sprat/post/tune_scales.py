"""Give a rounded model back what it lost: its scales learn to say what the original says.

GPTQ looks at one matrix at a time and at all that passes it alike; a model is asked for a few tokens, at the end of all
matrices. So the rounded model is shown what it was calibrated on once more, and its scales follow the gradient of
``KL(original || rounded)`` of the next token: distillation, with the model as it was for a teacher. Of conversations
only answers count, of texts all tokens; where there are both, each counts for half. Codes stay as they are, so that
the file has the same size and the same kernels (``quant.scales``).

That scales alone may learn is from PEQA (Kim et al., arXiv 2305.14152) and EfficientQAT (Chen et al., arXiv
2407.11062, section 3.3).

Some rows are kept apart. If the scales are no better on these than they were, they stay as they were.
"""

# B rows, T positions, N positions that count, D hidden, V vocabulary, C positions of a chunk

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from sprat.config import OptimConfig
from sprat.data.loader import IGNORE_INDEX, Batch, MixedBatchSource, gather_rows
from sprat.data.pack import PackedDataset
from sprat.errors import DataError, TrainingError
from sprat.kernels.mixed_precision import linear
from sprat.model import Transformer
from sprat.model.layers import set_compute_dtype
from sprat.quant.scales import keep_scales, learn_scales
from sprat.train import machine, optim, schedule
from sprat.train.losses import attention_segments

WINDOW = 256  # tokens of a row, at most
STEP_ROWS = 3  # of all parts together; the first has more of them than the others
HELD_OUT_ROWS = 8  # of each part, at most; and at most a quarter, but one
_CHUNK = 256  # positions whose logits are held at once


def tune_scales(
    rounded: Transformer,
    original: Transformer,
    parts: Sequence[PackedDataset],
    *,
    steps: int,
    lr: float,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> dict[str, Any]:
    """Train the scales of ``rounded`` in place; what came of it, KL in nats on rows that were not trained on.

    Args:
        original: dense float32, with the same vocabulary.
        parts: rows of one width; each part counts alike.
        lr: of a scale's relative change.
        on_progress: hears how many steps are done, of how many.

    Raises:
        DataError: see ``hold_out``.
        TrainingError: the loss is not finite.
    """
    machine.tune_allocator()
    held, sources = [], []
    for number, part in enumerate(parts):
        train, apart = hold_out(part, seed)
        held.append(gather_rows(apart, range(apart.num_rows)))
        rows = 1 if number else max(1, STEP_ROWS - len(parts) + 1)
        sources.append(MixedBatchSource([(train, 1.0)], rows=rows, seed=seed))
    dtype = torch.bfloat16 if machine.resolve_dtype("auto", "cpu") == "bfloat16" else None
    learn_scales(rounded)
    for model in (rounded, original):
        set_compute_dtype(model, dtype)
    config = OptimConfig(name="adamw", adam_lr=lr, schedule="cosine", warmup_steps=max(1, steps // 10))
    optimizer = optim.build(rounded, config)
    before = _mean_kl(rounded, original, held)
    for step in range(steps):
        for source in sources:
            kl = _kl(rounded, original, source.batch(step), weight=1 / len(sources))
            if not math.isfinite(kl):
                raise TrainingError("the loss is not finite", where=f"step {step + 1}", todo="lower tune_lr")
        optimizer.clip_grad_norm(config.grad_clip)
        optimizer.step(lr_factor=schedule.lr_factor(config, step, steps))
        optimizer.zero_grad()
        on_progress(step + 1, steps)
    after = _mean_kl(rounded, original, held)
    for model in (rounded, original):
        set_compute_dtype(model, None)
    keep_scales(rounded, learned=after < before)
    return {"steps": steps, "kl_before": before, "kl_after": after, "kept": after < before}


def hold_out(part: PackedDataset, seed: int) -> tuple[PackedDataset, PackedDataset]:
    """Rows of ``part`` to train on, and others; of rows of which nothing is learned nothing can be said.

    Raises:
        DataError: there are not two rows of which something is learned.
    """
    learned_BT = gather_rows(part, range(part.num_rows)).targets_BT != IGNORE_INDEX
    rows = np.flatnonzero(learned_BT.any(1).numpy())
    if len(rows) < 2:
        what = f"{len(rows)} rows of {part.seq_len + 1} tokens with something to learn are too few to tune scales on"
        raise DataError(
            what, where="tune_steps", todo="give more text, or more conversations whose answers are learned"
        )
    order = rows[np.random.default_rng(seed).permutation(len(rows))]
    count = max(1, min(HELD_OUT_ROWS, len(rows) // 4))
    pieces = (order[count:], order[:count])
    train, apart = (PackedDataset(part.tokens[at], part.segments[at], part.loss_mask[at]) for at in pieces)
    return train, apart


def _mean_kl(rounded: Transformer, original: Transformer, parts: Sequence[Batch]) -> float:
    """The mean over parts of the mean KL of their rows."""
    with torch.no_grad():
        return sum(
            sum(_kl(rounded, original, part[row : row + 1]) for row in range(len(part))) / len(part) for part in parts
        ) / len(parts)


def _kl(rounded: Transformer, original: Transformer, batch: Batch, weight: float = 1.0) -> float:
    """Mean ``KL(original || rounded)`` at the places of ``batch`` that carry loss.

    Where gradients are on, ``weight`` times that of the scales is added to theirs. Gradients are taken of the logits by
    hand (``p_rounded - p_original``), chunk by chunk, so that no logits of all places are ever held.
    """
    segments_BT, counts_BT = attention_segments(batch.segments_BT), batch.targets_BT != IGNORE_INDEX
    with torch.no_grad():
        exact_ND = original.hidden(batch.tokens_BT, segments_BT=segments_BT).x_BTD[counts_BT]
    x_ND = rounded.hidden(batch.tokens_BT, segments_BT=segments_BT).x_BTD[counts_BT]
    head_VD, exact_head_VD = rounded.head.dense_weight(), original.head.dense_weight()
    total, gradient_ND = 0.0, torch.empty_like(x_ND)
    with torch.no_grad():
        for rows in torch.arange(len(x_ND)).split(_CHUNK):
            log_p_CV = linear(x_ND[rows], head_VD).log_softmax(-1)
            exact_CV = linear(exact_ND[rows], exact_head_VD).log_softmax(-1)
            p_CV = exact_CV.exp()
            total += float((p_CV * (exact_CV - log_p_CV)).sum())
            gradient_ND[rows] = (log_p_CV.exp_() - p_CV) @ head_VD
    if x_ND.requires_grad:
        x_ND.backward(gradient_ND * (weight / max(1, len(x_ND))))
    return total / max(1, len(x_ND))
