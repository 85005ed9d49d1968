"""The KV cache: what each layer stores of the tokens it has read, as one static tensor.

For multi-head latent attention a token leaves ``kv_lora_rank + qk_rope_head_dim`` numbers a layer (the latent
that keys and values are rebuilt from, and the one shared rotary key); for grouped-query attention it leaves
all keys and values. Rows of a batch may hold different numbers of tokens: ``length_B`` says how many.
"""

# B rows, T new tokens, S stored tokens, C capacity, W numbers a token leaves

from __future__ import annotations

import torch
from torch import Tensor

from sprat.config.model import ModelConfig
from sprat.errors import EngineError


class KVCache:
    """Stored tokens of a batch of rows. Slots at or beyond ``length_B`` hold rubbish and are never attended to."""

    def __init__(self, layers: list[Tensor], length_B: Tensor, max_length: int = 0) -> None:
        self.layers = layers  # each [B, C, W]
        self.length_B = length_B
        self.max_length = max_length  # no row holds more than this; kept as an int so that no tensor has to be read

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> KVCache:
        """An empty cache for ``batch`` rows of at most ``capacity`` tokens."""
        width = cls.width(config)
        shape = (batch, capacity, width)
        layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        return cls(layers, torch.zeros(batch, dtype=torch.long, device=device))

    @staticmethod
    def width(config: ModelConfig) -> int:
        """Numbers that one token leaves in one layer."""
        if config.is_mla:
            return config.kv_lora_rank + config.qk_rope_head_dim
        return 2 * config.kv_heads * config.attention_head_dim

    @property
    def batch(self) -> int:
        """Rows."""
        return int(self.length_B.shape[0])

    @property
    def capacity(self) -> int:
        """Tokens that each row can hold."""
        return int(self.layers[0].shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all layers together, used or not."""
        return sum(layer.nbytes for layer in self.layers)

    def write(self, layer: int, new_BTW: Tensor, positions_BT: Tensor, valid_BT: Tensor | None) -> None:
        """Store ``new_BTW`` of ``layer`` at ``positions_BT``; slots that are not valid stay as they are."""
        rows_B1 = torch.arange(new_BTW.shape[0], device=new_BTW.device).unsqueeze(1)
        store_BCW = self.layers[layer]
        new_BTW = new_BTW.to(store_BCW.dtype)
        if valid_BT is None:
            store_BCW[rows_B1, positions_BT] = new_BTW
        else:
            store_BCW[rows_B1.expand_as(positions_BT)[valid_BT], positions_BT[valid_BT]] = new_BTW[valid_BT]

    def read(self, layer: int, count: int, dtype: torch.dtype) -> Tensor:
        """The first ``count`` slots of ``layer``: [B, count, W]."""
        return self.layers[layer][:, :count].to(dtype)

    def reserve(self, count: int, valid_BT: Tensor | None) -> None:
        """Check that ``count`` more tokens fit into each row (fewer where ``valid_BT`` says so).

        Raises:
            EngineError: a row would overflow.
        """
        if self.max_length + count <= self.capacity:
            return
        extra_B = count if valid_BT is None else valid_BT.sum(1)
        if int((self.length_B + extra_B).max()) > self.capacity:
            raise EngineError(
                f"{count} more tokens do not fit into the cache",
                where=f"capacity {self.capacity} tokens, {int(self.length_B.max())} used",
                todo="ask for a larger capacity or for fewer tokens",
            )

    def advance(self, count: int, valid_BT: Tensor | None) -> None:
        """Count the tokens of the forward pass that has just been stored."""
        self.length_B = self.length_B + (count if valid_BT is None else valid_BT.sum(1))
        self.max_length = min(self.max_length + count, self.capacity)
        if valid_BT is not None:
            self.max_length = int(self.length_B.max())

    def reorder(self, index: Tensor) -> None:
        """Keep only the rows ``index`` (long), in that order; a row may be named twice."""
        self.layers = [layer[index] for layer in self.layers]
        self.length_B = self.length_B[index]
        self.max_length = int(self.length_B.max()) if self.batch else 0
