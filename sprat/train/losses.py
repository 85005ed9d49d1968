# size: the losses that trainers share, and the fused kernels that they are made of
"""What trainers minimize; fused, where whole logits would be held else.

Pre-training: the next token, the token after it (MTP), and a little sequence balance.

    total = next-token + mtp_weight * mean over MTP depths + balance_weight * mean over MoE layers

Each term is a mean over a step: of its targets, of the targets that a depth can see, of its rows. A micro-batch gives
its share of each, its sum divided by what the whole step counts, so that the shares add up to the same loss and the
same gradient however the rows are cut.

RL and distillation: log-probabilities of chosen tokens, and losses made of them, without ever holding [N, V] logits.
A small model with a large batch spends most of its memory traffic on logits: 50,000 response tokens
times 1,000 words are 200 MB, written and read several times by softmax, gather, entropy and their
backward passes. The losses of RL are *elementwise in the log-probability of the token*:

    loss = sum_n f_n(log p_n)          so          d loss / d logits_n = f_n'(log p_n) (onehot_n - p_n)

That means the gradient with respect to the logits of a row is known as soon as the row's own softmax
is. So the rows are taken in chunks small enough for the logits to stay in the cache: matmul, softmax,
``f`` and ``f'``, and at once the gradients of hidden states and head, accumulated. ``backward`` only
scales what is stored. Cost: the three matmuls that any head needs and one pass of ``exp``; memory: one
chunk. The price is that the gradient is computed even if nobody calls ``backward``; callers that
want numbers alone use ``token_logprob``.

The same holds for the forward KL of logit distillation: d KL(t||s) / d logits_s = p_s - p_t.

Left out: second derivatives, a gradient of the entropy (it is a metric here, not a bonus), bias terms
in the head (no model family of ours has one).
"""

# B batch, T time, D hidden of the student or policy, E hidden of the teacher, V vocabulary, N tokens, C rows of a chunk

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sprat.config import LoopConfig
from sprat.data.loader import IGNORE_INDEX, Batch
from sprat.kernels.ops import linear_cross_entropy
from sprat.model import Hidden, Routing, Transformer, balance_loss
from sprat.model.forward_context import mtp_segments
from sprat.model.layers import product_weight

# (log-probabilities of a chunk, its rows) -> (loss of each row, derivative of it by the log-probability)
Surrogate = Callable[[Tensor, slice], tuple[Tensor, Tensor]]

_CHUNK_ELEMENTS = 1 << 18  # logits of one chunk: 1 MiB of float32; measured best at 300 and at 2,048 words
_CHUNK_ELEMENTS_DEVICE = 1 << 26


@dataclass(frozen=True)
class Loss:
    """What one part of a step's rows gives; the parts' numbers add up to the step's.

    Attributes:
        total: scalar with gradient, this part's share of the mean over the step.
        metrics: plain numbers for the log, shares likewise; their key ``loss`` is the next-token loss in nats.
        expert_loads: load_E of each MoE layer that ran, in the order of ``model.moe_layers()``.
    """

    total: Tensor
    metrics: dict[str, float]
    expert_loads: list[Tensor]


class LossFn(Protocol):
    """What is minimized."""

    def __call__(self, model: Transformer, batch: Batch, config: LoopConfig, whole: Batch | None = None, /) -> Loss:
        """The share that ``batch`` has in the loss of ``whole``, all rows of the step (None: ``batch`` is all)."""
        ...


def next_token_loss(model: Transformer, batch: Batch, config: LoopConfig, step_batch: Batch | None = None) -> Loss:
    """Cross-entropy of the next token, with MTP where the model has modules and ``mtp_weight`` is positive.

    Args:
        step_batch: all rows of the step, of which ``batch`` is a part; see ``LossFn``.

    Sources: MTP in DeepSeek-V3 (arXiv 2412.19437) eq. 24-25; sequence-wise balance there, eq. 17-20.
    """
    step_batch = step_batch or batch
    segments_BT = attention_segments(batch.segments_BT)
    hidden = model.hidden(batch.tokens_BT, segments_BT=segments_BT)
    head_VD = product_weight(model.head)
    num_items = num_targets(step_batch.targets_BT)
    main = linear_cross_entropy(hidden.x_BTD.flatten(0, 1), head_VD, batch.targets_BT.flatten(), num_items=num_items)
    return with_auxiliary(main, {"loss": main.item()}, model, hidden, batch, step_batch, config)


def with_auxiliary(
    total: Tensor,
    metrics: dict[str, float],
    model: Transformer,
    hidden: Hidden,
    batch: Batch,
    step_batch: Batch,
    config: LoopConfig,
) -> Loss:
    """``total`` with the MTP modules' loss and the router's balance, as ``config`` weighs them; and ``metrics``."""
    routing = list(hidden.routing)
    if model.mtp and config.mtp_weight > 0:
        mtp, mtp_routing = _mtp_term(model, hidden, batch, step_batch)
        routing += mtp_routing
        total, metrics["mtp_loss"] = total + config.mtp_weight * mtp, mtp.item()
    if config.balance_weight > 0 and hidden.routing:
        total = total + config.balance_weight * balance_term(hidden.routing, batch, step_batch)
    return Loss(total, metrics, [each.load_E for each in routing])


def num_targets(targets_BT: Tensor) -> int:
    """How many of the targets carry loss."""
    return int((targets_BT != IGNORE_INDEX).sum())


def balance_term(routing: list[Routing], batch: Batch, step_batch: Batch) -> Tensor:
    """The share that ``batch`` has in the balance loss of ``step_batch``: mean over rows and MoE layers."""
    rows = len(batch)
    return torch.stack([balance_loss(each, rows) for each in routing]).mean() * (rows / len(step_batch))


def _mtp_term(model: Transformer, hidden: Hidden, batch: Batch, step_batch: Batch) -> tuple[Tensor, list[Routing]]:
    """The share that ``batch`` has in the MTP loss of ``step_batch``, a mean over depths; and the modules' routing."""
    losses, routing, head_VD = [], list[Routing](), model.head.dense_weight()
    for depth, (ahead, targets_BT) in enumerate(mtp_outputs(model, hidden, batch), 1):
        num_items = num_targets(mtp_targets(step_batch, depth))
        x_ND, targets_N = ahead.x_BTD.flatten(0, 1), targets_BT.flatten()
        losses.append(linear_cross_entropy(x_ND, head_VD, targets_N, num_items=num_items))
        routing += ahead.routing
    return torch.stack(losses).mean(), routing


def mtp_outputs(model: Transformer, hidden: Hidden, batch: Batch) -> Iterator[tuple[Hidden, Tensor]]:
    """For each MTP depth, from 1: what its module makes of ``hidden``, and the targets [B, T - depth] of its places."""
    segments_BT = attention_segments(batch.segments_BT)
    for depth in range(1, len(model.mtp) + 1):
        hidden = model.mtp_hidden(hidden, batch.tokens_BT, segments_BT=segments_BT, depth=depth)
        yield hidden, mtp_targets(batch, depth)


def mtp_targets(batch: Batch, depth: int) -> Tensor:
    """Targets of an MTP module [B, T - depth]; it joins place i with token i + depth, of one document or no loss.

    Place i then predicts what place i + depth predicts.
    """
    return batch.targets_BT[:, depth:].masked_fill(mtp_segments(batch.segments_BT, depth) == 0, IGNORE_INDEX)


def attention_segments(segments_BT: Tensor) -> Tensor | None:
    """None where every row is one whole segment, so that attention may be plainly causal (and faster)."""
    whole = bool((segments_BT == segments_BT[:, :1]).all()) and bool((segments_BT[:, 0] > 0).all())
    return None if whole else segments_BT


def token_logprob(x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each row's distribution, in nats; no gradient.

    Args:
        x_ND: float hidden states ready for the head.
        head_VD: float head weight.
        targets_N: int64 in [0, V).
        temperature: logits are divided by it first, as the sampler does.

    Returns:
        logprob_N, entropy_N (float32, or float64 for such states and head).
    """
    x_ND, head_VD = _wide(x_ND), _wide(head_VD)
    logprob_N = x_ND.new_empty(len(x_ND))
    entropy_N = torch.empty_like(logprob_N)
    with torch.no_grad(), _without_autocast(x_ND.device.type):
        for rows in head_chunks(x_ND, head_VD):
            logits_CV = (x_ND[rows] @ head_VD.T).div_(temperature)
            logprob_N[rows], entropy_N[rows], _ = _softmax_(logits_CV, targets_N[rows])
    return logprob_N, entropy_N


def policy_loss(
    x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, surrogate: Surrogate, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over rows of ``surrogate(log p(target))``, differentiable in ``x_ND`` and ``head_VD``.

    Args:
        x_ND: float hidden states ready for the head.
        head_VD: float head weight.
        targets_N: int64 in [0, V).
        surrogate: maps a chunk's log-probabilities and its rows to each row's loss and to the derivative
            of that loss by the log-probability.
        temperature: logits are divided by it first.

    Returns:
        scalar loss; logprob_N and entropy_N, both without gradient.
    """
    x_ND, head_VD = _wide(x_ND), _wide(head_VD)
    with _without_autocast(x_ND.device.type):
        loss, logprob_N, entropy_N = _PolicyLoss.apply(x_ND, head_VD, targets_N, surrogate, temperature)  # type: ignore[no-untyped-call]
    return loss, logprob_N, entropy_N


def forward_kl(
    x_ND: Tensor,
    head_VD: Tensor,
    teacher_x_NE: Tensor,
    teacher_head_VE: Tensor,
    targets_N: Tensor,
    *,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``ce_weight * CE(targets) + kl_weight * T² KL(teacher || student)``, means over rows.

    The factor T² keeps the gradient's size when the temperature rises (Hinton et al. 2015, section 2).

    Args:
        x_ND, head_VD: the student's hidden states and head (they get gradients).
        teacher_x_NE, teacher_head_VE: the teacher's; same V, any width.
        targets_N: int64 in [0, V), for the cross-entropy.

    Returns:
        scalar loss; mean KL and mean cross-entropy in nats (unweighted, without gradient).
    """
    tensors = x_ND.float(), head_VD.float(), teacher_x_NE.float(), teacher_head_VE.float(), targets_N
    with _without_autocast(x_ND.device.type):
        loss, kl, ce = _ForwardKL.apply(*tensors, kl_weight, ce_weight, temperature)  # type: ignore[no-untyped-call]
    return loss, kl, ce


def head_chunks(x_ND: Tensor, head_VD: Tensor) -> Iterator[slice]:
    """Slices of rows whose logits fit the cache (on other devices than CPUs, a bounded memory)."""
    elements = _CHUNK_ELEMENTS if x_ND.device.type == "cpu" else _CHUNK_ELEMENTS_DEVICE
    step = max(16, elements // len(head_VD))
    for start in range(0, len(x_ND), step):
        yield slice(start, min(start + step, len(x_ND)))


def _wide(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _without_autocast(device: str) -> torch.autocast:
    """No half precision inside: the callers hand over float32."""
    return torch.autocast(device, enabled=False)


def _softmax_(logits_CV: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(target), entropy, probabilities) of each row; ``logits_CV`` is overwritten."""
    logits_CV -= logits_CV.amax(1, keepdim=True)
    p_CV = logits_CV.exp()
    sum_C = p_CV.sum(1)
    log_sum_C = sum_C.log()
    p_CV /= sum_C[:, None]
    logprob_C = logits_CV.gather(1, targets_C[:, None]).squeeze(1) - log_sum_C
    entropy_C = log_sum_C - torch.linalg.vecdot(p_CV, logits_CV)
    return logprob_C, entropy_C, p_CV


class _PolicyLoss(torch.autograd.Function):
    """See ``policy_loss``; gradients are computed in the forward pass and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, surrogate: Surrogate, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprob_N = x_ND.new_empty(len(x_ND))
        entropy_N, loss = torch.empty_like(logprob_N), x_ND.new_zeros(())
        dx_ND, dhead_VD = torch.empty_like(x_ND), torch.zeros_like(head_VD)
        for rows in head_chunks(x_ND, head_VD):
            x_CD, targets_C = x_ND[rows], targets_N[rows]
            logits_CV = (x_CD @ head_VD.T).div_(temperature)
            logprob_N[rows], entropy_N[rows], p_CV = _softmax_(logits_CV, targets_C)
            loss_C, slope_C = surrogate(logprob_N[rows], rows)
            loss += loss_C.sum()
            slope_C = (slope_C / temperature)[:, None]
            dlogits_CV = p_CV.mul_(-slope_C).scatter_add_(1, targets_C[:, None], slope_C)
            torch.mm(dlogits_CV, head_VD, out=dx_ND[rows])
            dhead_VD.addmm_(dlogits_CV.T, x_CD)
        ctx.save_for_backward(dx_ND, dhead_VD)
        ctx.mark_non_differentiable(logprob_N, entropy_N)
        return loss, logprob_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dx_ND, dhead_VD = ctx.saved_tensors
        return grad * dx_ND, grad * dhead_VD, None, None, None


class _ForwardKL(torch.autograd.Function):
    """See ``forward_kl``; gradients are computed in the forward pass and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        head_VD: Tensor,
        teacher_x_NE: Tensor,
        teacher_head_VE: Tensor,
        targets_N: Tensor,
        kl_weight: float,
        ce_weight: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows_total = max(len(x_ND), 1)
        kl, ce = x_ND.new_zeros(()), x_ND.new_zeros(())
        dx_ND, dhead_VD = torch.empty_like(x_ND), torch.zeros_like(head_VD)
        for rows in head_chunks(x_ND, head_VD):
            x_CD, targets_C = x_ND[rows], targets_N[rows, None]
            logits_CV = x_CD @ head_VD.T
            dlogits_CV = torch.zeros_like(logits_CV)
            if kl_weight:
                teacher_CV = (teacher_x_NE[rows] @ teacher_head_VE.T).div_(temperature).log_softmax(1)
                student_CV = (logits_CV / temperature).log_softmax(1)
                p_CV = teacher_CV.exp()
                kl += torch.linalg.vecdot(p_CV, teacher_CV.sub_(student_CV)).sum()
                # T² of the loss times 1/T of the inner derivative
                dlogits_CV.add_(student_CV.exp_().sub_(p_CV), alpha=kl_weight * temperature)
            log_p_CV = logits_CV.log_softmax(1)
            ce -= log_p_CV.gather(1, targets_C).sum()
            if ce_weight:
                dlogits_CV.add_(log_p_CV.exp_(), alpha=ce_weight)
                dlogits_CV.scatter_add_(1, targets_C, torch.full_like(targets_C, -ce_weight, dtype=torch.float32))
            dlogits_CV = dlogits_CV.div_(rows_total)
            torch.mm(dlogits_CV, head_VD, out=dx_ND[rows])
            dhead_VD.addmm_(dlogits_CV.T, x_CD)
        kl, ce = kl / rows_total, ce / rows_total
        ctx.save_for_backward(dx_ND, dhead_VD)
        ctx.mark_non_differentiable(kl, ce)
        return kl_weight * temperature**2 * kl + ce_weight * ce, kl, ce

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dx_ND, dhead_VD = ctx.saved_tensors
        return grad * dx_ND, grad * dhead_VD, None, None, None, None, None, None
