"""What all layers of one forward pass share: turns, mask, and where the cache stands. Built once a pass."""

# B batch, T new tokens, S keys, r rotary width

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sprat.errors import EngineError
from sprat.model.cache import Cache
from sprat.model.documents import Documents, cut
from sprat.model.rope import RotaryTable


@dataclass(frozen=True)
class Step:
    """One forward pass as attention sees it.

    Attributes:
        turn_BTr: complex rotary turns; B is 1 where all rows share them.
        mask_B1TS: additive float mask, or None where plain causality is all there is.
        window_B1TS: the same for layers with a sliding window; None where no token has that many before it.
        positions_BT: where the new tokens stand in the cache; None without a cache.
        valid_BT: bool, False on padding, which is neither stored nor counted; None where all are tokens.
        documents: the documents of the batch where they are attended to one by one (then there is no mask).
        keys: S, how many keys there are.
        fresh: the cache was empty (or there is none), so the new tokens are all the keys.
    """

    turn_BTr: Tensor
    mask_B1TS: Tensor | None
    window_B1TS: Tensor | None
    positions_BT: Tensor | None
    valid_BT: Tensor | None
    cache: Cache | None
    documents: Documents | None
    keys: int
    fresh: bool

    def mask(self, sliding: bool) -> Tensor | None:
        """The mask of a layer: its window's, if it has one that hides anything."""
        return self.window_B1TS if sliding and self.window_B1TS is not None else self.mask_B1TS


def plan(
    rotary: RotaryTable,
    tokens_BT: Tensor,
    *,
    segments_BT: Tensor | None,
    positions_BT: Tensor | None,
    cache: Cache | None,
    valid_BT: Tensor | None,
    by_document: bool = False,
    window: int | None = None,
) -> Step:
    """The ``Step`` of a pass over ``tokens_BT``.

    Without a cache a token attends to the tokens before it in its run of equal segments. With a cache, row ``b``
    continues at ``cache.length_B[b]``. ``by_document`` asks to attend document by document; ``window`` is how many
    keys a token of a sliding layer sees, its own included.

    Raises:
        EngineError: segments or positions beside a cache, a batch of another size, or no room.
    """
    device, (batch, time) = tokens_BT.device, tokens_BT.shape
    if cache is None:
        if segments_BT is not None:
            valid_BT = segments_BT > 0 if valid_BT is None else valid_BT & (segments_BT > 0)
        if valid_BT is not None and bool(valid_BT.all()):
            valid_BT = None
        if positions_BT is None:
            turn_BTr = rotary.first(time, device).unsqueeze(0)
        else:
            turn_BTr = rotary.first(int(positions_BT.max()) + 1, device)[positions_BT]
        if by_document and positions_BT is None:
            documents = cut(segments_BT, batch, time, turn_BTr[0])
            if documents is not None:
                return Step(turn_BTr, None, None, None, valid_BT, None, documents, time, True)
        mask = None if segments_BT is None else _packed_mask(segments_BT)
        near = _near_mask(torch.arange(time, device=device).unsqueeze(0), time, window, mask)
        return Step(turn_BTr, mask, near, None, valid_BT, None, None, time, True)
    if segments_BT is not None or positions_BT is not None:
        raise EngineError("a cache counts positions itself", where="forward", todo="leave segments and positions out")
    if cache.batch != batch:
        raise EngineError(f"{batch} rows for a cache of {cache.batch}", where="forward", todo="reorder the cache first")
    cache.reserve(time, valid_BT)
    fresh = cache.extent == 0
    offsets_T = torch.arange(time, device=device)
    if fresh:
        places_BT, turn_BTr = offsets_T.expand(batch, time), rotary.first(time, device).unsqueeze(0)
        near = _near_mask(offsets_T.unsqueeze(0), time, window, None)
        return Step(turn_BTr, None, near, places_BT, valid_BT, cache, None, time, True)
    places_BT = cache.length_B.unsqueeze(1) + offsets_T
    keys = min(cache.extent + time, cache.capacity)
    turn_BTr = rotary.first(cache.extent + time, device)[places_BT]
    unseen_BTS = torch.arange(keys, device=device) > places_BT.unsqueeze(-1)
    mask = torch.zeros(unseen_BTS.shape, device=device).masked_fill_(unseen_BTS, float("-inf")).unsqueeze(1)
    near = _near_mask(places_BT, keys, window, mask)
    return Step(turn_BTr, mask, near, places_BT, valid_BT, cache, None, keys, False)


def pair_segments(segments_BT: Tensor, depth: int) -> Tensor:
    """The segment of each pair (place ``i``, place ``i + depth``) [B, T - depth]; 0 where a border lies between.

    What multi-token prediction joins, and the loss on it, belongs to a document only where the whole pair does.

    >>> pair_segments(torch.tensor([[1, 1, 1, 2, 2, 0]]), 2).tolist()
    [[1, 0, 0, 0]]
    """
    runs_BT = _runs(segments_BT)
    return segments_BT[:, depth:].masked_fill(runs_BT[:, depth:] != runs_BT[:, :-depth], 0)


def _runs(segments_BT: Tensor) -> Tensor:
    """Long [B, T]: the number of borders before each place of its row."""
    borders_BT = torch.zeros_like(segments_BT)
    borders_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return borders_BT.cumsum(1)


def _packed_mask(segments_BT: Tensor) -> Tensor:
    """Additive [B, 1, T, T]: 0 where a key is not later and of the same run of segments, -inf elsewhere."""
    batch, time = segments_BT.shape
    runs_BT = _runs(segments_BT)
    later_TT = torch.ones(time, time, dtype=torch.bool, device=segments_BT.device).triu_(1)
    hidden_BTT = (runs_BT.unsqueeze(2) != runs_BT.unsqueeze(1)).logical_or_(later_TT)
    mask = torch.zeros(batch, time, time, device=segments_BT.device).masked_fill_(hidden_BTT, float("-inf"))
    return mask.unsqueeze(1)


def _near_mask(places_BT: Tensor, keys: int, window: int | None, mask_B1TS: Tensor | None) -> Tensor | None:
    """Additive [B, 1, T, S]: ``mask_B1TS`` (None: causality), -inf where a key is ``window`` or more places back."""
    if window is None or keys <= window:
        return None
    back_BTS = places_BT.unsqueeze(-1) - torch.arange(keys, device=places_BT.device)
    hidden_BTS = (back_BTS < 0) | (back_BTS >= window)
    mask = torch.zeros(hidden_BTS.shape, device=places_BT.device).masked_fill_(hidden_BTS, float("-inf")).unsqueeze(1)
    return mask if mask_B1TS is None else mask + mask_B1TS
