"""An answer that is known before: a processor that lets each token of a script through, and no other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray


class Says:
    """Allows the token of ``script`` whose turn it is; behind its end all."""

    starts_at, supports_drafts = 0, True

    def __init__(self, script: Sequence[int]) -> None:
        self._script = script

    def apply(self, logits_V: NDArray[np.float32], output_ids: Sequence[int], draft_ids: Sequence[int]) -> None:
        """See ``Processor``."""
        place = len(output_ids) + len(draft_ids)
        if place < len(self._script):
            logits_V[np.arange(len(logits_V)) != self._script[place]] = -np.inf


def says(script: Sequence[int]) -> tuple[Callable[[Sequence[int]], Says]]:
    """For ``Sampling(processors=…)``."""
    return (lambda prompt: Says(script),)
