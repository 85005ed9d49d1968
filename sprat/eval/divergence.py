"""How far two models are apart on the tokens of a text: KL divergence, likeliest tokens, bits, choices of experts.

The logits come from the engine's back ends, so that what is measured is what is served: for codes of four bits the
native step also rounds activations, which the torch model does not. Routers are asked in torch, which says what they
chose. Probabilities are computed in float64: most tokens' KL is far below float32's rounding of two log-probabilities.
"""

# T predicted tokens of a window, V vocabulary, L MoE layers, N tokens, K chosen experts

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sprat.engine.backend import BLOCK_SIZE, Backend, Batch
from sprat.errors import DataError
from sprat.eval.certificate import LayerFlips, RouterFlips, TextLoss
from sprat.eval.intervals import clustered_quantile, ratio_of_sums, share_of_sums
from sprat.model import Transformer
from sprat.tokens import Tokenizer

ROWS = 64  # logits in float64 at once
MIN_DOCUMENTS = 20  # of fewer, windows are what was drawn


@dataclass(frozen=True)
class Window:
    """A piece of text as both models see it: ``ids``, of which all but the first are predicted, of ``bytes`` bytes."""

    ids: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class TokenDivergence:
    """Each of T predicted tokens: nats of both models, KL(before || after) in nats, and whether the likeliest agree."""

    before_T: NDArray[np.float64]
    after_T: NDArray[np.float64]
    kl_T: NDArray[np.float64]
    same_top_T: NDArray[np.bool_]


def cut_windows(
    tokenizer: Tokenizer, texts: Iterable[str], *, documents: int, window: int
) -> tuple[list[Window], Literal["document", "window"]]:
    """The first window of each of ``documents`` texts; of fewer texts more windows each, up to that number.

    A window is the longest piece that has ``window + 1`` ids at most, a beginning-of-text id included.

    Raises:
        DataError: under two windows of text.
    """
    bos, rests, windows = tokenizer.special_ids.bos, list[str](), list[Window]()
    for text in texts:
        rests.append(text)
        if len(rests) == documents:
            break
    unit: Literal["document", "window"] = "document" if len(rests) >= min(documents, MIN_DOCUMENTS) else "window"
    while rests and len(windows) < documents:
        following = []
        for rest in rests if unit == "window" else rests[:documents]:
            piece, ids = _longest_piece(tokenizer, rest, bos, window + 1)
            if len(ids) > 1:
                windows.append(Window(tuple(ids), len(piece.encode("utf-8", "replace"))))
            following.append(rest[len(piece) :])
        rests = [rest for rest in following if rest.strip()] if unit == "window" else []
    if len(windows) < 2:
        todo = f"give at least two documents, or two windows of {window} tokens"
        raise DataError("too little text to compare two models", where="text", todo=todo)
    return windows[:documents], unit


def _longest_piece(tokenizer: Tokenizer, text: str, bos: int, length: int) -> tuple[str, list[int]]:
    """A beginning of ``text`` that makes ``length`` ids at most, and those ids."""
    piece = text[: 8 * length]
    while True:
        ids = ([bos] if bos >= 0 else []) + tokenizer.encode(piece)
        if len(ids) <= length or len(piece) <= 1:
            return piece, ids[:length]
        piece = piece[: max(1, min(len(piece) - 1, len(piece) * length // len(ids)))]


def logits(backend: Backend, ids: Sequence[int], *, last: int | None = None) -> Tensor:
    """Logits [T, V] (float32) of what follows each of T ``ids``, or the ``last`` ones; valid until the next call.

    The back end's blocks are written from the first on, so no engine may hold a request in them.
    """
    count = len(ids)
    blocks = -(-count // BLOCK_SIZE)
    if backend.num_blocks < blocks:
        backend.reserve(blocks)
    positions_T = np.arange(count, dtype=np.int32)
    table = np.arange(blocks, dtype=np.int32)[None]
    starts = np.array([0, count], dtype=np.int32)
    return backend.run(
        Batch(np.asarray(ids, dtype=np.int32), positions_T, starts, table, positions_T[-(last or count) :])
    )


def compare_logits(before_TV: Tensor, after_TV: Tensor, targets_T: Tensor) -> TokenDivergence:
    """Two models' logits for the same places, and the ids that came (long).

    Raises:
        DataError: logits that are not finite.
    """
    parts = []
    for start in range(0, len(targets_T), ROWS):
        rows = slice(start, start + ROWS)
        p_RV, q_RV = (table[rows].double().log_softmax(-1) for table in (before_TV, after_TV))
        target_R1 = targets_T[rows, None]
        kl_R = (p_RV.exp() * (p_RV - q_RV)).sum(-1).clamp(min=0.0)  # below 0 by rounding alone
        same_R = p_RV.argmax(-1) == q_RV.argmax(-1)
        parts.append((-p_RV.gather(1, target_R1)[:, 0], -q_RV.gather(1, target_R1)[:, 0], kl_R, same_R))
    before_T, after_T, kl_T, same_T = (torch.cat(column).numpy() for column in zip(*parts, strict=True))
    if not (np.isfinite(before_T).all() and np.isfinite(after_T).all() and np.isfinite(kl_T).all()):
        raise DataError("a model's logits are not finite", where="logits", todo="use a model that did not diverge")
    return TokenDivergence(before_T, after_T, kl_T, same_T)


def compare_on_text(
    before: Backend,
    after: Backend,
    name: str,
    windows: Sequence[Window],
    unit: Literal["document", "window"],
    *,
    on_progress: Callable[[], None] = lambda: None,
) -> TextLoss:
    """Both models on all ``windows``; ``on_progress`` hears of each.

    Raises:
        DataError: fewer than two windows, or logits that are not finite.
    """
    parts: list[TokenDivergence] = []
    for window in windows:
        targets_T = torch.tensor(window.ids[1:])
        parts.append(compare_logits(logits(before, window.ids[:-1]), logits(after, window.ids[:-1]), targets_T))
        on_progress()
    sizes = [float(window.bytes) for window in windows]
    counts = [float(len(part.kl_T)) for part in parts]
    bits_before, bits_after = ([float(nats.sum()) / math.log(2) for nats in column] for column in (
        [part.before_T for part in parts], [part.after_T for part in parts]
    ))  # fmt: skip
    more_bits = [after - before for before, after in zip(bits_before, bits_after, strict=True)]
    kl = [part.kl_T.tolist() for part in parts]
    return TextLoss(
        name=name,
        unit=unit,
        tokens=int(sum(counts)),
        bytes=int(sum(sizes)),
        window=max(len(window.ids) - 1 for window in windows),
        bits_before=math.fsum(bits_before) / sum(sizes),
        bits_after=math.fsum(bits_after) / sum(sizes),
        difference=ratio_of_sums(more_bits, sizes),
        loss=ratio_of_sums(more_bits, bits_before),
        kl_mean=ratio_of_sums([math.fsum(values) for values in kl], counts),
        kl_median=clustered_quantile(kl, 0.5),
        kl_p99=clustered_quantile(kl, 0.99),
        kl_max=max(max(values) for values in kl),
        same_top=share_of_sums([float(part.same_top_T.sum()) for part in parts], counts),
    )


def routers_agree(before: Transformer, after: Transformer) -> bool:
    """Whether both models choose among as many experts in the same layers, so that choices can be compared."""

    def shape(model: Transformer) -> list[tuple[int, int, int]]:
        config = model.config
        moe = [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
        return [(layer, config.n_routed_experts, config.num_experts_per_tok) for layer in moe]

    return bool(shape(before)) and shape(before) == shape(after)


@torch.no_grad()
def compare_routing(before: Transformer, after: Transformer, name: str, windows: Sequence[Window]) -> RouterFlips:
    """Which experts both models choose for each token of ``windows``; see ``routers_agree``."""
    config = before.config
    layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe(layer)]
    sets_L, slots_L = ([[0.0] * len(windows) for _ in layers] for _ in range(2))
    tokens = [float(len(window.ids) - 1) for window in windows]
    for number, window in enumerate(windows):
        tokens_BT = torch.tensor([window.ids[:-1]])
        routings = zip(before.hidden(tokens_BT).routing, after.hidden(tokens_BT).routing, strict=True)
        for place, (a, b) in enumerate(routings):
            kept_NK = (a.index_NK[:, :, None] == b.index_NK[:, None, :]).any(-1)
            sets_L[place][number] = float((~kept_NK.all(-1)).sum())
            slots_L[place][number] = float((~kept_NK).sum())
    chosen = [count * config.num_experts_per_tok for count in tokens]
    rows = [
        LayerFlips(layer, share_of_sums(sets, tokens), share_of_sums(slots, chosen))
        for layer, sets, slots in zip(layers, sets_L, slots_L, strict=True)
    ]
    every = len(layers)
    return RouterFlips(
        name,
        share_of_sums([sum(column) for column in zip(*sets_L, strict=True)], [every * count for count in tokens]),
        share_of_sums([sum(column) for column in zip(*slots_L, strict=True)], [every * count for count in chosen]),
        tuple(rows),
    )
