"""When two requests may share cached blocks: the keys of blocks.

A block's content follows from the tokens in it, all tokens before it, the weights, and how numbers are stored. Its
key is SHA-256 over exactly that, with the tenant's secret in front: who does not have the secret cannot find the
block, so neither the answer nor the time that it takes tells one tenant what another has asked. Each part is
written as tag, length, bytes, so that no two different lists of parts have the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence as GenericSequence

import numpy as np
import torch
from numpy.typing import NDArray

from sprat.engine.backend import BLOCK_SIZE
from sprat.engine.sequence import Sequence
from sprat.model import Transformer


class BlockKeys:
    """Makes the keys of blocks for one model as one engine runs it.

    Args:
        model, adapter, tokenizer: their digests. ``adapter`` is empty where there is none, and ``model`` where keys
            never leave this engine.
        kv_format: how the back end stores keys and values.
        adapters: digests of those that a request may have beside the weights, by their place.
    """

    def __init__(
        self, model: str, adapter: str, tokenizer: str, kv_format: str, adapters: GenericSequence[str] = ()
    ) -> None:
        parts = {b"model": model, b"adapter": adapter, b"tokenizer": tokenizer, b"kv": kv_format}
        self._common = b"".join(tagged(tag, text.encode()) for tag, text in parts.items())
        self._of_adapter = {place: tagged(b"lora", digest.encode()) for place, digest in enumerate(adapters)}

    def extend(self, sequence: Sequence, tokens: int) -> None:
        """Have ``sequence.block_keys`` name every full block of the first ``tokens`` tokens of prompt and answer."""
        keys, needed = sequence.block_keys, tokens // BLOCK_SIZE
        if len(keys) >= needed:
            return
        ids = sequence.ids_between(len(keys) * BLOCK_SIZE, needed * BLOCK_SIZE)
        head = self._head(sequence)
        for start in range(0, len(ids), BLOCK_SIZE):
            keys.append(_child_key(head, keys[-1] if keys else b"", ids[start : start + BLOCK_SIZE]))

    def partial(self, sequence: Sequence, tokens: int) -> bytes:
        """The key of the block, not full, that holds the last of the first ``tokens`` tokens."""
        head = self._head(sequence)
        full = tokens // BLOCK_SIZE
        return _child_key(head, self.parent(sequence, full), sequence.ids_between(full * BLOCK_SIZE, tokens))

    def parent(self, sequence: Sequence, index: int) -> bytes:
        """The key of the block before the one at ``index``; for the first block a name of tenant and model."""
        if index:
            return sequence.block_keys[index - 1]
        return self._head(sequence).digest()

    def _head(self, sequence: Sequence) -> hashlib._Hash:
        """What all keys of a request begin with: whose it is, and what computes it."""
        own = self._of_adapter.get(sequence.adapter, b"")
        return hashlib.sha256(tagged(b"secret", sequence.tenant.secret) + self._common + own)


def _child_key(head: hashlib._Hash, parent: bytes, tokens: NDArray[np.int32]) -> bytes:
    """The key of a block behind the one of key ``parent``."""
    digest = head.copy()
    digest.update(tagged(b"parent", parent) + tagged(b"tokens", tokens.astype(np.dtype("<i4")).tobytes()))
    return digest.digest()


def model_digest(model: Transformer) -> str:
    """SHA-256 (hex) of shape and weights as they are in memory; about a second for two gigabytes."""
    digest = hashlib.sha256(model.config.model_dump_json().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(tagged(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), b""))
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tagged(tag: bytes, value: bytes) -> bytes:
    """``value`` behind its tag and both their lengths.

    >>> tagged(b"kv", b"f16").hex(" ", -4)
    '00000002 6b760000 00000000 00036631 36'
    """
    return len(tag).to_bytes(4, "big") + tag + len(value).to_bytes(8, "big") + value
