# size: to open, keep and finish a run is one noun
"""A stage of the pipeline as a folder that proves itself.

    pipeline/
      ledger.jsonl            a root, and one entry per finished run, chained by hash
      pretrain/
        recipe.toml           the recipe as resolved
        metrics.jsonl         one row per logged step
        artefact/             what later stages read; its digest is the run's name
        run.json              inputs, outputs, seeds, cost, facts; written last, atomically
        checkpoints/ open.json spent.json facts.json      only while the run is not finished

What a run is, is decided by its stage, recipe, seed and the digests of its inputs. ``open_run`` with
the same four finds the run again: finished and intact (``done``), or interrupted (go on from
``checkpoints``). With any other four the ledger is told and the old folder renamed ``….old-N``:
results of two recipes never mix. ``artefact_digest`` covers only the files of the artefact, so an
interrupted run and an uninterrupted one, or two runs of one seed, agree on it; times and cost are in
``run.json`` and in the ledger's digest of it.

Cost: device-seconds are CPU seconds of this process and its finished children between ``open_run`` and
``finish``, with those of earlier, interrupted sessions (``spent.json``, written at each ``log``). Energy
is that times the watts that the user stated, so it is an estimate and named one. Money is integer
nano-yuan at the user's stated price.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sprat.config import Config, MoneyConfig
from sprat.errors import ConfigError, TrustError
from sprat.files import atomic, digest
from sprat.files.json import read_json, to_json_value, write_json
from sprat.trust import run_record
from sprat.trust.ledger import KIND_RUN, KIND_SET_ASIDE, LEDGER_NAME, Ledger, utc_now

_OPEN_FILES = ("open.json", "spent.json", "facts.json")
_RUN_FILES = {*run_record.RECORD_FILES, *_OPEN_FILES, "artefact", "checkpoints", "run.json", "report.html"}


class Run:
    """One run; made by ``open_run``.

    Attributes:
        folder: the run's folder; ``artifact`` and ``checkpoints`` are folders in it.
        stage, seed: as given to ``open_run``.
        done: finished earlier with the same recipe and inputs, outputs intact; nothing is left to do.
        set_aside: where the run of another recipe that lay in this folder is now; None where there was none.
        facts: what ``add_facts`` was given, also of a finished run.
        record: the content of ``run.json`` (empty until finished).
        on_log: each is told every row of ``metrics.jsonl``, step and row, after it was written.
        other_cpu_seconds: CPU seconds that others have worked for it, beside this process and its finished children.
    """

    def __init__(self, folder: Path, ledger: Ledger, identity: dict[str, Any], recipe: Config, money: MoneyConfig):
        self.folder, self.ledger, self.recipe, self.money = folder, ledger, recipe, money
        self.artifact, self.checkpoints = folder / "artefact", folder / "checkpoints"
        self.stage: str = identity["stage"]
        self.seed: int = identity["seed"]
        self.identity = identity
        self.record: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.done = False
        self.set_aside: Path | None = None
        self.on_log: list[Callable[[int, Mapping[str, Any]], None]] = []
        self.other_cpu_seconds: Callable[[], float] = lambda: 0.0
        self._spent = {"device_seconds": 0.0, "wall_seconds": 0.0}
        self._started, self._step, self._steps = utc_now(), 0, 0
        self._cpu, self._wall = _cpu_seconds(), time.monotonic()

    def start_progress(self, steps: int, done: int = 0) -> None:
        """Note how many steps there will be and how many were done before, for ``run_record.read_progress``."""
        self._step, self._steps = done, steps
        self.write_progress()

    def log(self, step: int, **metrics: float | int | str | None) -> None:
        """Append a row to ``metrics.jsonl``; a number that is not finite is written as null."""
        self._check_open()
        row = {"step": int(step), **{name: to_json_value(value) for name, value in metrics.items()}}
        atomic.append_line(self.folder / "metrics.jsonl", json.dumps(row, allow_nan=False), durable=False)
        self._step = int(step)
        self.write_progress()
        for listener in self.on_log:
            listener(int(step), row)

    def write_progress(self) -> None:
        """Note what was spent and reached so far: a kill does not make it free, and others can watch."""
        state = {**self._cost(), "step": self._step, "steps": self._steps}
        seconds = float(state["device_seconds"])
        state |= {"energy_joules_estimated": run_record.energy_joules(seconds, self.money)}
        state |= {"nano_yuan": run_record.price_nano_yuan(seconds, self.money)}
        write_json(self.folder / "spent.json", state, durable=False)

    @property
    def cpu_seconds(self) -> float:
        """What the run has cost so far, interrupted sessions included."""
        return float(self._cost()["device_seconds"])

    def truncate_metrics(self, step: int) -> None:
        """Drop the metric rows of later steps than ``step`` (on resume from a checkpoint at ``step``)."""
        self._check_open()
        rows = [row for row in run_record.read_metrics(self.folder) if row["step"] <= step]
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        atomic.write_text(self.folder / "metrics.jsonl", text)

    def add_facts(self, **facts: Any) -> None:
        """Add facts (JSON values, tuples, NumPy and torch scalars) for ``run.json``; kept over an interruption."""
        self._check_open()
        self.facts.update({name: to_json_value(value) for name, value in facts.items()})
        write_json(self.folder / "facts.json", self.facts, durable=False)

    def finish(self, *, flops: float = 0, tokens: int = 0) -> None:
        """Digest the artefact, write ``run.json``, tell the ledger, and remove the checkpoints.

        Killed anywhere in here, the next ``open_run`` either finds the run interrupted or completes this.

        Args:
            flops: floating point operations of the whole run.
            tokens: tokens trained on or generated.
        """
        self._check_open()
        outputs = digest.of_files(self.artifact)
        spent = self._cost()
        device_seconds = round(spent["device_seconds"], 3)
        self.record = {
            **self.identity,
            "recipe": self.recipe.model_dump(mode="json"),
            "records": {name: digest.of_file(self.folder / name) for name in run_record.RECORD_FILES},
            "outputs": outputs,
            "artefact_digest": digest.of_listing(outputs),
            "ledger_root": self.ledger.root_hash(),
            "versions": run_record.versions(),
            "flops": float(flops),
            "tokens": int(tokens),
            "device_seconds": device_seconds,
            "wall_seconds": round(spent["wall_seconds"], 3),
            "money": self.money.model_dump(mode="json"),
            "energy_joules_estimated": run_record.energy_joules(device_seconds, self.money),
            "nano_yuan": run_record.price_nano_yuan(device_seconds, self.money),
            "facts": self.facts,
            "started": spent["started"],
            "finished": utc_now(),
        }
        write_json(self.folder / "run.json", self.record)
        self._finalize()

    def _finalize(self) -> None:
        """After ``run.json`` stands: the ledger's entry (once) and the end of what only an open run needs."""
        body = run_record.ledger_entry(self.folder, self.ledger.path.parent, self.record)
        if _finished_entry(self.ledger, body["run"]) is None:
            self.ledger.append(KIND_RUN, body)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        for temporary in self.folder.glob(".*.tmp-*"):  # a write that an earlier session did not end
            temporary.unlink(missing_ok=True)
        for name in reversed(_OPEN_FILES):
            (self.folder / name).unlink(missing_ok=True)
        self.done = True

    def _cost(self) -> dict[str, Any]:
        return {
            "device_seconds": self._spent["device_seconds"] + _cpu_seconds() - self._cpu + self.other_cpu_seconds(),
            "wall_seconds": self._spent["wall_seconds"] + time.monotonic() - self._wall,
            "started": self._started,
        }

    def _open_folder(self) -> None:
        """Open or reopen the folder of a run that is not finished."""
        self.ledger.root_hash()
        name = run_record.run_name(self.folder, self.ledger.path.parent)
        if _finished_entry(self.ledger, name) is not None:  # its folder was deleted by hand
            self.ledger.append(KIND_SET_ASIDE, {"run": name, "to": None, "digest": None})
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "open.json", self.identity)
        atomic.write_text(self.folder / "recipe.toml", self.recipe.to_toml())
        # What an interrupted stage had begun to write is not trusted; its checkpoints are (they are atomic).
        shutil.rmtree(self.artifact, ignore_errors=True)
        self.artifact.mkdir()
        self.checkpoints.mkdir(exist_ok=True)
        spent = read_json(self.folder / "spent.json") or {}
        self._started = str(spent.get("started") or self._started)
        self._spent = {name: float(spent.get(name, 0.0)) for name in self._spent}
        if any(self.checkpoints.iterdir()):
            self.facts = read_json(self.folder / "facts.json") or {}
            self.truncate_metrics(sys.maxsize)
        else:
            self.truncate_metrics(-1)
        self.write_progress()

    def _check_open(self) -> None:
        if self.done:
            raise TrustError("this run is finished and cannot change", where=str(self.folder), todo="open another run")


def open_run(
    folder: str | Path,
    *,
    stage: str,
    recipe: Config,
    inputs: Mapping[str, run_record.Input],
    seed: int,
    ledger: str | Path,
    money: MoneyConfig | None = None,
    prepare: Callable[[bool], object] | None = None,
) -> Run:
    """Open the run in ``folder``: done already, to go on with, or fresh (see the module's text).

    ``artifact`` is empty when the run is not done; ``checkpoints`` holds what an earlier session left. With no
    checkpoint the metrics and facts of that session are dropped.

    Args:
        inputs: by name a run folder, another folder, a file, settings, or a bare SHA-256 in hex.
        ledger: the ledger's file: ``ledger.jsonl`` of the pipeline folder, which is above the run's. Paths are written
            as relative to it.
        money: the price of a core-hour; defaults to ``MoneyConfig()``.
        prepare: reads and checks all that the work needs, before anything is touched, where there is work to do; its
            argument is whether an interrupted session left checkpoints to go on from.

    Raises:
        TrustError: an input is missing or was altered since it was made, or the folder holds something else.
        ConfigError: an input is the run's own folder, or one around it.
        MachineError: the disk is full or closed to us.
    """
    folder, run_ledger = Path(folder), Ledger(ledger)
    if run_ledger.path.resolve().parent == folder.resolve():
        raise TrustError("a ledger cannot lie in a run", where=str(run_ledger.path), todo="put it in the folder above")
    _check_apart(folder, inputs)
    pipeline_folder = run_ledger.path.parent
    if run_ledger.path.name != LEDGER_NAME or not folder.resolve().is_relative_to(pipeline_folder.resolve()):
        what = f"a run's ledger is the {LEDGER_NAME} of a folder above it"  # where verify looks for it
        raise TrustError(what, where=str(run_ledger.path), todo=f"give {folder.parent / LEDGER_NAME}")
    described = {name: run_record.describe_input(path, pipeline_folder) for name, path in sorted(inputs.items())}
    identity = {"stage": stage, "recipe_digest": recipe.digest(), "inputs": described, "seed": int(seed)}
    run = Run(folder, run_ledger, identity, recipe, money or MoneyConfig())
    is_other_run = False
    if folder.exists():
        _check_folder(folder)
        record = read_json(folder / "run.json")
        if record is not None and _same_identity(record, identity) and _is_intact(folder, record, run_ledger):
            run.record, run.facts = record, record["facts"]
            run._finalize()
            return run
        is_other_run = (folder / "run.json").exists()
        is_other_run = is_other_run or not _same_identity(read_json(folder / "open.json") or identity, identity)
    if prepare is not None:
        prepare(not is_other_run and run.checkpoints.is_dir() and any(run.checkpoints.iterdir()))
    if is_other_run:
        run.set_aside = _set_aside(folder, run_ledger)
    run._open_folder()
    return run


def _check_apart(folder: Path, inputs: Mapping[str, run_record.Input]) -> None:
    """Refuse inputs that the run itself would change: it could neither go on nor be found done."""
    place = folder.resolve()
    for name, path in inputs.items():
        if isinstance(path, Path) and place.is_relative_to(path.resolve()):
            is_own = place == path.resolve()
            what = "a run cannot start from itself" if is_own else f"{name} is a folder in which the run would lie"
            raise ConfigError(what, where=str(path), todo="give another --out")


def _same_identity(record: dict[str, Any], identity: dict[str, Any]) -> bool:
    """Whether what is written is of this stage, recipe, seed and these inputs (by digest, wherever they lie)."""

    def key(of: dict[str, Any]) -> list[Any]:
        inputs = {name: item["digest"] for name, item in of.get("inputs", {}).items()}
        return [of.get("stage"), of.get("recipe_digest"), of.get("seed"), inputs]

    return key(record) == key(identity)


def _is_intact(folder: Path, record: dict[str, Any], ledger: Ledger) -> bool:
    """Whether files, ``run.json`` and ledger agree; the ledger may lack the entry only if we died before it."""
    try:
        if {name: digest.of_file(folder / name) for name in run_record.RECORD_FILES} != record["records"]:
            return False
        if digest.of_files(folder / "artefact") != record["outputs"]:
            return False
        body = run_record.ledger_entry(folder, ledger.path.parent, record)
        entry = _finished_entry(ledger, body["run"])
        same_ledger = record.get("ledger_root") in (None, ledger.root_hash())
        return same_ledger and (entry == body or (entry is None and (folder / "open.json").exists()))
    except (TrustError, KeyError):
        return False


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise TrustError("the run's folder is a file", where=str(folder), todo="give another folder")
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if names and not names & {"run.json", "open.json"} and names - _RUN_FILES:
        raise TrustError("the folder holds something else than a run", where=str(folder), todo="give an empty folder")


def _finished_entry(ledger: Ledger, name: str) -> dict[str, Any] | None:
    """What the ledger says of the finished run ``name``; None where it knows none, or only one that was set aside."""
    last = ledger.last_entry("run", name)
    body: dict[str, Any] | None = last["body"] if last and last["kind"] == KIND_RUN else None
    return body


def _set_aside(folder: Path, ledger: Ledger) -> Path:
    """Tell the ledger and rename ``folder`` to the first free ``….old-N``, its place from now on."""
    name, folder_digest = run_record.run_name(folder, ledger.path.parent), run_record.run_folder_digest(folder)
    last = ledger.last_entry("run", name)
    if last and last["kind"] == KIND_SET_ASIDE and last["body"]["to"] and last["body"].get("digest") == folder_digest:
        target = Path(ledger.path.parent, str(last["body"]["to"]))  # the ledger was told, and then we died
        if not target.exists():
            os.replace(folder, target)
            return target
    for number in itertools.count(1):
        target = folder.with_name(f"{folder.name}.old-{number}")
        to = run_record.run_name(target, ledger.path.parent)
        if not target.exists() and not ledger.last_entry("to", to):
            break
    # In this order: a run that is renamed and not entered would be missed for ever.
    ledger.append(KIND_SET_ASIDE, {"run": name, "to": to, "digest": folder_digest})
    os.replace(folder, target)
    return target


def _cpu_seconds() -> float:
    """CPU seconds, user and system, of this process and its finished children."""
    used = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
