"""Rollouts of this process with a ledger: what was sampled is not sampled again, and every step can be replayed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sprat.model import Transformer
from sprat.post.rl.ledger import RolloutLedger
from sprat.post.rl.ledger_tables import Question, StepRow
from sprat.post.rl.machines import note_machine, this_machine
from sprat.post.rl.rollout import Rollout, RolloutSource
from sprat.post.rl.trajectory import digest_rollouts
from sprat.post.rl.weights import TrainedWeights
from sprat.trust.run import Run

_OWN = "this process"


class RecordedSource:
    """A ``RolloutSource`` that keeps what ``source`` samples, and gives what is kept.

    Args:
        run: whose log's rows are kept with their steps.
        first_group: of the run's first step, with dynamic sampling; a later one follows on the step before.
    """

    def __init__(self, source: RolloutSource, ledger: RolloutLedger, run: Run, first_group: int = 0) -> None:
        self._source, self._ledger, self._first_group = source, ledger, first_group
        self._trained: dict[int, str] = {}
        self._weights: TrainedWeights | None = None
        run.on_log.append(self._note)
        note_machine(ledger, this_machine())

    def _note(self, step: int, row: Mapping[str, Any]) -> None:
        self._ledger.note_metrics(step, {name: value for name, value in row.items() if name != "step"})

    def groups(self, step: int, first: int | None = None) -> list[Rollout]:
        """See ``RolloutSource``; all groups of a step are kept at once, or none."""
        if not self._ledger.done(step):
            rollouts, size = self._sample(step), self._ledger.group_size
            groups = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
            asked = [Question(one.group, one.task, one.problem_id, one.prompt_ids) for one, *_ in groups]
            with self._ledger.transaction("IMMEDIATE"):
                self._ledger.dispatch(asked, _OWN, step)
                for group in groups:
                    self._ledger.record(group[0].group, group, _OWN)
        rollouts = self._ledger.rollouts(step)
        self._trained = {step: digest_rollouts(rollouts)}
        return rollouts

    def _sample(self, step: int) -> list[Rollout]:
        if not self._ledger.dynamic_sampling:
            return self._source.groups(step)
        return self._source.groups(step, self._ledger.end_of(step - 1, self._first_group))

    def publish(self, version: int, model: Transformer, rollbacks: int = 0) -> None:
        """See ``RolloutSource``. Raises TrustError: the step was done before, and came out otherwise."""
        self._source.publish(version, model, rollbacks)
        if rollbacks:
            self._ledger.roll_back(version, rollbacks)
        trained = self._trained.pop(version, "")
        version_in = version - 1 if trained else None
        if self._weights is None or self._weights.model is not model:
            self._weights = TrainedWeights(model)
        self._ledger.record_step(StepRow(version, version_in, self._weights.digest(), trained, {}))

    def close(self) -> None:
        """See ``RolloutSource``."""
        self._source.close()
        self._ledger.close(final=True)
