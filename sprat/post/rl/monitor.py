"""What watches a run of RL on the user's questions: its measurements, its held-out scores and its trip wires."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from sprat.config.rl import RLRunConfig
from sprat.model import Transformer
from sprat.post.rl.grpo import RLResult
from sprat.post.rl.held_out import HeldOut
from sprat.post.rl.rollout import Rollout
from sprat.post.rl.run_metrics import kl_from_start, run_metrics
from sprat.post.rl.trip_wires import Trip, TripWires
from sprat.trust.run import Run
from sprat.trust.run_record import read_metrics

log = logging.getLogger(__name__)
OnNews = Callable[[str], None]
ReferenceModel = Callable[[], AbstractContextManager[Transformer]]


class RunMonitor:
    """See ``training_state.Monitor``.

    Args:
        held_out: asks the problems that are kept from training.
        reference: the weights of the start, while the context lasts; None where nobody asks for the KL.
        reward_name: of the verifier.
        on_news: is told what a person at the terminal should know.
    """

    def __init__(
        self,
        run: Run,
        config: RLRunConfig,
        held_out: HeldOut,
        reference: ReferenceModel | None,
        reward_name: str,
        on_news: OnNews,
    ) -> None:
        self._run, self._config, self._held_out, self._on_news = run, config, held_out, on_news
        self._reference, self._wires = reference, TripWires(config.trip_wires, reward_name)
        self.can_roll_back, self.lr_factor = config.trip_wires.action == "rollback", config.trip_wires.lr_factor

    def start(self, step: int, model: Transformer) -> None:
        """See ``training_state.Monitor``; before its very first step the held-out problems are asked."""
        self._held_out.forget_after(step)
        steps = {row["step"] for row in read_metrics(self._run.folder)}
        if self._held_out.asked and self._held_out.first not in steps:
            scores = self._held_out.evaluate(step)
            self._run.truncate_metrics(step - 1)
            self._run.log(step, **scores)
            self._tell(step, scores)
        self._wires.replay(read_metrics(self._run.folder))

    def measure(self, step: int, rollouts: Sequence[Rollout], result: RLResult) -> dict[str, float]:
        """See ``training_state.Monitor``."""
        metrics = run_metrics(rollouts, step, self._config.group_size)
        metrics |= {"tokens": result.tokens, "petaflops": result.flops / 1e15}
        if self._reference is not None:
            with self._reference() as reference:
                metrics["kl_start"] = kl_from_start(reference, rollouts, self._config)
        if self._held_out.is_due(step):
            scores = self._held_out.evaluate(step)
            self._tell(step, scores)
            metrics |= scores
        return metrics

    def check(self, row: Mapping[str, Any]) -> Trip | None:
        """See ``training_state.Monitor``."""
        trip = self._wires.add(row)
        if trip is not None and trip.is_end:
            if self._held_out.asked and trip.step not in self._held_out.results:
                self._held_out.evaluate(trip.step)
            self.note(trip, None)
        return trip

    def note(self, trip: Trip, back_to: int | None) -> None:
        """See ``training_state.Monitor``."""
        what = "nothing is left to learn" if trip.is_end else "stopped"
        what = what if back_to is None else f"back to step {back_to}, with a lower rate"
        self._on_news(f"step {trip.step}: {trip.sentence}; {what}")
        entry = {"wire": trip.wire, "step": trip.step, "sentence": trip.sentence, "is_end": trip.is_end}
        entry |= {} if back_to is None else {"back_to": back_to}
        trips = self._run.facts.get("trips", [])
        if entry not in trips:  # noted by a session that was killed before its checkpoint
            self._run.add_facts(trips=[*trips, entry])

    def has_ended(self, step: int) -> bool:
        """See ``training_state.Monitor``."""
        return any(trip["is_end"] and trip["step"] == step for trip in self._run.facts.get("trips", []))

    def _tell(self, step: int, scores: Mapping[str, float]) -> None:
        when = f"after step {step}" if "eval_gain" in scores else "before training"
        gain = ""
        if "eval_gain" in scores:
            gain = f", {scores['eval_gain']:+.3f} since the start (p = {scores['eval_p_value']:.2g})"
        reward, accuracy = scores["eval_reward"], scores["eval_accuracy"]
        count = len(self._held_out.asked)
        self._on_news(f"{count} held-out problems {when}: reward {reward:.3f}, {accuracy:.1%} right{gain}")
