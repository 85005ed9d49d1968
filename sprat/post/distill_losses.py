"""How far a student's distribution is from a teacher's, where of the teacher only the likeliest tokens are known.

A teacher of 100,000 words says almost all that it has to say in its first few dozen. So of each place its k likeliest
tokens are kept, and the probability of all others together: a distribution over k + 1 *buckets*. The student's is
brought to the same buckets, and the divergence taken between the two. To put words into one bucket can only hide a
difference, so each of the divergences below is a lower bound of that over all words (the data processing inequality),
and is that one at k = V. Dropping the rest and dividing by what is left, as is often done, is no bound of anything: it
rewards a student for what it puts on words that the teacher finds absurd.

- ``forward_kl``, KL(teacher || student): the student must cover all that the teacher may say.
- ``reverse_kl``, KL(student || teacher): the student must not say what the teacher would not.
- ``generalized_jsd``: between the two, by ``beta``; bounded, also where one of them is sure and wrong.

All take log-probabilities and give nats for each row. With a temperature above 1 both distributions are flattened
first, and the loss multiplied by its square, which keeps the gradient's size (Hinton et al., arXiv 1503.02531,
section 2); TRL leaves that factor out.

Sources: Generalized JSD: GKD, Agarwal et al., arXiv 2306.13649, eq. 1 and section 3; the tail as a bucket of its own is
also in TRL's server distillation.
"""

# N rows, V words, K kept ones, B buckets (K + 1; K where K = V), D hidden, C rows of a chunk

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sprat.config.teach import LogitsConfig
from sprat.train.losses import head_chunks

Divergence = Callable[[Tensor, Tensor], Tensor]  # log-probabilities [N, B] of teacher and student -> [N]


def forward_kl(teacher_NB: Tensor, student_NB: Tensor) -> Tensor:
    """KL(teacher || student) of each row, in nats.

    >>> round(forward_kl(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()).item(), 4)
    0.1438
    """
    return (teacher_NB.exp() * (teacher_NB - student_NB)).sum(-1)


def reverse_kl(teacher_NB: Tensor, student_NB: Tensor) -> Tensor:
    """KL(student || teacher) of each row, in nats."""
    return forward_kl(student_NB, teacher_NB)


def generalized_jsd(teacher_NB: Tensor, student_NB: Tensor, beta: float) -> Tensor:
    """``beta KL(teacher || m) + (1 - beta) KL(student || m)`` of each row, ``m = beta teacher + (1 - beta) student``.

    Args:
        beta: between 0 and 1; divided by it (by 1 - it), the value goes to the forward (reverse) KL at 0 (at 1).
    """
    share = torch.tensor(beta, dtype=student_NB.dtype, device=student_NB.device)
    mixture_NB = torch.logaddexp(teacher_NB + share.log(), student_NB + torch.log1p(-share))
    return beta * forward_kl(teacher_NB, mixture_NB) + (1 - beta) * forward_kl(student_NB, mixture_NB)


def select_divergence(config: LogitsConfig) -> Divergence:
    """The divergence that ``config`` names."""
    if config.divergence == "jsd":
        return partial(generalized_jsd, beta=config.beta)
    return forward_kl if config.divergence == "forward_kl" else reverse_kl


def bucket_log_probs(logits_NV: Tensor, ids_NK: Tensor) -> Tensor:
    """Log-probabilities [N, B] of the words ``ids_NK`` and, last, of all others together (not where K = V).

    Args:
        logits_NV: float.
        ids_NK: int64, different ones in each row.

    The tail is a sum over the others and no difference to 1, so that it is exact where it is small.
    """
    log_probs_NV = logits_NV.log_softmax(-1)
    kept_NK = log_probs_NV.gather(-1, ids_NK)
    if ids_NK.shape[-1] == logits_NV.shape[-1]:
        return kept_NK
    tail_N = log_probs_NV.scatter(-1, ids_NK, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept_NK, tail_N], -1)


def head_divergence(
    x_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    ids_NK: Tensor,
    teacher_NB: Tensor,
    config: LogitsConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """``weight T² divergence + (1 - weight) CE(targets)``, sums over rows, without ever holding [N, V] logits.

    Args:
        x_ND, head_VD: the student's hidden states and head (they get gradients).
        targets_N: int64 in [0, V).
        ids_NK, teacher_NB: the teacher's words and its buckets, at ``config.temperature``.

    Returns:
        scalar loss; the sums of divergence and cross-entropy in nats (unweighted, without gradient).
    """
    tensors = x_ND.float(), head_VD.float(), targets_N, ids_NK, teacher_NB.float()
    with torch.autocast(x_ND.device.type, enabled=False):
        loss, divergence, ce = _HeadDivergence.apply(*tensors, config)  # type: ignore[no-untyped-call]
    return loss, divergence, ce


class _HeadDivergence(torch.autograd.Function):
    """See ``head_divergence``; gradients are computed in the forward pass and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        head_VD: Tensor,
        targets_N: Tensor,
        ids_NK: Tensor,
        teacher_NB: Tensor,
        config: LogitsConfig,
    ) -> tuple[Tensor, Tensor, Tensor]:
        formula, temperature, weight = select_divergence(config), config.temperature, config.weight
        divergence, ce = x_ND.new_zeros(()), x_ND.new_zeros(())
        dx_ND, dhead_VD = torch.empty_like(x_ND), torch.zeros_like(head_VD)
        for rows in head_chunks(x_ND, head_VD):
            logits_CV = x_ND[rows] @ head_VD.T
            with torch.enable_grad():
                logits_CV.requires_grad_()
                student_CB = bucket_log_probs(logits_CV / temperature, ids_NK[rows])
                divergence_part = formula(teacher_NB[rows], student_CB).sum()
                ce_part = F.cross_entropy(logits_CV, targets_N[rows], reduction="sum")
                part = weight * temperature**2 * divergence_part + (1 - weight) * ce_part
                (dlogits_CV,) = torch.autograd.grad(part, logits_CV)
            divergence, ce = divergence + divergence_part.detach(), ce + ce_part.detach()
            torch.mm(dlogits_CV, head_VD, out=dx_ND[rows])
            dhead_VD.addmm_(dlogits_CV.T, x_ND[rows])
        ctx.save_for_backward(dx_ND, dhead_VD)
        ctx.mark_non_differentiable(divergence, ce)
        return weight * temperature**2 * divergence + (1 - weight) * ce, divergence, ce

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dx_ND, dhead_VD = ctx.saved_tensors
        return grad * dx_ND, grad * dhead_VD, None, None, None, None
