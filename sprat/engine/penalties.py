"""Penalties for what was said before: repetition as in transformers, frequency and presence as in OpenAI's API.

Repetition (Keskar et al., "CTRL", 2019) looks at prompt and answer and scales; frequency and presence look at the
answer alone and subtract. Repetition goes first, as in vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
from numpy.typing import NDArray

from sprat.engine.sampling import Sampling


class Penalties:
    """The three penalties of one answer; see ``processors.Processor``."""

    wakes, speculates = 0, True

    def __init__(self, sampling: Sampling, prompt: Rows[int], vocab: int) -> None:
        self._repetition = np.float32(sampling.repetition_penalty)
        self._frequency = np.float32(sampling.frequency_penalty)
        self._presence = np.float32(sampling.presence_penalty)
        self._count_V = np.zeros(vocab, np.int32)  # times that the settled answer said it
        self._known_V = np.zeros(vocab, np.int32)  # the same with the prompt
        self._known_V[[index for index in prompt if index < vocab]] = 1
        self._settled = 0

    def apply(self, logits_V: NDArray[np.float32], said: Rows[int], ahead: Rows[int]) -> None:
        """See ``Processor``."""
        self._count(said[self._settled :], 1)
        self._settled = len(said)
        self._count(ahead, 1)
        if self._repetition != 1:
            ids = np.flatnonzero(self._known_V)
            old = logits_V[ids]
            with np.errstate(all="ignore"):  # a penalty near 0 leaves what the sampler refuses by name
                logits_V[ids] = np.where(old < 0, old * self._repetition, old / self._repetition)
        if self._frequency or self._presence:
            ids = np.flatnonzero(self._count_V)
            logits_V[ids] -= self._frequency * self._count_V[ids].astype(np.float32) + self._presence
        self._count(ahead, -1)

    def _count(self, tokens: Rows[int], by: int) -> None:
        """Add ``by`` to the counts of ``tokens``."""
        for token in tokens:
            self._count_V[token] += by
            self._known_V[token] += by
