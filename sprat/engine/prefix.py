"""When two requests may share memory: the keys of blocks.

A block's content follows from the tokens in it, all tokens before it, the weights, and how numbers are stored. Its
key is SHA-256 over exactly that, with the tenant's secret in front: who does not have the secret cannot find the
block, so neither the answer nor the time that it takes tells one tenant what another has asked. Each part is
written as tag, length, bytes, so that no two different lists of parts have the same bytes.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from sprat.engine.backend import BLOCK
from sprat.engine.sequence import Sequence
from sprat.model import Transformer


class Keys:
    """Makes the keys of blocks for one model as one engine runs it.

    Args:
        model, adapter, tokenizer: their digests. ``adapter`` is empty where there is none, and ``model`` where keys
            never leave this engine.
        kv_format: how the back end stores memory.
    """

    def __init__(self, model: str, adapter: str, tokenizer: str, kv_format: str) -> None:
        parts = {b"model": model, b"adapter": adapter, b"tokenizer": tokenizer, b"kv": kv_format}
        self._common = b"".join(tagged(tag, text.encode()) for tag, text in parts.items())

    def extend(self, sequence: Sequence, tokens: int) -> None:
        """Have ``sequence.keys`` name every full block of the first ``tokens`` tokens of prompt and answer."""
        keys, wanted = sequence.keys, tokens // BLOCK
        if len(keys) >= wanted:
            return
        start, prompt = len(keys) * BLOCK, sequence.prompt
        after = max(0, start - len(prompt))
        text = prompt[start : wanted * BLOCK] + sequence.token_ids[after : max(0, wanted * BLOCK - len(prompt))]
        ids = np.asarray(text, np.dtype("<i4")).tobytes()
        head = hashlib.sha256(tagged(b"secret", sequence.tenant.secret) + self._common)
        for at in range(0, len(ids), 4 * BLOCK):
            digest = head.copy()
            digest.update(tagged(b"parent", keys[-1] if keys else b"") + tagged(b"tokens", ids[at : at + 4 * BLOCK]))
            keys.append(digest.digest())


def digest_of(model: Transformer) -> str:
    """SHA-256 (hex) of shape and weights as they are in memory; about a second for two gigabytes."""
    digest = hashlib.sha256(model.config.model_dump_json().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(tagged(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), b""))
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def tagged(tag: bytes, value: bytes) -> bytes:
    """``value`` behind its tag and both their lengths.

    >>> tagged(b"kv", b"f16").hex(" ", 4)
    '00000002 6b760000 00000000 00036631 36'
    """
    return len(tag).to_bytes(4, "big") + tag + len(value).to_bytes(8, "big") + value
