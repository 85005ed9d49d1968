"""Every step of a run can be computed again from its ledger, and what was changed since is named."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sprat.config.rl import RLRunConfig
from sprat.errors import CheckpointError, ConfigError, TrustError
from sprat.formats.load import save
from sprat.model import Transformer
from sprat.post.rl import monitor
from sprat.post.rl.audit import audit
from sprat.post.rl.ledger import LEDGER_FILE, RolloutLedger
from sprat.post.rl.questions import Questions
from sprat.post.rl.reinforce import reinforce
from sprat.post.rl.replay import replay
from sprat.post.rl.rollout import InProcess
from sprat.post.rl.trip_wires import Trip
from sprat.tokens import Tokenizer
from sprat.trust.verify import verify

SETTINGS: dict[str, Any] = {
    "steps": 6, "prompts_per_step": 4, "group_size": 4, "max_tokens": 10, "lr": 3e-3, "checkpoint_every": 2,
    "gate": False, "held_out": {"share": 0, "every": 0}, "trip_wires": {"action": "off"},
}  # fmt: skip
Do = Callable[..., Path]


@pytest.fixture
def do(guesser: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Do:
    """Does a tiny run, or goes on with it; its folder."""
    save(guesser, tokenizer, tmp_path / "model")
    rows = [{"question": f"{number} train", "answer": "7"} for number in range(60)]
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name: str = "mine", **changes: Any) -> Path:
        config = RLRunConfig.model_validate(SETTINGS | changes)
        questions = Questions(tasks=(str(tmp_path / "ask.jsonl"),))
        return reinforce(tmp_path / "model", questions, tmp_path / name, config).folder

    return run


def change(run: Path, statement: str) -> None:
    with sqlite3.connect(run / LEDGER_FILE) as db:
        db.execute(statement)


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 2}}, {"kl_weight": 0.1, "epochs": 2, "minibatch": 8}])
def test_all_steps_and_each_alone_come_out_with_the_same_bits(do: Do, changes: dict[str, Any]) -> None:
    run = do("road/mine", **changes)
    whole = replay(run, model=run.parents[1] / "model")
    assert whole.is_same and whole.start == 0 and [each.step for each in whole.steps] == [1, 2, 3, 4, 5, 6]
    assert len({each.actual for each in whole.steps}) > 3
    assert all(each.answers == 16 and each.versions == (each.step - 1, each.step - 1) for each in whole.steps)
    alone = replay(run, 4, model=run.parents[1] / "model")
    assert alone.is_same and alone.steps[-1] == whole.steps[3]
    assert [finding for finding in verify(run.parent) if not finding.ok] == []


def test_what_was_sampled_before_a_kill_is_not_sampled_again(do: Do, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, asked, groups = do("whole"), list[int](), InProcess.groups

    def counting(source: InProcess, step: int) -> Any:
        asked.append(step)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return groups(source, step)

    monkeypatch.setattr(InProcess, "groups", counting)
    with pytest.raises(KeyboardInterrupt):
        do("killed")
    run = whole.parent / "killed"
    step = replay(run, 3)  # from the checkpoint of step 2, while the run is not done
    assert step.is_same and step.start == 2 and [each.step for each in step.steps] == [3]
    for folder in (run / "checkpoints").glob("step-*"):
        shutil.rmtree(folder)
    assert do("killed") == run
    assert asked == [1, 2, 3, 4, 4, 5, 6]  # steps 1 to 3 were done again with the answers that they had
    for name in ("metrics.jsonl", "artefact/model.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()


def test_what_was_changed_since_is_named(do: Do, tmp_path: Path) -> None:
    run = do()
    copy = shutil.copytree(run, tmp_path / "answers")
    change(copy, "UPDATE trajectories SET reward = 1 - reward WHERE group_number = 9 AND sample = 0")
    found = replay(copy)
    assert [each.step for each in found.steps] == [1, 2, 3] and not found.is_same
    assert "the answers in the ledger are not those that it trained" in found.steps[-1].differences
    assert any("the weights have the digest" in each for each in found.steps[-1].differences)
    assert any("measured otherwise: reward" in each for each in found.steps[-1].differences)
    assert found.faults == ["step 3 was trained with other answers than are kept"]
    copy = shutil.copytree(run, tmp_path / "weights")
    change(copy, f"UPDATE steps SET weights = '{'0' * 64}' WHERE step = 2")
    assert [each.step for each in replay(copy).steps] == [1, 2]
    copy = shutil.copytree(run, tmp_path / "machine")
    change(copy, f"UPDATE steps SET weights = '{'0' * 64}' WHERE step = 1")
    change(copy, "UPDATE meta SET value = replace(value, '\"torch\":\"', '\"torch\":\"0.') WHERE key = 'machines'")
    assert any(each.startswith("torch: 0.") for each in replay(copy).steps[0].differences)
    copy = shutil.copytree(run, tmp_path / "hole")
    change(copy, "DELETE FROM steps WHERE step = 3")
    assert replay(copy).faults[0].startswith("steps are missing")


def test_another_model_another_folder_and_another_step_are_refused(do: Do, tmp_path: Path, model: Transformer) -> None:
    run = do()
    with pytest.raises(CheckpointError, match="step 7 was not trained; there are 1 to 6"):
        replay(run, 7)
    with pytest.raises(CheckpointError, match="no run of RL"):
        replay(tmp_path)
    elsewhere = shutil.copytree(run, tmp_path / "away" / "mine")
    with pytest.raises(TrustError, match="the model is not as it was|cannot digest"):
        replay(elsewhere)
    assert replay(elsewhere, 1, model=tmp_path / "model").is_same
    (tmp_path / "model" / "config.json").write_text((tmp_path / "model" / "config.json").read_text() + " ")
    with pytest.raises(TrustError, match="the model is not as it was when the run started"):
        replay(run)


@pytest.mark.parametrize("step", [None, 1])
def test_a_run_that_was_stopped_before_its_first_step_proves_nothing(
    step: int | None, do: Do, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(source: InProcess, step: int, first: int | None = None) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(InProcess, "groups", killed)
    with pytest.raises(KeyboardInterrupt):
        do()
    with pytest.raises(CheckpointError, match="no step was trained"):
        replay(tmp_path / "mine", step)


def test_a_model_that_lies_elsewhere_must_be_named(do: Do, tmp_path: Path) -> None:
    run = do("road/mine")
    with pytest.raises(ConfigError, match="is not beside it.*--model"):
        replay(run)
    assert replay(run, 2, model=tmp_path / "model").is_same


def test_a_run_that_was_sent_back_is_replayed_with_the_rate_that_held(do: Do, monkeypatch: pytest.MonkeyPatch) -> None:
    check, tripped = monitor.RunMonitor.check, list[int]()

    def trips_once(own: Any, row: Any) -> Trip | None:
        if row["step"] == 5 and not tripped:
            tripped.append(5)
            return Trip("length", 5, "answers are long")
        return check(own, row)

    monkeypatch.setattr(monitor.RunMonitor, "check", trips_once)
    run = do(trip_wires={"action": "rollback", "lr_factor": 0.25, "max_kl": 0, "no_spread": 0})
    assert tripped == [5]
    ledger = RolloutLedger.read(run / LEDGER_FILE)
    assert ledger.rollbacks == [4] and audit(ledger) == []
    whole = replay(run)
    assert whole.is_same and [each.step for each in whole.steps] == [1, 2, 3, 4, 5, 6]
    with ledger.transaction() as db:
        before = db.execute("SELECT step, weights FROM steps WHERE rolled_back = 1").fetchall()
    (old,) = before
    row = ledger.step(5)
    assert row is not None and old[0] == 5 and old[1] != row.weights  # the same answers, another rate
