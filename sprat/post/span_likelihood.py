"""A teacher with another tokenizer: both say how likely a piece of the same text is, and the pieces are matched.

Two tokenizers cut one text differently, so that neither words nor distributions over them can be compared. Its bytes
are the same. A *span* ends wherever both have a boundary at the same byte: of "un|believ|able" and "unbe|liev|able" the
spans are "unbeliev" and "able". The probability of a span is the product over its tokens, whoever cuts it. So each span
is an event that both give a probability to, and what is minimized is the KL of the event: whether this span comes, or
anything else does,

    p log(p / q) + (1 - p) log((1 - p) / (1 - q))          p the teacher's, q the student's.

That is ``distill_losses.forward_kl`` with two buckets: no more than the KL over all continuations, zero only where the
two agree. The answers' end is a span of its own. Each model reads the conversation in its own chat format; where an
answer's bytes differ there (a format that writes its thinking as text), it has no spans and is learned as a trace.

What is approximate: a tokenizer gives a text's canonical cutting only, and a span's end may be none of another cutting.

Source: approximate likelihood matching, Minixhofer et al., arXiv 2503.20083, section 3 (chunks aligned by bytes, the
binarised divergence of their likelihoods); left out are its temperature on likelihoods and its debiasing of boundaries.
"""

# S spans, N tokens with loss, T places of a row, D hidden

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sprat.config import LoopConfig
from sprat.config.teach import TeachConfig
from sprat.data.example import Conversation, Example
from sprat.data.loader import IGNORE_INDEX, Batch, gather_rows
from sprat.data.pack import PackedDataset, document_ids
from sprat.errors import ConfigError, DataError
from sprat.model import Transformer
from sprat.post.distill_losses import forward_kl
from sprat.post.dpo import row_keys
from sprat.post.examples import MaskedIds, encode_example
from sprat.tokens import Tokenizer
from sprat.train import losses

_HIGHEST = -1e-6  # a log-probability above which the rest is too small to be told from nothing


def align(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[tuple[int, int]]:
    """Where spans end: after how many of the student's tokens, and of the teacher's.

    Args:
        student, teacher: the bytes of each token of one text; those of control tokens are empty.

    Returns:
        nothing where the two are not the same text. Tokens without bytes at the end are a span, where both have some.

    >>> align([b" un", b"believ", b"able", b""], [b" unbe", b"liev", b"able", b""])
    [(2, 2), (3, 3), (4, 4)]
    >>> align([b"a", b"b"], [b"abc"])
    []
    """
    if b"".join(student) != b"".join(teacher) or not any(student):
        return []
    ends: list[dict[int, int]] = []
    for tokens in (student, teacher):
        offsets = itertools.accumulate(map(len, tokens))
        counted: dict[int, int] = {}
        for count, offset in enumerate(offsets, 1):
            counted.setdefault(offset, count)
        counted.pop(0, None)
        ends.append(counted)
    spans = [(count, ends[1][offset]) for offset, count in ends[0].items() if offset in ends[1]]
    last = (len(student), len(teacher))
    return [*spans, last] if spans[-1][0] < last[0] and spans[-1][1] < last[1] else spans


@dataclass(frozen=True)
class SpanTargets:
    """What the teacher says of the spans of packed rows.

    Attributes:
        table: by row (see ``dpo.row_keys``) the span of each place [T] int64, -1 for none, and their teacher's
            log-probabilities, float32 nats.
        counts: ``spans`` in all, and how many answers were ``aligned`` or ``unaligned``.
    """

    table: dict[bytes, tuple[Tensor, Tensor]]
    counts: dict[str, int]


def span_targets(
    teacher: Transformer,
    teacher_tokenizer: Tokenizer,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    rows: PackedDataset,
    config: TeachConfig,
) -> SpanTargets:
    """The teacher's likelihood of each span of ``rows``, which ``post.examples`` made of ``examples`` by ``config``.

    Raises:
        ConfigError: examples that are too long are not left out, so that a row may hold half an answer.
        DataError: not one answer could be aligned.
    """
    if config.examples.too_long != "drop":
        todo = "set examples.too_long=drop, and seq_len as long as they are"
        raise ConfigError("spans need whole examples", where="examples.too_long", todo=todo)
    sequences, spans = list[MaskedIds](), list[list[tuple[int, int, float]]]()
    counts = {"spans": 0, "aligned": 0, "unaligned": 0}
    keep_reasoning = config.examples.reasoning == "keep"
    for example in examples:
        try:
            own = encode_example(tokenizer, example, keep_reasoning=keep_reasoning)
        except DataError:
            continue
        if max(len(ids) for ids, _ in own) > config.seq_len + 1:
            continue
        try:
            others = encode_example(teacher_tokenizer, example, keep_reasoning=keep_reasoning)
        except DataError:
            others = []
        if not isinstance(example, Conversation) or len(others) != len(own):
            others = [([], [])] * len(own)
        for mine, theirs in zip(own, others, strict=True):
            sequences.append(mine)
            spans.append(_spans(teacher, teacher_tokenizer, tokenizer, mine, theirs, counts))
    counts["spans"] = sum(map(len, spans))
    if not counts["spans"]:
        todo = "learn from traces alone: the two models write answers differently"
        raise DataError("no answer has the same bytes for teacher and student", where="spans", todo=todo)
    return SpanTargets(_place(sequences, spans, rows), counts)


def _runs(mask: Sequence[int]) -> list[tuple[int, int]]:
    """From and to of each run of learned tokens; the first token of a sequence is never predicted."""
    edges = [0, *mask, 0]
    starts = [place for place in range(len(mask)) if edges[place + 1] and not edges[place]]
    stops = [place + 1 for place in range(len(mask)) if edges[place + 1] and not edges[place + 2]]
    return [(max(start, 1), stop) for start, stop in zip(starts, stops, strict=True)]


def _spans(
    teacher: Transformer,
    teacher_tokenizer: Tokenizer,
    tokenizer: Tokenizer,
    mine: MaskedIds,
    theirs: MaskedIds,
    counts: dict[str, int],
) -> list[tuple[int, int, float]]:
    """Spans of a sequence of the student's: from and to, in tokens, and the teacher's log-probability."""
    own_runs, their_runs = _runs(mine[1]), _runs(theirs[1])
    if len(own_runs) != len(their_runs) or len(theirs[0]) > teacher.config.context:
        counts["unaligned"] += len(own_runs)
        return []
    ids = torch.tensor(theirs[0])
    with torch.no_grad():
        x_TD = teacher.hidden(ids[None, :-1]).x_BTD[0]
        logprob_T, _ = losses.token_logprob(x_TD, teacher.head.dense_weight(), ids[1:])
    spans: list[tuple[int, int, float]] = []
    for (start, stop), (their_start, their_stop) in zip(own_runs, their_runs, strict=True):
        own_bytes = [tokenizer.token_bytes(token) for token in mine[0][start:stop]]
        their_bytes = [teacher_tokenizer.token_bytes(token) for token in theirs[0][their_start:their_stop]]
        lead, their_lead = (next((n for n, each in enumerate(run) if each), 0) for run in (own_bytes, their_bytes))
        ends = align(own_bytes[lead:], their_bytes[their_lead:])
        counts["aligned" if ends else "unaligned"] += 1
        ends = [(lead + own, their_lead + other) for own, other in [(0, 0), *ends]] if ends else []
        for (own_from, from_), (own_to, to) in itertools.pairwise([*([(0, 0)] if lead and their_lead else []), *ends]):
            total = logprob_T[their_start + from_ - 1 : their_start + to - 1].sum().item()
            spans.append((start + own_from, start + own_to, total))
    return spans


def _place(
    sequences: Sequence[MaskedIds], spans: Sequence[Sequence[tuple[int, int, float]]], rows: PackedDataset
) -> dict[bytes, tuple[Tensor, Tensor]]:
    """The spans where the sequences lie in ``rows``."""
    sequence_RT = document_ids([len(ids) for ids, _ in sequences], rows.seq_len)
    if sequence_RT.shape != rows.tokens.shape:
        raise DataError("the rows are not those of the examples", where="spans", todo="report this")
    table = {}
    for row, key in enumerate(row_keys(gather_rows(rows, range(rows.num_rows)))):
        span_T, likelihoods = torch.full((rows.seq_len,), -1), list[float]()
        for number in sorted(set(sequence_RT[row].tolist()) - {-1}):
            first = int((sequence_RT[row] == number).argmax())
            for start, stop, total in spans[number]:
                span_T[first + start - 1 : first + stop - 1] = len(likelihoods)  # the place before predicts a token
                likelihoods.append(total)
        table[key] = span_T, torch.tensor(likelihoods)
    return table


def span_loss(targets: SpanTargets, weight: float) -> losses.LossFn:
    """``weight`` times the KL of the spans, a mean over spans, and the rest cross-entropy, for ``train.loop.train``.

    Metrics: ``loss`` is the cross-entropy in nats a token, ``divergence`` the KL in nats a span.
    """

    def loss(model: Transformer, batch: Batch, settings: LoopConfig, whole: Batch | None = None) -> losses.Loss:
        whole = whole or batch
        hidden = model.hidden(batch.tokens_BT, segments_BT=losses.attention_segments(batch.segments_BT))
        head_VD, selected_BT = model.head.dense_weight(), batch.targets_BT != IGNORE_INDEX
        x_ND, targets_N = hidden.x_BTD[selected_BT], batch.targets_BT[selected_BT]
        span_N, teacher_S = _of_batch(targets, batch, selected_BT)
        num_targets = max(losses.num_targets(whole.targets_BT), 1)
        num_spans = max(sum(len(targets.table[key][1]) for key in row_keys(whole)), 1)
        logprob_N, _ = losses.token_logprob(x_ND.detach(), head_VD.detach(), targets_N)
        with torch.enable_grad():
            logprob_N.requires_grad_()
            sums_S = logprob_N.new_zeros(len(teacher_S)).index_add(0, span_N[span_N >= 0], logprob_N[span_N >= 0])
            divergence = forward_kl(_event(teacher_S), _event(sums_S)).sum() / num_spans
            ce = -logprob_N.sum() / num_targets
            (slope_N,) = torch.autograd.grad(weight * divergence + (1 - weight) * ce, logprob_N)
        linear, _, _ = losses.policy_loss(
            x_ND, head_VD, targets_N, lambda logprob_C, rows: (slope_N[rows] * logprob_C, slope_N[rows])
        )
        metrics = {"loss": ce.item(), "divergence": divergence.item()}
        return losses.with_auxiliary(linear, metrics, model, hidden, batch, whole, settings)

    return loss


def _event(logprob_S: Tensor) -> Tensor:
    """Log-probabilities [S, 2] of a span, and of anything else."""
    logprob_S = logprob_S.clamp(max=_HIGHEST)
    return torch.stack([logprob_S, torch.log(-torch.expm1(logprob_S))], -1)


def _of_batch(targets: SpanTargets, batch: Batch, selected_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The span of each token with loss [N], -1 for none, and the teacher's log-probabilities [S]."""
    spans, likelihoods, count = list[Tensor](), list[Tensor](), 0
    for key in row_keys(batch):
        span_T, teacher_S = targets.table[key]
        spans.append(torch.where(span_T >= 0, span_T + count, -1))
        likelihoods.append(teacher_S)
        count += len(teacher_S)
    device = selected_BT.device
    return torch.stack(spans).to(device)[selected_BT], torch.cat(likelihoods).to(device)
