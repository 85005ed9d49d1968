"""Which group is asked next, of whom, and with which weights: the orchestrator's state, shared by its threads.

One rule holds it together. Groups are numbered in the order in which they are dispatched, and step s trains exactly the
groups (s - 1) P to s P - 1, in that order. Group g may be dispatched while floor(g / P) <= version + staleness, where
``version`` counts the steps whose weights are published. So

- with staleness 0 it is what one process does: a step's groups are sampled with the weights of the step before;
- with more, workers run ahead by so many steps at most, and the trainer waits for stragglers, however late: nothing is
  dropped because it was slow, so long answers are trained as often as short ones;
- the position to go on from is a number of steps, whatever was in flight.

With ``dynamic_sampling``, synchronous alone, a step's groups follow on those of the step before (``plan_step``).

A group belongs to the worker that was asked until its answers are here or its connection ends; then it is asked again,
lowest number first, under the same number, question and seed. Who is thought dead and answers all the same is heard,
unless another was faster: the ledger takes the first.
"""

from __future__ import annotations

import heapq
import threading
from pathlib import Path

from sprat.errors import SpratError, TrainingError, TrustError
from sprat.post.rl.assignment import Asker, Assignment, Range, Sampled
from sprat.post.rl.ledger import RolloutLedger
from sprat.post.rl.ledger_tables import Question, StepRow
from sprat.post.rl.sampled import Request, check_versions
from sprat.post.rl.weights import versions

MAX_REFUSALS = 3  # of one version, before the run ends
MAX_GIVEN_BACK = 10  # of one group in a session, before the run ends


class Dispatcher:
    """See the module's text. Each method may be called by any thread.

    Args:
        groups: those of the run.
        staleness: see above.
        weights_folder: where the trainer writes versions.

    Attributes:
        version: the newest weights that can be had; None while there are none.
    """

    def __init__(
        self, ledger: RolloutLedger, asker: Asker, groups: Range, staleness: int, weights_folder: Path
    ) -> None:
        self.ledger, self._asker, self._range, self._staleness = ledger, asker, groups, staleness
        self._changed = threading.Condition()
        self._again = ledger.unfinished()  # a heap: dispatched, and nobody works on them
        self._next = ledger.next_group(groups.first)
        self._owners: dict[int, tuple[str, Question]] = {}
        self._unpaid: list[Sampled] = []
        self._given_back, self._refusals = dict[int, int](), dict[int, int]()
        self._gone = set[str]()
        self._stopped = False
        self._failure: SpratError | None = None
        self._digests = {row.step: row.weights for row in ledger.steps()}
        there = [version for version in versions(weights_folder) if version in self._digests]
        self.version = there[-1] if there else None
        self._rollbacks = len(ledger.rollbacks)

    def take(self, worker: str, room: int) -> Assignment | None:
        """Groups for ``worker``, at most ``room``, once there are some; None where it is to end.

        Raises SpratError: the run has failed.
        """
        with self._changed:
            while not self._is_over(worker) and not (due := self._due(room)):
                self._changed.wait()
            if self._is_over(worker):
                return None
            assert self.version is not None
            questions = [self._asker.question(group) for group in due]
            self.ledger.dispatch(questions, worker, self.version + 1 if self.ledger.dynamic_sampling else None)
            for question in questions:
                if self._again and self._again[0] == question.group:
                    heapq.heappop(self._again)
                else:
                    self._next = question.group + 1
                self._owners[question.group] = worker, question
            requests = [Request(one.group, one.prompt_ids, self._asker.sampling(one.group)) for one in questions]
            return Assignment(self.version, self._digests[self.version], self._rollbacks, requests)

    def newest(self) -> Assignment | None:
        """The newest weights, and no groups; None while there are none to be had."""
        with self._changed:
            version = self.version
            return None if version is None else Assignment(version, self._digests[version], self._rollbacks, [])

    def _due(self, room: int) -> list[int]:
        """The groups that may be dispatched now, at most ``room``, lowest first."""
        if self.version is None or self._stopped or self._failure:
            return []
        limit = min((self.version + self._staleness + 1) * self._range.per_step, self._range.end)
        limit = self._end_of_wave(self.version + 1) if self.ledger.dynamic_sampling else limit
        candidates = heapq.nsmallest(room, self._again) + list(range(self._next, min(self._next + room, limit)))
        return [group for group in candidates[:room] if group < limit]

    def _end_of_wave(self, step: int) -> int:
        """With dynamic sampling, the group before which all may be asked for ``step`` by now."""
        first = self.ledger.end_of(step - 1, self._range.first)
        return first + self.ledger.plan(step).size if step * self._range.per_step <= self._range.end else first

    def question(self, group: int) -> Question | None:
        """What ``group`` was asked; None where nobody waits for its answers."""
        with self._changed:
            if group in self._owners:
                return self._owners[group][1]
            return self._asker.question(group) if group in self._again else None

    def answered(self, sampled: Sampled) -> None:
        """Take in the answers to a group, to be paid; those to one that nobody waits for any more are forgotten.

        Raises TrustError: a token is of older weights than the group may have, or of newer ones than there are.
        """
        group = sampled.question.group
        with self._changed:
            is_waited_for = group in self._again or group in self._owners
            if sampled.rollbacks != self._rollbacks or not is_waited_for:  # of weights that were given up, or late
                return
            newest = group // self._range.per_step  # its own step is not trained yet
            if self.ledger.dynamic_sampling:  # and what is waited for is of the step that comes next
                newest = self.version or 0
            check_versions(sampled.answers, newest - self._staleness, newest, sampled.worker)
            if group in self._again:  # its worker was thought dead
                self._again.remove(group)
                heapq.heapify(self._again)
            else:
                del self._owners[group]
            self._unpaid.append(sampled)
            self._changed.notify_all()

    def pay_next(self, seconds: float) -> bool:
        """Pay and record the answers to one group, if any come within ``seconds``; whether some did.

        Raises SpratError: the verifier is broken, or the ledger cannot be written.
        """
        with self._changed:
            if not self._unpaid:
                self._changed.wait(seconds)
            if not self._unpaid:
                return False
            one = self._unpaid.pop(0)
        rollouts = self._asker.pay(one.question, one.answers)
        with self._changed:
            if one.rollbacks == self._rollbacks:
                self.ledger.record(one.question.group, rollouts, one.worker)
            self._changed.notify_all()
        return True

    def give_back(self, worker: str, *, gone: bool = True) -> list[int]:
        """The groups of ``worker`` will be asked again; which they are.

        Args:
            gone: it has ended, and is given no more.

        Raises:
            TrainingError: one of them has taken down too many.
        """
        with self._changed:
            groups = sorted(group for group, (owner, _) in self._owners.items() if owner == worker)
            for group in groups:
                del self._owners[group]
                heapq.heappush(self._again, group)
                self._given_back[group] = self._given_back.get(group, 0) + 1
            if gone:
                self._gone.add(worker)
            self._changed.notify_all()
            if worst := [group for group in groups if self._given_back[group] >= MAX_GIVEN_BACK]:
                question = self._asker.question(worst[0])
                what = f"group {worst[0]} was sampled {MAX_GIVEN_BACK} times, and each time its worker ended"
                where = f"task {question.task}, problem {question.problem_id}"
                todo = "see what the workers said; lower rollout.batch or rl.max_tokens if memory ran out"
                raise TrainingError(what, where=where, todo=todo)
        return groups

    def refused(self, worker: str, version: int, reason: str) -> None:
        """``worker`` could not take ``version``: its groups wait for the trainer to write it again.

        Raises:
            TrustError: that has happened too often.
        """
        self.give_back(worker, gone=False)
        with self._changed:
            if self.version != version:  # an older one, or somebody else said so before
                return
            self.version, self._refusals[version] = None, self._refusals.get(version, 0) + 1
            if self._refusals[version] >= MAX_REFUSALS:
                what = f"version {version} of the weights was written again and again and is never whole: {reason}"
                raise TrustError(what, where=worker, todo="check the disk")
            self._changed.notify_all()

    def wait_for_step(self, step: int, trainer: str) -> list[int] | None:
        """The groups of ``step``, in order, once all of them are answered; None where it is to publish again first.

        Raises:
            KeyboardInterrupt: the run was stopped, or ``trainer`` has ended. SpratError: it has failed.
        """
        with self._changed:
            while not self.ledger.plan(step).is_complete:
                if self._is_over(trainer):
                    raise KeyboardInterrupt
                if self.version is None:
                    return None
                self._changed.wait()
            done, first = self.ledger.done(step), (step - 1) * self._range.per_step
            first = self.ledger.end_of(step - 1, self._range.first) if self.ledger.dynamic_sampling else first
        if done != list(range(first, first + len(done))):
            raise TrustError(f"step {step} has the groups {done}", where=str(self.ledger.path), todo="report it")
        return done

    def publish(self, row: StepRow, rollbacks: int) -> int:
        """Version ``row.step`` is written: the step is done, and workers may sample with it; the newest version.

        Args:
            rollbacks: how often the run was sent back by now; the last time to this very step.

        Raises:
            TrustError: the step was done before, and came out otherwise.
        """
        with self._changed:
            if rollbacks > self._rollbacks:
                self._roll_back(row.step, rollbacks)
            self.ledger.record_step(row)
            self._digests[row.step] = row.weights
            self.version = row.step if self.version is None else max(self.version, row.step)
            self._changed.notify_all()
            return self.version

    def _roll_back(self, step: int, number: int) -> None:
        """Forget what came after ``step``; whoever still samples for it is not heard."""
        self.ledger.roll_back(step, number)
        self._rollbacks, self._digests = number, {row.step: row.weights for row in self.ledger.steps()}
        self._owners, self._unpaid, self.version = {}, [], None
        self._again, self._next = self.ledger.unfinished(), self.ledger.next_group(self._range.first)

    def stop(self, failure: SpratError | None = None) -> None:
        """Nothing is dispatched from now on, and whoever waits is told."""
        with self._changed:
            self._stopped, self._failure = True, self._failure or failure
            self._changed.notify_all()

    def raise_if_failed(self) -> None:
        """Raises: SpratError: the run has failed."""
        with self._changed:
            if self._failure is not None:
                raise self._failure

    def _is_over(self, name: str) -> bool:
        """Whether there is nothing more to wait for. Raises SpratError: the run has failed."""
        if self._failure is not None:
            raise self._failure
        return self._stopped or name in self._gone

    @property
    def in_flight(self) -> dict[int, str]:
        """Groups that are being sampled, and by whom."""
        with self._changed:
            return {group: owner for group, (owner, _) in self._owners.items()}
