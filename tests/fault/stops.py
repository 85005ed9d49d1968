"""Runs of fine-tuning and RL that are stopped at random instants and started again, beside one never stopped.

    python tests/fault/stops.py FOLDER KIND COUNT SEED

FOLDER holds ``model``, ``pairs.jsonl``, ``talks.jsonl``, ``ask.jsonl``, ``book.txt`` and ``judge.py``. One process
imports torch; each attempt at a run is a fork of it, and dies as a process does: by SIGKILL, or by SIGINT to its group
as a terminal sends it, in turn. Three of five instants are drawn evenly over the time that a whole run takes, two of
five over its end: from the first file of the artefact until the process leaves. A run is stopped once or twice, then it
may end. What is printed is one JSON object: the stops with their instants, and the runs that ended unlike the one never
stopped.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from sprat.config.finetune import DPOConfig, FinetuneConfig
from sprat.config.rl import RLRunConfig
from sprat.files import digest
from sprat.post.finetune import finetune
from sprat.post.rl.questions import Questions
from sprat.post.rl.reinforce import reinforce
from sprat.trust.verify import verify

INTERRUPTED = 130
SETTINGS: dict[str, Any] = {
    "epochs": 4,
    "seq_len": 32,
    "checkpoint_every": 2,
    "log_every": 3,
    "optim": {"adam_lr": 0.01},
    "keep_checkpoint": True,
}
BEST = {"keep_best": True, "patience": 40, "best_metric": "ask", "eval_every": 1, "checkpoint_every": 5}
LORA = {"lora": {"rank": 2, "dora": True}}
CHANGES: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": LORA,
    "dpo": {},
    "best": BEST,
    "replay": LORA | {"keep_best": True},
}
RL: dict[str, Any] = {
    "steps": 8,
    "prompts_per_step": 4,
    "group_size": 4,
    "max_tokens": 6,
    "lr": 0.01,
    "checkpoint_every": 2,
    "gate": False,
    "fire_drill": "off",  # the judge pays by form, so that any model learns something
    "held_out": {"every": 3},
    "verifier": {"workers": 1},
    "keep_checkpoint": True,
}
RL_CHANGES: dict[str, dict[str, Any]] = {
    "rl": {},
    "rl lora": {"lora": {"rank": 2}},
}
CLOCK_FACTS = {"tokens_per_second"}
CLOCK_RECORD = {
    "device_seconds", "wall_seconds", "energy_joules_estimated", "nano_yuan", "started", "finished", "ledger_root",
    "records", "facts",
}  # fmt: skip


def attempt(base: Path, kind: str, name: str) -> int:
    """The process id of a fork, which leads a group of its own, that starts or goes on with the run ``name``."""
    child = os.fork()
    if child:
        os.setpgid(child, child)
        return child
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
        if kind in RL_CHANGES:
            settings = RLRunConfig.model_validate(RL | RL_CHANGES[kind])
            questions = Questions(data=base / "ask.jsonl", reward=f"{base / 'judge.py'}:reward")
            reinforce(base / "model", questions, base / name / "run", settings)
            os._exit(0)
        config = (DPOConfig if kind == "dpo" else FinetuneConfig).model_validate(SETTINGS | CHANGES[kind])
        data = base / ("pairs.jsonl" if kind == "dpo" else "talks.jsonl")
        tasks = [str(base / "ask.jsonl")] if kind == "best" else []
        replay = base / "book.txt" if kind == "replay" else None
        finetune(base / "model", data, base / name / "run", config, eval_tasks=tasks, replay=replay)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def has_left(child: int) -> bool:
    """Whether ``child`` has ended; its status can still be asked for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_for_artifact(child: int, run: Path) -> None:
    """Until the artefact's first file is there, or ``child`` has ended."""
    while not (run / "artefact").is_dir() or not any((run / "artefact").iterdir()):
        if has_left(child):
            return
        time.sleep(0.0005)


def result(run: Path) -> dict[str, Any]:
    """All of a finished run that must not depend on when it was stopped."""
    record = json.loads((run / "run.json").read_text())
    return {
        "artefact": digest.of_files(run / "artefact"),
        "metrics": (run / "metrics.jsonl").read_text(),
        "facts": {name: value for name, value in record["facts"].items() if name not in CLOCK_FACTS},
        "record": {name: value for name, value in record.items() if name not in CLOCK_RECORD},
        "files": sorted(str(path.relative_to(run)) for path in run.rglob("*")),
        "faults": [str(finding) for finding in verify(run.parent) if not finding.ok],
    }


def phase(run: Path) -> str:
    """How far a run is."""
    if (run / "run.json").exists():
        return "recorded"
    if (run / "artefact").is_dir() and any((run / "artefact").iterdir()):
        return "artefact"
    return "training" if any(run.glob("checkpoints/step-*")) else "before a checkpoint"


def signal_group(child: int, number: signal.Signals, run: Path) -> str:
    """Send ``number`` to the group of ``child``; how far its run was then. It stands still in between."""
    os.killpg(child, signal.SIGSTOP)
    os.waitid(os.P_PID, child, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
    reached = phase(run)
    os.killpg(child, number)
    os.killpg(child, signal.SIGCONT)
    return reached


def exit_code(child: int) -> int:
    """How ``child`` ended, once it has: what it left with, or minus the number of the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def undisturbed(base: Path, kind: str, name: str) -> tuple[dict[str, Any], float, float]:
    """The result of a run that nobody stops, its seconds, and those of its end."""
    began = time.monotonic()
    child = attempt(base, kind, name)
    wait_for_artifact(child, base / name / "run")
    artifact = time.monotonic()
    assert exit_code(child) == 0, "the run that nobody stops failed"
    ended = time.monotonic()
    return result(base / name / "run"), ended - began, ended - artifact


def main() -> None:
    """Stop runs of one kind and print what came of it."""
    torch.set_num_threads(1)
    base, kind, count, chance = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), random.Random(int(sys.argv[4]))
    whole, _, _ = undisturbed(base, kind, "whole")
    same, seconds, end_seconds = undisturbed(base, kind, "again")  # the first one warmed the disk's cache
    assert same == whole, "two runs that nobody stops differ: this test can say nothing"

    stops: list[dict[str, Any]] = []
    faults: list[dict[str, Any]] = []
    runs, too_late = 0, 0
    run = base / "stopped" / "run"
    while len(stops) < count and too_late < 3 * count + 10:
        shutil.rmtree(run.parent, ignore_errors=True)
        first = len(stops)
        for _ in range(min(chance.choice((1, 2)), count - first)):
            number = signal.SIGINT if len(stops) % 2 else signal.SIGKILL
            at_end, share = len(stops) % 5 >= 3, chance.random()
            child = attempt(base, kind, "stopped")
            if at_end:
                wait_for_artifact(child, run)
            time.sleep(share * (end_seconds if at_end else seconds))
            before = signal_group(child, number, run)
            if (code := exit_code(child)) == 0:
                if before in ("training", "artefact"):
                    faults.append({"run": runs, "forgot": number.name, "share": share, "phase": before})
                too_late += 1
                seconds, end_seconds = (seconds, 0.7 * end_seconds) if at_end else (0.7 * seconds, end_seconds)
                break
            where = {"at_end": at_end, "share": round(share, 4), "phase": before}
            stops.append({"run": runs, "signal": number.name, "code": code, **where})
        code = exit_code(attempt(base, kind, "stopped"))
        ended = result(run) if code == 0 else {}
        differing = [name for name in whole if ended.get(name) != whole[name]]
        unclean = [stop for stop in stops[first:] if stop["code"] not in (-signal.SIGKILL, INTERRUPTED)]
        if differing or unclean:
            faults.append({"run": runs, "code": code, "differs in": differing, "stops": stops[first:]})
            shutil.copytree(run.parent, base / f"fault-{runs}")
        runs += 1
    print(json.dumps({"stops": stops, "faults": faults, "runs": runs, "seconds": [seconds, end_seconds]}))


if __name__ == "__main__":
    main()
