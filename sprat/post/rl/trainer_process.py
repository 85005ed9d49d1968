"""The trainer of a run of RL with roles: a process that takes answers, moves the weights and publishes them.

It is the very loop of one process (``grpo.train``); what differs is where answers come from (``OrchestratedSource``)
and that the run's log and facts are written by the orchestrator (``OrchestratedRun``), which outlives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sprat.config import MoneyConfig
from sprat.config.rl import RLRunConfig
from sprat.files.json import to_json_value
from sprat.model import Transformer
from sprat.post.rl.connection import Caller
from sprat.post.rl.machines import this_machine
from sprat.post.rl.reinforce import train
from sprat.post.rl.roles import preparation, tell
from sprat.post.rl.rollout import Rollout
from sprat.post.rl.trajectory import digest_rollouts, unpack_rollout
from sprat.post.rl.weights import WEIGHTS_FOLDER, TrainedWeights, prune_weights
from sprat.post.rl.wire import Message
from sprat.post.rl.worker import serve_parent
from sprat.trust.ledger import Ledger
from sprat.trust.run import Run


class OrchestratedRun(Run):
    """A run whose log, facts and end are the orchestrator's; folders and artefact are written here."""

    def __init__(self, caller: Caller, job: Mapping[str, Any], config: RLRunConfig) -> None:
        opened = job["run"]
        super().__init__(Path(opened["folder"]), Ledger(opened["ledger"]), opened["identity"], config, MoneyConfig())
        self._caller, self.facts = caller, dict(job["facts"])

    def start_progress(self, steps: int, done: int = 0) -> None:
        """See ``Run``."""
        self._caller.ask("progress", steps=steps, done=done)

    def log(self, step: int, **metrics: float | int | str | None) -> None:
        """See ``Run``."""
        row = {name: to_json_value(value) for name, value in metrics.items()}
        self._caller.ask("log", step=int(step), metrics=row)
        for listener in self.on_log:
            listener(int(step), {"step": int(step), **row})

    def truncate_metrics(self, step: int) -> None:
        """See ``Run``."""
        self._caller.ask("truncate", step=step)

    def add_facts(self, **facts: Any) -> None:
        """See ``Run``."""
        added = {name: to_json_value(value) for name, value in facts.items()}
        self.facts.update(added)
        self._caller.ask("facts", facts=added)

    def finish(self, *, flops: float = 0, tokens: int = 0) -> None:
        """See ``Run``: the orchestrator does it, once all processes have ended."""
        self._caller.ask("finish", flops=float(flops), tokens=int(tokens))


class OrchestratedSource:
    """A ``RolloutSource`` whose answers come from the orchestrator, and whose weights go out as files.

    Args:
        folder: of the versions.
        staleness: see ``dispatcher``; as many versions and two more are kept.
    """

    def __init__(self, caller: Caller, folder: Path, staleness: int) -> None:
        self._caller, self._folder, self._staleness = caller, folder, staleness
        self._trained: dict[int, str] = {}
        self._newest: tuple[int, Transformer, int] | None = None
        self._weights: TrainedWeights | None = None

    def groups(self, step: int, first: int | None = None) -> list[Rollout]:
        """See ``RolloutSource``; waits for all of them.

        Raises:
            KeyboardInterrupt: the run is to stop. SpratError: it has failed.
        """
        while True:
            reply = self._caller.ask("groups", step=step)
            if "stop" in reply.body:
                raise KeyboardInterrupt
            if "groups" in reply.body:
                break
            assert self._newest is not None  # what was published is not whole any more
            self.publish(*self._newest)
        rollouts = [one for number in reply.body["groups"] for one in self._group(number)]
        self._trained[step] = digest_rollouts(rollouts)
        return rollouts

    def _group(self, number: int) -> list[Rollout]:
        message: Message = self._caller.ask("group", group=number)
        rollouts = []
        for row, fields in enumerate(message.rows("answers")):
            own = {key: value for key, value in message.arrays.items() if key.startswith(f"{row}.")}
            rollouts.append(unpack_rollout(fields, {key.partition(".")[2]: value for key, value in own.items()}))
        return rollouts

    def publish(self, version: int, model: Transformer, rollbacks: int = 0) -> None:
        """See ``RolloutSource``. Raises SpratError: the step was done before, and came out otherwise."""
        if self._weights is None or self._weights.model is not model:
            self._weights = TrainedWeights(model)
        weights = self._weights.save(self._folder, version)
        trained = self._trained.pop(version, "")
        reply = self._caller.ask("publish", version=version, weights=weights, trained=trained, rollbacks=rollbacks)
        prune_weights(self._folder, reply.integer("version"), self._staleness)
        self._newest = version, model, rollbacks

    def close(self) -> None:
        """Nothing was started."""


def train_job(caller: Caller) -> None:
    """Do the job of the orchestrator: all that ``reinforce`` does in one process, but sample."""
    job = caller.ask("hello", role="trainer", machine=this_machine()).body
    config = RLRunConfig.model_validate(job["config"])
    run = OrchestratedRun(caller, job, config)
    with preparation(job, config, run) as ready:
        source = OrchestratedSource(caller, run.checkpoints / WEIGHTS_FOLDER, config.rollout.staleness)
        result = train(run, ready, source, job["name"], job["reward_name"], tell)
    run.finish(flops=result.flops, tokens=result.tokens)


def main(work: Callable[[Caller], None] = train_job) -> None:
    """Be the trainer of the parent that started this process."""
    serve_parent(work)


if __name__ == "__main__":
    main()
