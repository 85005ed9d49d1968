"""The ledger of a run of RL: every group that was asked, every answer, every step that used them, in SQLite.

    groups        number in order of dispatch, the step that trains it, the question, who was asked and how often;
                  once it is answered, why nothing is learned from it, if nothing is
    trajectories  tokens, log-probabilities, the weights' version of each token, what was paid and why
    steps         version in, what was trained, digest of the weights out, metrics

A group's line is on the disk before anybody is asked, and its answers are before the trainer sees them; the step's line
is before anybody samples with its weights. So whatever dies, what was asked and not answered is asked again under the
same number, what was answered is not asked again, and a step that is redone gets the very answers that it had.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sprat.errors import TrustError
from sprat.files.json import canonical_json
from sprat.post.rl.dynamic_sampling import StepPlan, plan_step, unused_reason
from sprat.post.rl.ledger_file import LedgerFile, torn
from sprat.post.rl.ledger_tables import (
    ANSWER_COLUMNS,
    DISPATCHED,
    DONE,
    Question,
    StepRow,
    pack_row,
    unpack_row,
)
from sprat.post.rl.rollout import Rollout
from sprat.post.rl.trajectory import check_group, digest_rollouts

LEDGER_FILE = "rollouts.sqlite"  # in the run's folder
_STEPS = "SELECT step, version_in, weights, trained, metrics FROM steps WHERE rolled_back = 0"


class RolloutLedger(LedgerFile):
    """The ledger of a run; see ``LedgerFile`` for what it is given, and raises everywhere.

    ``identity`` names the run, with its ``prompts_per_step`` and ``group_size``, and ``dynamic_sampling`` if it is on.
    """

    @classmethod
    def read(cls, path: str | Path) -> RolloutLedger:
        """The ledger at ``path``, whatever run it is of, to be read alone."""
        return cls(path, None)

    def step_of(self, group: int) -> int:
        """The step that trains ``group``, without dynamic sampling."""
        return group // self.prompts_per_step + 1

    def dispatch(self, questions: Sequence[Question], worker: str, step: int | None = None) -> None:
        """Note that ``worker`` is about to be asked; a group that was asked before is counted again.

        Args:
            step: that will train them; ``step_of`` each where nothing is said.

        Raises:
            TrustError: its answers are known already, or it had another question.
        """
        with self.transaction("IMMEDIATE") as db:
            for question in questions:
                prompt = np.asarray(question.prompt_ids, "<i4").tobytes()
                query = "SELECT prompt_ids, state FROM groups WHERE number = ? AND rolled_back = 0"
                row = db.execute(query, (question.group,)).fetchone()
                if row is not None and row != (prompt, DISPATCHED):
                    fault = "is answered already" if row[1] == DONE else "had another question"
                    raise torn(self.path, f"group {question.group} {fault}")
                db.execute(
                    "INSERT INTO groups VALUES (?, 0, ?, ?, ?, ?, 1, ?, ?, NULL) ON CONFLICT (number, rolled_back)"
                    " DO UPDATE SET dispatches = dispatches + 1, worker = excluded.worker",
                    (question.group, step or self.step_of(question.group), question.task, question.problem_id)
                    + (prompt, worker, DISPATCHED),
                )

    def record(self, group: int, rollouts: Sequence[Rollout], worker: str) -> bool:
        """Keep the answers of a group that was dispatched; False where they are known, from whoever came first.

        Raises:
            TrustError: they are not whole, or the group was not dispatched, or had another question.
        """
        check_group(rollouts, group, self.group_size)
        prompts = {np.asarray(rollout.prompt_ids, "<i4").tobytes() for rollout in rollouts}
        with self.transaction("IMMEDIATE") as db:
            query = "SELECT state, prompt_ids FROM groups WHERE number = ? AND rolled_back = 0"
            row = db.execute(query, (group,)).fetchone()
            if row is None or prompts != {row[1]}:
                raise torn(self.path, f"nobody asked what was answered as group {group}")
            if row[0] == DONE:
                return False
            insert = f"INSERT INTO trajectories ({ANSWER_COLUMNS}) VALUES ({', '.join('?' * 11)})"
            db.executemany(insert, [pack_row(rollout) for rollout in rollouts])
            unused = unused_reason([rollout.reward for rollout in rollouts])
            update = "UPDATE groups SET state = ?, worker = ?, unused = ? WHERE number = ? AND rolled_back = 0"
            db.execute(update, (DONE, worker, unused, group))
        return True

    def unfinished(self) -> list[int]:
        """Groups that were dispatched and have no answers, in order."""
        return self._numbers("state = 'dispatched'")

    def done(self, step: int) -> list[int]:
        """Groups of ``step`` whose answers are known, in order."""
        return self._numbers("state = 'done' AND step = ?", step)

    def plan(self, step: int) -> StepPlan:
        """How ``step`` goes on, by what is known of its groups."""
        query = "SELECT unused FROM groups WHERE step = ? AND rolled_back = 0 ORDER BY number"
        with self.transaction() as db:
            reasons = [reason for (reason,) in db.execute(query, (step,))]
        spread = [None if reason is None else not reason for reason in reasons]
        return plan_step(spread, self.prompts_per_step, self.dynamic_sampling)

    def end_of(self, step: int, default: int) -> int:
        """The number after the last group of ``step``; ``default`` where no group of it or an earlier one is known."""
        with self.transaction() as db:
            query = "SELECT max(number) + 1 FROM groups WHERE step <= ? AND rolled_back = 0"
            (end,) = db.execute(query, (step,)).fetchone()
        return default if end is None else int(end)

    def unused(self) -> dict[int, str]:
        """Groups that were answered and from which nothing is learned, and why."""
        query = "SELECT number, unused FROM groups WHERE rolled_back = 0 AND unused != '' ORDER BY number"
        with self.transaction() as db:
            return dict(db.execute(query))

    def next_group(self, first: int) -> int:
        """The first group from ``first`` on that was never dispatched.

        Raises:
            TrustError: some before it was not either.
        """
        with self.transaction() as db:
            count, highest = db.execute("SELECT count(*), max(number) FROM groups WHERE rolled_back = 0").fetchone()
        if count and count != highest - first + 1:
            raise torn(self.path, f"{count} groups from {first} on, and the last one is {highest}")
        return first + int(count)

    def group(self, number: int) -> list[Rollout]:
        """The answers of group ``number``.

        Raises:
            TrustError: there are none, or they are torn.
        """
        with self.transaction() as db:
            query = "SELECT task, problem_id, prompt_ids FROM groups WHERE number = ? AND rolled_back = 0"
            head = db.execute(query, (number,)).fetchone()
            query = f"SELECT {ANSWER_COLUMNS} FROM trajectories WHERE group_number = ? AND rolled_back = 0"
            rows = db.execute(f"{query} ORDER BY sample", (number,)).fetchall()
        try:
            rollouts = [unpack_row(head, row) for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise torn(self.path, f"group {number}: {error}") from None
        check_group(rollouts, number, self.group_size)
        return rollouts

    def rollouts(self, step: int) -> list[Rollout]:
        """The answers that ``step`` trains: those of its groups, in order. Raises TrustError: some are missing."""
        first = (step - 1) * self.prompts_per_step
        numbers: Sequence[int] = range(first, first + self.prompts_per_step)
        if self.dynamic_sampling:
            numbers = self.done(step)
            if not self.plan(step).is_complete:
                raise torn(self.path, f"of step {step} only the groups {numbers} are answered")
        return [one for number in numbers for one in self.group(number)]

    def record_step(self, row: StepRow) -> None:
        """Keep what became of a step; one that is known must have become the same.

        A row that says nothing of what was trained is of weights that were only put back.

        Raises:
            TrustError: it was redone, and other weights came out.
        """
        with self.transaction("IMMEDIATE") as db:
            known = self.step(row.step)
            if known is None:
                values = (row.step, row.version_in, row.weights, row.trained, canonical_json(row.metrics))
                db.execute("INSERT INTO steps VALUES (?, 0, ?, ?, ?, ?)", values)
        trained = row.trained or (known.trained if known is not None else "")
        if known is not None and (known.weights, known.trained) != (row.weights, trained):
            part = "answers" if known.trained != trained else "weights"
            what = f"step {row.step} was done again, and its {part} are not those that it had"
            todo = "go on where it ran before: same processor, torch and number of threads (sprat replay says more)"
            raise TrustError(what, where=str(self.path), todo=todo)

    def step(self, step: int) -> StepRow | None:
        """What is known of ``step``; None where it was not trained."""
        with self.transaction() as db:
            row = db.execute(f"{_STEPS} AND step = ?", (step,)).fetchone()
        return None if row is None else _step_row(*row)

    def steps(self) -> list[StepRow]:
        """All that is known of steps, in order."""
        with self.transaction() as db:
            rows = db.execute(f"{_STEPS} ORDER BY step").fetchall()
        return [_step_row(*row) for row in rows]

    def note_metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Keep what was measured of ``step``, once it is there."""
        with self.transaction("IMMEDIATE") as db:
            update = "UPDATE steps SET metrics = ? WHERE step = ? AND rolled_back = 0"
            db.execute(update, (canonical_json(dict(metrics)), step))

    @property
    def rollbacks(self) -> list[int]:
        """The steps to which the run was sent back, in order of time."""
        with self.transaction() as db:
            return [step for (step,) in db.execute("SELECT back_to FROM rollbacks ORDER BY number")]

    def roll_back(self, step: int, number: int) -> bool:
        """The run was sent back to ``step``, for the ``number``-th time; False where that is known.

        Steps and groups that came after stay, as rolled back, and their numbers are free.
        """
        with self.transaction("IMMEDIATE") as db:
            if number <= len(self.rollbacks):
                return False
            db.execute("INSERT INTO rollbacks VALUES (?, ?)", (number, step))
            for table in ("groups", "steps"):  # trajectories go with their groups
                update = f"UPDATE {table} SET rolled_back = ? WHERE step > ? AND rolled_back = 0"
                db.execute(update, (number, step))
        return True

    def counts(self) -> dict[str, int]:
        """Groups, those answered, dispatches, answers, answers that nobody paid; all with those rolled back."""
        groups = "SELECT count(*), coalesce(sum(state = 'done'), 0), coalesce(sum(dispatches), 0) FROM groups"
        answers = "SELECT count(*), coalesce(sum(reward IS NULL), 0) FROM trajectories"
        with self.transaction() as db:
            values = [*db.execute(groups).fetchone(), *db.execute(answers).fetchone()]
        return dict(zip(("groups", "done", "dispatches", "answers", "abstained"), values, strict=True))

    def digest(self) -> str:
        """SHA-256 (hex) of all answers in order of their groups: what was trained, whoever sampled it and when."""
        numbers = self._numbers("state = 'done'")
        return digest_rollouts(one for number in numbers for one in self.group(number))

    def _numbers(self, condition: str, *values: int) -> list[int]:
        query = f"SELECT number FROM groups WHERE rolled_back = 0 AND {condition} ORDER BY number"
        with self.transaction() as db:
            return [number for (number,) in db.execute(query, values)]


def _step_row(step: int, version_in: int | None, weights: str, trained: str, metrics: str) -> StepRow:
    return StepRow(step, version_in, weights, trained, json.loads(metrics))
