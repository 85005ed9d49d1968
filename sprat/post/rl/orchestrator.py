"""The orchestrator: the parent of a run of RL with roles, which knows all and computes nothing.

    orchestrator   draws questions, has answers paid, keeps the ledger and the log; this process
    trainer        one process: takes the answers of a step, moves the weights, publishes them as a file
    workers        many: take weights and prompts, give tokens

All questions come from the others; a thread for each answers them, and the main thread pays what was sampled and
starts again whoever died. Whatever is killed, and whenever:

- a worker: its groups are asked again under the same number, question and seed;
- the trainer: it goes on from its last checkpoint, and does the steps since then again with the answers in the ledger;
- this process: the others end with it, and the same command goes on from ledger, checkpoint and weights.

A step that is done again must give the weights that it gave before, to the bit, or the run ends by a sentence.
"""

from __future__ import annotations

import logging
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sprat.config.rl import RLRunConfig
from sprat.errors import SpratError, TrustError, unpack_error
from sprat.files.digest import of_json
from sprat.files.lock import LOCK_NAME, lock_folder
from sprat.post.rl.children import STOP_SECONDS, Child, Role, worker_environment
from sprat.post.rl.connection import ALIVE_SECONDS, Connection, error_reply
from sprat.post.rl.dispatcher import Asker, Dispatcher, Range, Sampled
from sprat.post.rl.ledger import LEDGER_FILE, RolloutLedger
from sprat.post.rl.ledger_tables import StepRow
from sprat.post.rl.placement import Placement, start_placement
from sprat.post.rl.sampled import pack_requests, unpack_answers
from sprat.post.rl.trajectory import pack_rollout
from sprat.post.rl.weights import WEIGHTS_FOLDER, read_chunk
from sprat.post.rl.wire import Arrays, Message
from sprat.train.loop import deferred_interrupt
from sprat.trust.run import Run

log = logging.getLogger("sprat.post.rl")
PREDECESSOR_SECONDS = 30.0  # for the processes of a run that was killed to end
TRAINER, WORKER = "sprat.post.rl.trainer_process", "sprat.post.rl.worker"
Reply = tuple[Mapping[str, Any], Arrays]


def open_ledger(run: Run, config: RLRunConfig) -> RolloutLedger:
    """The ledger of rollouts of ``run``. Raises as ``RolloutLedger``."""
    inputs = {name: item["digest"] for name, item in run.identity["inputs"].items()}
    identity = {"run": of_json([run.stage, run.identity["recipe_digest"], run.seed, inputs])}
    sizes = {"prompts_per_step": config.prompts_per_step, "group_size": config.group_size}
    return RolloutLedger(run.folder / LEDGER_FILE, identity | sizes)


def wait_for_predecessor(folder: Path) -> None:
    """Wait until no process of an earlier session works on the run in ``folder`` any more: before it is opened.

    Raises:
        MachineError: another session is at work there.
    """
    checkpoints = folder / "checkpoints"
    if (checkpoints / LOCK_NAME).exists():
        with lock_folder(checkpoints, wait_seconds=PREDECESSOR_SECONDS):
            pass


@dataclass(frozen=True)
class Commands:
    """How the roles are started, without the two numbers that come last."""

    trainer: Sequence[str] = (sys.executable, "-P", "-m", TRAINER)
    worker: Sequence[str] = (sys.executable, "-P", "-m", WORKER)


class Orchestrator:
    """One session of a run with roles.

    Args:
        run: opened, not done; its log and facts are written here alone.
        config: with ``rollout.workers`` of at least 1.
        asker: draws questions and has answers paid, in the thread that calls ``work``.
        job: what trainer and workers need to know beside, JSON: ``model`` at least.
        start: the step after which training starts.
        commands: how the roles are started.
    """

    def __init__(
        self,
        run: Run,
        config: RLRunConfig,
        asker: Asker,
        job: Mapping[str, Any],
        *,
        start: int = 0,
        commands: Commands | None = None,
    ) -> None:
        self._run, self._config, self._commands = run, config, commands or Commands()
        self.weights_folder = run.checkpoints / WEIGHTS_FOLDER
        opened = {"folder": str(run.folder), "ledger": str(run.ledger.path), "identity": run.identity}
        room = config.rollout.batch or -(-config.prompts_per_step // config.rollout.workers)
        self._job = {"config": config.model_dump(mode="json"), "run": opened, "room": room, **job}
        self.ledger = open_ledger(run, config)
        per_step = config.prompts_per_step
        groups = Range(start * per_step, config.steps * per_step, per_step)
        self.dispatcher = Dispatcher(self.ledger, asker, groups, config.rollout.staleness, self.weights_folder)
        self._children: dict[str, Child] = {}
        self._metrics: dict[int, dict[str, Any]] = {}
        self._cpu: dict[str, float] = {}
        self._connections: set[Connection] = set()
        self._trainer_error: SpratError | None = None
        self._finish: dict[str, Any] | None = None
        self._closing = threading.Event()

    def work(self) -> dict[str, Any]:
        """Do all steps that are left; what the trainer said at its end. Goes on where an earlier session was.

        Raises:
            SpratError: what ended trainer, worker, verifier or ledger.
            KeyboardInterrupt: Ctrl-C or SIGTERM; the trainer finished its step first, with a checkpoint.
        """
        with lock_folder(self._run.checkpoints, wait_seconds=PREDECESSOR_SECONDS) as held:
            placement = self._start(held)
            try:
                with deferred_interrupt() as interrupted:
                    while self._finish is None or self._children["trainer"].process is not None:
                        self._keep_children()
                        placement.keep_alive()
                        self.dispatcher.pay_next(0.05)
                        if interrupted():
                            self._interrupt()
            except SpratError as error:
                self.dispatcher.stop(error)
                raise
            finally:
                self.dispatcher.stop()
                self._close(placement)
        assert self._finish is not None
        return self._finish

    def _start(self, held: int) -> Placement:
        """The children, and whoever comes from elsewhere."""
        workers = self._config.rollout.workers if self._config.rollout.placement == "local" else 0
        environment = worker_environment(max(1, workers))
        roles = [Role(f"worker-{number}", self._commands.worker, environment) for number in range(workers)]
        import os

        for role in (Role("trainer", self._commands.trainer, dict(os.environ)), *roles):
            self._children[role.name] = Child(role, held, self._serve_in_thread, self._dismiss)
        threading.Thread(target=self._say_alive, daemon=True).start()
        return start_placement(self._config.rollout, self._run.checkpoints, self._job, self._serve_in_thread)

    def _keep_children(self) -> None:
        """Start whoever is not there. Raises SpratError: the trainer says why it cannot go on, or one dies of its start."""
        trainer = self._children["trainer"]
        for child in self._children.values():
            if child.reap() is not None and not (child is trainer and self._finish is not None):
                if self._trainer_error is not None:
                    raise self._trainer_error
                child.note_death()
            if child.process is None and not (child is trainer and self._finish is not None):
                if child is trainer:
                    self._clear_artifact()
                child.keep_alive()

    def _clear_artifact(self) -> None:
        """What a trainer that died had begun to write is not trusted."""
        shutil.rmtree(self._run.artifact, ignore_errors=True)
        self._run.artifact.mkdir()
