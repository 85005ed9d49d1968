"""The orchestrator: the parent of a run of RL with roles, which knows all and computes nothing.

    orchestrator   draws questions, has answers paid, keeps the ledger and the log; this process
    trainer        one process: takes the answers of a step, moves the weights, publishes them as a file
    workers        many: take weights and prompts, give tokens

All questions come from the others (``service``); a thread for each answers them, and the main thread pays what was
sampled and starts again whoever died. Whatever is killed, and whenever:

- a worker: its groups are asked again under the same number, question and seed;
- the trainer: it goes on from its last checkpoint, and does the steps since then again with the answers in the ledger;
- this process: the others end with it, and the same command goes on from ledger, checkpoint and weights.

A step that is done again must give the weights that it gave before, to the bit, or the run ends by a sentence.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sprat.config.rl import RLRunConfig
from sprat.errors import SpratError
from sprat.files.digest import of_json
from sprat.files.lock import LOCK_NAME, lock_folder
from sprat.post.rl.assignment import Asker, Range
from sprat.post.rl.children import STOP_SECONDS, Child, Role, worker_environment
from sprat.post.rl.connection import ALIVE_SECONDS, Connection
from sprat.post.rl.dispatcher import Dispatcher
from sprat.post.rl.ledger import LEDGER_FILE, RolloutLedger
from sprat.post.rl.placement import Placement, start_placement
from sprat.post.rl.service import TRAINER, Service
from sprat.post.rl.weights import WEIGHTS_FOLDER
from sprat.train.loop import deferred_interrupt
from sprat.trust.run import Run

log = logging.getLogger("sprat.post.rl")
PREDECESSOR_SECONDS = 30.0  # for the processes of a session that was killed to end
PAY_SECONDS = 0.05  # without answers to pay, until the processes are looked at again


def open_ledger(run: Run, config: RLRunConfig) -> RolloutLedger:
    """The ledger of rollouts of ``run``. Raises as ``RolloutLedger``."""
    inputs = {name: item["digest"] for name, item in run.identity["inputs"].items()}
    identity = {"run": of_json([run.stage, run.identity["recipe_digest"], run.seed, inputs])}
    sizes = {"prompts_per_step": config.prompts_per_step, "group_size": config.group_size}
    sizes |= {"dynamic_sampling": config.dynamic_sampling} if config.dynamic_sampling else {}
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
    """How the roles are started; two numbers are added."""

    trainer: Sequence[str] = (sys.executable, "-P", "-m", "sprat.post.rl.trainer_process")
    worker: Sequence[str] = (sys.executable, "-P", "-m", "sprat.post.rl.worker")


class Orchestrator:
    """One session of a run with roles.

    Args:
        run: opened, not done; its log and facts are written here alone.
        config: with ``rollout.workers`` of at least 1.
        asker: draws questions, and has answers paid in the thread that calls ``work``.
        job: what trainer and workers need to know beside, JSON: ``model`` at least.
        start: the step after which training starts.
        first_group: of the step after that.
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
        first_group: int | None = None,
        commands: Commands | None = None,
    ) -> None:
        self._run, self._config, self._commands = run, config, commands or Commands()
        weights_folder, per_step = run.checkpoints / WEIGHTS_FOLDER, config.prompts_per_step
        self.ledger = open_ledger(run, config)
        first = start * per_step if first_group is None else first_group
        groups = Range(first, config.steps * per_step, per_step)
        self.dispatcher = Dispatcher(self.ledger, asker, groups, config.rollout.staleness, weights_folder)
        opened = {"folder": str(run.folder), "ledger": str(run.ledger.path), "identity": run.identity}
        room = config.rollout.batch or -(-per_step // config.rollout.workers)
        whole = {"config": config.model_dump(mode="json"), "run": opened, "room": room, **job}
        self._service = Service(run, self.dispatcher, weights_folder, whole, self._note_progress)
        self._job = whole
        self._children: dict[str, Child] = {}
        self._cpu: dict[str, float] = {}
        self._connections, self._threads = set[Connection](), list[threading.Thread]()
        self._closing = threading.Event()

    def work(self) -> dict[str, Any]:
        """Do all steps that are left; ``flops`` and ``tokens`` of the run. Goes on where an earlier session was.

        Raises:
            SpratError: what ended trainer, worker, verifier or ledger.
            KeyboardInterrupt: Ctrl-C or SIGTERM; the trainer finished its step first, with a checkpoint.
        """
        with lock_folder(self._run.checkpoints, wait_seconds=PREDECESSOR_SECONDS) as held:
            self._run.other_cpu_seconds = self._cpu_seconds
            placement = self._start(held)
            try:
                with deferred_interrupt() as interrupted:
                    while self._service.finish is None or self._children[TRAINER].process is not None:
                        self.dispatcher.raise_if_failed()
                        self._keep_children()
                        placement.keep_alive()
                        self.dispatcher.pay_next(PAY_SECONDS)
                        if interrupted():
                            self._interrupt()
            finally:
                self.dispatcher.stop()
                self._close(placement)
        assert self._service.finish is not None
        return self._service.finish

    def _start(self, held: int) -> Placement:
        """Places for the children, and for whoever comes from elsewhere."""
        workers = self._config.rollout.workers if self._config.rollout.placement == "local" else 0
        environment = worker_environment(max(1, workers))
        roles = [Role(f"worker-{number}", self._commands.worker, environment) for number in range(workers)]
        for role in (Role(TRAINER, self._commands.trainer, dict(os.environ)), *roles):
            self._children[role.name] = Child(role, held, self._serve_in_thread, self._dismiss)
        threading.Thread(target=self._say_alive, daemon=True).start()
        return start_placement(self._config.rollout, self._run.checkpoints, self._job, self._serve_in_thread)

    def _keep_children(self) -> None:
        """Start whoever is not there. Raises SpratError: one cannot be started, or dies of it."""
        for child in self._children.values():
            is_trainer, has_ended = child.role.name == TRAINER, child.reap() is not None
            if is_trainer and self._service.finish is not None and child.process is None:
                if child.exit_code == 0:
                    continue
                self._service.finish = None  # it died of its end: once more
            if has_ended:
                self.dispatcher.raise_if_failed()
                child.note_death()
            if child.process is None and is_trainer:  # what it had begun to write is not trusted
                shutil.rmtree(self._run.artifact, ignore_errors=True)
                self._run.artifact.mkdir()
            child.keep_alive()

    def _interrupt(self) -> None:
        """Let the trainer finish its step, with a checkpoint, and end. Raises KeyboardInterrupt, or why it failed."""
        self.dispatcher.stop()
        trainer = self._children[TRAINER]
        trainer.signal(signal.SIGINT)
        trainer.end(None)
        self.dispatcher.raise_if_failed()
        if self._service.finish is None or trainer.exit_code:
            raise KeyboardInterrupt

    def _close(self, placement: Placement) -> None:
        """End all others; what they did not say is not needed."""
        self._closing.set()
        seconds = STOP_SECONDS if self._service.finish is not None else 0.0
        deadline = time.monotonic() + seconds
        for child in self._children.values():
            child.end(max(0.0, deadline - time.monotonic()))
        placement.close()
        for connection in list(self._connections):
            connection.close()
        for thread in self._threads:
            thread.join(STOP_SECONDS)
        self.ledger.close(final=True)

    def _dismiss(self, name: str) -> None:
        """A process has ended: its groups are asked again."""
        if groups := self.dispatcher.give_back(name):
            log.warning("%s: its groups %s are asked again", name, ", ".join(map(str, groups)))

    def _note_progress(self, name: str) -> None:
        if child := self._children.get(name.partition(".")[0]):
            child.note_progress()

    def _cpu_seconds(self) -> float:
        """CPU seconds of the others, as far as the system does not count them as those of children that have ended."""
        alive = {child.name for child in self._children.values() if child.process is not None}
        local = tuple(self._children)
        return sum(s for name, s in self._cpu.copy().items() if name in alive or not name.startswith(local))

    def _serve_in_thread(self, connection: Connection) -> None:
        """Answer what comes from ``connection``, in a thread of its own."""
        self._connections.add(connection)
        thread = threading.Thread(target=self._serve, args=(connection,), daemon=True, name=f"rl-{connection.peer}")
        self._threads = [thread, *(other for other in self._threads if other.is_alive())]
        thread.start()

    def _serve(self, connection: Connection) -> None:
        """Answer questions until the other side has ended."""
        name = connection.peer
        try:
            while (message := connection.receive()) is not None:
                self._cpu[name] = message.number("cpu")
                if message.kind != "alive":
                    connection.send(*self._service.answer(name, message))
        except SpratError as error:  # what it says is not believed
            log.warning("%s: %s", name, error)
        except OSError:
            pass
        finally:
            self._connections.discard(connection)
            connection.close()
            try:
                self._dismiss(name)
            except SpratError as error:
                self.dispatcher.stop(error)

    def _say_alive(self) -> None:
        """Tell all who wait that this process lives."""
        while not self._closing.wait(ALIVE_SECONDS):
            for connection in list(self._connections):
                connection.send_alive()
