"""The ledger of rollouts: what was committed is there, whole and once, whatever happened in between."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sprat.errors import CheckpointError, MachineError, SpratError, TrustError
from sprat.post.rl.ledger import RolloutLedger
from sprat.post.rl.ledger_tables import Question, StepRow
from sprat.post.rl.trajectory import digest_rollouts
from tests.unit.post.rl.trajectories import answers

IDENTITY = {"prompts_per_step": 2, "group_size": 2, "recipe": "abc"}


def opened(folder: Path) -> RolloutLedger:
    return RolloutLedger(folder / "rollouts.sqlite", IDENTITY)


def asked(*groups: int) -> list[Question]:
    return [Question(group, "lucky", f"row {group}", [7, group, 5]) for group in groups]


def test_what_was_recorded_comes_back_to_the_bit(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.dispatch(asked(0, 1, 2), "worker-0")
    for group in (2, 0, 1):  # whenever they come
        assert ledger.record(group, answers(group), "worker-0")
    expected = answers(0) + answers(1)
    ledger.close()
    again = opened(tmp_path)
    assert again.rollouts(1) == expected
    assert digest_rollouts(again.rollouts(1)) == digest_rollouts(expected)
    assert again.done(2) == [2] and again.unfinished() == [] and again.next_group(0) == 3
    with pytest.raises(TrustError, match="0 answers are not the 2"):
        again.rollouts(2)


def test_a_group_is_answered_once_whoever_comes_second(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.dispatch(asked(0), "worker-0")
    ledger.dispatch(asked(0), "worker-1")  # the first one was given up
    assert ledger.record(0, answers(0, seed=1), "worker-1")
    assert not ledger.record(0, answers(0, seed=2), "worker-0")
    assert ledger.group(0) == answers(0, seed=1)
    assert ledger.counts() | {"abstained": 0} == {"groups": 1, "done": 1, "dispatches": 2, "answers": 2, "abstained": 0}
    with pytest.raises(TrustError, match="is answered already"):
        ledger.dispatch(asked(0), "worker-2")


def test_only_what_was_asked_can_be_answered(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.dispatch(asked(0, 1), "w")
    first, second = answers(0)
    for wrong in ([first], [second, first], [first, first], answers(1), [first, replace(second, prompt_ids=[1])]):
        with pytest.raises(TrustError):
            ledger.record(0, wrong, "w")
    torn = [
        replace(first, logprobs=first.logprobs[1:]),
        replace(first, reward=float("nan")),
        replace(first, versions=[]),
    ]
    for one in torn:
        with pytest.raises(TrustError, match="not whole"):
            ledger.record(0, [one, second], "w")
    with pytest.raises(TrustError, match="nobody asked"):
        ledger.record(5, answers(5), "w")
    with pytest.raises(TrustError, match="another question"):
        ledger.dispatch([replace(asked(0)[0], prompt_ids=[1, 2])], "w")
    assert ledger.unfinished() == [0, 1] and ledger.counts()["answers"] == 0


def test_a_step_that_is_done_again_must_come_out_the_same(tmp_path: Path) -> None:
    ledger, row = opened(tmp_path), StepRow(1, 0, "a" * 64, "b" * 64, {"loss": 0.1 + 0.2})
    ledger.record_step(StepRow(0, None, "0" * 64, "", {}))
    ledger.record_step(row)
    ledger.record_step(row)
    assert ledger.step(1) == row and [each.step for each in ledger.steps()] == [0, 1] and ledger.step(2) is None
    with pytest.raises(TrustError, match="its weights are not those that it had"):
        ledger.record_step(replace(row, weights="c" * 64))
    with pytest.raises(TrustError, match="its answers are not those that it had"):
        ledger.record_step(replace(row, trained="c" * 64))


def test_a_hole_among_the_groups_is_seen(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.dispatch(asked(4, 5, 7), "w")
    with pytest.raises(TrustError, match="3 groups from 4 on, and the last one is 7"):
        ledger.next_group(4)


def test_another_run_another_version_and_what_is_none_are_refused(tmp_path: Path) -> None:
    opened(tmp_path).close()
    with pytest.raises(CheckpointError, match="of another run"):
        RolloutLedger(tmp_path / "rollouts.sqlite", IDENTITY | {"recipe": "xyz"})
    assert RolloutLedger.read(tmp_path / "rollouts.sqlite").identity == IDENTITY
    with pytest.raises(CheckpointError, match="no ledger"):
        RolloutLedger.read(tmp_path / "none.sqlite")
    with sqlite3.connect(tmp_path / "rollouts.sqlite") as db:
        db.execute("UPDATE meta SET value = '99' WHERE key = 'schema'")
    with pytest.raises(CheckpointError, match="another version"):
        opened(tmp_path)
    (tmp_path / "noise.sqlite").write_bytes(os.urandom(5000))
    with pytest.raises(TrustError, match="does not hold together"):
        RolloutLedger(tmp_path / "noise.sqlite", IDENTITY)


def test_a_row_that_was_changed_by_hand_is_refused_or_seen_in_the_digest(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.dispatch(asked(0, 1), "w")
    for group in (0, 1):
        ledger.record(group, answers(group), "w")
    before = ledger.digest()
    with sqlite3.connect(ledger.path) as db:
        db.execute("UPDATE trajectories SET reward = 0.5 WHERE group_number = 0 AND sample = 1")
    assert ledger.digest() != before
    with sqlite3.connect(ledger.path) as db:
        db.execute("UPDATE trajectories SET versions = '[[0, 99]]' WHERE group_number = 1")
    with pytest.raises(TrustError, match="versions differ in number"):
        ledger.group(1)
    with sqlite3.connect(ledger.path) as db, pytest.raises(sqlite3.IntegrityError):
        db.execute("UPDATE groups SET state = 'lost'")


def writer(folder: Path, limit_bytes: int = 0) -> tuple[int, int]:
    """A fork that fills the ledger and says on a pipe what was committed, or why it ended: process and pipe."""
    reader, pipe = os.pipe()
    child = os.fork()
    if child:
        os.close(pipe)
        return child, reader
    if limit_bytes:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    try:
        ledger = opened(folder)
        for group in range(ledger.next_group(0), 100_000):
            ledger.dispatch(asked(group), "w")
            ledger.record(group, answers(group), "w")
            os.write(pipe, f"{group}\n".encode())
    except BaseException as error:
        os.write(pipe, f"{type(error).__name__}: {error}\n".encode())
    os._exit(0)


def lines_until_the_end(child: int, reader: int) -> list[str]:
    with open(reader) as stream:
        lines = stream.read().splitlines()
    os.waitpid(child, 0)
    return lines


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_moment_it_holds_all_that_was_acknowledged(tmp_path: Path) -> None:
    last = -1
    for pause in (0.03, 0.051, 0.077, 0.1):
        child, reader = writer(tmp_path)
        first = os.read(reader, 1).decode()
        time.sleep(pause)
        os.kill(child, signal.SIGKILL)
        acknowledged = int((first + "\n".join(lines_until_the_end(child, reader))).splitlines()[-1])
        ledger = opened(tmp_path)
        assert acknowledged > last and ledger.next_group(0) > acknowledged
        last = acknowledged
        for group in range(acknowledged + 1):
            assert ledger.group(group) == answers(group)
        assert len(ledger.unfinished()) <= 1
        for group in ledger.unfinished():
            ledger.dispatch(asked(group), "again")
            ledger.record(group, answers(group), "again")
        ledger.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    *done, fault = lines_until_the_end(*writer(tmp_path, 300_000))
    assert fault.startswith("MachineError: the disk is full, or failed; what the ledger of rollouts holds is whole")
    ledger, acknowledged = opened(tmp_path), int(done[-1])
    assert acknowledged > 3
    for group in range(acknowledged + 1):
        assert ledger.group(group) == answers(group)
    assert ledger.next_group(0) - len(ledger.unfinished()) == acknowledged + 1


def test_a_full_database_is_the_same_sentence(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger._db.execute("PRAGMA max_page_count = 1")
    with pytest.raises(MachineError, match="the disk is full"):
        for group in range(1000):
            ledger.dispatch(asked(group), "w")
    assert ledger.next_group(0) == len(ledger.unfinished())


def test_threads_share_it(tmp_path: Path) -> None:
    ledger, faults = opened(tmp_path), list[SpratError]()
    ledger.dispatch(asked(*range(40)), "w")

    def work(start: int) -> None:
        try:
            for group in range(start, 40, 4):
                ledger.record(group, answers(group), f"w{start}")
        except SpratError as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults and ledger.counts()["done"] == 40 and ledger.group(39) == answers(39)
