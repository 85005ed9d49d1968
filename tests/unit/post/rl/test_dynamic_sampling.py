"""A step with dynamic sampling asks until enough groups teach something; order of dispatch decides, and it resumes."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sprat.config.rl import RLRunConfig, load_rl_config
from sprat.errors import ConfigError, TrustError
from sprat.files import digest
from sprat.formats.load import save
from sprat.model import Transformer
from sprat.post.rl.assignment import Assignment, Range, Sampled
from sprat.post.rl.audit import audit
from sprat.post.rl.dispatcher import Dispatcher
from sprat.post.rl.dynamic_sampling import plan_step, unused_reason
from sprat.post.rl.ledger import LEDGER_FILE, RolloutLedger
from sprat.post.rl.ledger_tables import Question, StepRow
from sprat.post.rl.questions import Questions
from sprat.post.rl.reinforce import reinforce
from sprat.post.rl.replay import replay
from sprat.post.rl.rollout import InProcess, Rollout
from sprat.post.rl.sampled import SampledAnswer
from sprat.post.rl.training_state import TrainingState
from sprat.post.rl.trajectory import digest_rollouts
from sprat.tokens import Tokenizer
from sprat.train import checkpoint
from sprat.trust.run_record import read_metrics
from tests.unit.post.rl.test_dispatcher import Numbers

P, FACTOR, STEPS = 3, 4, 6


def groups_of_step(has_spread: Sequence[bool], first: int) -> int:
    """How many groups a step has, by the definition: up to the P-th with spread, or FACTOR x P of them."""
    live = 0
    for count, spread in enumerate(has_spread[first : first + FACTOR * P], 1):
        live += spread
        if live == P:
            return count
    return FACTOR * P


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_a_step_ends_with_the_group_that_it_still_needed_or_at_the_bound(share: float) -> None:
    for seed in range(50):
        rng = random.Random(seed)
        truth = [rng.random() < share for _ in range(100)]
        known: list[bool | None] = []
        while not (plan := plan_step(known, P, FACTOR)).is_complete:
            missing = plan.size - len(known)
            assert 0 < missing <= P - sum(map(bool, known)), "a group too many"
            known += [None] * missing
            order = list(range(len(known) - missing, len(known)))
            rng.shuffle(order)  # answers come in any order, and until all are here nothing more is asked
            for place in order:
                assert plan_step(known, P, FACTOR) == plan
                known[place] = truth[place]
        assert len(known) == groups_of_step(truth, 0)


def test_why_a_group_is_not_used() -> None:
    assert unused_reason([0.0, 1.0, None]) == "" and unused_reason([1e-9, 2e-9]) == ""
    assert "alike (0.3)" in unused_reason([0.3, 0.1 + 0.2]), "what differs by rounding alone is alike"
    assert unused_reason([None, None]) == "no answer was paid" and "only one" in unused_reason([None, 1.0])


class Mixed(Numbers):
    """Pays some groups alike."""

    def pay(self, question: Question, sampled: Sequence[SampledAnswer]) -> list[Rollout]:
        rollouts = super().pay(question, sampled)
        rewards = (0.0, 1.0) if SPREAD[question.group] else (1.0, 1.0)
        return [replace(one, reward=reward) for one, reward in zip(rollouts, rewards, strict=True)]


SPREAD = [random.Random(f"spread/{group}").random() < 0.4 for group in range(STEPS * P * FACTOR)]


def board_of(folder: Path, version: int) -> Dispatcher:
    identity = {"prompts_per_step": P, "group_size": 2, "dynamic_sampling": FACTOR}
    (folder / "weights").mkdir(exist_ok=True)
    (folder / "weights" / f"version-{version:08d}.safetensors").touch()
    ledger = RolloutLedger(folder / "l.sqlite", identity)
    return Dispatcher(ledger, Mixed(), Range(0, STEPS * P, P), 0, folder / "weights")


def publish(board: Dispatcher, version: int) -> None:
    trained = digest_rollouts(board.ledger.rollouts(version)) if version else ""
    board.publish(StepRow(version, version - 1 if version else None, f"{version:064x}", trained, {}), 0)


def answer(board: Dispatcher, assignment: Assignment, seed: int) -> None:
    for request in assignment.requests:
        question = board.question(request.group) or Numbers().question(request.group)
        sampled = [SampledAnswer([1], [-1.0], [assignment.version], "stop", seed)]
        board.answered(Sampled(question, "w", assignment.rollbacks, sampled))
    while board.pay_next(0):
        pass


@pytest.mark.parametrize("seed", range(4))
def test_with_workers_that_die_come_late_and_a_parent_that_is_killed_steps_have_the_same_groups(
    tmp_path: Path, seed: int
) -> None:
    chance, version = random.Random(seed), 0
    board = board_of(tmp_path, 0)
    publish(board, 0)
    working: dict[str, Assignment] = {}
    for turn in range(3000):
        worker, event = f"w{chance.randrange(3)}", chance.choice(["take", "answer", "die", "train", "restart"])
        if event == "take" and worker not in working and board._due(9):
            assignment = board.take(f"{worker}.{turn}", chance.randrange(1, 3))
            assert assignment is not None
            working[worker] = assignment
        elif event == "answer" and worker in working:
            answer(board, working.pop(worker), turn)
        elif event == "die" and worker in working:
            board.give_back(board.in_flight[working.pop(worker).requests[0].group])
        elif event == "train" and board.ledger.plan(version + 1).is_complete:
            found = board.wait_for_step(version + 1, "t")
            first = board.ledger.end_of(version, 0)
            assert found == list(range(first, first + groups_of_step(SPREAD, first)))
            version += 1
            publish(board, version)
        elif event == "restart" and chance.random() < 0.1:
            board.ledger.close()
            board, working = board_of(tmp_path, version), {}
        if version == STEPS:
            break
    assert version == STEPS and audit(board.ledger) == [] and board._due(9) == []
    last = board.ledger.next_group(0)
    assert sorted(board.ledger.unused()) == [group for group in range(last) if not SPREAD[group]]
    assert set(board.ledger.unused().values()) == {"all answers were paid alike (1)"}


SETTINGS: dict[str, Any] = {
    "steps": 6, "prompts_per_step": 4, "group_size": 3, "max_tokens": 10, "lr": 1e-3, "checkpoint_every": 2,
    "gate": False, "held_out": {"share": 0, "every": 0}, "trip_wires": {"action": "off"}, "dynamic_sampling": 3,
}  # fmt: skip


@pytest.fixture
def folder(guesser: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save(guesser, tokenizer, tmp_path / "model")
    rows = [{"question": f"{number} train", "answer": "7"} for number in range(60)]
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def do(folder: Path, name: str, **changes: Any) -> Any:
    config = RLRunConfig.model_validate(SETTINGS | changes)
    return reinforce(folder / "model", Questions(tasks=(str(folder / "ask.jsonl"),)), folder / name / "run", config)


def test_a_run_trains_as_many_groups_as_it_was_told_and_resumes_and_replays_bit_for_bit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = do(folder, "whole")
    rows, ledger = read_metrics(whole.folder), RolloutLedger.read(whole.folder / LEDGER_FILE)
    unused = ledger.unused()
    assert len({row["sampled_groups"] for row in rows}) > 1 and audit(ledger) == []
    for row in rows:
        numbers = ledger.done(row["step"])
        live = [number for number in numbers if number not in unused]
        assert len(numbers) == row["sampled_groups"] and row["live_groups"] == pytest.approx(len(live) / len(numbers))
        assert (len(live) == 4 and numbers[-1] in live) or (len(live) < 4 and len(numbers) == 12)
    groups = InProcess.groups

    def dying(source: InProcess, step: int, first: int | None = None) -> list[Rollout]:
        if step == 4:
            raise KeyboardInterrupt
        return groups(source, step, first)

    monkeypatch.setattr(InProcess, "groups", dying)
    with pytest.raises(KeyboardInterrupt):
        do(folder, "stopped")
    monkeypatch.undo()
    kept = checkpoint.latest(folder / "stopped" / "run" / "checkpoints")
    assert kept is not None and kept.extra["next_group"] == ledger.end_of(kept.step, 0)
    again = do(folder, "stopped")
    assert digest.of_files(again.artifact) == digest.of_files(whole.artifact) and read_metrics(again.folder) == rows
    assert replay(whole.folder, model=folder / "model").is_same
    assert replay(whole.folder, 4, model=folder / "model").is_same


def test_a_run_that_goes_on_where_another_ended_asks_what_follows(folder: Path) -> None:
    whole = do(folder, "whole")
    do(folder, "first", steps=3, checkpoint_every=3, keep_checkpoint=True)
    start = {"init_from": str(folder / "first" / "run"), "init_state": "continue"}
    rest = do(folder, "rest", **start)
    assert read_metrics(rest.folder)[-1]["sampled_groups"] == read_metrics(whole.folder)[-1]["sampled_groups"]
    ledgers = [RolloutLedger.read(run.folder / LEDGER_FILE) for run in (whole, rest)]
    assert ledgers[0].done(6) == ledgers[1].done(6) and audit(ledgers[1]) == []


def test_a_checkpoint_and_a_ledger_that_do_not_belong_together_are_refused(folder: Path) -> None:
    run = do(folder, "run")
    rollouts = RolloutLedger.read(run.folder / LEDGER_FILE).rollouts(2)
    config = RLRunConfig.model_validate(SETTINGS)
    state = TrainingState(None, None, config, "", None, next_group=rollouts[0].group + 1)  # type: ignore[arg-type]
    with pytest.raises(TrustError, match="step 2 begins with group"):
        state.note_groups(2, rollouts)


def test_what_cannot_go_together_is_said() -> None:
    both = ["dynamic_sampling=2", "rollout.workers=2", "rollout.staleness=1"]
    with pytest.raises(
        ConfigError, match=r"dynamic_sampling = 2 and rollout\.staleness = 1.*once its answers are paid"
    ):
        load_rl_config(overrides=both)
    with pytest.raises(ConfigError, match="seeding=group"):
        load_rl_config(overrides=["dynamic_sampling=2", "seeding=step"])
    assert load_rl_config(overrides=both[:2]).dynamic_sampling == 2
