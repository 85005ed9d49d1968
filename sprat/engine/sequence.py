"""A request: what it asks, its output so far, where it stands, and what comes back; and one step of many of them.

``output_ids`` hold every sampled token, the closing end-of-sequence token included, because
reinforcement learning must also learn to stop. ``logprobs`` are those of the model's whole
distribution at the request's temperature (at temperature 1 for greedy requests), before any ban,
penalty, top-k, top-p or min-p: what a trainer recomputes from the raw logits. Those of a prompt, which
nobody sampled, are at temperature 1.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from sprat.engine.sampling_params import Processor, Sampling

if TYPE_CHECKING:
    from sprat.engine.routes import Routes

FinishReason = Literal["stop", "length", "cancelled"]
TopLogprobs = list[tuple[int, float]]  # likeliest tokens with their log-probabilities (nats), best first
TokenLogprob = tuple[int, float, tuple[tuple[int, float], ...]]  # a token, its log-probability, the likeliest there
SMALL_BATCH = 16
Scoring = Literal["", "logprobs", "hidden"]
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
    ``prompt_logprobs`` and ``prompt_top_logprobs`` say the same of ``prompt_ids``, where asked for: of the first token,
    which nothing stands before, None. ``stop`` is the stop string that ended the answer, empty if none did.

    ``routes``, where asked for, are the experts that each token of prompt and answer took in each MoE layer, uint8 or
    int16 [tokens, layers, experts of a token], in no particular order. The last token's are 0, for nobody computes it.
    None for models without experts.

    ``versions``: of the weights that sampled each token, where they changed meanwhile (``Engine.update_weights``).
    """

    text: str
    reasoning: str
    token_ids: list[int]
    logprobs: list[float] | None
    usage: Usage
    finish_reason: FinishReason
    prompt_ids: list[int]
    closed: bool = True
    top_logprobs: list[TopLogprobs] | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[TopLogprobs | None] | None = None
    stop: str = ""
    routes: NDArray[Any] | None = None
    versions: list[int] | None = None


@dataclass(frozen=True)
class Delta:
    """A piece of a streamed answer; the last one is of kind ``done`` and carries the whole output.

    ``logprobs``, where asked for, are of the tokens of this channel that were sampled since its last piece, whether
    this text shows them or they are held back, hidden or cut: (id, log-probability, likeliest ids with theirs) each.
    Those of all pieces, one after the other, are those of the output, but for the end token that ended it. Think tags
    belong to the reasoning. ``text`` is empty where tokens come without any.

    ``started`` goes to listeners alone: the request has its slot, and ``Sequence.num_cached`` is known.
    """

    kind: Literal["started", "reasoning", "content", "done"]
    text: str = ""
    output: Output | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


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
    top_logprobs: list[TopLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cancelled: bool = False
    detokenize: bool = False  # its text is made token by token
    adapter: int = -1  # its place among the back end's adapters
    scoring: Scoring = ""  # what is wanted of each token of its prompt
    num_scored: int = (
        0  # rows of its prompt that are no longer needed, since what was wanted of them is in what follows
    )
    prompt_logprobs: list[float] = field(default_factory=list)  # of all but the first token
    prompt_top_logprobs: list[TopLogprobs] = field(default_factory=list)
    hidden_sum_D: NDArray[np.float64] | None = None  # of the last norm's output
    routes: Routes | None = None  # the experts that it took, where it asks
    versions: list[tuple[int, int]] = field(default_factory=list)  # (tokens before, weights from then on); none: one
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

    @property
    def num_to_hold(self) -> int:
        """Tokens that there must be blocks for before it is computed, the one that it says next included."""
        return self.num_tokens + (self.max_tokens > 0)

    @property
    def num_to_score(self) -> int:
        """Rows of the prompt of which something is wanted: nothing of the prompt stands behind its last one."""
        return {"": 0, "logprobs": len(self.prompt_ids) - 1, "hidden": len(self.prompt_ids)}[self.scoring]

    @property
    def num_skippable(self) -> int:
        """Tokens at the beginning that need not be computed where they are in the KV cache.

        The last one always is, since its logits are needed, and so is all that is still to be scored.
        """
        whole = self.num_tokens - 1
        if self.routes is not None:
            whole = min(whole, self.num_routed)
        return min(whole, self.num_scored) if self.num_scored < self.num_to_score else whole

    @property
    def num_routed(self) -> int:
        """Tokens at the beginning whose experts are known, where they are asked for."""
        assert self.routes is not None
        return self.num_tokens - 1 if self.output_ids else self.routes.num_prompt

    def ids_between(self, start: int, stop: int) -> NDArray[np.int32]:
        """Tokens ``start`` … ``stop - 1`` of prompt and answer."""
        prompt = len(self.prompt_ids)
        answer = self.output_ids[max(0, start - prompt) : max(0, stop - prompt)]
        return np.array(self.prompt_ids[start:stop] + answer, np.int32)

    def token_versions(self) -> list[int] | None:
        """Of the weights that sampled each token of the answer; None where they never changed."""
        ends = [start for start, _ in self.versions[1:]] + [len(self.output_ids)]
        return [
            version for (start, version), end in zip(self.versions, ends, strict=False) for _ in range(start, end)
        ] or None

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
