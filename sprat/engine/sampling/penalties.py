"""Penalties for what was said before: repetition as in transformers, frequency and presence as in OpenAI's API.

Repetition (Keskar et al., "CTRL", 2019) looks at prompt and answer and scales; frequency and presence look at the
answer alone and subtract. Repetition goes first, as in vLLM.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sprat.engine.sampling_params import Sampling, TokenIds


class Penalties:
    """The three penalties of one answer; see ``processors.Processor``."""

    starts_at, supports_drafts = 0, True

    def __init__(self, sampling: Sampling, prompt_ids: TokenIds, vocab_size: int) -> None:
        self._repetition = np.float32(sampling.repetition_penalty)
        self._frequency = np.float32(sampling.frequency_penalty)
        self._presence = np.float32(sampling.presence_penalty)
        self._count_V = np.zeros(vocab_size, np.int32)  # times that the output has each token
        self._total_count_V = np.zeros(vocab_size, np.int32)  # the same with the prompt
        self._total_count_V[[index for index in prompt_ids if index < vocab_size]] = 1
        self._num_counted = 0

    def apply(self, logits_V: NDArray[np.float32], output_ids: TokenIds, draft_ids: TokenIds) -> None:
        """See ``Processor``."""
        self._count(output_ids[self._num_counted :], 1)
        self._num_counted = len(output_ids)
        self._count(draft_ids, 1)
        if self._repetition != 1:
            ids = np.flatnonzero(self._total_count_V)
            logits = logits_V[ids]
            with np.errstate(all="ignore"):  # a penalty near 0 leaves what the sampler refuses by name
                logits_V[ids] = np.where(logits < 0, logits * self._repetition, logits / self._repetition)
        if self._frequency or self._presence:
            ids = np.flatnonzero(self._count_V)
            logits_V[ids] -= self._frequency * self._count_V[ids].astype(np.float32) + self._presence
        self._count(draft_ids, -1)

    def _count(self, tokens: TokenIds, by: int) -> None:
        """Add ``by`` to the counts of ``tokens``."""
        for token in tokens:
            self._count_V[token] += by
            self._total_count_V[token] += by
