"""What watches a run of RL on the user's questions: its measurements, its held-out scores and its trip wires."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from sprat.config.rl import RLRunConfig
from sprat.model import Transformer
from sprat.post.rl.grpo import RLResult
from sprat.post.rl.hack_monitor import HackAlarm, HackMonitor, observation
from sprat.post.rl.hack_signals import Observation
from sprat.post.rl.held_out import HeldOut
from sprat.post.rl.problem_mix import ProblemSource
from sprat.post.rl.rollout import Rollout
from sprat.post.rl.run_metrics import kl_from_start, run_metrics
from sprat.post.rl.step_line import spent_so_far, step_line
from sprat.post.rl.trip_wires import Trip, TripWires
from sprat.tasks import Problem, is_correct
from sprat.trust.run import Run
from sprat.trust.run_record import read_metrics

log = logging.getLogger(__name__)
HACK_WIRE = "hack_monitor"
OnNews = Callable[[str], None]
ReferenceModel = Callable[[], AbstractContextManager[Transformer]]


class RunMonitor:
    """See ``training_state.Monitor``.

    Args:
        held_out: asks the problems that are kept from training.
        problems: what the groups were asked.
        reference: the weights of the start, while the context lasts; None where nobody asks for the KL.
        reward_name: of the verifier.
        on_news: is told what a person at the terminal should know.
    """

    def __init__(
        self,
        run: Run,
        config: RLRunConfig,
        held_out: HeldOut,
        problems: ProblemSource,
        reference: ReferenceModel | None,
        reward_name: str,
        on_news: OnNews,
    ) -> None:
        self._run, self._config, self._held_out, self._on_news = run, config, held_out, on_news
        self._problems, self._reference = problems, reference
        self._wires, self._reward_name = TripWires(config.trip_wires, reward_name), reward_name
        self._hacks, self._new_alarms, self._last_step = HackMonitor(), list[HackAlarm](), time.monotonic()
        self.can_roll_back = "rollback" in (config.trip_wires.action, config.hack_monitor)
        self.lr_factor = config.trip_wires.lr_factor

    def start(self, step: int, model: Transformer, state: Mapping[str, Any]) -> None:
        """See ``training_state.Monitor``; before its very first step the held-out problems are asked."""
        self._hacks, self._last_step = HackMonitor(), time.monotonic()
        if state:
            self._hacks.restore(state)
        self._held_out.forget_after(step)
        steps = {row["step"] for row in read_metrics(self._run.folder)}
        if self._held_out.asked and self._held_out.first not in steps:
            scores = self._held_out.evaluate(step)
            self._run.truncate_metrics(step - 1)
            self._run.log(step, **scores)
            self._tell(step, scores)
        self._wires.replay(read_metrics(self._run.folder))

    def state(self) -> dict[str, Any]:
        """See ``training_state.Monitor``."""
        return {} if self._config.hack_monitor == "off" else self._hacks.state()

    def rolls_back(self, trip: Trip) -> bool:
        """See ``training_state.Monitor``."""
        action = self._config.hack_monitor if trip.wire == HACK_WIRE else self._config.trip_wires.action
        return action == "rollback"

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
        return metrics | self._look_for_hacks(step, rollouts)

    def _look_for_hacks(self, step: int, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Show the answers of a step to the hack monitor; its evidence, as shares of what makes an alarm."""
        if self._config.hack_monitor == "off":
            return {}
        asked = {rollout.group: self._problems.problem(rollout.group)[1] for rollout in rollouts}
        self._new_alarms = self._hacks.observe(
            step, [answer_seen(asked[rollout.group], rollout) for rollout in rollouts]
        )
        for alarm in self._new_alarms:
            self._on_news(f"hack monitor: {alarm}")
            entry = {
                "step": step,
                "signal": alarm.signal,
                "sentence": str(alarm),
                "answer": alarm.example.content[:500],
            }
            entry |= {"question": alarm.example.question[:500], "expected": alarm.example.expected[:500]}
            alarms = self._run.facts.get("alarms", [])
            if entry not in alarms:  # told by a session that was killed before its checkpoint, or before a rollback
                self._run.add_facts(alarms=[*alarms, entry])
        evidence = {name: value for name, value in self._hacks.metrics().items() if value}
        highest = max([*evidence.values(), float(bool(self._new_alarms))], default=0.0)
        return {"hack_evidence": highest, "hack_alarms": float(len(self._hacks.alarms)), **evidence}

    def check(self, row: Mapping[str, Any]) -> Trip | None:
        """See ``training_state.Monitor``."""
        now, spent = time.monotonic(), spent_so_far(self._run.folder, float(row.get("tokens") or 0))
        self._on_news(step_line(row, self._config.steps, now - self._last_step, spent))
        self._last_step = now
        trip = self._wires.add(row) or self._hack_trip()
        if trip is not None and trip.is_end:
            if self._held_out.asked and trip.step not in self._held_out.results:
                self._held_out.evaluate(trip.step)
            self.note(trip, None)
        return trip

    def _hack_trip(self) -> Trip | None:
        """An alarm of this step, where one shall do more than be told."""
        if not self._new_alarms or self._config.hack_monitor not in ("rollback", "stop"):
            return None
        alarm = self._new_alarms[0]
        what = f"what reward {self._reward_name} pays begins to look like a hack: {alarm}"
        return Trip(HACK_WIRE, alarm.step, what)

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


def answer_seen(problem: Problem, rollout: Rollout) -> Observation:
    """An answer as the hack monitor sees it: with what the judge paid, before length and form were weighed in."""
    second = None if rollout.second is None else is_correct(rollout.second)
    return observation(problem, rollout.response, rollout.score if rollout.outcome == "paid" else None, second)
