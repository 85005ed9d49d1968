"""What is wanted of a prompt itself: log-probabilities of its tokens, or its mean hidden state as an embedding.

Such a prompt goes through the scheduler like any other, piece by piece beside the answers that run, and what is wanted
of a piece is taken right after it was computed. A piece has as many rows of logits as tokens, and each is as long as
the vocabulary; so they are made a few rows at a time, and of each only some numbers stay.

A row that nobody computes gives nothing, so blocks of the prefix cache are used only for what was scored before the
request was preempted (``Sequence.num_skippable``).
"""

# R rows of logits, V vocabulary, D hidden

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sprat.engine.backend import Backend, Batch
from sprat.engine.sampling.ops import not_finite
from sprat.engine.sequence import ScheduledStep, Sequence, TopLogprobs
from sprat.errors import EngineError

ROWS = 64  # of logits that are made at once


def score_prompts(backend: Backend, batch: Batch, step: ScheduledStep) -> None:
    """Take from the last ``run`` what the requests of this step want of their prompts.

    Raises:
        EngineError: the model's logits are not finite.
    """
    for number, chunk in enumerate(step.chunks, len(step.decoding)):
        sequence, stop = chunk.sequence, chunk.start + chunk.count
        offset = int(batch.starts_S[number]) - chunk.start
        while sequence.num_scored < (end := min(stop, sequence.num_to_score)):
            first = sequence.num_scored
            end = min(end, first + ROWS)
            index_R = np.arange(first + offset, end + offset, dtype=np.int32)
            if sequence.scoring == "hidden":
                total_D = backend.hidden(batch, index_R).double().sum(0).cpu().numpy()
                sequence.hidden_sum_D = total_D if sequence.hidden_sum_D is None else sequence.hidden_sum_D + total_D
            else:
                _score(sequence, backend.logits(batch, index_R), sequence.prompt_ids[first + 1 : end + 1])
            sequence.num_scored = end


def _score(sequence: Sequence, logits_RV: Tensor, next_ids: list[int]) -> None:
    """Keep the log-probabilities of the tokens that stand behind these rows, and of the likeliest in their place."""
    log_sum_R1 = logits_RV.logsumexp(-1, keepdim=True)
    if not log_sum_R1.isfinite().all():
        raise not_finite()
    next_R1 = torch.tensor(next_ids, device=logits_RV.device)[:, None]
    sequence.prompt_logprobs += (logits_RV.gather(1, next_R1) - log_sum_R1)[:, 0].tolist()
    if count := min(sequence.sampling.top_logprobs, logits_RV.shape[1]):
        least_R = logits_RV.topk(count).values[:, -1].tolist()
        for logits_V, log_sum, least in zip(logits_RV, log_sum_R1[:, 0], least_R, strict=True):
            sequence.prompt_top_logprobs.append(_top(logits_V, log_sum, least, count))


def _top(logits_V: Tensor, log_sum: Tensor, least: float, count: int) -> TopLogprobs:
    """The ``count`` likeliest tokens of a row, whose logits are ``least`` or more; of equals the first."""
    ids = (logits_V >= least).nonzero()[:, 0]
    ids = ids[logits_V[ids].argsort(descending=True, stable=True)][:count]
    return list(zip(ids.tolist(), (logits_V[ids] - log_sum).tolist(), strict=True))


def embedding(sequence: Sequence) -> list[float]:
    """The mean hidden state of a finished request's prompt, scaled to length 1.

    Raises:
        EngineError: it was cancelled.
    """
    if sequence.hidden_sum_D is None or sequence.num_scored < sequence.num_to_score:
        raise EngineError("the engine was stopped while it embedded", where="embed", todo="ask again")
    length = float(np.linalg.norm(sequence.hidden_sum_D))
    if not np.isfinite(length):
        raise not_finite()
    vector: list[float] = (sequence.hidden_sum_D / max(length, np.finfo(np.float64).tiny)).tolist()
    return vector
