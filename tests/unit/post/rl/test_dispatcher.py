"""Groups are dispatched by the rule of staleness, each answered once, whoever dies, comes late or answers twice."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from sprat.engine import Sampling
from sprat.errors import SpratError, TrainingError, TrustError
from sprat.post.rl import dispatcher as module
from sprat.post.rl.assignment import Assignment, Range, Sampled
from sprat.post.rl.audit import audit
from sprat.post.rl.dispatcher import Dispatcher
from sprat.post.rl.ledger import RolloutLedger
from sprat.post.rl.ledger_tables import Question, StepRow
from sprat.post.rl.rollout import Rollout
from sprat.post.rl.sampled import SampledAnswer
from sprat.post.rl.trajectory import digest_rollouts
from tests.unit.post.rl.trajectories import answers

PER_STEP, SIZE, STEPS = 3, 2, 5


class Numbers:
    """Asks for the group's number, and pays what came as it is."""

    def __init__(self) -> None:
        self.paid: dict[int, list[Rollout]] = {}

    def question(self, group: int) -> Question:
        return Question(group, "lucky", f"row {group}", [7, group, 5])

    def sampling(self, group: int) -> Sampling:
        return Sampling(seed=group, n=SIZE)

    def pay(self, question: Question, sampled: Sequence[SampledAnswer]) -> list[Rollout]:
        return answers(question.group, SIZE, seed=sampled[0].prefill_tokens, version=sampled[0].versions[0])


def made(folder: Path, staleness: int = 0, there: Sequence[int] = ()) -> Dispatcher:
    """A dispatcher on the ledger in ``folder``; the files of versions ``there`` are there."""
    ledger = RolloutLedger(folder / "l.sqlite", {"prompts_per_step": PER_STEP, "group_size": SIZE})
    weights = folder / "weights"
    weights.mkdir(exist_ok=True)
    for version in there:
        (weights / f"version-{version:08d}.safetensors").touch()
    return Dispatcher(ledger, Numbers(), Range(0, STEPS * PER_STEP, PER_STEP), staleness, weights)


def weights_of(version: int) -> str:
    return f"{version:064x}"


def publish(board: Dispatcher, version: int, rollbacks: int = 0, weights: str = "") -> int:
    """The trainer does step ``version``."""
    trained = digest_rollouts(board.ledger.rollouts(version)) if version else ""
    before = version - 1 if version else None
    return board.publish(StepRow(version, before, weights or weights_of(version), trained, {}), rollbacks)


def sampled(board: Dispatcher, group: int, worker: str, version: int, seed: int = 0, rollbacks: int = 0) -> Sampled:
    question = board.question(group) or Numbers().question(group)
    return Sampled(question, worker, rollbacks, [SampledAnswer([1], [-1.0], [version], "stop", seed)])


def answer(board: Dispatcher, assignment: Assignment, worker: str = "w", seed: int = 0) -> None:
    """All groups of ``assignment`` are sampled and paid."""
    for request in assignment.requests:
        board.answered(sampled(board, request.group, worker, assignment.version, seed, assignment.rollbacks))
    while board.pay_next(0):
        pass


def groups(assignment: Assignment | None) -> list[int]:
    assert assignment is not None
    return [request.group for request in assignment.requests]


def blocked(board: Dispatcher, worker: str = "other") -> bool:
    """Whether nothing may be dispatched now."""
    return board._due(100) == []


def test_synchronous_a_step_begins_when_the_one_before_is_published(tmp_path: Path) -> None:
    board = made(tmp_path)
    assert blocked(board)  # before the start is published
    publish(board, 0)
    first, second = board.take("a", 2), board.take("b", 2)
    assert groups(first) == [0, 1] and groups(second) == [2] and blocked(board)
    assert first is not None and second is not None
    answer(board, second)
    answer(board, first)
    assert blocked(board) and board.wait_for_step(1, "t") == [0, 1, 2]
    publish(board, 1)
    third = board.take("a", 9)
    assert groups(third) == [3, 4, 5] and third is not None and (third.version, third.digest) == (1, weights_of(1))


@pytest.mark.parametrize("staleness", [0, 1, 2, 7])
def test_whatever_happens_the_rule_holds_and_every_group_is_trained_once_in_order(
    tmp_path: Path, staleness: int
) -> None:
    """Workers take, answer, die and come late at random, and the process itself is killed and made again."""
    chance, version = random.Random(staleness), 0
    board = made(tmp_path, staleness)
    publish(board, 0)
    working: dict[str, Assignment] = {}
    ahead = 0
    for turn in range(400):
        worker = f"w{chance.randrange(4)}"
        event = chance.choice(["take", "take", "answer", "answer", "die", "late", "train", "restart"])
        if event == "take" and worker not in working and not blocked(board):
            working[worker] = assignment = board.take(f"{worker}.{turn}", chance.randrange(1, 4))
            assert assignment is not None
            for group in groups(assignment):
                assert group // PER_STEP <= assignment.version + staleness
                ahead = max(ahead, group // PER_STEP - assignment.version)
        elif event == "answer" and worker in working:
            answer(board, working.pop(worker), worker, turn)
        elif event == "die" and worker in working:
            owner = board.in_flight[groups(working[worker])[0]]
            assert board.give_back(owner) == groups(working.pop(worker))
        elif event == "late" and worker in working:  # it was thought dead, and answers all the same
            owner = board.in_flight[groups(working[worker])[0]]
            board.give_back(owner)
            answer(board, working.pop(worker), worker, turn)
        elif event == "train" and len(board.ledger.done(version + 1)) == PER_STEP:
            assert board.wait_for_step(version + 1, "t") == list(range(version * PER_STEP, (version + 1) * PER_STEP))
            version += 1
            assert publish(board, version) == version
        elif event == "restart" and chance.random() < 0.2:
            board.ledger.close()
            board, working = made(tmp_path, staleness, [version]), {}
        if version == STEPS:
            break
    assert version == STEPS and audit(board.ledger) == [] and board.ledger.next_group(0) == STEPS * PER_STEP
    assert ahead <= staleness and (staleness == 0 or ahead > 0)
    counts = board.ledger.counts()
    assert counts["done"] == counts["groups"] == STEPS * PER_STEP and counts["answers"] == SIZE * counts["groups"]


def test_an_answer_of_a_group_that_another_has_answered_is_forgotten(tmp_path: Path) -> None:
    board = made(tmp_path)
    publish(board, 0)
    first = board.take("slow", 1)
    board.give_back("slow")
    second = board.take("quick", 1)
    assert groups(first) == groups(second) == [0] and first is not None and second is not None
    answer(board, second, "quick", seed=1)
    answer(board, first, "slow", seed=2)
    assert board.ledger.group(0) == answers(0, SIZE, seed=1)
    assert board.take("slow", 1) is None  # it has ended, as far as we know


def test_weights_that_are_refused_are_published_again_or_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = made(tmp_path)
    publish(board, 0)
    for _ in range(module.MAX_REFUSALS - 1):
        assert groups(board.take("w", 3)) == [0, 1, 2]
        board.refused("w", 0, "torn")
        assert blocked(board) and board.wait_for_step(1, "t") is None
        publish(board, 0)
    board.take("w", 3)
    with pytest.raises(TrustError, match="version 0 of the weights was written again and again"):
        board.refused("w", 0, "torn")


def test_an_old_version_that_is_gone_is_nobodys_fault(tmp_path: Path) -> None:
    board = made(tmp_path, staleness=9)
    publish(board, 0)
    taken = board.take("w", PER_STEP)
    assert taken is not None
    answer(board, taken)
    for worker in "abcd":
        board.take(worker, 1)
    publish(board, 1)
    for worker in "abcd":
        board.refused(worker, 0, "no such file")
    assert board.version == 1 and not blocked(board)


def test_after_a_kill_the_newest_version_that_is_there_is_used(tmp_path: Path) -> None:
    board = made(tmp_path)
    for version in range(3):
        publish(board, version)
        taken = board.take("w", 9)
        assert taken is not None
        answer(board, taken)
    board.ledger.close()
    assert made(tmp_path, there=[1, 2, 7]).version == 2  # 7 was never published
    gone = made(tmp_path / "none") if (tmp_path / "none").mkdir() is None else None
    assert gone is not None and gone.version is None
    for file in (tmp_path / "weights").iterdir():
        file.unlink()
    again = made(tmp_path, there=[])
    assert again.version is None and blocked(again)
    assert publish(again, 1) == 1 and publish(again, 2) == 2  # the trainer does them again


def test_a_step_that_is_done_again_and_comes_out_otherwise_ends_the_run(tmp_path: Path) -> None:
    board = made(tmp_path)
    publish(board, 0)
    taken = board.take("w", 9)
    assert taken is not None
    answer(board, taken)
    publish(board, 1)
    with pytest.raises(TrustError, match="step 1 was done again, and its weights are not those that it had"):
        publish(board, 1, weights="f" * 64)


def test_a_group_that_takes_every_worker_down_ends_the_run_by_its_name(tmp_path: Path) -> None:
    board = made(tmp_path)
    publish(board, 0)
    for turn in range(module.MAX_GIVEN_BACK - 1):
        board.take(f"w{turn}", 1)
        board.give_back(f"w{turn}")
    board.take("last", 1)
    with pytest.raises(TrainingError, match=r"group 0 was sampled 10 times.*task lucky, problem row 0"):
        board.give_back("last")


def test_who_waits_is_told_when_the_run_stops_or_fails(tmp_path: Path) -> None:
    board, heard = made(tmp_path), list[object]()

    def worker() -> None:
        heard.append(board.take("w", 1))

    def trainer() -> None:
        try:
            board.wait_for_step(1, "t")
        except KeyboardInterrupt as error:
            heard.append(error)

    publish(board, 0)
    board.take("other", 9)
    threads = [threading.Thread(target=each) for each in (worker, trainer)]
    for thread in threads:
        thread.start()
    board.stop()
    for thread in threads:
        thread.join(10)
    assert {type(each) for each in heard} == {type(None), KeyboardInterrupt}
    board.stop(TrainingError("the verifier is broken"))
    for ask in (lambda: board.take("w", 1), lambda: board.wait_for_step(1, "t"), board.raise_if_failed):
        with pytest.raises(TrainingError, match="the verifier is broken"):
            ask()


def test_a_run_that_is_sent_back_forgets_nothing_and_hears_nobody_of_before(tmp_path: Path) -> None:
    board = made(tmp_path, staleness=1)
    publish(board, 0)
    for version in (1, 2):
        taken = board.take("w", PER_STEP)
        assert taken is not None
        answer(board, taken, seed=version)
        publish(board, version)
    late = board.take("late", 2)
    assert late is not None and groups(late) == [6, 7]
    kept = board.ledger.rollouts(1)
    assert publish(board, 1, rollbacks=1) == 1
    answer(board, late)  # of weights that were given up
    assert board.ledger.next_group(0) == PER_STEP and board.ledger.rollouts(1) == kept
    again = board.take("w", PER_STEP)
    assert again is not None and groups(again) == [3, 4, 5] and again.version == 1
    answer(board, again, seed=9)
    publish(board, 2, rollbacks=1, weights="e" * 64)
    assert board.ledger.rollouts(2)[0] == answers(3, SIZE, seed=9, version=1)[0]
    assert audit(board.ledger) == [] and board.ledger.rollbacks == [1]
    with board.ledger.transaction() as db:
        lines = db.execute("SELECT number, state FROM groups WHERE rolled_back = 1 ORDER BY number").fetchall()
        steps = db.execute("SELECT step, weights FROM steps WHERE rolled_back = 1").fetchall()
        (count,) = db.execute("SELECT count(*) FROM trajectories WHERE rolled_back = 1").fetchone()
    assert lines == [(3, "done"), (4, "done"), (5, "done"), (6, "dispatched"), (7, "dispatched")]
    assert steps == [(2, weights_of(2))] and count == 3 * SIZE
    board.ledger.close()
    assert made(tmp_path, 1, there=[1, 2]).version == 2


def test_a_verifier_that_is_broken_is_heard_by_whoever_pays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = made(tmp_path)
    publish(board, 0)
    taken = board.take("w", 1)

    def broken(*_: object) -> list[Rollout]:
        raise TrainingError("the reward failed on each answer")

    monkeypatch.setattr(Numbers, "pay", broken)
    assert taken is not None
    board.answered(sampled(board, 0, "w", 0))
    with pytest.raises(SpratError, match="the reward failed on each answer"):
        board.pay_next(0)
    assert board.ledger.unfinished() == [0]
