"""What the orchestrator answers to the questions of trainer and workers; each is asked by a thread of its own.

| question | of whom | reply |
|---|---|---|
| ``hello`` | all | the job |
| ``take`` | worker | groups, and the weights to sample them with; waits until there are some |
| ``newest`` | worker | the newest weights, if there are any |
| ``answer``, ``refuse`` | worker | nothing: the answers to a group; that weights were not whole |
| ``weights`` | worker | a piece of a version's file, for who cannot see it |
| ``groups``, ``group`` | trainer | the groups of a step, once all are answered; the answers of one |
| ``publish`` | trainer | the newest version: a step is done, its weights are written |
| ``log``, ``truncate``, ``facts``, ``progress``, ``finish`` | trainer | nothing: what its run notes |
| ``failed`` | all | nothing: why it cannot go on, which ends the run |
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sprat.errors import MachineError, SpratError, TrustError, unpack_error
from sprat.post.rl.assignment import Assignment, Sampled
from sprat.post.rl.connection import error_reply
from sprat.post.rl.dispatcher import Dispatcher
from sprat.post.rl.ledger_tables import StepRow
from sprat.post.rl.machines import note_machine
from sprat.post.rl.sampled import pack_requests, unpack_answers
from sprat.post.rl.trajectory import pack_rollout
from sprat.post.rl.weights import read_chunk, weights_file
from sprat.post.rl.wire import Arrays, Message
from sprat.trust.run import Run

log = logging.getLogger("sprat.post.rl")
Reply = tuple[Mapping[str, Any], Arrays]
TRAINER = "trainer"
_OF_ALL = ("hello", "take", "newest", "answer", "refuse", "weights", "failed")
_OF_THE_TRAINER = ("groups", "group", "publish", "log", "truncate", "facts", "progress", "finish")


class Service:
    """See the module's text.

    Args:
        job: what trainer and workers need to know, JSON.
        on_progress: is told who has done something that its death would not undo.

    Attributes:
        finish: what the trainer said at its end; None before.
    """

    def __init__(
        self,
        run: Run,
        dispatcher: Dispatcher,
        weights_folder: Path,
        job: Mapping[str, Any],
        on_progress: Callable[[str], None],
    ) -> None:
        self._run, self._dispatcher, self._folder, self._job = run, dispatcher, weights_folder, dict(job)
        self._note_progress = on_progress
        self.finish: dict[str, Any] | None = None
        self._handlers: dict[str, Callable[[str, Message], Reply]] = {
            kind: getattr(self, f"_on_{kind}") for kind in (*_OF_ALL, *_OF_THE_TRAINER)
        }

    def answer(self, name: str, message: Message) -> Reply:
        """The reply to one question of ``name``; an error ends the run, and is said to whoever asked.

        Raises:
            TrustError: it is not whole, or not for its sender to ask, who cannot be believed.
        """
        handler = self._handlers.get(message.kind)
        if handler is None or (message.kind in _OF_THE_TRAINER and name.partition(".")[0] != TRAINER):
            raise TrustError(f"nobody answers {message.kind!r:.40}", where=name, todo="run the same version of sprat")
        try:
            return handler(name, message)
        except KeyboardInterrupt:
            return {"stop": True}, {}
        except SpratError as error:
            if message.kind == "answer":
                raise
            if message.kind != "weights":
                self._dispatcher.stop(error)
            return error_reply(error), {}

    def _on_hello(self, name: str, message: Message) -> Reply:
        if message.body.get("role") == "trainer":
            note_machine(self._dispatcher.ledger, message.table("machine"))
        return self._job | {"facts": self._run.facts}, {}

    def _on_failed(self, name: str, message: Message) -> Reply:
        """A child says why it cannot go on."""
        packed = message.body.get("error")
        if not isinstance(packed, list) or len(packed) != 4 or not all(isinstance(part, str) for part in packed):
            raise TrustError("an error that is none", where=name, todo="run the same version of sprat")
        error = unpack_error(packed, MachineError)
        self._dispatcher.stop(error)
        return {}, {}

    def _on_take(self, name: str, message: Message) -> Reply:
        assignment = self._dispatcher.take(name, message.integer("room", 1))
        if assignment is None:
            return {"stop": True}, {}
        rows, arrays = pack_requests(assignment.requests)
        return {**self._weights(assignment), "requests": rows}, arrays

    def _on_newest(self, name: str, message: Message) -> Reply:
        assignment = self._dispatcher.newest()
        return ({} if assignment is None else self._weights(assignment)), {}

    def _weights(self, assignment: Assignment) -> dict[str, Any]:
        file = str(weights_file(self._folder, assignment.version))
        weights = {"version": assignment.version, "digest": assignment.digest, "file": file}
        return {**weights, "rollbacks": assignment.rollbacks}

    def _on_answer(self, name: str, message: Message) -> Reply:
        question = self._dispatcher.question(message.integer("group"))
        if question is not None:
            answers = unpack_answers(message, len(question.prompt_ids), self._dispatcher.ledger.group_size)
            self._dispatcher.answered(Sampled(question, name, message.integer("rollbacks"), answers))
            self._note_progress(name)
        return {}, {}

    def _on_refuse(self, name: str, message: Message) -> Reply:
        log.warning("%s: %s", name, message.text("reason"))
        self._dispatcher.refused(name, message.integer("version"), message.text("reason"))
        return {}, {}

    def _on_weights(self, name: str, message: Message) -> Reply:
        chunk, size = read_chunk(self._folder, message.integer("version"), message.integer("offset"))
        return {"size": size}, {"bytes": np.frombuffer(chunk, "|u1")}

    def _on_publish(self, name: str, message: Message) -> Reply:
        version, trained = message.integer("version"), message.text("trained")
        row = StepRow(version, version - 1 if trained else None, message.text("weights"), trained, {})
        newest = self._dispatcher.publish(row, message.integer("rollbacks"))
        self._note_progress(name)
        return {"version": newest}, {}

    def _on_groups(self, name: str, message: Message) -> Reply:
        groups = self._dispatcher.wait_for_step(message.integer("step", 1), name)
        return ({"publish_again": True} if groups is None else {"groups": groups}), {}

    def _on_group(self, name: str, message: Message) -> Reply:
        packed = [pack_rollout(rollout) for rollout in self._dispatcher.ledger.group(message.integer("group"))]
        arrays = {f"{row}.{key}": value for row, (_, own) in enumerate(packed) for key, value in own.items()}
        return {"answers": [fields for fields, _ in packed]}, arrays

    def _on_log(self, name: str, message: Message) -> Reply:
        step, metrics = message.integer("step"), message.table("metrics")
        self._dispatcher.ledger.note_metrics(step, metrics)
        self._run.log(step, **metrics)
        return {}, {}

    def _on_truncate(self, name: str, message: Message) -> Reply:
        self._run.truncate_metrics(message.integer("step", -1))
        return {}, {}

    def _on_facts(self, name: str, message: Message) -> Reply:
        self._run.add_facts(**message.table("facts"))
        return {}, {}

    def _on_progress(self, name: str, message: Message) -> Reply:
        self._run.start_progress(message.integer("steps"), message.integer("done"))
        return {}, {}

    def _on_finish(self, name: str, message: Message) -> Reply:
        self.finish = {"flops": message.number("flops"), "tokens": message.integer("tokens")}
        return {}, {}
