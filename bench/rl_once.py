"""Exactly once: runs of RL whose roles are killed at random instants, held against runs that nobody kills.

Four rollout workers sample, slowed down as by stragglers: a pause in proportion to the length of a group's answers, and
ten times that for one group in ten, so that long answers come late. A run is killed by SIGKILL so many times, any role
at any moment (in the first second of a process too); killed parents are started again by the same command. Bars, for
synchronous runs and for staleness 1, 4 and 16:

- trained = dispatched: each step trained all answers of its own groups, once each, and no group is missing or left;
- synchronous: weights and log are those of the run in one process that nobody killed, to the bit;
- asynchronous: replayed from its ledger, each step gives its weights, to the bit, and the last ones are the artefact's;
- no bias by length: lengths of answers are distributed as in the synchronous run (Kolmogorov-Smirnov, p > 0.05);
- the position is exact: after every kill the ledger holds whole steps in order, and the next group is the next one.

    python -m bench.rl_once [--quick] [--json] [--kills 20] [--seed 0] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.rl_tiny import DELAY
from sprat.errors import SpratError
from sprat.formats.load import load_dense
from sprat.post.rl.audit import audit
from sprat.post.rl.ledger import LEDGER_FILE, RolloutLedger
from sprat.post.rl.replay import replay
from sprat.post.rl.weights import TrainedWeights

ROOT = Path(__file__).resolve().parents[1]
WORKERS, MIN_P = 4, 0.05
ROLES = ("parent", "trainer", "worker")
LIMIT_SECONDS = 3600.0


def command(folder: Path, name: str, changes: dict[str, Any]) -> list[str]:
    """What starts the run ``name``, and goes on with it."""
    return [sys.executable, "-m", "bench.rl_tiny", "run", str(folder), name, json.dumps(changes)]


def start(folder: Path, name: str, changes: dict[str, Any], delay: float) -> subprocess.Popen[bytes]:
    """The parent of a run."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({DELAY: str(delay)} if delay else {})}
    with open(folder / f"{name}.log", "ab") as log:
        line = command(folder, name, changes)
        return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=log, stderr=log)


def processes(parent: int) -> dict[str, list[int]]:
    """The processes of a run by role."""
    found: dict[str, list[int]] = {"parent": [parent], "trainer": [], "worker": []}
    for place in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            if place.name.isdigit() and int((place / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                words = (place / "cmdline").read_bytes().decode().split("\0")
                for role in ("trainer", "worker"):
                    found[role] += [int(place.name)] * any(role in word for word in words)
    return found


def position(folder: Path, name: str) -> dict[str, Any] | None:
    """Where a run is, as its ledger says it now; None while it says nothing."""
    try:
        ledger = RolloutLedger.read(folder / name / "run" / LEDGER_FILE)
    except SpratError:
        return None
    try:
        steps, faults = [row.step for row in ledger.steps()], audit(ledger)
        return {"steps": steps, "next": ledger.next_group(0), "faults": faults, **ledger.counts()}
    except SpratError as error:
        return {"steps": [], "next": 0, "faults": [str(error)], "done": 0}
    finally:
        ledger.close()


def progress(folder: Path, name: str) -> tuple[int, int]:
    """Steps and groups that are done."""
    here = position(folder, name)
    return (0, 0) if here is None else (len(here["steps"]), here["done"])


def kill_at_random(
    folder: Path, name: str, changes: dict[str, Any], delay: float, kills: int, chance: random.Random
) -> dict[str, Any]:
    """Do a run, killed ``kills`` times; the kills by role, what was wrong after one, and how often it was started.

    Three of four kills come after something got done since the last one, at a random moment of the time that a step
    takes; one of four at once, while processes still start.
    """
    parent, starts, done, faults = start(folder, name, changes, delay), 1, Counter[str](), list[str]()
    deadline, before, step_seconds = time.monotonic() + LIMIT_SECONDS, (0, 0), 1.0
    while sum(done.values()) < kills and time.monotonic() < deadline:
        if chance.random() < 0.75:
            began = time.monotonic()
            while (now := progress(folder, name)) == before and parent.poll() is None:
                time.sleep(0.05)
            before, step_seconds = now, max(0.3, min(3.0, time.monotonic() - began))
        time.sleep(chance.uniform(0, step_seconds))
        role = chance.choice(ROLES)
        victims = processes(parent.pid)[role]
        if parent.poll() is not None:
            break  # it was done before it could be killed so often
        if not victims:
            continue
        with suppress(ProcessLookupError):
            os.kill(chance.choice(victims), signal.SIGKILL)
            done[role] += 1
        if role == "parent":
            parent.wait()
            here = position(folder, name)
            faults += [] if here is None else here["faults"]
            parent, starts = start(folder, name, changes, delay), starts + 1
    code = parent.wait(max(1.0, deadline - time.monotonic()))
    if code:
        faults.append((folder / f"{name}.log").read_text(errors="replace")[-2000:])
    return {"kills": dict(done), "starts": starts, "code": code, "faults": faults}


def lengths(folder: Path, name: str) -> list[int]:
    """Tokens of each answer of a run."""
    ledger = RolloutLedger.read(folder / name / "run" / LEDGER_FILE)
    try:
        return [len(one.token_ids) for row in ledger.steps()[1:] for one in ledger.rollouts(row.step)]
    finally:
        ledger.close()


def ks_p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """Of the two-sample Kolmogorov-Smirnov test, asymptotic (Stephens 1970); with ties it is conservative."""
    values = sorted({*a, *b})
    first, second = sorted(a), sorted(b)
    distance, i, j = 0.0, 0, 0
    for value in values:
        while i < len(first) and first[i] <= value:
            i += 1
        while j < len(second) and second[j] <= value:
            j += 1
        distance = max(distance, abs(i / len(first) - j / len(second)))
    root = math.sqrt(len(a) * len(b) / (len(a) + len(b)))
    scaled = (root + 0.12 + 0.11 / root) * distance
    if scaled < 0.2:
        return 1.0
    return min(1.0, 2 * sum((-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101)))


def record(folder: Path, name: str) -> dict[str, Any]:
    """What a finished run says of itself, and its log."""
    run = folder / name / "run"
    facts: dict[str, Any] = json.loads((run / "run.json").read_text())
    return {"artefact": facts["artefact_digest"], "flops": facts["flops"], "log": (run / "metrics.jsonl").read_text()}


def judge(folder: Path, name: str, reference: str, staleness: int, steps: int) -> dict[str, Any]:
    """What came of a run that was killed, against the bars."""
    here = position(folder, name)
    assert here is not None
    per_step = RolloutLedger.read(folder / name / "run" / LEDGER_FILE).prompts_per_step
    once = not here["faults"] and here["steps"] == list(range(steps + 1)) and here["done"] == here["groups"]
    exact = here["next"] == steps * per_step == here["groups"]
    found: dict[str, Any] = {"once": once, "position": exact, "asked_again": here["dispatches"] - here["groups"]}
    if staleness == 0:
        found["bits"] = record(folder, name) == record(folder, reference)
    else:
        again = replay(folder / name / "run", model=folder / "model")
        found["bits"] = again.is_same and len(again.steps) == steps
        ledger = RolloutLedger.read(folder / name / "run" / LEDGER_FILE)
        rows = [(row.step, one) for row in ledger.steps()[1:] for one in ledger.rollouts(row.step)]
        behind = [step - 1 - version for step, one in rows for version in one.versions]
        model, _ = load_dense(folder / name / "run")
        found["bits"] = found["bits"] and TrainedWeights(model).digest() == ledger.steps()[-1].weights
        found |= {"mean_staleness": sum(behind) / len(behind), "largest_staleness": max(behind)}
        found["bits"] = found["bits"] and max(behind) <= staleness
    found["p_value"] = ks_p_value(lengths(folder, name), lengths(folder, reference))
    return found


def measure(
    folder: Path, kills: int, seed: int, stalenesses: Sequence[int], steps: int, delay: float
) -> dict[str, Any]:
    """All runs and their verdicts."""
    subprocess.run([sys.executable, "-m", "bench.rl_tiny", "make", str(folder)], cwd=ROOT, check=True)
    changes: dict[str, Any] = {"steps": steps, "lr": 3e-4}
    assert start(folder, "undisturbed", changes, 0.0).wait(LIMIT_SECONDS) == 0, "the run that nobody kills failed"
    results: dict[str, Any] = {}
    for staleness in stalenesses:
        name, chance = f"staleness-{staleness}", random.Random(f"{seed}/{staleness}")
        began = time.monotonic()
        rollout = {"workers": WORKERS, "staleness": staleness, "batch": 1}
        killed = kill_at_random(folder, name, changes | {"rollout": rollout}, delay, kills, chance)
        results[name] = {**killed, "seconds": round(time.monotonic() - began)}
        if killed["code"] == 0:
            results[name] |= judge(folder, name, "undisturbed", staleness, steps)
    return results


def is_met(result: dict[str, Any], kills: int) -> bool:
    """Whether a run met all bars."""
    met = all(result.get(name) for name in ("once", "position", "bits")) and not result["faults"]
    return met and result["p_value"] > MIN_P and sum(result["kills"].values()) >= kills


def main() -> int:
    """Print a line for each run, bars and verdict; 1 where one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="synchronous and staleness 4, with 6 kills each")
    parser.add_argument("--kills", type=int, default=0, help="of each run: 20")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--steps", type=int, default=0, help="of each run: 60")
    parser.add_argument("--delay", type=float, default=0.01, help="seconds for a token of a group's longest answer")
    parser.add_argument("--only", type=int, action="append", help="staleness")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path)
    asked = parser.parse_args()
    kills, steps = asked.kills or (6 if asked.quick else 20), asked.steps or (20 if asked.quick else 60)
    stalenesses = asked.only or ((0, 4) if asked.quick else (0, 1, 4, 16))
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        results = measure(folder, kills, asked.seed, stalenesses, steps, asked.delay)
    met = {name: is_met(result, kills) for name, result in results.items()}
    for name, result in results.items() if not asked.json else ():
        verdict = "met" if met[name] else "MISSED"
        print(f"{name}: {verdict}; bar: once, exact position, same bits, p > {MIN_P}, {kills} kills; {result}")
    summary = (
        f"{sum(met.values())} of {len(met)} runs of {steps} steps met all bars, {WORKERS} workers, seed {asked.seed}"
    )
    print(json.dumps({"results": results, "met": met, "summary": summary}) if asked.json else summary)
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
