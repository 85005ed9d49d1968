"""Where a run of RL is: what a checkpoint holds of it, how it goes on after a kill, and how it is sent back.

A trip wire may send a run back to its last checkpoint, once, with a lower rate; the checkpoint is written anew with
that rate, so that a kill at any moment goes on from the same state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sprat.config import RLConfig
from sprat.config.rl import RLRunConfig
from sprat.errors import CheckpointError, TrainingError, TrustError
from sprat.model import Transformer
from sprat.post.rl.rollout import Rollout, RolloutSource
from sprat.post.rl.trip_wires import Trip
from sprat.post.rl.update import optim_config
from sprat.train import checkpoint, loop, optim
from sprat.trust.run import Run


@dataclass
class RLResult:
    """What a run of GRPO did; ``reward`` and ``accuracy`` are those of the last step's rollouts."""

    steps: int = 0
    tokens: int = 0  # sampled
    flops: float = 0.0
    reward: float = 0.0
    accuracy: float = 0.0


class Monitor(Protocol):
    """Who measures a run and watches it; see ``monitor``.

    Attributes:
        can_roll_back: whether a trip sends the run back to its last checkpoint, once.
        lr_factor: of the rate from then on.
    """

    can_roll_back: bool
    lr_factor: float

    def start(self, step: int, model: Transformer, state: Mapping[str, Any]) -> None:
        """Before the first step that is made after ``step``, also after a kill, or when the run was sent back.

        ``state``: what it gave to the checkpoint after ``step``; empty without one.
        """
        ...

    def state(self) -> dict[str, Any]:
        """What the checkpoint after the last step that was measured keeps of it, JSON."""
        ...

    def rolls_back(self, trip: Trip) -> bool:
        """Whether ``trip`` may send the run back."""
        ...

    def measure(self, step: int, rollouts: Sequence[Rollout], result: RLResult) -> dict[str, float]:
        """What else is logged of ``step``, whose weights have just been published."""
        ...

    def check(self, row: Mapping[str, Any]) -> Trip | None:
        """Look at the row of a step."""
        ...

    def has_ended(self, step: int) -> bool:
        """Whether a wire has said after ``step`` that nothing is left to learn."""
        ...

    def note(self, trip: Trip, back_to: int | None) -> None:
        """Keep that ``trip`` sent the run back to a step, or ended it."""
        ...


@dataclass
class TrainingState:
    """What a checkpoint holds: the trained weights, the optimizer, what was done, and how often it was sent back.

    ``config`` has the rate that holds now; ``digest`` is that of the recipe's. ``next_group`` is the one with which the
    next step begins, where dynamic sampling decides that; ``watched`` what the monitor keeps.
    """

    model: Transformer
    optimizer: optim.OptimizersContainer
    config: RLConfig
    digest: str
    result: RLResult
    rollbacks: int = 0
    next_group: int = 0
    watched: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_dynamic(self) -> bool:
        """Whether dynamic sampling decides where a step ends."""
        return isinstance(self.config, RLRunConfig) and self.config.dynamic_sampling > 0

    def note_groups(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """The answers of ``step`` are here, and the next step begins after them.

        Raises:
            TrustError: they do not follow on those of the step before.
        """
        if not self.is_dynamic:
            return
        if rollouts[0].group != self.next_group:
            what = f"step {step} begins with group {rollouts[0].group}, and the one before ended at {self.next_group}"
            todo = "put back the checkpoints or the ledger of rollouts that belong together, or start afresh"
            raise TrustError(what, where="dynamic_sampling", todo=todo)
        self.next_group = rollouts[-1].group + 1

    def save(self, folder: Path, step: int) -> None:
        """Write the checkpoint after ``step``."""
        extra: dict[str, Any] = {"config": self.digest, "result": vars(self.result)}
        if self.watched:
            extra["monitor"] = dict(self.watched)
        if self.is_dynamic:
            extra["next_group"] = self.next_group
        if self.rollbacks:
            extra |= {"rollbacks": self.rollbacks, "lr": self.config.lr}
        checkpoint.save(folder, step, self.model, self.optimizer, extra)


def resume(model: Transformer, config: RLConfig, run: Run) -> TrainingState:
    """Take over the last whole checkpoint of the run, else that of ``init_from``; what was done so far, or nothing."""
    own_checkpoint = checkpoint.latest(run.checkpoints)
    start = own_checkpoint or loop.load_start(config.init_from, config.steps, run)
    if start is None:
        run.truncate_metrics(0)
        return TrainingState(model, optim.build(model, optim_config(config)), config, config.digest(), RLResult())
    if own_checkpoint and start.extra.get("config") != config.digest():
        todo = "remove the checkpoints or go back to that recipe"
        raise CheckpointError("the checkpoint was made with another recipe", where=str(start.folder), todo=todo)
    result = RLResult(**start.extra["result"]) if own_checkpoint else RLResult(steps=start.step)
    rollbacks = int(start.extra.get("rollbacks", 0)) if own_checkpoint else 0
    now = config.replace(lr=float(start.extra["lr"])) if rollbacks else config
    state = TrainingState(model, optim.build(model, optim_config(now)), now, config.digest(), result, rollbacks)
    state.next_group = first_group_after(start, config)
    state.watched = start.extra.get("monitor", {}) if own_checkpoint else {}
    checkpoint.restore(start, model, state.optimizer)
    run.truncate_metrics(start.step)
    return state


def first_group_after(start: checkpoint.Checkpoint, config: RLConfig) -> int:
    """The group with which the step after ``start`` begins."""
    return int(start.extra.get("next_group", start.step * config.prompts_per_step))


def roll_back(state: TrainingState, monitor: Monitor, trip: Trip, run: Run, source: RolloutSource) -> TrainingState:
    """Go back to the last checkpoint with a lower rate, once; what was spent since then stays spent.

    Raises:
        TrainingError: the run ends here, with the sentence of ``trip``.
    """
    good, result = checkpoint.latest(run.checkpoints), state.result
    is_final = good is None or bool(state.rollbacks) or not monitor.rolls_back(trip)
    monitor.note(trip, None if is_final or good is None else good.step)
    if is_final or good is None:
        kept = "" if good is None else f"; the last checkpoint before is {run.folder}@{good.step}"
        todo = f"see docs/rl.md on trip wires{kept}"
        raise TrainingError(f"{trip.sentence} (step {trip.step})", where=f"trip_wires: {trip.wire}", todo=todo)
    now = state.config.replace(lr=state.config.lr * monitor.lr_factor)
    result.steps = good.step
    after = TrainingState(state.model, optim.build(state.model, optim_config(now)), now, state.digest, result, 1)
    after.next_group, after.watched = first_group_after(good, now), good.extra.get("monitor", {})
    checkpoint.restore(good, after.model, after.optimizer)
    after.save(run.checkpoints, good.step)  # so that a kill from here on goes on with the lower rate
    run.truncate_metrics(good.step)
    monitor.start(good.step, state.model, after.watched)
    source.publish(good.step, state.model, after.rollbacks)
    return after
