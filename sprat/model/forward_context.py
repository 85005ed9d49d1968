"""What all layers of one forward pass share: rotary table, masks, where the cache stands, and precision."""

# B batch, T new tokens, S keys, r rotary width

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sprat.errors import EngineError
from sprat.kernels import ops
from sprat.model.kv_cache import KVCache
from sprat.model.rope import RotaryTable


@dataclass(frozen=True)
class ForwardContext:
    """One forward pass as attention sees it.

    Attributes:
        freqs_cis_BTr: complex rotations of each position; B is 1 where all rows share them.
        mask_B1TS: additive float mask, or None where plain causality is all there is.
        window_mask_B1TS: the same for layers with a sliding window; None where no token has that many before it.
        cache_position_BT: where the new tokens stand in the cache; None without a cache.
        valid_BT: bool, False on padding, which is neither stored nor counted; None where all are tokens.
        varlen: the sequences of the batch where attention is computed one by one (then there is no mask).
        document_lengths: how long the runs of equal segments are, row after row, where a pass without a cache has many
            of them: to attend to each by itself is then less work than the mask, and the same.
        num_keys: S, how many keys there are.
        no_past: the cache was empty (or there is none), so the new tokens are all the keys.
    """

    freqs_cis_BTr: Tensor
    mask_B1TS: Tensor | None
    window_mask_B1TS: Tensor | None
    cache_position_BT: Tensor | None
    valid_BT: Tensor | None
    cache: KVCache | None
    varlen: ops.VarlenMetadata | None
    num_keys: int
    no_past: bool
    document_lengths: list[int] | None = None

    def mask(self, sliding: bool) -> Tensor | None:
        """The mask of a layer: its window's, if it has one that hides anything."""
        return self.window_mask_B1TS if sliding and self.window_mask_B1TS is not None else self.mask_B1TS

    def update_cache(self, layer: int, new_BTW: Tensor) -> Tensor:
        """Store what the new tokens leave in ``layer`` -> all that is to be attended to [B, S, W], in their dtype."""
        if self.cache is not None:
            assert self.cache_position_BT is not None
            self.cache.write(layer, new_BTW, self.cache_position_BT, self.valid_BT)
            if not self.no_past:
                return self.cache.read(layer, self.num_keys, new_BTW.dtype)
        return new_BTW


def forward_context(
    rotary: RotaryTable,
    tokens_BT: Tensor,
    *,
    segments_BT: Tensor | None,
    positions_BT: Tensor | None,
    cache: KVCache | None,
    valid_BT: Tensor | None,
    use_varlen: bool = False,
    window: int | None = None,
) -> ForwardContext:
    """The ``ForwardContext`` of a pass over ``tokens_BT``.

    Without a cache a token attends to the tokens before it in its run of equal segments. With a cache, row ``b``
    continues at ``cache.length_B[b]``. ``use_varlen`` asks to attend document by document; ``window`` is how
    many keys a token of a sliding layer sees, its own included.

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
            freqs_cis_BTr = rotary.freqs_cis(time, device).unsqueeze(0)
        else:
            freqs_cis_BTr = rotary.freqs_cis(int(positions_BT.max()) + 1, device)[positions_BT]
        if use_varlen and positions_BT is None:
            varlen = ops.varlen_metadata(segments_BT, batch, time, freqs_cis_BTr[0])
            if varlen is not None:
                return ForwardContext(freqs_cis_BTr, None, None, None, valid_BT, None, varlen, time, True)
        mask = None if segments_BT is None else _packed_mask(segments_BT)
        window_mask = _window_mask(torch.arange(time, device=device).unsqueeze(0), time, window, mask)
        lengths = None if segments_BT is None or window_mask is not None else _document_lengths(segments_BT)
        return ForwardContext(freqs_cis_BTr, mask, window_mask, None, valid_BT, None, None, time, True, lengths)
    if segments_BT is not None or positions_BT is not None:
        raise EngineError("a cache counts positions itself", where="forward", todo="leave segments and positions out")
    if cache.batch != batch:
        raise EngineError(f"{batch} rows for a cache of {cache.batch}", where="forward", todo="reorder the cache first")
    cache.reserve(time, valid_BT)
    no_past = cache.max_length == 0
    offsets_T = torch.arange(time, device=device)
    if no_past:
        cache_position_BT, freqs_cis_BTr = offsets_T.expand(batch, time), rotary.freqs_cis(time, device).unsqueeze(0)
        window_mask = _window_mask(offsets_T.unsqueeze(0), time, window, None)
        return ForwardContext(freqs_cis_BTr, None, window_mask, cache_position_BT, valid_BT, cache, None, time, True)
    cache_position_BT = cache.length_B.unsqueeze(1) + offsets_T
    num_keys = min(cache.max_length + time, cache.capacity)
    freqs_cis_BTr = rotary.freqs_cis(cache.max_length + time, device)[cache_position_BT]
    unseen_BTS = torch.arange(num_keys, device=device) > cache_position_BT.unsqueeze(-1)
    mask = torch.zeros(unseen_BTS.shape, device=device).masked_fill_(unseen_BTS, float("-inf")).unsqueeze(1)
    window_mask = _window_mask(cache_position_BT, num_keys, window, mask)
    return ForwardContext(freqs_cis_BTr, mask, window_mask, cache_position_BT, valid_BT, cache, None, num_keys, False)


def mtp_segments(segments_BT: Tensor, depth: int) -> Tensor:
    """The segment of each pair (position ``i``, position ``i + depth``) [B, T - depth]; 0 where a border lies between.

    What multi-token prediction joins, and the loss on it, belongs to a document only where the whole pair does.

    >>> mtp_segments(torch.tensor([[1, 1, 1, 2, 2, 0]]), 2).tolist()
    [[1, 0, 0, 0]]
    """
    runs_BT = _segment_runs(segments_BT)
    return segments_BT[:, depth:].masked_fill(runs_BT[:, depth:] != runs_BT[:, :-depth], 0)


def _segment_runs(segments_BT: Tensor) -> Tensor:
    """Long [B, T]: the number of borders before each position of its row."""
    borders_BT = torch.zeros_like(segments_BT)
    borders_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return borders_BT.cumsum(1)


def _document_lengths(segments_BT: Tensor) -> list[int] | None:
    """The lengths of runs of equal segments, row after row; None where one by one they would hardly be less work."""
    batch, time = segments_BT.shape
    starts_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    starts_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts = starts_BT.flatten().nonzero().flatten().tolist()
    lengths = [end - start for start, end in itertools.pairwise([*starts, batch * time])]
    return lengths if 2 * sum(length**2 for length in lengths) <= batch * time**2 else None


def _packed_mask(segments_BT: Tensor) -> Tensor:
    """Additive [B, 1, T, T]: 0 where a key is not later and of the same run of segments, -inf elsewhere."""
    batch, time = segments_BT.shape
    runs_BT = _segment_runs(segments_BT)
    later_TT = torch.ones(time, time, dtype=torch.bool, device=segments_BT.device).triu_(1)
    hidden_BTT = (runs_BT.unsqueeze(2) != runs_BT.unsqueeze(1)).logical_or_(later_TT)
    mask = torch.zeros(batch, time, time, device=segments_BT.device).masked_fill_(hidden_BTT, float("-inf"))
    return mask.unsqueeze(1)


def _window_mask(position_BT: Tensor, num_keys: int, window: int | None, mask_B1TS: Tensor | None) -> Tensor | None:
    """Additive [B, 1, T, S]: ``mask_B1TS`` (None: causality), -inf where a key is ``window`` or more positions back."""
    if window is None or num_keys <= window:
        return None
    back_BTS = position_BT.unsqueeze(-1) - torch.arange(num_keys, device=position_BT.device)
    hidden_BTS = (back_BTS < 0) | (back_BTS >= window)
    mask = torch.zeros(hidden_BTS.shape, device=position_BT.device).masked_fill_(hidden_BTS, float("-inf")).unsqueeze(1)
    return mask if mask_B1TS is None else mask + mask_B1TS


@contextlib.contextmanager
def precision(device: str | torch.device) -> Iterator[None]:
    """The autocast context of a forward pass on ``device``: nothing on CPUs (bfloat16 ran at 0.6 times the
    speed without AMX tiles), bfloat16 elsewhere."""
    kind = torch.device(device).type
    if kind == "cpu":
        yield
        return
    with torch.autocast(kind, dtype=torch.bfloat16):
        yield
