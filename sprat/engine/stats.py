"""What an engine has done and holds, in numbers: for operators, benches and tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """A snapshot; counts are since the engine was made.

    Attributes:
        running, waiting: requests.
        blocks, blocks_held, blocks_cached: blocks of memory that are made, in use by requests, and kept for later ones.
        block_bytes: bytes of one block.
        steps: calls of the back end.
        sampled_tokens: tokens of answers.
        prompt_tokens, hit_tokens: of admitted requests, and how many of them were in memory already.
        preempted: times that a request made way for another.
        drafted_tokens, accepted_tokens: guesses checked, and those that held.
        model_seconds: time inside the back end.
    """

    running: int
    waiting: int
    blocks: int
    blocks_held: int
    blocks_cached: int
    block_bytes: int
    steps: int
    sampled_tokens: int
    prompt_tokens: int
    hit_tokens: int
    preempted: int
    drafted_tokens: int
    accepted_tokens: int
    model_seconds: float
