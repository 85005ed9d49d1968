"""What an engine says of itself; no torch is needed to read it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """What an engine has done and holds, for operators, benches and tests; counts are since it was made.

    Attributes:
        running, waiting: requests.
        blocks, blocks_used, blocks_cached: that there is memory for, in use by requests, and kept for later ones.
        block_bytes: bytes of one block.
        steps: calls of the back end.
        sampled_tokens: tokens of answers.
        prompt_tokens, cached_tokens: of admitted requests, and how many of them were in the KV cache already.
        preemptions: times that a request made way for another.
        drafted_tokens, accepted_tokens: drafts checked, and those that were accepted.
        model_seconds: time inside the back end.
    """

    running: int
    waiting: int
    blocks: int
    blocks_used: int
    blocks_cached: int
    block_bytes: int
    steps: int
    sampled_tokens: int
    prompt_tokens: int
    cached_tokens: int
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int
    model_seconds: float
