"""Recompute what a run, or a whole road, claims of itself.

For each run: the digest of each file of the artefact (none missing, none added), of recipe and metrics,
of ``run.json`` against the ledger's entry; the recipe's digest from the recipe; energy and money from the
device-seconds; and each input from its producer as it lies there now, or from the settings recorded. For the
ledger, which is the road's by its place and by its root: its chain, and that no run that it names is missing. For the
road: recipe, corpus, report and set-aside runs as they were entered, and that nothing else lies there.

What is not checked: that the machine computed what the recipe says (run it again: same seed, same digests), inputs
outside of the road folder, and what only somebody can see who kept the ledger's head (SECURITY.md).
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sprat.config import MoneyConfig
from sprat.errors import TrustError
from sprat.trust import digest, record
from sprat.trust.history import History, inside
from sprat.trust.ledger import NAME, Ledger, above
from sprat.trust.place import Place, survey, written_partly

_OWN = {*record.RECORDS, "artefact", "run.json"}


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: ``ok``, the ``subject`` (a run, a file of the road or the ledger), and a sentence."""

    ok: bool
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.text}"


def verify(path: str | Path, *, expect_head: str = "") -> list[Finding]:
    """Check the run folder or road folder at ``path``; any ``Finding`` that is not ``ok`` is a fault.

    Args:
        expect_head: the head of the ledger (hex, 16 digits or more) as a witness kept it.

    Raises:
        TrustError: there is nothing there that could be verified, or ``expect_head`` is no head.
    """
    path, expect_head = Path(path), expect_head.lower()
    if expect_head and (len(expect_head) < 16 or not set(expect_head) <= set("0123456789abcdef")):
        raise TrustError("not the head of a ledger", where=expect_head, todo="give 16 or more of its hex digits")
    if (path / "run.json").is_file():
        ledger = above(path)
        if ledger is None:
            text = f"no {NAME} in a folder above; verify the run where it was made, or copy the whole road"
            return [Finding(False, path.resolve().name, text)]
        entries = ledger.entries()
        history = History.of(entries)
        faults = ledger.check() + history.faults + _witness(entries, expect_head)
        return _run(path, ledger.path.parent, history) + [Finding(False, NAME, fault) for fault in faults]
    ledger = Ledger(path / NAME)
    if not ledger.path.is_file() and not (path.is_dir() and record.find(path)):
        raise TrustError(
            "no run to verify here", where=str(path), todo="give a run folder or the folder that holds runs"
        )
    return _road(path, ledger, expect_head)


def _road(road: Path, ledger: Ledger, expect_head: str) -> list[Finding]:
    """All findings of a road."""
    faults = ledger.check() + (["it is a link"] if ledger.path.is_symlink() else [])
    entries = ledger.entries() if ledger.path.is_file() else []
    history = History.of(entries)
    here = survey(road, history)
    faults += history.faults + _witness(entries, expect_head)
    names = {record.name_of(run, road) for run in here.runs}
    faults += [f"the finished run {name!r} is not there" for name in sorted(history.runs.keys() - names)]
    faults += [f"the finished run {name!r} was deleted and not made again" for name in history.missing()]
    findings = [finding for run in here.runs for finding in _run(run, road, history)]
    findings += [Finding(False, subject, text) for subject, text in here.faults]
    findings += [Finding(False, NAME, fault) for fault in faults]
    return findings if faults else [*findings, Finding(True, NAME, _told(entries, history, here))]


def _told(entries: list[dict[str, Any]], history: History, here: Place) -> str:
    """What a sound ledger says in short, and what of the road it does not prove."""
    head = entries[-1]["hash"] if entries else "none"
    parts = [f"{len(entries)} entries, head {head}, chain whole, no run missing"]
    if history.old:
        parts.append("made before ledgers had a root: it binds runs, not recipe, corpus and report; make the road anew")
    for what, names in (
        ("set aside", here.aside),
        ("deleted and made again", sorted(history.again)),
        ("not finished", here.unfinished),
        ("not proved", sorted(here.unproved)),
    ):
        if names:
            parts.append(f"{what}: {', '.join(names)}")
    return "; ".join(parts)


def _witness(entries: list[dict[str, Any]], head: str) -> list[str]:
    """The fault where the ledger's head is not the one that somebody kept."""
    hashes = [str(entry["hash"]) for entry in entries]
    if not head or (hashes and hashes[-1].startswith(head)):
        return []
    place = next((number for number, known in enumerate(hashes) if known.startswith(head)), None)
    if place is None:
        return ["the expected head is not in it: entries were cut off or written anew since it was kept"]
    return [f"the expected head is entry {place}; {len(hashes) - 1 - place} were added since it was kept"]


def _run(folder: Path, road: Path, history: History) -> list[Finding]:
    """All findings of one run."""
    subject = record.name_of(folder, road)
    written = record.read_json(folder / "run.json")
    if written is None:
        return [Finding(False, subject, "run.json cannot be read")]
    try:
        faults = _extra(folder, subject, history) + _outputs(folder, written) + _recipe(folder, written)
        inputs = {name: _input(road, name, item, history) for name, item in written["inputs"].items()}
        faults += _cost(written) + [*filter(None, inputs.values())] + _entry(folder, road, written, history)
    except (KeyError, TypeError, ValueError, AttributeError, OSError, OverflowError, RecursionError) as error:
        return [Finding(False, subject, f"run.json is not what a run writes ({type(error).__name__}: {error})")]
    if faults:
        return [Finding(False, subject, fault) for fault in faults]
    unchecked = [name for name, fault in inputs.items() if fault is None]
    told = f"; not here to check: input {', '.join(unchecked)}" if unchecked else ""
    files, checked = len(written["outputs"]), len(inputs) - len(unchecked)
    return [Finding(True, subject, f"{files} files, recipe, {checked} inputs, cost and ledger entry agree{told}")]


def _extra(folder: Path, name: str, history: History) -> list[str]:
    """What lies in the run's folder and is not the run's: a report, if the ledger knows it, and nothing else."""
    faults = []
    for path in sorted(folder.iterdir()):
        known = history.files.get(f"{name}/{path.name}")
        if path.is_symlink():
            faults.append(f"{path.name} is a link")
        elif known is not None:
            faults += [] if digest.content(path) == known else [f"{path.name} was changed after it was entered"]
        elif path.name not in _OWN and not (history.old and written_partly(path.name)):
            faults.append(f"{path.name} was added after the run")
    bound = [path for path in history.files if path.startswith(f"{name}/")]
    return faults + [f"{path} is not there" for path in bound if not (folder / path[len(name) + 1 :]).exists()]


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


def _input(road: Path, name: str, item: dict[str, Any], history: History) -> str | None:
    """The fault of the input ``name`` as it is now against its digest in ``run.json``; None: not here to check.

    A checkpoint in a run's folder goes with it when that is set aside; one of an open run may be gone.
    """
    if "settings" in item:
        return "" if digest.value(item["settings"]) == item["digest"] else f"input {name!r}: not the settings recorded"
    if "path" not in item:
        return None
    path, fault = inside(item["path"]), ""
    moved = [
        f"{aside}/{path.removeprefix(body['run'] + '/')}"
        for aside, body in history.aside.items()
        if path.startswith(body["run"] + "/")
    ]
    for place in (path, *moved):
        try:
            if record.describe(road / place, road)["digest"] == item["digest"]:
                return ""
            fault = fault or f"input {name!r}: {path} now holds something else than this run read"
        except TrustError as error:
            fault = fault or f"input {name!r} ({path}): {error.what}"
    return None if "/checkpoints/" in path else fault


def _entry(folder: Path, road: Path, written: dict[str, Any], history: History) -> list[str]:
    """Faults between ``run.json`` and the road's ledger: its root, and its last entry for the run."""
    body = record.entry_body(folder, road, written)
    entry = history.runs.get(body["run"])
    faults = []
    if written.get("ledger_root") != history.root and not (history.old and "ledger_root" not in written):
        faults.append("it was made under another ledger than that of this road")
    if entry is None:
        faults.append("the ledger has no entry for this run")
    elif entry != body:
        names = [name for name in body if entry.get(name) != body[name]] or ["more than a road writes"]
        faults.append(f"run.json and the ledger's entry disagree on {', '.join(names)}")
    return faults
