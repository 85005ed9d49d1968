"""Recompute what a run, or a whole pipeline, claims of itself.

For each run: the digest of each file of the artefact (none missing, none added), of recipe and metrics,
of ``run.json`` against the ledger's entry; the recipe's digest from the recipe; energy and money from the
device-seconds; and each input from its producer as it lies there now, or from the settings recorded. For the
ledger, which is the pipeline's by its place and by its root: its chain, and that no run that it names is missing. For
the pipeline: recipe, corpus, report and set-aside runs as they were entered, and that nothing else lies there.

What is not checked: that the machine computed what the recipe says (run it again: same seed, same digests), inputs
outside of the pipeline folder, and what only somebody can see who kept the ledger's head (SECURITY.md).
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sprat.config import MoneyConfig
from sprat.errors import TrustError
from sprat.files import digest
from sprat.files.atomic import is_temporary
from sprat.files.json import read_json
from sprat.trust import run_record
from sprat.trust.folder_contents import FolderContents, scan_folder
from sprat.trust.ledger import LEDGER_NAME, Ledger, find_ledger_above
from sprat.trust.ledger_state import LedgerState, check_relative_path

_RUN_FILES = {*run_record.RECORD_FILES, "artefact", "run.json"}


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: ``ok``, the ``subject`` (a run, a file or the ledger), and a sentence."""

    ok: bool
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.text}"


def verify(path: str | Path, *, expect_head: str = "") -> list[Finding]:
    """Check the run folder or pipeline folder at ``path``; any ``Finding`` that is not ``ok`` is a fault.

    Args:
        expect_head: the head of the ledger (hex, 16 digits or more) as a witness kept it.

    Raises:
        TrustError: there is nothing there that could be verified, or ``expect_head`` is no head.
    """
    path, expect_head = Path(path), expect_head.lower()
    if expect_head and (len(expect_head) < 16 or not set(expect_head) <= set("0123456789abcdef")):
        raise TrustError("not the head of a ledger", where=expect_head, todo="give 16 or more of its hex digits")
    if (path / "run.json").is_file():
        ledger = find_ledger_above(path)
        if ledger is None:
            text = f"no {LEDGER_NAME} in a folder above; verify the run where it was made, or copy the whole road"
            return [Finding(False, path.resolve().name, text)]
        entries = ledger.entries()
        state = LedgerState.from_entries(entries)
        errors = ledger.find_errors() + state.errors + _head_errors(entries, expect_head)
        return _verify_run(path, ledger.path.parent, state) + [Finding(False, LEDGER_NAME, error) for error in errors]
    ledger = Ledger(path / LEDGER_NAME)
    if not ledger.path.is_file() and not (path.is_dir() and run_record.find_runs(path)):
        todo = "give a run folder or the folder that holds runs"
        raise TrustError("no run to verify here", where=str(path), todo=todo)
    return _verify_pipeline(path, ledger, expect_head)


def _verify_pipeline(pipeline_folder: Path, ledger: Ledger, expect_head: str) -> list[Finding]:
    """All findings of a pipeline."""
    errors = ledger.find_errors() + (["it is a link"] if ledger.path.is_symlink() else [])
    entries = ledger.entries() if ledger.path.is_file() else []
    state = LedgerState.from_entries(entries)
    contents = scan_folder(pipeline_folder, state)
    errors += state.errors + _head_errors(entries, expect_head)
    names = {run_record.run_name(run, pipeline_folder) for run in contents.runs}
    errors += [f"the finished run {name!r} is not there" for name in sorted(state.runs.keys() - names)]
    errors += [f"the finished run {name!r} was deleted and not made again" for name in state.deleted_runs()]
    findings = [finding for run in contents.runs for finding in _verify_run(run, pipeline_folder, state)]
    findings += [Finding(False, subject, text) for subject, text in contents.errors]
    findings += [Finding(False, LEDGER_NAME, error) for error in errors]
    return findings if errors else [*findings, Finding(True, LEDGER_NAME, _summary(entries, state, contents))]


def _summary(entries: list[dict[str, Any]], state: LedgerState, contents: FolderContents) -> str:
    """What a sound ledger says in short, and what of the pipeline it does not prove."""
    head = entries[-1]["hash"] if entries else "none"
    parts = [f"{len(entries)} entries, head {head}, chain whole, no run missing"]
    if state.is_legacy:
        parts.append("made before ledgers had a root: it binds runs, not recipe, corpus and report; make the road anew")
    lists = {
        "set aside": contents.set_aside,
        "deleted and made again": sorted(state.deleted),
        "not finished": contents.unfinished,
        "not proved": sorted(contents.unverified),
    }
    parts += [f"{what}: {', '.join(names)}" for what, names in lists.items() if names]
    return "; ".join(parts)


def _head_errors(entries: list[dict[str, Any]], head: str) -> list[str]:
    """The fault where the ledger's head is not the one that somebody kept."""
    hashes = [str(entry["hash"]) for entry in entries]
    if not head or (hashes and hashes[-1].startswith(head)):
        return []
    index = next((number for number, entry_hash in enumerate(hashes) if entry_hash.startswith(head)), None)
    if index is None:
        return ["the expected head is not in it: entries were cut off or written anew since it was kept"]
    return [f"the expected head is entry {index}; {len(hashes) - 1 - index} were added since it was kept"]


def _verify_run(folder: Path, pipeline_folder: Path, state: LedgerState) -> list[Finding]:
    """All findings of one run."""
    subject = run_record.run_name(folder, pipeline_folder)
    record = read_json(folder / "run.json")
    if record is None:
        return [Finding(False, subject, "run.json cannot be read")]
    try:
        errors = _unexpected_files(folder, subject, state)
        errors += _artifact_errors(folder, record) + _recipe_errors(folder, record)
        inputs = {name: _input_error(pipeline_folder, name, item, state) for name, item in record["inputs"].items()}
        errors += _cost_errors(record) + [*filter(None, inputs.values())]
        errors += _ledger_errors(folder, pipeline_folder, record, state)
    except (KeyError, TypeError, ValueError, AttributeError, OSError, OverflowError, RecursionError) as error:
        return [Finding(False, subject, f"run.json is not what a run writes ({type(error).__name__}: {error})")]
    if errors:
        return [Finding(False, subject, error) for error in errors]
    unchecked = [name for name, error in inputs.items() if error is None]
    note = f"; not here to check: input {', '.join(unchecked)}" if unchecked else ""
    files, checked = len(record["outputs"]), len(inputs) - len(unchecked)
    return [Finding(True, subject, f"{files} files, recipe, {checked} inputs, cost and ledger entry agree{note}")]


def _unexpected_files(folder: Path, name: str, state: LedgerState) -> list[str]:
    """What lies in the run's folder and is not the run's: a report, if the ledger knows it, and nothing else."""
    errors = []
    for path in sorted(folder.iterdir()):
        expected = state.files.get(f"{name}/{path.name}")
        if path.is_symlink():
            errors.append(f"{path.name} is a link")
        elif expected is not None:
            errors += [] if digest.of_path(path) == expected else [f"{path.name} was changed after it was entered"]
        elif path.name not in _RUN_FILES and not (state.is_legacy and is_temporary(path.name)):
            errors.append(f"{path.name} was added after the run")
    bound = [path for path in state.files if path.startswith(f"{name}/")]
    return errors + [f"{path} is not there" for path in bound if not (folder / path[len(name) + 1 :]).exists()]


def _artifact_errors(folder: Path, record: dict[str, Any]) -> list[str]:
    """Faults of the artefact's files, the recipe file and the metrics."""
    errors = []
    try:
        digests = digest.of_files(folder / "artefact")
    except TrustError as error:
        return [error.what]
    claimed: dict[str, str] = record["outputs"]
    for name in sorted(digests.keys() | claimed.keys()):
        if name not in digests:
            errors.append(f"artefact/{name} is missing")
        elif name not in claimed:
            errors.append(f"artefact/{name} was added after the run")
        elif digests[name] != claimed[name]:
            errors.append(f"artefact/{name} was changed after the run")
    if digest.of_listing(claimed) != record["artefact_digest"]:
        errors.append("artefact_digest is not that of the outputs listed")
    for name in run_record.RECORD_FILES:
        if not (folder / name).is_file():
            errors.append(f"{name} is missing")
        elif digest.of_file(folder / name) != record["records"].get(name):
            errors.append(f"{name} was changed after the run")
    return errors


def _recipe_errors(folder: Path, record: dict[str, Any]) -> list[str]:
    """Faults between ``recipe.toml``, the recipe in ``run.json`` and its digest."""
    errors = []
    if digest.of_json(record["recipe"]) != record["recipe_digest"]:
        errors.append("recipe_digest is not that of the recipe")
    try:
        table = tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [*errors, "recipe.toml cannot be read"]
    if table != _without_none(record["recipe"]):
        errors.append("recipe.toml is not the recipe in run.json")
    return errors


def _without_none(value: Any) -> Any:
    """``value`` as TOML can say it: keys whose value is None are left out."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _cost_errors(record: dict[str, Any]) -> list[str]:
    """Faults of energy and money, which follow from the device-seconds."""
    money = MoneyConfig.model_validate(record["money"])
    seconds = record["device_seconds"]
    errors = []
    if type(record["nano_yuan"]) is not int or record["nano_yuan"] != run_record.price_nano_yuan(seconds, money):
        errors.append("nano_yuan does not follow from device_seconds and the price of a core-hour")
    if record["energy_joules_estimated"] != run_record.energy_joules(seconds, money):
        errors.append("energy_joules_estimated does not follow from device_seconds and the watts of a core")
    return errors


def _input_error(pipeline_folder: Path, name: str, item: dict[str, Any], state: LedgerState) -> str | None:
    """The fault of the input ``name`` as it is now against its digest in ``run.json``; None: not here to check.

    A checkpoint in a run's folder goes with it when that is set aside; one of an open run may be gone.
    """
    if "settings" in item:
        is_same = digest.of_json(item["settings"]) == item["digest"]
        return "" if is_same else f"input {name!r}: not the settings recorded"
    if "path" not in item:
        return None
    path, message = check_relative_path(item["path"]), ""
    runs = {to: f"{body['run']}/" for to, body in state.set_aside.items()}
    moved = [f"{to}/{path.removeprefix(run)}" for to, run in runs.items() if path.startswith(run)]
    for location in (path, *moved):
        try:
            if run_record.describe_input(pipeline_folder / location, pipeline_folder)["digest"] == item["digest"]:
                return ""
            message = message or f"input {name!r}: {path} now holds something else than this run read"
        except TrustError as error:
            message = message or f"input {name!r} ({path}): {error.what}"
    return None if "/checkpoints/" in path else message


def _ledger_errors(folder: Path, pipeline_folder: Path, record: dict[str, Any], state: LedgerState) -> list[str]:
    """Faults between ``run.json`` and the pipeline's ledger: its root, and its last entry for the run."""
    body = run_record.ledger_entry(folder, pipeline_folder, record)
    entry = state.runs.get(body["run"])
    errors = []
    if record.get("ledger_root") != state.root and not (state.is_legacy and "ledger_root" not in record):
        errors.append("it was made under another ledger than that of this road")
    if entry is None:
        errors.append("the ledger has no entry for this run")
    elif entry != body:
        names = [name for name in body if entry.get(name) != body[name]] or ["more than a road writes"]
        errors.append(f"run.json and the ledger's entry disagree on {', '.join(names)}")
    return errors
