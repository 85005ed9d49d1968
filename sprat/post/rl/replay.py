"""Recompute steps of a run of RL from its ledger, and compare the weights bit for bit: ``sprat replay``.

A step is a function of the weights before it, the optimizer's state and the answers that it was given. The answers are
in the ledger, weights and state in the nearest checkpoint before, or in the model that the run started from. What comes
out must have the digest that was published. It does on the same processor with the same torch and as many threads;
threads are set to what they were, and whatever else differs is said.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sprat.config.base import load
from sprat.config.rl import RLRunConfig
from sprat.errors import CheckpointError, ConfigError, TrustError
from sprat.files.json import read_json
from sprat.formats.load import load_dense, locate
from sprat.model.lora import add_lora
from sprat.post.rl import grpo
from sprat.post.rl.audit import audit
from sprat.post.rl.ledger import LEDGER_FILE, RolloutLedger
from sprat.post.rl.ledger_tables import StepRow
from sprat.post.rl.machines import differences
from sprat.post.rl.training_state import RLResult
from sprat.post.rl.trajectory import digest_rollouts
from sprat.post.rl.update import optim_config
from sprat.post.rl.weights import TrainedWeights
from sprat.train import checkpoint, machine, optim
from sprat.trust import run_record

_SHOWN_METRICS = 5
OnStep = Callable[["StepReplay"], None]


@dataclass(frozen=True)
class StepReplay:
    """What came of a step that was computed again.

    Attributes:
        expected, actual: digests of the weights after it.
        answers: that it trained.
        versions: of the weights that sampled them, the oldest and the newest.
        differences: sentences on what differs; empty where all bits are the same.
    """

    step: int
    expected: str
    actual: str
    answers: int
    versions: tuple[int, int]
    differences: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Replay:
    """What came of a replay: from which step, which steps, and faults of the ledger itself (of a whole one)."""

    start: int
    steps: list[StepReplay]
    faults: list[str]

    @property
    def is_same(self) -> bool:
        """Whether all came out as it was."""
        return not self.faults and not any(step.differences for step in self.steps)


def replay(
    folder: str | Path, step: int | None = None, *, model: str | Path | None = None, on_step: OnStep = lambda step: None
) -> Replay:
    """Recompute ``step`` of the run in ``folder`` from the nearest checkpoint before it; None: all, from the start.

    Args:
        model: where the model is that the run started from, if that is not beside the run.
        on_step: is shown each step when it is done.

    Raises:
        CheckpointError: no such run, or no such step.
        TrustError: the model is not the one that the run started from.
    """
    folder = Path(folder)
    record = read_json(folder / "run.json") or read_json(folder / "open.json")
    if record is None or record.get("stage") != "rl":
        raise CheckpointError("no run of RL", where=str(folder), todo="give the folder of a run of `sprat rl MODEL`")
    ledger = RolloutLedger.read(folder / LEDGER_FILE)
    try:
        rows = ledger.steps()
        last = rows[-1].step if rows else 0
        if len(rows) < 2:  # the first is the start
            raise CheckpointError("no step was trained", where=str(folder), todo="let the run go on: the same command")
        if step is not None and not rows[0].step < step <= last:
            done = f"there are {rows[0].step + 1} to {last}"
            raise CheckpointError(f"step {step} was not trained; {done}", where=str(folder), todo="name another")
        faults = audit(ledger) if step is None else []
        if threads := ((ledger.meta("machines") or [{}])[-1]).get("threads"):
            torch.set_num_threads(int(threads))
        path = _find_model(folder, record, model)
        trainer = _Trainer(folder, record, ledger, path, None if step is None else step - 1)
        steps = list[StepReplay]()
        for row in rows:
            if trainer.step < row.step <= (step or last):
                steps.append(trainer.redo(row))
                on_step(steps[-1])
                if steps[-1].differences:
                    break
        return Replay(trainer.start, steps, faults)
    finally:
        ledger.close()


def _find_model(folder: Path, record: dict[str, Any], given: str | Path | None) -> Path:
    """The model that the run started from.

    Raises:
        ConfigError: nobody says where it is. TrustError: it is another one.
    """
    known, pipeline = record["inputs"]["model"], folder.parent
    if given is None and "path" not in known:
        what, todo = f"the model of the run, {known.get('outside')!r}, is not beside it", "say where: --model MODEL"
        raise ConfigError(what, where=str(folder), todo=todo)
    path = locate(given) if given is not None else pipeline / known["path"]
    if run_record.describe_input(path, pipeline)["digest"] != known["digest"]:
        todo = "give the model that the run started from"
        raise TrustError("the model is not as it was when the run started", where=str(path), todo=todo)
    return path


class _Trainer:
    """Weights and optimizer as they were after a step; they are moved step by step.

    Args:
        record: the run's, as it is on disk.
        latest: the last step that it may start after; None: from the start.
    """

    def __init__(
        self, folder: Path, record: dict[str, Any], ledger: RolloutLedger, model: Path, latest: int | None
    ) -> None:
        machine.tune_allocator()
        self._ledger, self._recipe = ledger, load(RLRunConfig, folder / "recipe.toml")
        self.model, _ = load_dense(model, dequantize=True)
        if self._recipe.lora is not None:
            add_lora(self.model, self._recipe.lora, self._recipe.seed)
        start, is_own = None if latest is None else _nearest_checkpoint(folder, latest), True
        if start is None and self._recipe.init_from:
            digest = record["inputs"]["init_from"]["digest"]
            start, is_own = checkpoint.find_start(self._recipe.init_from, folder, digest), False
            if self._recipe.init_state == "fresh":
                checkpoint.restore_weights(start, self.model)
                start = None
        kl = self._recipe.kl_weight > 0
        self._reference = copy.deepcopy(self.model).eval().requires_grad_(False) if kl else None
        self.start = self.step = 0 if start is None else start.step
        self._rollbacks = int(start.extra.get("rollbacks", 0)) if start is not None and is_own else 0
        self._optimizer = optim.build(self.model, optim_config(self._config))
        if start is not None:
            checkpoint.restore(start, self.model, self._optimizer)
        self._weights = TrainedWeights(self.model)
        self._start_digest = self._weights.digest()

    @property
    def _config(self) -> RLRunConfig:
        """The recipe, with the rate that holds now."""
        if not self._rollbacks:
            return self._recipe
        return self._recipe.replace(lr=self._recipe.lr * self._recipe.trip_wires.lr_factor**self._rollbacks)

    def _note_rollbacks(self) -> None:
        """Where the run was sent back to this step, it went on with another rate."""
        sent_back = self._ledger.rollbacks[self._rollbacks :]
        while sent_back and sent_back.pop(0) == self.step:
            self._rollbacks += 1
            before, self._optimizer = self._optimizer, optim.build(self.model, optim_config(self._config))
            self._optimizer.load_state_dict(before.state_dict())

    def redo(self, row: StepRow) -> StepReplay:
        """The step after this one, once more."""
        self._note_rollbacks()
        rollouts = self._ledger.rollouts(row.step)
        config, result = self._config, RLResult(steps=self.step)
        metrics = grpo.train_step(self.model, self._optimizer, rollouts, config, row.step, self._reference, result)
        self.step, actual = row.step, self._weights.digest()
        versions = [version for rollout in rollouts for version in rollout.versions]
        found = StepReplay(row.step, row.weights, actual, len(rollouts), (min(versions), max(versions)))
        if digest_rollouts(rollouts) != row.trained:
            found.differences.append("the answers in the ledger are not those that it trained")
        if actual != row.weights:
            found.differences.extend(self._explain(row, metrics))
        return found

    def _explain(self, row: StepRow, metrics: dict[str, float]) -> Iterator[str]:
        """What differs beside the weights that came out."""
        yield f"the weights have the digest {self._weights.digest()[:12]}, and had {row.weights[:12]}"
        before = self._ledger.step(self.start)
        if before is not None and before.weights != self._start_digest:
            yield f"it began with other weights: those after step {self.start} are not what they were"
        for name, (there, here) in differences(self._ledger).items():
            yield f"{name}: {there} there, {here} here"
        moved = [
            f"{name} {known} there, {json.loads(json.dumps(value))} here"
            for name, value in metrics.items()
            if (known := row.metrics.get(name)) is not None and known != value
        ]
        if moved:
            more = f" and {len(moved) - _SHOWN_METRICS} more" if len(moved) > _SHOWN_METRICS else ""
            yield f"measured otherwise: {'; '.join(moved[:_SHOWN_METRICS])}{more}"


def _nearest_checkpoint(folder: Path, latest: int) -> checkpoint.Checkpoint | None:
    """The whole checkpoint of the run that is nearest before the step after ``latest``; None where there is none."""
    places = (folder / "checkpoints", folder / "checkpoints" / checkpoint.STABLE)
    found: list[checkpoint.Checkpoint] = []
    for place in (*places, folder / "artefact" / checkpoint.ARTEFACT_FOLDER):
        steps = sorted((int(path.name.removeprefix("step-")) for path in place.glob("step-*")), reverse=True)
        whole = (checkpoint.at_step(place, step) for step in steps if step <= latest)
        found += [each for each in whole if each is not None][:1]
    return max(found, key=lambda each: each.step, default=None)
