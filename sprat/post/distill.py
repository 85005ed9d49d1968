"""Distillation: a small model learns from a large one, by its words, by its doubts, or by both.

*Traces* (sequence level; Kim and Rush 2016; DeepSeek-R1, arXiv 2501.12948, section 2.4): the teacher answers
problems, the task's judge keeps only what is right, the student learns that text by cross-entropy. Rejection
sampling makes the teacher better than itself: its errors are never taught.

*Logits* (Hinton et al. 2015): on the same packed batches the student is pulled to the teacher's whole
distribution, ``T² KL(teacher || student)``. A trace says which word came; the distribution says which
others could have, and that is most of what a token can teach. At equal tokens the student of a prototype
kept 35 % by traces and 54 % by logits; both together keep the text exact and the doubts right.

The two [N, V] distributions are made, compared and turned into gradients chunk by chunk, and only at
positions that carry loss (``losses.forward_kl``). Teacher and student must share a tokenizer.

Dims: B rows, T positions, N positions with loss, D student's hidden, E teacher's hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sprat.config import DistillConfig, LoopConfig, QuantConfig
from sprat.data.loader import IGNORE_INDEX, Batch, BatchSource
from sprat.engine import Engine, Sampling
from sprat.errors import TrainingError
from sprat.eval.tasks import problem_messages, score_output
from sprat.model import Transformer, flops_per_token
from sprat.post.sft import Demonstration, sample_problems
from sprat.quant import fake_quantize
from sprat.tasks import Task, is_correct
from sprat.train import loop, losses
from sprat.trust.run import Run


@dataclass(frozen=True)
class Traces:
    """Demonstrations that count, of ``num_samples`` sampled answers; ``tokens`` in all, at a cost of ``flops``."""

    demonstrations: list[Demonstration]
    num_samples: int
    tokens: int
    flops: float


def sample_traces(
    engine: Engine,
    tasks: Sequence[Task],
    weights: Sequence[float],
    *,
    count: int,
    max_tokens: int,
    samples: int = 1,
    thinking: bool | None = True,
    temperature: float = 0.7,
    seed: int = 0,
    verified: bool = True,
) -> Traces:
    """Answers of the engine's model to ``count`` training problems, by rejection sampling or as they come.

    Args:
        samples: draws for each problem; every distinct one that counts is kept.
        thinking: as in ``Sampling``; False makes direct answers, which the student needs to answer without thinking.
        verified: only right answers count; else all that came to an end, as where nobody knows what is right.

    Raises:
        TrainingError: not one answer counts.
    """
    problems = sample_problems(tasks, weights, count, f"traces/{seed}/{thinking}")
    sampling = Sampling(temperature=temperature, max_tokens=max_tokens, seed=seed, thinking=thinking, n=samples)
    outputs = engine.generate([problem_messages(problem) for _, problem in problems], sampling)
    unique: dict[Demonstration, None] = {}
    for row, output in enumerate(outputs):
        task, problem = problems[row // samples]
        if output.finish_reason == "stop" and (not verified or is_correct(score_output(task, problem, output))):
            unique[Demonstration(problem.question, output.reasoning, output.text)] = None
    if not unique:
        what = f"the teacher answered none of {count} problems"
        raise TrainingError(what, where="traces", todo="train the teacher first or raise max_tokens")
    tokens = sum(len(output.token_ids) for output in outputs)
    processed_tokens = tokens + sum(output.usage.cache_miss_tokens for output in outputs)
    length = processed_tokens // len(outputs)
    return Traces(list(unique), len(outputs), tokens, processed_tokens * flops_per_token(engine.model.config, length))


def distillation_loss(teacher: Transformer, config: DistillConfig) -> losses.LossFn:
    """The loss of ``config.mode`` as a function for ``train.loop.train``.

    ``traces`` is the plain next-token loss. ``logits`` is the forward KL to the teacher; ``both`` mixes it with the
    cross-entropy by ``logits_weight``. The student's MTP modules learn in the same way, each place from what the
    teacher says at the place that it looks ahead to; they and the router's balance loss are weighted as in
    pre-training. The logged ``loss`` and ``mtp_loss`` are cross-entropies in all modes.
    """
    if config.mode == "traces":
        return losses.next_token_loss
    kl_weight = 1.0 if config.mode == "logits" else config.logits_weight

    def weighted_losses(
        x_BTD: Tensor, head_VD: Tensor, teacher_x_BTE: Tensor, targets_BT: Tensor, num_targets: int
    ) -> tuple[Tensor, ...]:
        """Sums of loss, KL and cross-entropy over the targets of a part, divided by how many the step has."""
        selected_BT = targets_BT != IGNORE_INDEX
        x_ND, teacher_x_NE, targets_N = x_BTD[selected_BT], teacher_x_BTE[selected_BT], targets_BT[selected_BT]
        weights = {"kl_weight": kl_weight, "ce_weight": 1.0 - kl_weight, "temperature": config.temperature}
        means = losses.forward_kl(x_ND, head_VD, teacher_x_NE, teacher.head.dense_weight(), targets_N, **weights)
        return tuple(each * (len(targets_N) / max(num_targets, 1)) for each in means)

    def loss(model: Transformer, batch: Batch, settings: LoopConfig, whole: Batch | None = None) -> losses.Loss:
        whole, segments_BT = whole or batch, losses.attention_segments(batch.segments_BT)
        with torch.no_grad():
            teacher_x_BTE = teacher.hidden(batch.tokens_BT, segments_BT=segments_BT).x_BTD
        hidden, head_VD = model.hidden(batch.tokens_BT, segments_BT=segments_BT), model.head.dense_weight()
        num_targets = losses.num_targets(whole.targets_BT)
        total, kl, ce = weighted_losses(hidden.x_BTD, head_VD, teacher_x_BTE, batch.targets_BT, num_targets)
        metrics, routing = {"loss": ce.item(), "kl": kl.item()}, list(hidden.routing)
        if model.mtp and settings.mtp_weight > 0:
            depths = []
            for depth, (ahead, targets_BT) in enumerate(losses.mtp_outputs(model, hidden, batch), 1):
                num_targets = losses.num_targets(losses.mtp_targets(whole, depth))
                teacher_ahead_BTE = teacher_x_BTE[:, depth:]
                shares = weighted_losses(ahead.x_BTD, head_VD, teacher_ahead_BTE, targets_BT, num_targets)
                depths.append(torch.stack(shares))
                routing += ahead.routing
            mtp, _, mtp_ce = torch.stack(depths).mean(0)
            total, metrics["mtp_loss"] = total + settings.mtp_weight * mtp, mtp_ce.item()
        if settings.balance_weight > 0 and hidden.routing:
            total = total + settings.balance_weight * losses.balance_term(hidden.routing, batch, whole)
        return losses.Loss(total, metrics, [each.load_E for each in routing])

    return loss


def distill(
    student: Transformer,
    teacher: Transformer,
    source: BatchSource,
    config: DistillConfig,
    run: Run,
    quant: QuantConfig | None = None,
) -> loop.TrainResult:
    """Train ``student`` in place towards ``teacher`` on ``source``; resumes from the run's checkpoints.

    In the last ``config.qat_fraction`` of the steps it learns with weights as ``quant`` rounds them to the nearest (the
    defaults if not given). The result's FLOPs include the teacher's forward passes.

    Raises:
        TrainingError: the vocabularies differ, or the loss is not finite.
    """
    sizes = student.config.vocab_size, teacher.config.vocab_size
    if sizes[0] != sizes[1]:
        what = f"the student has {sizes[0]} words, the teacher {sizes[1]}"
        raise TrainingError(what, where="distill", todo="give both the same tokenizer and vocab_size")
    qat_steps = round(config.qat_fraction * config.steps)
    rounding = partial(fake_quantize, student, quant or QuantConfig())
    phase = loop.FinalPhase(config.steps - qat_steps, rounding) if qat_steps else None
    loss_fn = distillation_loss(teacher, config)
    result = loop.train(student, source, config, run, loss_fn=loss_fn, final_phase=phase)
    if config.mode == "traces":
        return result
    length = result.tokens // max(1, result.steps * config.batch_rows)
    return replace(result, flops=result.flops + result.tokens * flops_per_token(teacher.config, length))
