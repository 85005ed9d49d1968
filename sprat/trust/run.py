# size: to open, keep and finish a run is one noun
"""A stage of the road as a folder that proves itself.

    road/
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
from sprat.errors import TrustError
from sprat.trust import atomic, digest, record
from sprat.trust.ledger import NAME, RUN, SET_ASIDE, Ledger, now

_WORKING = ("open.json", "spent.json", "facts.json")
_OWN = {*record.RECORDS, *_WORKING, "artefact", "checkpoints", "run.json", "report.html"}


class Run:
    """One run; made by ``open_run``.

    Attributes:
        folder: the run's folder; ``artefact`` and ``checkpoints`` are folders in it.
        stage, seed: as given to ``open_run``.
        done: finished earlier with the same recipe and inputs, outputs intact; nothing is left to do.
        set_aside: where the run of another recipe that lay in this folder is now; None where there was none.
        facts: what ``note`` was told, also of a finished run.
        record: the content of ``run.json`` (empty until finished).
    """

    def __init__(self, folder: Path, ledger: Ledger, identity: dict[str, Any], recipe: Config, money: MoneyConfig):
        self.folder, self.ledger, self.recipe, self.money = folder, ledger, recipe, money
        self.artefact, self.checkpoints = folder / "artefact", folder / "checkpoints"
        self.stage: str = identity["stage"]
        self.seed: int = identity["seed"]
        self.identity = identity
        self.record: dict[str, Any] = {}
        self.facts: dict[str, Any] = {}
        self.done = False
        self.set_aside: Path | None = None
        self._spent = {"device_seconds": 0.0, "wall_seconds": 0.0}
        self._started, self._step, self._steps = now(), 0, 0
        self._cpu, self._wall = _cpu_seconds(), time.monotonic()

    def expect(self, steps: int, done: int = 0) -> None:
        """Tell those who watch (``record.pulse``) how many steps there will be, and how many were done before."""
        self._step, self._steps = done, steps
        self.heartbeat()

    def log(self, step: int, **metrics: float | int | str | None) -> None:
        """Append a row to ``metrics.jsonl``; a number that is not finite is written as null."""
        self._must_be_open()
        row = {"step": int(step), **{name: record.plain(value) for name, value in metrics.items()}}
        atomic.append_line(self.folder / "metrics.jsonl", json.dumps(row, allow_nan=False), durable=False)
        self._step = int(step)
        self.heartbeat()

    def heartbeat(self) -> None:
        """Note what was spent and reached so far: a kill does not make it free, and others can watch."""
        state = {**self._cost(), "step": self._step, "steps": self._steps}
        atomic.write_json(self.folder / "spent.json", state, durable=False)

    @property
    def cpu_seconds(self) -> float:
        """What the run has cost so far, interrupted sessions included."""
        return float(self._cost()["device_seconds"])

    def rewind(self, step: int) -> None:
        """Drop the metric rows of later steps than ``step`` (on resume from a checkpoint at ``step``)."""
        self._must_be_open()
        kept = [row for row in record.metrics(self.folder) if row["step"] <= step]
        text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept)
        atomic.write_text(self.folder / "metrics.jsonl", text)

    def note(self, **facts: Any) -> None:
        """Add facts (JSON values, tuples, NumPy and torch scalars) for ``run.json``; kept over an interruption."""
        self._must_be_open()
        self.facts.update({name: record.plain(value) for name, value in facts.items()})
        atomic.write_json(self.folder / "facts.json", self.facts, durable=False)

    def finish(self, *, flops: float = 0, tokens: int = 0) -> None:
        """Digest the artefact, write ``run.json``, tell the ledger, and remove the checkpoints.

        Killed anywhere in here, the next ``open_run`` either finds the run interrupted or completes this.

        Args:
            flops: floating point operations of the whole run.
            tokens: tokens trained on or generated.
        """
        self._must_be_open()
        outputs = digest.files(self.artefact)
        spent = self._cost()
        device_seconds = round(spent["device_seconds"], 3)
        self.record = {
            **self.identity,
            "recipe": self.recipe.model_dump(mode="json"),
            "records": {name: digest.file(self.folder / name) for name in record.RECORDS},
            "outputs": outputs,
            "artefact_digest": digest.listing(outputs),
            "ledger_root": self.ledger.root(),
            "versions": record.versions(),
            "flops": float(flops),
            "tokens": int(tokens),
            "device_seconds": device_seconds,
            "wall_seconds": round(spent["wall_seconds"], 3),
            "money": self.money.model_dump(mode="json"),
            "energy_joules_estimated": record.energy(device_seconds, self.money),
            "nano_yuan": record.price(device_seconds, self.money),
            "facts": self.facts,
            "started": spent["started"],
            "finished": now(),
        }
        atomic.write_json(self.folder / "run.json", self.record)
        self._settle()

    def _settle(self) -> None:
        """After ``run.json`` stands: the ledger's entry (once) and the end of what only an open run needs."""
        body = record.entry_body(self.folder, self.ledger.path.parent, self.record)
        if _entered(self.ledger, body["run"]) is None:
            self.ledger.append(RUN, body)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        for cut_off in self.folder.glob(".*.tmp-*"):  # a write that an earlier session did not end
            cut_off.unlink(missing_ok=True)
        for name in reversed(_WORKING):
            (self.folder / name).unlink(missing_ok=True)
        self.done = True

    def _cost(self) -> dict[str, Any]:
        return {
            "device_seconds": self._spent["device_seconds"] + _cpu_seconds() - self._cpu,
            "wall_seconds": self._spent["wall_seconds"] + time.monotonic() - self._wall,
            "started": self._started,
        }

    def _begin(self) -> None:
        """Open or reopen the folder of a run that is not finished."""
        self.ledger.root()
        name = record.name_of(self.folder, self.ledger.path.parent)
        if _entered(self.ledger, name) is not None:  # its folder was deleted by hand
            self.ledger.append(SET_ASIDE, {"run": name, "to": None, "digest": None})
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic.write_json(self.folder / "open.json", self.identity)
        atomic.write_text(self.folder / "recipe.toml", self.recipe.to_toml())
        # What an interrupted stage had begun to write is not trusted; its checkpoints are (they are atomic).
        shutil.rmtree(self.artefact, ignore_errors=True)
        self.artefact.mkdir()
        self.checkpoints.mkdir(exist_ok=True)
        spent = record.read_json(self.folder / "spent.json") or {}
        self._started = str(spent.get("started") or self._started)
        self._spent = {name: float(spent.get(name, 0.0)) for name in self._spent}
        if any(self.checkpoints.iterdir()):
            self.facts = record.read_json(self.folder / "facts.json") or {}
            self.rewind(sys.maxsize)
        else:
            self.rewind(-1)
        self.heartbeat()

    def _must_be_open(self) -> None:
        if self.done:
            raise TrustError("this run is finished and cannot change", where=str(self.folder), todo="open another run")


def open_run(
    folder: str | Path,
    *,
    stage: str,
    recipe: Config,
    inputs: Mapping[str, record.Input],
    seed: int,
    ledger: str | Path,
    money: MoneyConfig | None = None,
    prepare: Callable[[bool], object] | None = None,
) -> Run:
    """Open the run in ``folder``: done already, to go on with, or fresh (see the module's text).

    ``artefact`` is empty when the run is not done; ``checkpoints`` holds what an earlier session left. With no
    checkpoint the metrics and facts of that session are dropped.

    Args:
        inputs: by name a run folder, another folder, a file, settings, or a bare SHA-256 in hex.
        ledger: the ledger's file: ``ledger.jsonl`` of the road folder, which is above the run's. Paths are written
            as relative to it.
        money: the price of a core-hour; defaults to ``MoneyConfig()``.
        prepare: reads and checks all that the work needs, before anything is touched, where there is work to do; its
            argument is whether an interrupted session left checkpoints to go on from.

    Raises:
        TrustError: an input is missing or was altered since it was made, or the folder holds something else.
        MachineError: the disk is full or closed to us.
    """
    folder, book = Path(folder), Ledger(ledger)
    if book.path.resolve().parent == folder.resolve():
        raise TrustError("a ledger cannot lie in a run", where=str(book.path), todo="put it in the folder above")
    road = book.path.parent
    if book.path.name != NAME or not folder.resolve().is_relative_to(road.resolve()):
        what = f"a run's ledger is the {NAME} of a folder above it"  # where verify looks for it
        raise TrustError(what, where=str(book.path), todo=f"give {folder.parent / NAME}")
    identity = {
        "stage": stage,
        "recipe_digest": recipe.digest(),
        "inputs": {name: record.describe(path, road) for name, path in sorted(inputs.items())},
        "seed": int(seed),
    }
    run = Run(folder, book, identity, recipe, money or MoneyConfig())
    other = False
    if folder.exists():
        _check_ours(folder)
        written = record.read_json(folder / "run.json")
        if written is not None and _same(written, identity) and _intact(folder, written, book):
            run.record, run.facts = written, written["facts"]
            run._settle()
            return run
        other = (folder / "run.json").exists()
        other = other or not _same(record.read_json(folder / "open.json") or identity, identity)
    if prepare is not None:
        prepare(not other and run.checkpoints.is_dir() and any(run.checkpoints.iterdir()))
    if other:
        run.set_aside = _set_aside(folder, book)
    run._begin()
    return run


def _same(written: dict[str, Any], identity: dict[str, Any]) -> bool:
    """Whether what is written is of this stage, recipe, seed and these inputs (by digest, wherever they lie)."""

    def key(of: dict[str, Any]) -> list[Any]:
        inputs = {name: item["digest"] for name, item in of.get("inputs", {}).items()}
        return [of.get("stage"), of.get("recipe_digest"), of.get("seed"), inputs]

    return key(written) == key(identity)


def _intact(folder: Path, written: dict[str, Any], ledger: Ledger) -> bool:
    """Whether files, ``run.json`` and ledger agree; the ledger may lack the entry only if we died before it."""
    try:
        if {name: digest.file(folder / name) for name in record.RECORDS} != written["records"]:
            return False
        if digest.files(folder / "artefact") != written["outputs"]:
            return False
        body = record.entry_body(folder, ledger.path.parent, written)
        entry = _entered(ledger, body["run"])
        bound = written.get("ledger_root") in (None, ledger.root())
        return bound and (entry == body or (entry is None and (folder / "open.json").exists()))
    except (TrustError, KeyError):
        return False


def _check_ours(folder: Path) -> None:
    if not folder.is_dir():
        raise TrustError("the run's folder is a file", where=str(folder), todo="give another folder")
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if names and not names & {"run.json", "open.json"} and names - _OWN:
        raise TrustError("the folder holds something else than a run", where=str(folder), todo="give an empty folder")


def _entered(ledger: Ledger, name: str) -> dict[str, Any] | None:
    """What the ledger says of the finished run ``name``; None where it knows none, or only one that was set aside."""
    last = ledger.latest("run", name)
    body: dict[str, Any] | None = last["body"] if last and last["kind"] == RUN else None
    return body


def _set_aside(folder: Path, ledger: Ledger) -> Path:
    """Tell the ledger and rename ``folder`` to the first free ``….old-N``, its place from now on."""
    name, content = record.name_of(folder, ledger.path.parent), record.content_of(folder)
    last = ledger.latest("run", name)
    if last and last["kind"] == SET_ASIDE and last["body"]["to"] and last["body"].get("digest") == content:
        target = Path(ledger.path.parent, str(last["body"]["to"]))  # the ledger was told, and then we died
        if not target.exists():
            os.replace(folder, target)
            return target
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists() or ledger.latest(
        "to", record.name_of(target, ledger.path.parent)
    ):
        number += 1
    to = record.name_of(target, ledger.path.parent)
    # In this order: a run that is renamed and not entered would be missed for ever.
    ledger.append(SET_ASIDE, {"run": name, "to": to, "digest": content})
    os.replace(folder, target)
    return target


def _cpu_seconds() -> float:
    """CPU seconds, user and system, of this process and its finished children."""
    used = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
