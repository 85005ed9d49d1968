"""Recompute what a run, or a whole road, claims of itself.

For each run: the digest of each file of the artefact (none missing, none added), of recipe and metrics,
of ``run.json`` against the ledger's entry; the recipe's digest from the recipe; energy and money from the
device-seconds; and each input from its producer as it lies there now. For the ledger: its chain, and
that no run that it names is missing. What is not checked: that the machine computed what the recipe says
(run it again: same seed, same digests), and inputs outside of the road folder.
"""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sprat.config import MoneyConfig
from sprat.errors import TrustError
from sprat.trust import digest, record
from sprat.trust.ledger import Ledger


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: ``ok``, the ``subject`` (a run or the ledger), and a sentence."""

    ok: bool
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.text}"


def verify(path: str | Path) -> list[Finding]:
    """Check the run folder or road folder at ``path``; any ``Finding`` that is not ``ok`` is a fault.

    Raises:
        TrustError: there is nothing there that could be verified.
    """
    path = Path(path)
    if (path / "run.json").is_file():
        return _run(path, None)
    ledger = path / "ledger.jsonl"
    runs = record.find(path) if path.is_dir() else []
    if not runs and not ledger.is_file():
        raise TrustError(
            "no run to verify here", where=str(path), todo="give a run folder or the folder that holds runs"
        )
    findings = [finding for run in runs for finding in _run(run, path)]
    return findings + _ledger(Ledger(ledger), runs)


def _ledger(ledger: Ledger, runs: list[Path]) -> list[Finding]:
    """The chain of the ledger, and its runs that are not there."""
    name = ledger.path.name
    faults = [Finding(False, name, fault) for fault in ledger.check()]
    here = {os.path.relpath(run.resolve(), ledger.path.parent.resolve()) for run in runs}
    for missing in sorted(set(record.last_entries(ledger.entries())) - here):
        faults.append(Finding(False, name, f"the finished run {missing!r} is not there"))
    return faults or [Finding(True, name, f"{len(ledger.entries())} entries, chain whole, no run missing")]


def _run(folder: Path, road: Path | None) -> list[Finding]:
    """All findings of one run; its own ledger's chain too when it is not verified as part of a ``road``."""
    subject = os.path.relpath(folder, road) if road else folder.resolve().name
    written = record.read_json(folder / "run.json")
    if written is None:
        return [Finding(False, subject, "run.json cannot be read")]
    try:
        faults = _outputs(folder, written) + _recipe(folder, written) + _cost(written)
        ledger = Ledger(folder / written["ledger"])
        faults += _inputs(ledger.path.parent, written) + _entry(folder, ledger, written)
        if road is None:
            faults += [f"ledger: {fault}" for fault in ledger.check()]
        outside = [name for name, item in written["inputs"].items() if "path" not in item]
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        return [Finding(False, subject, f"run.json is not what a run writes ({type(error).__name__}: {error})")]
    if faults:
        return [Finding(False, subject, fault) for fault in faults]
    told = f"; not here to check: input {', '.join(outside)}" if outside else ""
    files = len(written["outputs"])
    inputs = len(written["inputs"]) - len(outside)
    return [Finding(True, subject, f"{files} files, recipe, {inputs} inputs, cost and ledger entry agree{told}")]


def _outputs(folder: Path, written: dict[str, Any]) -> list[str]:
    """Faults of the artefact's files, the recipe file and the metrics."""
    faults = []
    try:
        found = digest.files(folder / "artefact")
    except TrustError as error:
        return [error.what]
    claimed: dict[str, str] = written["outputs"]
    for name in sorted(found.keys() | claimed.keys()):
        if name not in found:
            faults.append(f"artefact/{name} is missing")
        elif name not in claimed:
            faults.append(f"artefact/{name} was added after the run")
        elif found[name] != claimed[name]:
            faults.append(f"artefact/{name} was changed after the run")
    if digest.listing(claimed) != written["artefact_digest"]:
        faults.append("artefact_digest is not that of the outputs listed")
    for name in record.RECORDS:
        if not (folder / name).is_file():
            faults.append(f"{name} is missing")
        elif digest.file(folder / name) != written["records"].get(name):
            faults.append(f"{name} was changed after the run")
    return faults


def _recipe(folder: Path, written: dict[str, Any]) -> list[str]:
    """Faults between ``recipe.toml``, the recipe in ``run.json`` and its digest."""
    faults = []
    if digest.value(written["recipe"]) != written["recipe_digest"]:
        faults.append("recipe_digest is not that of the recipe")
    try:
        table = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [*faults, "recipe.toml cannot be read"]
    if table != _without_none(written["recipe"]):
        faults.append("recipe.toml is not the recipe in run.json")
    return faults


def _without_none(value: Any) -> Any:
    """``value`` as TOML can say it: keys whose value is None are left out."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _cost(written: dict[str, Any]) -> list[str]:
    """Faults of energy and money, which follow from the device-seconds."""
    money = MoneyConfig.model_validate(written["money"])
    seconds = written["device_seconds"]
    faults = []
    if type(written["nano_yuan"]) is not int or written["nano_yuan"] != record.price(seconds, money):
        faults.append("nano_yuan does not follow from device_seconds and the price of a core-hour")
    if written["energy_joules_estimated"] != record.energy(seconds, money):
        faults.append("energy_joules_estimated does not follow from device_seconds and the watts of a core")
    return faults


def _inputs(road: Path, written: dict[str, Any]) -> list[str]:
    """Faults of lineage: each input as it lies there now against its digest in ``run.json``."""
    faults = []
    for name, item in written["inputs"].items():
        if "path" not in item:
            continue
        try:
            found = record.describe(road / item["path"], road)
        except TrustError as error:
            faults.append(f"input {name!r} ({item['path']}): {error.what}")
            continue
        if found["digest"] != item["digest"]:
            faults.append(f"input {name!r}: {item['path']} now holds something else than this run read")
    return faults


def _entry(folder: Path, ledger: Ledger, written: dict[str, Any]) -> list[str]:
    """Faults between ``run.json`` and the ledger's last entry for the run."""
    body = record.entry_body(folder, ledger.path.parent, written)
    entry = record.last_entries(ledger.entries()).get(body["run"])
    if entry is None:
        return ["the ledger has no entry for this run"]
    if entry != body:
        names = [name for name in body if entry.get(name) != body[name]]
        return [f"run.json and the ledger's entry disagree on {', '.join(names)}"]
    return []
