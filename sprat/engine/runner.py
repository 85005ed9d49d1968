"""One step of the model: prefill the new rows, decode the running ones, sample all of them together.

The model is the one that trains; only which positions it computes differs. New prompts run as one
right-padded batch straight into their rows of the pool, and only their last position reaches the head. A
prompt that is there several times runs once, and its twins copy the row. Running rows feed the token that
they sampled last, one each, through absorbed attention on the latents.

B rows, T prompt tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from torch import Tensor

from sprat.engine.pool import Pool
from sprat.engine.sample import Dials, Samples, sample
from sprat.engine.scheduler import Moves, Plan
from sprat.model import Transformer


class Runner:
    """Holds what the rows need between steps: cache, settings, and the token sampled last.

    Args:
        vocab: ids from here on are never sampled.
        banned: ids that a request may not sample during its first ``ban`` tokens.
    """

    def __init__(self, model: Transformer, *, vocab: int, banned: Rows[int]) -> None:
        self.model = model
        self._vocab, self._banned = vocab, tuple(banned)
        self._device = model.norm.weight.device
        self.pool = Pool(model.config, model.norm.weight.dtype, self._device)
        self._dials = Dials(0)
        self._last_B = torch.zeros(0, dtype=torch.long, device=self._device)

    def run(self, plan: Plan) -> Samples | None:
        """One sampled token per row, running rows first; None if there is no row.

        Raises:
            EngineError: the model's logits are not finite.
        """
        new = plan.new
        rows = plan.running + len(new)
        if not rows:
            return None
        longest = int(self.pool.length[: plan.running].max(initial=0)) + 1
        self.pool.reserve(rows, max([longest, *(len(sequence.prompt) for sequence in new)]))
        self._dials.reserve(self.pool.rows)
        with torch.no_grad():
            parts = [self._decode(plan.running)] if plan.running else []
            if new:
                parts.append(self._prefill(plan))
            logits_BV = self.model.head(torch.cat(parts)).float()
            for row, sequence in enumerate(new, plan.running):
                self._dials.set(row, sequence)
            samples = sample(logits_BV, self._dials, self._banned, self._vocab)
        self._dials.position[:rows] += 1
        self._last_B = samples.tokens_B
        return samples

    def compact(self, moves: Moves) -> None:
        """Follow the scheduler after rows have left."""
        self.pool.copy(moves.source, moves.target)
        self._dials.move(moves.source, moves.target)
        self._last_B[moves.target] = self._last_B[moves.source]
        self._last_B = self._last_B[: moves.count]
        self.pool.shrink(moves.count)

    def reset(self) -> None:
        """Forget all rows, and with them whatever a failed step wrote."""
        self.pool = Pool(self.model.config, self.model.norm.weight.dtype, self._device)
        self._last_B = self._last_B[:0]

    def check(self, lengths: Rows[int]) -> list[str]:
        """Faults in the books: ``lengths`` are the tokens that each row should hold."""
        held = self.pool.length[: self.pool.count].tolist()
        return [] if held == list(lengths) else [f"the pool holds rows of {held} tokens, not {list(lengths)}"]

    def _decode(self, rows: int) -> Tensor:
        """Feed the last tokens of rows 0 … rows-1; hidden [rows, D]."""
        hidden_B1D = self.model.hidden(self._last_B[:rows, None], cache=self.pool.view(0, rows)).x_BTD
        self.pool.length[:rows] += 1
        return hidden_B1D[:, 0]

    def _prefill(self, plan: Plan) -> Tensor:
        """Compute the prompts of the new rows; hidden of their last tokens, [firsts + twins, D]."""
        start, firsts = plan.running, plan.firsts
        lengths = [len(sequence.prompt) for sequence in firsts]
        tokens = np.zeros((len(firsts), max(lengths)), np.int64)
        for row, sequence in enumerate(firsts):
            tokens[row, : lengths[row]] = sequence.prompt
        tokens_BT = torch.from_numpy(tokens).to(self._device)
        last_B = torch.tensor(lengths, device=self._device) - 1
        ragged = min(lengths) < max(lengths)
        valid_BT = torch.arange(tokens.shape[1], device=self._device) <= last_B[:, None] if ragged else None
        cache = self.pool.fresh(start, start + len(firsts))
        hidden_BTD = self.model.hidden(tokens_BT, cache=cache, valid_BT=valid_BT).x_BTD
        self.pool.open([len(sequence.prompt) for sequence in plan.new])
        hidden_BD = hidden_BTD[torch.arange(len(firsts), device=self._device), last_B]
        if not plan.twins:
            return hidden_BD
        self.pool.copy(plan.twin_of, range(start + len(firsts), start + len(plan.new)))
        origin = torch.tensor([row - start for row in plan.twin_of], device=self._device)
        return torch.cat((hidden_BD, hidden_BD[origin]))
