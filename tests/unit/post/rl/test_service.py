"""The orchestrator answers whom it should, and believes nobody who is not whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sprat.errors import MachineError, TrustError, pack_error
from sprat.post.rl.dispatcher import Dispatcher
from sprat.post.rl.sampled import SampledAnswer, pack_answers
from sprat.post.rl.service import Service
from sprat.post.rl.trajectory import unpack_rollout
from sprat.post.rl.wire import Message
from tests.unit.post.rl.test_dispatcher import SIZE, made, publish, weights_of
from tests.unit.post.rl.trajectories import answers


class Notes:
    """What a run would keep."""

    def __init__(self) -> None:
        self.facts: dict[str, Any] = {"gate": 1}
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def log(self, step: int, **metrics: Any) -> None:
        self.rows.append((step, metrics))


def service(folder: Path, staleness: int = 0) -> tuple[Service, Dispatcher, Notes, list[str]]:
    board, notes, progress = made(folder, staleness), Notes(), list[str]()
    own = Service(notes, board, folder / "weights", {"room": 2}, progress.append)  # type: ignore[arg-type]
    return own, board, notes, progress


def message(kind: str, arrays: Any = None, **body: Any) -> Message:
    return Message({"kind": kind, "cpu": 0.0, **body}, dict(arrays or {}))


def answered(group: int, count: int = SIZE, rollbacks: int = 0) -> Message:
    body, arrays = pack_answers([SampledAnswer([1], [-1.0], [0], "stop", 3)] * count)
    return message("answer", arrays, group=group, rollbacks=rollbacks, **body)


def test_a_group_goes_out_comes_back_and_reaches_the_trainer(tmp_path: Path) -> None:
    own, board, notes, progress = service(tmp_path)
    assert own.answer("worker-0", message("hello", role="worker"))[0] == {"room": 2, "facts": {"gate": 1}}
    told = {"version": 0, "weights": weights_of(0), "trained": "", "rollbacks": 0}
    assert own.answer("trainer", message("publish", **told))[0] == {"version": 0}
    for turn, room in enumerate((2, 9)):
        reply, _ = own.answer(f"worker-{turn}", message("take", room=room))
        assert reply["version"] == 0 and reply["digest"] == weights_of(0) and "version-00000000" in reply["file"]
        for row in reply["requests"]:
            own.answer(f"worker-{turn}", answered(row["group"]))
    while board.pay_next(0):
        pass
    assert own.answer("trainer.3", message("groups", step=1))[0] == {"groups": [0, 1, 2]}
    body, arrays = own.answer("trainer.3", message("group", group=2))
    parts = [{k.partition(".")[2]: v for k, v in arrays.items() if k.startswith(f"{row}.")} for row in range(SIZE)]
    assert [unpack_rollout(*pair) for pair in zip(body["answers"], parts, strict=True)] == answers(2, seed=3)
    own.answer("trainer", message("log", step=1, metrics={"reward": 0.5}))
    assert notes.rows == [(1, {"reward": 0.5})] and set(progress) == {"trainer", "worker-0", "worker-1"}


def test_answers_that_are_not_whole_are_not_believed_and_end_nothing(tmp_path: Path) -> None:
    own, board, _, _ = service(tmp_path)
    publish(board, 0)
    own.answer("w", message("take", room=1))
    for wrong in (answered(0, SIZE - 1), message("answer", group=0, rollbacks=0), message("answer", group="0")):
        with pytest.raises(TrustError):
            own.answer("w", wrong)
    board.raise_if_failed()
    own.answer("w", answered(77))  # nobody waits for it
    assert board.in_flight == {0: "w"} and not board.pay_next(0)


@pytest.mark.parametrize("kind", ["publish", "log", "facts", "truncate", "finish", "groups", "group", "progress"])
def test_a_worker_may_not_speak_for_the_trainer(tmp_path: Path, kind: str) -> None:
    own, _, _, _ = service(tmp_path)
    for name in ("worker-0", "10.0.0.1:999", "trainers:1"):
        with pytest.raises(TrustError, match="nobody answers"):
            own.answer(name, message(kind, version=9, weights="0" * 64, trained="", rollbacks=0, step=1, metrics={}))
    with pytest.raises(TrustError, match="nobody answers"):
        own.answer("trainer", message("__init__"))


def test_why_a_child_cannot_go_on_ends_the_run(tmp_path: Path) -> None:
    own, board, _, _ = service(tmp_path)
    with pytest.raises(TrustError, match="an error that is none"):
        own._on_failed("w", message("failed", error=["a", 1]))
    own.answer("w", message("failed", error=pack_error(MachineError("no memory", todo="buy some"))))
    with pytest.raises(MachineError, match="no memory; buy some"):
        board.raise_if_failed()
    reply, _ = own.answer("w", message("take", room=1))
    assert reply["error"][1] == "no memory"


def test_who_waits_when_the_run_stops_is_told_to(tmp_path: Path) -> None:
    own, board, _, _ = service(tmp_path)
    board.stop()
    assert own.answer("w", message("take", room=1))[0] == {"stop": True}
    assert own.answer("trainer", message("groups", step=1))[0] == {"stop": True}


def test_weights_that_are_not_there_are_said_to_whoever_asks_and_end_nothing(tmp_path: Path) -> None:
    own, board, _, _ = service(tmp_path)
    reply, _ = own.answer("w", message("weights", version=3, offset=0))
    assert "cannot be read" in reply["error"][1]
    board.raise_if_failed()
    (tmp_path / "weights" / "version-00000003.safetensors").write_bytes(b"abcdef")
    reply, arrays = own.answer("w", message("weights", version=3, offset=2))
    assert reply == {"size": 6} and arrays["bytes"].tobytes() == b"cdef"
