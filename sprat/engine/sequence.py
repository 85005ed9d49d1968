"""What a request is: what it was asked, what it has said so far, where it stands, and what comes back.

``token_ids`` hold every sampled token, the closing end-of-sequence token included, because
reinforcement learning must also learn to stop. ``logprobs`` are those of the model's whole
distribution at the request's temperature (at temperature 1 for greedy requests), before any ban,
penalty, top-k, top-p or min-p: what a trainer recomputes from the raw logits.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from sprat.engine.sampling import Sampling

if TYPE_CHECKING:
    from sprat.engine.draft import Lookup
    from sprat.engine.processors import Processor

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Tenant:
    """Whose request it is.

    Args:
        name: requests of one name share one place in the fair order.
        secret: takes part in the keys of cached blocks, so tenants of different secrets never share one. It is
            chosen by the server and never by a request.
    """

    name: str = ""
    secret: bytes = b""


NOBODY = Tenant()


@dataclass(frozen=True)
class Usage:
    """Tokens of one request; ``cache_hit_tokens + cache_miss_tokens == prompt_tokens``."""

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cache_hit_tokens: int
    cache_miss_tokens: int


@dataclass(frozen=True)
class Output:
    """One finished answer. ``closed`` is False when the reasoning was cut off before ``</think>``.

    ``top_logprobs`` holds for each token the likeliest ids with their log-probabilities (nats), best first.
    """

    text: str
    reasoning: str
    token_ids: list[int]
    logprobs: list[float] | None
    usage: Usage
    finish_reason: FinishReason
    prompt_ids: list[int]
    closed: bool = True
    top_logprobs: list[list[tuple[int, float]]] | None = None


@dataclass(frozen=True)
class Delta:
    """A piece of a streamed answer; the last one is of kind ``done`` and carries the whole output."""

    kind: Literal["reasoning", "content", "done"]
    text: str = ""
    output: Output | None = None


@dataclass(eq=False)
class Sequence:
    """The state of one request inside the engine: waiting (slot -1), running (slot >= 0) or finished."""

    id: int
    prompt: list[int]
    sampling: Sampling
    limit: int  # sampled tokens at most
    key: int  # 64-bit key of its noise
    share: int = 0  # requests of equal non-zero share have one prompt, and compute it once
    tenant: Tenant = NOBODY
    event: threading.Event | None = None  # once set, the request is cancelled
    ban: int = 0  # first tokens for which the end of thinking is banned
    processors: tuple[Processor, ...] = ()  # rules that change its logits
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cancelled: bool = False
    followed: bool = False  # its text is read token by token
    # In the engine
    slot: int = -1
    known: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))  # tokens to compute, if prefilling
    stored: int = 0  # of those, how many are in memory; kept while prefilling only
    leader: Sequence | None = None  # the twin that computes its prompt
    twins: list[Sequence] = field(default_factory=list)  # those that wait for this one's prompt
    keys: list[bytes] = field(default_factory=list)  # cache keys of its full blocks, as far as they are known
    hit: int = -1  # prompt tokens whose memory was there already; -1 until it is admitted
    drafts: list[int] = field(default_factory=list)  # MTP's guess of what follows, to be checked in the next step
    lookup: Lookup | None = None  # where it said what before, for drafts
    watched: bool = False  # settling its tokens takes more than appending them

    @property
    def length(self) -> int:
        """Tokens of the prompt and the answer so far."""
        return len(self.prompt) + len(self.token_ids)

    @property
    def halted(self) -> bool:
        """Whether its caller wants it no more."""
        return self.cancelled or (self.event is not None and self.event.is_set())


def noise_key(seed: int, stream: int, prompt: list[int]) -> int:
    """The 64-bit key of a request's noise: a digest of (seed, stream, prompt).

    The prompt takes part so that the rows of a batch that share one seed are not correlated, and the
    position in the batch takes none, so that a request alone samples what it samples in a crowd.
    """
    digest = hashlib.blake2b(f"{seed}/{stream}/".encode(), digest_size=8)
    digest.update(np.asarray(prompt, dtype=np.int64).tobytes())
    return int.from_bytes(digest.digest(), "little")
