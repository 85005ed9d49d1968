"""The ledger of a run of RL: every group that was asked, every answer, every step that used them, in SQLite.

    groups        number in order of dispatch, the step that trains it, the question, who was asked and how often
    trajectories  tokens, log-probabilities, the weights' version of each token, what was paid and why
    steps         version in, what was trained, digest of the weights out, metrics

A group's line is on the disk before anybody is asked, and its answers are before the trainer sees them; the step's line
is before anybody samples with its weights. So whatever dies, what was asked and not answered is asked again under the
same number, what was answered is not asked again, and a step that is redone gets the very answers that it had.

WAL, so that a report can read while the run writes, with ``synchronous=FULL``: each commit is synced, for a step whose
answers were lost by a power cut would not be the step that the weights' digest tells of. A commit is one group, which
took seconds to sample, and costs about a millisecond.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from sprat.errors import CheckpointError, TrustError
from sprat.files.json import canonical_json
from sprat.post.rl.ledger_tables import (
    DISPATCHED,
    DONE,
    SCHEMA,
    SCHEMA_VERSION,
    Question,
    StepRow,
    explain,
    pack_row,
    torn,
    unpack_row,
)
from sprat.post.rl.rollout import Rollout
from sprat.post.rl.trajectory import check_group, digest_rollouts

LEDGER_FILE = "rollouts.sqlite"  # in the run's folder


class RolloutLedger:
    """The ledger in the file ``path``, made if missing; any thread may use it.

    Args:
        identity: what run it is of, JSON; with ``prompts_per_step`` and ``group_size``.

    Raises:
        CheckpointError: it is another run's, or another version's.
        TrustError: it is torn.
        MachineError: the disk is full or closed to us; here and below, and what was committed stays.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, Any]) -> None:
        self.path, self.identity, self._lock = Path(path), dict(identity), threading.RLock()
        self.prompts_per_step, self.group_size = int(identity["prompts_per_step"]), int(identity["group_size"])
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=30.0, isolation_level=None, check_same_thread=False)
        try:
            with self._explained():
                mode = self._db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
                # without WAL (a network's file system) EXTRA also syncs the folder that the journal is unlinked from
                self._db.execute(f"PRAGMA synchronous={'FULL' if mode == 'wal' else 'EXTRA'}")
                self._db.execute("PRAGMA foreign_keys=ON")
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        """Make the tables, or check whose they are."""
        expected = {"schema": SCHEMA_VERSION, "identity": self.identity}
        with self.transaction("IMMEDIATE") as db:
            if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in SCHEMA.split(";"):
                    db.execute(statement)
                pairs = [(key, canonical_json(value)) for key, value in expected.items()]
                db.executemany("INSERT INTO meta VALUES (?, ?)", pairs)
            known = dict(db.execute("SELECT key, value FROM meta"))
        for key, value in expected.items():
            if known.get(key) != canonical_json(value):
                what = "another version of sprat" if key == "schema" else "another run"
                todo = "give another --out, or go on with what made it"
                raise CheckpointError(f"the ledger of rollouts is of {what}", where=str(self.path), todo=todo)

    @classmethod
    def read(cls, path: str | Path) -> RolloutLedger:
        """The ledger at ``path``, whatever run it is of.

        Raises:
            CheckpointError: there is none. TrustError, MachineError: see the class.
        """
        path = Path(path)
        if not path.is_file():
            what, todo = "no ledger of rollouts", "give the folder of a run of `sprat rl MODEL`"
            raise CheckpointError(what, where=str(path), todo=todo)
        try:
            with explain(path):
                db = sqlite3.connect(path)
                try:
                    (text,) = db.execute("SELECT value FROM meta WHERE key = 'identity'").fetchone()
                finally:
                    db.close()
            return cls(path, json.loads(text))
        except (TypeError, KeyError, ValueError) as error:
            raise torn(path, str(error)) from None

    def close(self) -> None:
        """End it; what was committed is in the one file."""
        with self._lock, suppress(sqlite3.Error):
            self._db.close()

    def step_of(self, group: int) -> int:
        """The step that trains ``group``."""
        return group // self.prompts_per_step + 1

    def dispatch(self, questions: Sequence[Question], worker: str) -> None:
        """Note that ``worker`` is about to be asked; a group that was asked before is counted again.

        Raises:
            TrustError: its answers are known already, or it had another question.
        """
        with self.transaction("IMMEDIATE") as db:
            for question in questions:
                prompt = np.asarray(question.prompt_ids, "<i4").tobytes()
                row = db.execute("SELECT prompt_ids, state FROM groups WHERE number = ?", (question.group,)).fetchone()
                if row is not None and row != (prompt, DISPATCHED):
                    fault = "is answered already" if row[1] == DONE else "had another question"
                    raise torn(self.path, f"group {question.group} {fault}")
                db.execute(
                    "INSERT INTO groups VALUES (?, ?, ?, ?, ?, 1, ?, ?) ON CONFLICT (number)"
                    " DO UPDATE SET dispatches = dispatches + 1, worker = excluded.worker",
                    (question.group, self.step_of(question.group), question.task, question.problem_id, prompt)
                    + (worker, DISPATCHED),
                )

    def record(self, group: int, rollouts: Sequence[Rollout], worker: str) -> bool:
        """Keep the answers of a group that was dispatched; False where they are known, from whoever came first.

        Raises:
            TrustError: they are not whole, or the group was not dispatched, or had another question.
        """
        check_group(rollouts, group, self.group_size)
        prompts = {np.asarray(rollout.prompt_ids, "<i4").tobytes() for rollout in rollouts}
        with self.transaction("IMMEDIATE") as db:
            row = db.execute("SELECT state, prompt_ids FROM groups WHERE number = ?", (group,)).fetchone()
            if row is None or prompts != {row[1]}:
                raise torn(self.path, f"nobody asked what was answered as group {group}")
            if row[0] == DONE:
                return False
            insert = f"INSERT INTO trajectories VALUES ({', '.join('?' * 11)})"
            db.executemany(insert, [pack_row(rollout) for rollout in rollouts])
            db.execute("UPDATE groups SET state = ?, worker = ? WHERE number = ?", (DONE, worker, group))
        return True

    def unfinished(self) -> list[int]:
        """Groups that were dispatched and have no answers, in order."""
        return self._numbers("SELECT number FROM groups WHERE state = 'dispatched' ORDER BY number")

    def done(self, step: int) -> list[int]:
        """Groups of ``step`` whose answers are known, in order."""
        return self._numbers("SELECT number FROM groups WHERE state = 'done' AND step = ? ORDER BY number", step)

    def next_group(self, first: int) -> int:
        """The first group from ``first`` on that was never dispatched.

        Raises:
            TrustError: some before it was not either.
        """
        with self.transaction() as db:
            count, highest = db.execute("SELECT count(*), max(number) FROM groups").fetchone()
        if count and count != highest - first + 1:
            raise torn(self.path, f"{count} groups from {first} on, and the last one is {highest}")
        return first + int(count)

    def group(self, number: int) -> list[Rollout]:
        """The answers of group ``number``.

        Raises:
            TrustError: there are none, or they are torn.
        """
        with self.transaction() as db:
            head = db.execute("SELECT task, problem_id, prompt_ids FROM groups WHERE number = ?", (number,)).fetchone()
            rows = db.execute("SELECT * FROM trajectories WHERE group_number = ? ORDER BY sample", (number,)).fetchall()
        try:
            rollouts = [unpack_row(head, row) for row in rows]
        except (ValueError, KeyError, TypeError) as error:
            raise torn(self.path, f"group {number}: {error}") from None
        check_group(rollouts, number, self.group_size)
        return rollouts

    def rollouts(self, step: int) -> list[Rollout]:
        """The answers that ``step`` trains: those of its groups, in order. Raises TrustError: some are missing."""
        first = (step - 1) * self.prompts_per_step
        return [one for number in range(first, first + self.prompts_per_step) for one in self.group(number)]

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
                db.execute("INSERT INTO steps VALUES (?, ?, ?, ?, ?)", values)
        trained = row.trained or (known.trained if known is not None else "")
        if known is not None and (known.weights, known.trained) != (row.weights, trained):
            part = "answers" if known.trained != trained else "weights"
            what = f"step {row.step} was done again, and its {part} are not those that it had"
            todo = "go on where it ran before: same processor, torch and number of threads (sprat replay says more)"
            raise TrustError(what, where=str(self.path), todo=todo)

    def step(self, step: int) -> StepRow | None:
        """What is known of ``step``; None where it was not trained."""
        with self.transaction() as db:
            row = db.execute("SELECT * FROM steps WHERE step = ?", (step,)).fetchone()
        return None if row is None else _step_row(*row)

    def steps(self) -> list[StepRow]:
        """All that is known of steps, in order."""
        with self.transaction() as db:
            rows = db.execute("SELECT * FROM steps ORDER BY step").fetchall()
        return [_step_row(*row) for row in rows]

    def counts(self) -> dict[str, int]:
        """Groups, those answered, dispatches, answers, and answers from which the verifier abstained."""
        groups = "SELECT count(*), coalesce(sum(state = 'done'), 0), coalesce(sum(dispatches), 0) FROM groups"
        answers = "SELECT count(*), coalesce(sum(reward IS NULL), 0) FROM trajectories"
        with self.transaction() as db:
            values = [*db.execute(groups).fetchone(), *db.execute(answers).fetchone()]
        return dict(zip(("groups", "done", "dispatches", "answers", "abstained"), values, strict=True))

    def digest(self) -> str:
        """SHA-256 (hex) of all answers in order of their groups: what was trained, whoever sampled it and when."""
        numbers = self._numbers("SELECT number FROM groups WHERE state = 'done' ORDER BY number")
        return digest_rollouts(one for number in numbers for one in self.group(number))

    def _numbers(self, query: str, *values: int) -> list[int]:
        with self.transaction() as db:
            return [number for (number,) in db.execute(query, values)]

    @contextmanager
    def transaction(self, kind: str = "DEFERRED") -> Iterator[sqlite3.Connection]:
        """All of the block, or nothing of it; a block within a block is part of the outer one."""
        with self._lock, self._explained():
            if self._db.in_transaction:
                yield self._db
                return
            self._db.execute(f"BEGIN {kind}")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    def _explained(self) -> Any:
        return explain(self.path)


def _step_row(step: int, version_in: int | None, weights: str, trained: str, metrics: str) -> StepRow:
    return StepRow(step, version_in, weights, trained, json.loads(metrics))
