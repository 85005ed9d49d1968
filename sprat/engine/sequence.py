"""A request: what it asks, its output so far, where it stands, and what comes back; and one step of many of them.

``output_ids`` hold every sampled token, the closing end-of-sequence token included, because
reinforcement learning must also learn to stop. ``logprobs`` are those of the model's whole
distribution at the request's temperature (at temperature 1 for greedy requests), before any ban,
penalty, top-k, top-p or min-p: what a trainer recomputes from the raw logits.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sprat.engine.sampling_params import Processor, Sampling

FinishReason = Literal["stop", "length", "cancelled"]
SMALL_BATCH = 16
SlotIndex = list[int] | NDArray[np.int64]  # slots (or rows) as an index; a list where they are few


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


DEFAULT_TENANT = Tenant()


@dataclass(frozen=True)
class EngineLimits:
    """How much there is of everything.

    Attributes:
        max_batch: requests that run together at most.
        step_tokens: tokens of one step, about; pieces of prompts get one block of it at least.
        num_blocks: blocks of the KV cache at most.
        context: tokens of one request at most.
        max_tokens_cap: sampled tokens of one request at most.
        frozen: the weights never change, so blocks are kept while nobody asks, begun ones of requests that leave too.
    """

    max_batch: int
    step_tokens: int
    num_blocks: int
    context: int
    max_tokens_cap: int
    frozen: bool


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
    """A piece of a streamed answer; the last one is of kind ``done`` and carries the whole output.

    ``started`` goes to listeners alone: the request has its slot, and ``Sequence.num_cached`` is known.
    """

    kind: Literal["started", "reasoning", "content", "done"]
    text: str = ""
    output: Output | None = None


@dataclass(eq=False)
class Sequence:
    """The state of one request inside the engine: waiting (slot -1), running (slot >= 0) or finished."""

    id: int
    prompt_ids: list[int]
    sampling: Sampling
    max_tokens: int  # sampled tokens at most
    noise_key: int  # 64-bit
    prompt_group: int = 0  # requests of one non-zero group have one prompt, and compute it once
    tenant: Tenant = DEFAULT_TENANT
    cancel_event: threading.Event | None = None  # once set, the request is cancelled
    min_think_tokens: int = 0  # first tokens in which the end of thinking is banned
    processors: tuple[Processor, ...] = ()  # rules that change its logits
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cancelled: bool = False
    detokenize: bool = False  # its text is made token by token
    adapter: int = -1  # its place among the back end's adapters
    # In the engine
    slot: int = -1
    # Prompt and answer to prefill
    pending_ids: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    num_computed: int = 0  # of those, how many are in the KV cache; while prefilling only
    prompt_owner: Sequence | None = None  # the sibling that computes its prompt
    siblings: list[Sequence] = field(default_factory=list)  # those that wait for this one's prompt
    block_keys: list[bytes] = field(default_factory=list)  # prefix-cache keys of its full blocks, as far as made
    num_cached: int = -1  # prompt tokens that were in the KV cache already; -1 until it is admitted
    draft_ids: list[int] = field(default_factory=list)  # MTP's drafts, to be checked in the next step
    needs_stop_check: bool = False  # its tokens must be looked at one by one, not only appended

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and the answer so far."""
        return len(self.prompt_ids) + len(self.output_ids)

    def ids_between(self, start: int, stop: int) -> NDArray[np.int32]:
        """Tokens ``start`` … ``stop - 1`` of prompt and answer."""
        prompt = len(self.prompt_ids)
        answer = self.output_ids[max(0, start - prompt) : max(0, stop - prompt)]
        return np.array(self.prompt_ids[start:stop] + answer, np.int32)

    @property
    def is_cancelled(self) -> bool:
        """Whether its caller cancelled it."""
        return self.cancelled or (self.cancel_event is not None and self.cancel_event.is_set())


@dataclass(frozen=True)
class PrefillChunk:
    """``count`` tokens of a prompt from ``start`` on; ``is_last``: the prompt ends with them."""

    sequence: Sequence
    start: int
    count: int
    is_last: bool


@dataclass(slots=True)
class ScheduledStep:
    """What one step computes: a token of each decoding sequence and its drafts (by slot), and pieces of prompts.

    ``slots_S`` are the slots of ``decoding``, ``slot_index`` the same as an index. The weights of a step wash all else
    out of the processor's caches, and then numpy's way into an operation on whole arrays takes 50 µs, a fiftieth of a
    small model's step: few rows go one by one.
    """

    decoding: list[Sequence]
    slots_S: NDArray[np.int64]
    slot_index: SlotIndex
    chunks: list[PrefillChunk]
    drafts: dict[int, list[int]]


def noise_key(seed: int, stream: int, prompt_ids: list[int]) -> int:
    """The 64-bit key of a request's noise: a digest of (seed, stream, prompt_ids).

    The prompt takes part so that the rows of a batch that share one seed are not correlated, and the
    position in the batch takes none, so that a request alone samples what it samples in a crowd.
    """
    digest = hashlib.blake2b(f"{seed}/{stream}/".encode(), digest_size=8)
    digest.update(np.asarray(prompt_ids, dtype=np.int64).tobytes())
    return int.from_bytes(digest.digest(), "little")
