"""What the MTP modules of a model guess, by the code that trains them; and a walk of a back end along a text."""

from __future__ import annotations

import numpy as np
import torch

from sprat.engine.backend import Backend, Batch
from sprat.model import Transformer


def logits_behind(model: Transformer, text: list[int], depth: int) -> torch.Tensor:
    """The logits of module ``depth`` (1, 2) for the token behind ``text``, which ends with what it was fed with."""
    with torch.no_grad():
        rows = torch.tensor([text])
        hidden = model.hidden(rows)
        for module in range(1, depth + 1):
            hidden = model.mtp_hidden(hidden, rows, depth=module)
        logits: torch.Tensor = model.head(hidden.x_BTD)[0, len(text) - 1 - depth]
    return logits


def worst_guess(model: Transformer, backend: Backend, ids: list[int]) -> tuple[float, int]:
    """Walk along ``ids`` several times, in a prompt and then in steps of drafts that hold or are refused.

    A second module was fed with guesses of the first that the text did not follow, so only its first one is compared.

    Returns:
        how far the logit of a guess lay below the greatest at most; how many different tokens were guessed.
    """
    backend.reserve(3)
    vocab, worst, table, seen = model.config.vocab_size, 0.0, np.array([[2, 0]], np.int32), set()
    for prompt in (7, 30, 60):
        place = 0
        for held, refused in ((prompt, 0), (1, 0), (1, 1), (2, 0), (2, 1), (1, 2), (3, 1)):
            after = ids[place + held]
            tokens = [*ids[place : place + held], *((after + 1 + i) % vocab for i in range(refused))]
            places = np.arange(place, place + len(tokens), dtype=np.int32)
            starts = np.array([0, len(tokens)], np.int32)
            batch = Batch(np.array(tokens, np.int32), places, starts, table, starts[1:] - 1)
            backend.run(batch)
            next_T = np.array([*ids[place + 1 : place + held + 1], *range(refused)], np.int64)
            guesses = backend.draft(batch, next_T, vocab)[0].tolist()
            text = ids[: place + held + 1]
            for depth, guess in enumerate(guesses if place == 0 else guesses[:1], 1):
                logits = logits_behind(model, text, depth)
                worst = max(worst, float(logits.max() - logits[guess]))
                seen.add(guess)
                text = [*text, guess]
            place += held
    return worst, len(seen)
