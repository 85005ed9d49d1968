"""The tables of the ledger of rollouts (see ``ledger``), what a row of each is, and SQLite's errors as sentences."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sprat.errors import MachineError, SpratError, TrustError
from sprat.files.json import canonical_json
from sprat.post.rl.rollout import Rollout
from sprat.post.rl.trajectory import pack_rollout, unpack_rollout

SCHEMA_VERSION = 1
DISPATCHED, DONE = "dispatched", "done"
_FULL_DISK = (
    "SQLITE_FULL",
    "SQLITE_IOERR_WRITE",
    "SQLITE_IOERR_FSYNC",
    "SQLITE_IOERR_TRUNCATE",
    "SQLITE_IOERR_SHMSIZE",
)
_TORN = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_IOERR_SHORT_READ", "SQLITE_CONSTRAINT")
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE groups (
    number INTEGER PRIMARY KEY CHECK (number >= 0),
    step INTEGER NOT NULL CHECK (step >= 1),
    task TEXT NOT NULL,
    problem_id TEXT NOT NULL,
    prompt_ids BLOB NOT NULL CHECK (length(prompt_ids) > 0 AND length(prompt_ids) % 4 = 0),
    dispatches INTEGER NOT NULL CHECK (dispatches >= 1),
    worker TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('dispatched', 'done'))
) STRICT;
CREATE INDEX groups_of_step ON groups (step);
CREATE TABLE trajectories (
    group_number INTEGER NOT NULL REFERENCES groups (number),
    sample INTEGER NOT NULL CHECK (sample >= 0),
    token_ids BLOB NOT NULL CHECK (length(token_ids) > 0 AND length(token_ids) % 4 = 0),
    logprobs BLOB NOT NULL CHECK (length(logprobs) = length(token_ids)),
    versions TEXT NOT NULL,
    routes BLOB,
    routes_shape TEXT CHECK ((routes IS NULL) = (routes_shape IS NULL)),
    reward REAL,
    score REAL NOT NULL,
    finish TEXT NOT NULL,
    verdict TEXT NOT NULL,
    PRIMARY KEY (group_number, sample)
) STRICT;
CREATE TABLE steps (
    step INTEGER PRIMARY KEY CHECK (step >= 0),
    version_in INTEGER,
    weights TEXT NOT NULL CHECK (length(weights) = 64),
    trained TEXT NOT NULL,
    metrics TEXT NOT NULL
) STRICT;
"""
_COLUMNS = ("reward", "score", "finish", "versions", "task", "problem_id", "group", "sample")  # the rest is the verdict


@dataclass(frozen=True)
class Question:
    """A group before it is asked: its number, where its question is from, and the prompt's ids."""

    group: int
    task: str
    problem_id: str
    prompt_ids: list[int]


@dataclass(frozen=True)
class StepRow:
    """What is known of a step that was trained.

    Attributes:
        step: its number; 0, or where the run started from another, is the start itself.
        version_in: of the weights that it moved; None for the start.
        weights: digest of the weights after it (``weights.TrainedWeights``).
        trained: digest of the answers that it was given (``trajectory.digest_rollouts``); empty for the start.
        metrics: the row of the log.
    """

    step: int
    version_in: int | None
    weights: str
    trained: str
    metrics: dict[str, Any]


def pack_row(rollout: Rollout) -> tuple[Any, ...]:
    """An answer as a row of ``trajectories``. Raises TrustError: it is not whole."""
    fields, arrays = pack_rollout(rollout)
    verdict = {name: value for name, value in fields.items() if name not in _COLUMNS}
    row = [fields["group"], fields["sample"], arrays["token_ids"].tobytes(), arrays["logprobs"].tobytes()]
    row.append(canonical_json(fields["versions"]))
    routes = arrays.get("routes")
    row += [None, None] if routes is None else [routes.tobytes(), canonical_json([routes.dtype.str, *routes.shape])]
    return (*row, fields["reward"], fields["score"], fields["finish"], canonical_json(verdict))


def unpack_row(head: Sequence[Any], row: Sequence[Any]) -> Rollout:
    """The answer of ``pack_row``; ``head``: task, problem_id and prompt_ids of its group.

    Raises:
        TrustError, ValueError, KeyError, TypeError: it is not whole.
    """
    number, sample, token_ids, logprobs, versions, routes, routes_shape, reward, score, finish, verdict = row
    fields = {"group": number, "sample": sample, "task": head[0], "problem_id": head[1], **json.loads(verdict)}
    fields |= {"versions": json.loads(versions), "reward": reward, "score": score, "finish": finish}
    arrays = {"prompt_ids": np.frombuffer(head[2], "<i4"), "token_ids": np.frombuffer(token_ids, "<i4")}
    arrays["logprobs"] = np.frombuffer(logprobs, "<f4")
    if routes is not None:
        dtype, *shape = json.loads(routes_shape)
        arrays["routes"] = np.frombuffer(routes, dtype).reshape(shape)
    return unpack_rollout(fields, arrays)


@contextmanager
def explain(path: Path) -> Iterator[None]:
    """SQLite's errors as sentences."""
    try:
        yield
    except sqlite3.Error as error:
        name = str(getattr(error, "sqlite_errorname", None) or "")
        raise _sentence(path, name, str(error)) from None


def _sentence(path: Path, name: str, reason: str) -> SpratError:
    if name.startswith(_FULL_DISK):
        what = "the disk is full, or failed; what the ledger of rollouts holds is whole"
        return MachineError(what, where=str(path), todo="free some space and start again")
    if name.startswith(_TORN):
        return torn(path, reason)
    return MachineError(f"the ledger of rollouts cannot be used: {reason}", where=str(path), todo="check the disk")


def torn(path: Path, reason: str) -> TrustError:
    """The error of a ledger that says what cannot be."""
    what = f"the ledger of rollouts does not hold together: {reason}"
    return TrustError(what, where=str(path), todo="put back a copy of it, or start the run afresh in another folder")
