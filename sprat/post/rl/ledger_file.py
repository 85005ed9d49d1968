"""The SQLite file of the ledger of rollouts: opened and checked, written by transactions, its errors as sentences.

WAL, so that a report can read while the run writes, with ``synchronous=FULL``: each commit is synced, for a step whose
answers were lost by a power cut would not be the step that the weights' digest tells of. A commit is one group, which
took seconds to sample, and costs about a millisecond.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sprat.errors import CheckpointError, MachineError, SpratError, TrustError
from sprat.files.json import canonical_json
from sprat.post.rl.ledger_tables import SCHEMA, SCHEMA_VERSION

_FULL_DISK = (
    "SQLITE_FULL",
    "SQLITE_IOERR_WRITE",
    "SQLITE_IOERR_FSYNC",
    "SQLITE_IOERR_TRUNCATE",
    "SQLITE_IOERR_SHMSIZE",
)
_TORN = ("SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_IOERR_SHORT_READ", "SQLITE_CONSTRAINT")
_BUSY_SECONDS = 30.0


class LedgerFile:
    """The file ``path``, made if missing; any thread may use it.

    Args:
        identity: what run it is of, JSON; None only reads, whatever run it is of.

    Raises:
        CheckpointError: it is another run's, or another version's; or there is none to read.
        TrustError: it is torn.
        MachineError: the disk is full or closed to us; here and below, and what was committed stays.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, Any] | None) -> None:
        self.path, self._lock = Path(path), threading.RLock()
        if identity is None and not self.path.is_file():
            what, todo = "no ledger of rollouts", "give the folder of a run of `sprat rl MODEL`"
            raise CheckpointError(what, where=str(path), todo=todo)
        with self._explained():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            name = f"{self.path.resolve().as_uri()}?mode={'ro' if identity is None else 'rwc'}"
            self._db = sqlite3.connect(
                name, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        try:
            if identity is not None:
                self._prepare(identity)
            self.identity = self._read_identity(identity)
        except BaseException:
            self.close()
            raise

    def _prepare(self, identity: Mapping[str, Any]) -> None:
        """Make the tables if there are none."""
        with self._explained():
            mode = self._db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
            # without WAL (a network's file system) EXTRA also syncs the folder that the journal is unlinked from
            self._db.execute(f"PRAGMA synchronous={'FULL' if mode == 'wal' else 'EXTRA'}")
            self._db.execute("PRAGMA foreign_keys=ON")
        with self.transaction("IMMEDIATE") as db:
            if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for statement in SCHEMA.split(";"):
                    db.execute(statement)
                self.set_meta("schema", SCHEMA_VERSION)
                self.set_meta("identity", dict(identity))

    def _read_identity(self, expected: Mapping[str, Any] | None) -> dict[str, Any]:
        """What run it is of, if that is ``expected``."""
        try:
            schema, identity = self.meta("schema"), self.meta("identity")
            sizes = [int(identity["prompts_per_step"]), int(identity["group_size"])]
        except (TypeError, KeyError, ValueError) as error:
            raise torn(self.path, f"it does not say what it is of ({error!r})") from None
        is_other_run = expected is not None and canonical_json(identity) != canonical_json(dict(expected))
        if schema != SCHEMA_VERSION or is_other_run:
            what = "another run" if schema == SCHEMA_VERSION else "another version of sprat"
            todo = "give another --out, or go on with what made it"
            raise CheckpointError(f"the ledger of rollouts is of {what}", where=str(self.path), todo=todo)
        self.prompts_per_step, self.group_size = sizes
        self.dynamic_sampling = int(identity.get("dynamic_sampling", 0))
        return dict(identity)

    def meta(self, key: str) -> Any:
        """What was noted under ``key``; None where nothing was."""
        with self.transaction() as db:
            row = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def set_meta(self, key: str, value: Any) -> None:
        """Note a JSON value."""
        with self.transaction("IMMEDIATE") as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, canonical_json(value)))

    def close(self, *, final: bool = False) -> None:
        """End it; with ``final`` as one plain file, which can be read where nothing can be written."""
        with self._lock, suppress(sqlite3.Error):
            if final:
                self._db.execute("PRAGMA journal_mode=DELETE")
            self._db.close()

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

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """SQLite's errors as sentences."""
        try:
            yield
        except sqlite3.Error as error:
            name = str(getattr(error, "sqlite_errorname", None) or "")
            raise self._sentence(name, str(error)) from None

    def _sentence(self, name: str, reason: str) -> SpratError:
        where = str(self.path)
        if name.startswith(_FULL_DISK):
            what = "the disk is full, or failed; what the ledger of rollouts holds is whole"
            return MachineError(what, where=where, todo="free some space and start again")
        if name.startswith(_TORN):
            return torn(self.path, reason)
        return MachineError(f"the ledger of rollouts cannot be used: {reason}", where=where, todo="check the disk")


def torn(path: Path, reason: str) -> TrustError:
    """The error of a ledger that says what cannot be."""
    what = f"the ledger of rollouts does not hold together: {reason}"
    return TrustError(what, where=str(path), todo="put back a copy of it, or start the run afresh in another folder")
