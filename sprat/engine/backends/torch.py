"""The step in torch: the reference for every other back end, and what runs where there is none.

The model is the very one that trains. A step's sequences are sorted into groups of about one length, because
``Transformer`` works on rectangles: those that decode make one, new prompts of 17 … 32 tokens another. Within a group
the model sees a ``KVCache`` whose slots happen to lie in blocks: writing goes straight to the right places, and
reading gathers a layer's blocks into one piece, once a layer and step. That copy is the price of staying simple; it
is small beside the arithmetic of short contexts, and a native step does without.

Sequences that have an adapter are grouped by it, and run through a view of the model that has it; plain ones run as if
they were alone.

Rows are as independent as torch's matrix products are: the same up to rounding, not to the bit.
"""

# S sequences, T new tokens, G sequences of one group, N longest of them, W blocks of a table, K numbers a token leaves

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sprat.engine.adapter import Adapter, with_adapter
from sprat.engine.backend import BLOCK_SIZE, Batch
from sprat.errors import EngineError, MachineError
from sprat.model import KVCache, Transformer

DTYPE_FORMATS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64"}


class PagedCache(KVCache):
    """A cache of one group whose slots lie in blocks.

    Args:
        store: per layer [blocks * BLOCK_SIZE, K].
        table_GW: long, block numbers; those beyond a sequence's own are any block.
        slot_GN: long, where each new token goes in ``store``.
        length_G: long, tokens that each sequence holds.
        scratch: where what is read is put together; new memory for every layer would cost more than the copy.
    """

    def __init__(
        self, store: list[Tensor], table_GW: Tensor, slot_GN: Tensor, length_G: Tensor, scratch: Tensor
    ) -> None:
        super().__init__(store, length_G, int(length_G.max()))
        self._table_GW, self._slot_GN, self._scratch = table_GW, slot_GN, scratch

    @property
    def capacity(self) -> int:
        """Tokens that each row can hold."""
        return self._table_GW.shape[1] * BLOCK_SIZE

    def write(self, layer: int, new_BTW: Tensor, positions_BT: Tensor, valid_BT: Tensor | None) -> None:
        """Store ``new_BTW`` where its tokens belong."""
        new = new_BTW.to(self.layers[layer].dtype)
        if valid_BT is None:
            self.layers[layer][self._slot_GN.flatten()] = new.flatten(0, 1)
        else:
            self.layers[layer][self._slot_GN[valid_BT]] = new[valid_BT]

    def read(self, layer: int, count: int, dtype: torch.dtype) -> Tensor:
        """The first ``count`` slots of every row, gathered: [G, count, K]; valid until the next layer is read."""
        width = self.layers[layer].shape[1]
        table_GW = self._table_GW[:, : -(-count // BLOCK_SIZE)]
        blocks = self._scratch[: table_GW.numel() * BLOCK_SIZE].view(-1, BLOCK_SIZE * width)
        torch.index_select(self.layers[layer].view(-1, BLOCK_SIZE * width), 0, table_GW.flatten(), out=blocks)
        return blocks.view(len(table_GW), -1, width)[:, :count].to(dtype)


@dataclass(frozen=True)
class Group:
    """Sequences of one rectangle: which, and where their tokens stand among the T of the batch; -1 is padding.

    All have the adapter ``adapter``; -1: none.
    """

    rows_G: NDArray[np.int64]
    tokens_GN: NDArray[np.int64]
    adapter: int


class TorchBackend:
    """``Backend`` by the torch model, whatever its precision or device.

    The model is used as it is at every call. See ``Backend`` for the attributes.
    """

    batch_invariant = False

    def __init__(self, model: Transformer, adapters: Sequence[Adapter] = ()) -> None:
        self.model, config = model, model.config
        self.adapters = tuple(adapters)
        self._views = [with_adapter(model, adapter) for adapter in self.adapters]
        weight = model.norm.weight
        self._device, self._dtype = weight.device, weight.dtype
        self.vocab, self.num_mtp_modules = config.vocab_size, config.num_nextn_predict_layers
        self.kv_format = DTYPE_FORMATS[self._dtype]
        self._layers = config.num_hidden_layers + self.num_mtp_modules
        self._width = KVCache.width(config)
        self.block_bytes = self._layers * BLOCK_SIZE * self._width * weight.element_size()
        self.num_blocks = 0
        self._store: list[Tensor] = [self._zeros(0) for _ in range(self._layers)]
        self._scratch = self._zeros(0)
        self._hidden_TD: Tensor | None = None  # of the last run

    def reserve(self, num_blocks: int) -> None:
        """Have memory for ``num_blocks`` blocks; see ``Backend``."""
        if num_blocks <= self.num_blocks:
            return
        try:
            for layer, old in enumerate(self._store):
                grown = self._zeros(num_blocks)
                grown[: len(old)] = old
                self._store[layer] = grown
        except (RuntimeError, MemoryError) as error:
            todo = "lower cache_bytes or max_batch"
            raise MachineError(f"no memory for {num_blocks} blocks: {error}", where="KV cache", todo=todo) from None
        self.num_blocks = num_blocks

    @torch.no_grad()
    def run(self, batch: Batch) -> Tensor:
        """Compute the batch; see ``Backend``."""
        hidden_TD: Tensor | None = None
        for group in _groups(batch):
            cache, tokens_GN, valid_GN = self._open(batch, group)
            out = self._model(group.adapter).hidden(tokens_GN, cache=cache, valid_BT=valid_GN)
            hidden_TD = self._scatter(hidden_TD, out.x_BTD, batch, group)
            if batch.routes_TLK is not None:
                real = group.tokens_GN.ravel() >= 0
                routes_NLK = torch.stack([layer.index_NK for layer in out.routing], 1).cpu().numpy()
                batch.routes_TLK[group.tokens_GN.ravel()[real]] = routes_NLK[real]
        self._hidden_TD = hidden_TD
        return self._head(batch, hidden_TD)

    def argmax(self, batch: Batch, vocab: int) -> NDArray[np.int64]:
        """The likeliest tokens; see ``Backend``."""
        return _argmax(self.run(batch), vocab)

    @torch.no_grad()
    def logits(self, batch: Batch, index_R: NDArray[np.int32]) -> Tensor:
        """Logits of more tokens of the last run; see ``Backend``."""
        return self._head(replace(batch, logits_index_R=index_R), self._hidden_TD)

    def hidden(self, batch: Batch, index_R: NDArray[np.int32]) -> Tensor:
        """The last norm's output for tokens of the last run; see ``Backend``."""
        assert self._hidden_TD is not None
        return self._hidden_TD[self._index(index_R)].float()

    @torch.no_grad()
    def draft(self, batch: Batch, next_T: NDArray[np.int64], vocab: int) -> NDArray[np.int64]:
        """What the MTP modules guess; see ``Backend``.

        Raises:
            EngineError: ``batch`` is not of the tokens that were computed last.
        """
        if self._hidden_TD is None or len(self._hidden_TD) != len(batch.tokens_T):
            fault = "the tokens to draft from are not those computed last"
            raise EngineError(fault, where="draft", todo="run the batch first")
        spans = list(zip(batch.starts_S[:-1].tolist(), batch.starts_S[1:].tolist(), strict=True))
        refused = batch.tokens_T[1:] != next_T[:-1]
        accepted = [start + int(np.append(refused[start : stop - 1], True).argmax()) for start, stop in spans]
        texts = [next_T[start : end + 1].tolist() for (start, _), end in zip(spans, accepted, strict=True)]
        hidden_TD = self._hidden_TD
        for depth in range(self.num_mtp_modules):
            tokens_T = np.zeros_like(batch.tokens_T)
            for (start, stop), text in zip(spans, texts, strict=True):
                further = text[depth : depth + stop - start]
                tokens_T[start : start + len(further)] = np.maximum(further, 0)
            further = replace(batch, tokens_T=tokens_T, logits_index_R=np.array(accepted, np.int32))
            hidden_TD = self._run_mtp_module(further, hidden_TD, depth)
            for text, draft_id in zip(texts, _argmax(self._head(further, hidden_TD), vocab).tolist(), strict=True):
                text.append(draft_id)
        return np.array([text[len(text) - self.num_mtp_modules :] for text in texts], np.int64)

    def copy(self, source: int, target: int) -> None:
        """Copy one block over another."""
        for layer in self._store:
            layer[_slots(target)] = layer[_slots(source)]

    def read(self, block: int) -> bytes:
        """The bytes of a block, layer after layer."""
        rows = torch.stack([layer[_slots(block)] for layer in self._store]).cpu()
        return rows.view(torch.uint8).numpy().tobytes()

    def write(self, block: int, data: bytes) -> None:
        """Store what ``read`` gave; ValueError if it has another length."""
        if len(data) != self.block_bytes:
            raise ValueError(f"a block has {self.block_bytes} bytes, not {len(data)}")
        rows = torch.frombuffer(bytearray(data), dtype=self._dtype).view(self._layers, BLOCK_SIZE, self._width)
        for layer, new in zip(self._store, rows.to(self._device), strict=True):
            layer[_slots(block)] = new

    def _zeros(self, blocks: int) -> Tensor:
        """Memory of one layer."""
        return torch.zeros(blocks * BLOCK_SIZE, self._width, dtype=self._dtype, device=self._device)

    def _index(self, index: NDArray[np.int32] | NDArray[np.int64]) -> Tensor:
        """Long on the model's device."""
        return torch.from_numpy(index.astype(np.int64)).to(self._device)

    def _open(self, batch: Batch, group: Group) -> tuple[PagedCache, Tensor, Tensor | None]:
        """The cache of a group, its tokens [G, N], and which of them are real (None: all)."""
        index_GN, rows_G1 = group.tokens_GN, group.rows_G[:, None]
        positions_GN = batch.positions_T[index_GN]
        table_GW = batch.block_tables_SW[group.rows_G]
        block_GN = batch.block_tables_SW[rows_G1, positions_GN // BLOCK_SIZE].astype(np.int64)
        slot_GN = block_GN * BLOCK_SIZE + positions_GN % BLOCK_SIZE
        if len(self._scratch) < table_GW.size * BLOCK_SIZE:
            self._scratch = self._zeros(2 * table_GW.size)
        table, slot, length = map(self._index, (np.maximum(table_GW, 0), slot_GN, positions_GN[:, 0]))
        cache = PagedCache(self._store, table, slot, length, self._scratch)
        valid_GN = index_GN >= 0
        mask = None if valid_GN.all() else torch.from_numpy(valid_GN).to(self._device)
        return cache, self._index(batch.tokens_T[index_GN]), mask

    def _scatter(self, out_TD: Tensor | None, new_GND: Tensor, batch: Batch, group: Group) -> Tensor:
        """Put a group's rows where their tokens stand in the batch."""
        flat_D = new_GND.flatten(0, 1)
        if len(group.rows_G) == len(batch.starts_S) - 1 and len(flat_D) == len(batch.tokens_T):
            return flat_D
        if out_TD is None:
            out_TD = new_GND.new_empty(len(batch.tokens_T), new_GND.shape[2])
        real = group.tokens_GN.ravel() >= 0
        out_TD[self._index(group.tokens_GN.ravel()[real])] = flat_D[torch.from_numpy(real).to(self._device)]
        return out_TD

    def _run_mtp_module(self, further: Batch, before_TD: Tensor, depth: int) -> Tensor:
        """Hidden states of one MTP module over those of the model, or of the module before it."""
        out_TD = None
        for group in _groups(further):
            cache, tokens_GN, valid_GN = self._open(further, group)
            model = self._model(group.adapter)
            context = model.context(tokens_GN, cache=cache, valid_BT=valid_GN)
            pair = before_TD[self._index(group.tokens_GN)], model.embed_tokens(tokens_GN)
            out_GND, _ = model.mtp[depth](*pair, context)
            out_TD = self._scatter(out_TD, out_GND, further, group)
        assert out_TD is not None
        return out_TD

    def _head(self, batch: Batch, hidden_TD: Tensor | None) -> Tensor:
        """Logits of the wanted rows: of those without an adapter, and of the others."""
        index_R = batch.logits_index_R
        if hidden_TD is None or not len(index_R):
            return torch.empty(0, self.vocab)
        if not len(batch.adapters_S):
            return self.model.logits(hidden_TD[self._index(index_R)] if len(index_R) < len(hidden_TD) else hidden_TD)
        plain_R = np.repeat(batch.adapters_S, np.diff(batch.starts_S))[index_R] < 0
        logits_RV = hidden_TD.new_empty(len(index_R), self.vocab, dtype=torch.float32)
        for rows in (np.flatnonzero(plain_R), np.flatnonzero(~plain_R)):
            if len(rows):
                logits_RV[self._index(rows)] = self.model.logits(hidden_TD[self._index(index_R[rows])])
        return logits_RV

    def _model(self, adapter: int) -> Transformer:
        """The model with one of its adapters; -1: with none."""
        return self.model if adapter < 0 else self._views[adapter]


def _slots(block: int) -> slice:
    """Where the tokens of a block lie in a layer."""
    return slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)


def _argmax(logits_RV: Tensor, vocab: int) -> NDArray[np.int64]:
    """The likeliest of the first ``vocab`` tokens of each row, -1 where they are not finite."""
    logits = logits_RV[:, :vocab].cpu().numpy()
    tokens_R: NDArray[np.int64] = np.where(np.isfinite(logits).all(1), logits.argmax(1), -1)
    return tokens_R


def _groups(batch: Batch) -> list[Group]:
    """The sequences of a batch in rectangles: alike are those that begin or go on, and have the same power of two.

    And the same adapter.
    """
    starts = batch.starts_S[:-1].astype(np.int64)
    counts = np.diff(batch.starts_S).astype(np.int64)
    kind = np.ceil(np.log2(counts)).astype(np.int64) * 2 + (batch.positions_T[starts] == 0)
    adapters = batch.adapters_S if len(batch.adapters_S) else np.full(len(starts), -1)
    groups = []
    for adapter, group_kind in sorted(set(zip(adapters.tolist(), kind.tolist(), strict=True))):
        rows_G = np.flatnonzero((kind == group_kind) & (adapters == adapter))
        offsets_N = np.arange(counts[rows_G].max())
        tokens_GN = starts[rows_G][:, None] + offsets_N
        tokens_GN[offsets_N >= counts[rows_G][:, None]] = -1
        groups.append(Group(rows_G, tokens_GN, adapter))
    return groups
