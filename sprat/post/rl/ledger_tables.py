"""The tables of the ledger of rollouts (see ``ledger``), and what a row of each is.

Where a trip wire sent a run back, what came after that step stays, and ``rolled_back`` says by which time it was sent.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sprat.files.json import canonical_json
from sprat.post.rl.rollout import Rollout
from sprat.post.rl.trajectory import pack_rollout, unpack_rollout

SCHEMA_VERSION = 2
DISPATCHED, DONE = "dispatched", "done"
SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE rollbacks (number INTEGER PRIMARY KEY CHECK (number >= 1), back_to INTEGER NOT NULL) STRICT;
CREATE TABLE groups (
    number INTEGER NOT NULL CHECK (number >= 0),
    rolled_back INTEGER NOT NULL DEFAULT 0,
    step INTEGER NOT NULL CHECK (step >= 1),
    task TEXT NOT NULL,
    problem_id TEXT NOT NULL,
    prompt_ids BLOB NOT NULL CHECK (length(prompt_ids) > 0 AND length(prompt_ids) % 4 = 0),
    dispatches INTEGER NOT NULL CHECK (dispatches >= 1),
    worker TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('dispatched', 'done')),
    unused TEXT CHECK ((unused IS NULL) = (state = 'dispatched')),
    PRIMARY KEY (number, rolled_back)
) STRICT;
CREATE INDEX groups_of_step ON groups (step);
CREATE TABLE trajectories (
    group_number INTEGER NOT NULL,
    rolled_back INTEGER NOT NULL DEFAULT 0,
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
    PRIMARY KEY (group_number, rolled_back, sample),
    FOREIGN KEY (group_number, rolled_back) REFERENCES groups (number, rolled_back) ON UPDATE CASCADE
) STRICT;
CREATE TABLE steps (
    step INTEGER NOT NULL CHECK (step >= 0),
    rolled_back INTEGER NOT NULL DEFAULT 0,
    version_in INTEGER,
    weights TEXT NOT NULL CHECK (length(weights) = 64),
    trained TEXT NOT NULL,
    metrics TEXT NOT NULL,
    PRIMARY KEY (step, rolled_back)
) STRICT;
"""
ANSWER_COLUMNS = (
    "group_number, sample, token_ids, logprobs, versions, routes, routes_shape, reward, score, finish, verdict"
)
_FIELDS = ("reward", "score", "finish", "versions", "task", "problem_id", "group", "sample")  # the rest is the verdict


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
    """An answer as a row of ``ANSWER_COLUMNS``. Raises TrustError: it is not whole."""
    fields, arrays = pack_rollout(rollout)
    verdict = {name: value for name, value in fields.items() if name not in _FIELDS}
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
