"""A road of the user's own: stages from one TOML file, each a run in a folder of its name, under one ledger.

The file is checked whole before anything starts: stations, keys, names, what waits for what, and every file that is
named. Paths in it are relative to it; ``model = "base"`` means the run of the stage ``base``. Stages run by the graph
that the quickstart runs by, side by side where they do not wait for each other, and the same line again goes on where
it was.
"""

from __future__ import annotations

import difflib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sprat.config import Config, load, parse
from sprat.config.road import RoadConfig, StageConfig
from sprat.config.sizes import size_names
from sprat.data.document import safe_name
from sprat.errors import CheckpointError, ConfigError, TrustError
from sprat.files import atomic
from sprat.files.json import read_json
from sprat.files.lock import lock_folder
from sprat.formats import fetch, hub
from sprat.pipeline.executor import LocalExecutor, notify
from sprat.pipeline.graph import OnProgress, Stage, run_stages
from sprat.pipeline.quickstart import check_folder
from sprat.pipeline.stations import STATIONS
from sprat.post.collect import is_url
from sprat.tasks import task_input
from sprat.train.checkpoint import parse_init_from
from sprat.trust import run_record
from sprat.trust.ledger import LEDGER_NAME, Ledger

RECIPE_FILE = "road.toml"  # in the road's folder: the file as it was given


@dataclass(frozen=True)
class RoadStage:
    """One stage, checked.

    Attributes:
        config: its keys, with paths that hold from anywhere.
        settings: of its run.
        folder: of its run.
        depends_on: the stages that it takes something from.
        where: the file and the stage, for a sentence.
    """

    config: StageConfig
    settings: Config
    folder: Path
    depends_on: tuple[str, ...]
    where: str

    @property
    def name(self) -> str:
        """Its name."""
        return self.config.name

    def state(self) -> str:
        """What a road would do with it now, whatever is made before it: ``done``, ``goes on``, ``runs``, or ``runs
        again`` with other settings or inputs."""
        record = read_json(self.folder / "run.json")
        if record is not None:
            is_same = record.get("recipe_digest") == self.settings.digest() and not self._has_other_inputs(record)
            return "done" if is_same else "runs again"
        return "goes on" if (self.folder / "open.json").is_file() else "runs"

    def _has_other_inputs(self, record: dict[str, Any]) -> bool:
        """Whether files and models that the stage names are others than those of its run; names to fetch are not."""
        recorded = {name: each["digest"] for name, each in record.get("inputs", {}).items()}
        asked: list[Path | str] = []
        try:
            for key in (*self.config.references, *self.config.files):
                value = getattr(self.config, key)
                if isinstance(value, tuple):
                    asked += [task_input(each) for each in value] if key in ("tasks", "eval_tasks") else []
                elif key in recorded and key != "init_from":
                    if not value or (os.path.exists(value) and self._digest(Path(value)) != recorded[key]):
                        return True
                elif value and key in ("replay", "text", "calibrate"):
                    return True
            columns = record["inputs"].get("map", {}).get("settings", {}).get("columns", {})
            tasks = sorted(digest for name, digest in recorded.items() if name.startswith(("task:", "asked-")))
            is_mapped = self.config.uses in ("sft", "dpo") and columns != getattr(self.config, "map", {})
            return is_mapped or tasks != sorted(map(self._digest, asked))
        except TrustError:
            return True

    def _digest(self, value: Path | str) -> str:
        """The digest of an input, as the run would record it."""
        return str(run_record.describe_input(value, self.folder.parent)["digest"])


def read_road(path: str | Path, out: str | Path) -> list[RoadStage]:
    """The stages of the file at ``path``, to be run in ``out``, all of them checked; those that others wait for first.

    Raises:
        ConfigError: no such file, an unknown station or key, a value that does not fit, a name that repeats or is none,
            stages that wait for each other, or a path that leads to nothing; says which stage and key.
    """
    path, out = Path(path), Path(os.path.abspath(out))
    tables = load(RoadConfig, path).stages
    names: list[str] = []
    for number, table in enumerate(tables, 1):
        name, where = table.get("name"), f"{path}: stage {number}"
        if not isinstance(name, str) or safe_name(name) != name:
            todo = 'give name = "…": small letters, digits, - and _'
            raise ConfigError(f"{name!r} cannot name a stage", where=where, todo=todo)
        if name in names:
            raise ConfigError(f"two stages are called {name!r}", where=where, todo="give one of them another name")
        names.append(name)
    stages = [_read_stage(table, [name for name in names if name != table["name"]], path, out) for table in tables]
    return _in_order(stages, path)


def road(
    stages: Sequence[RoadStage],
    path: str | Path,
    out: str | Path,
    *,
    jobs: int | None = None,
    on_progress: OnProgress = lambda *_: None,
) -> None:
    """Run ``stages`` of the file at ``path`` in the folder ``out``; what is done is found and not run again.

    Args:
        stages: of ``read_road``, or some of them (``select``).
        jobs: stages that may run side by side, and share the cores; as many as ever could, if not given.
        on_progress: hears ``(stage, "starts", "runs" or "done", seconds)``.

    Raises:
        SpratError: a stage that failed, a full disk, a second road in the same folder.
    """
    import torch

    out = Path(out)
    check_folder(out)
    jobs = jobs or _width(stages)
    names = {stage.name for stage in stages}
    graph = [
        Stage(stage.name, _run, (stage.config, stage.folder), tuple(name for name in stage.depends_on if name in names))
        for stage in stages
    ]
    with lock_folder(out):
        _keep_recipe(Path(path), out)
        with LocalExecutor(jobs, max(1, torch.get_num_threads() // jobs)) as executor:
            run_stages(graph, executor, jobs, on_progress)


def states(stages: Sequence[RoadStage]) -> list[str]:
    """``RoadStage.state`` of each; what takes something from a stage that is to be made is made after it."""
    by_name: dict[str, str] = {}
    for stage in stages:  # what is waited for comes first
        state = stage.state()
        is_waiting = any(by_name.get(name, "done") != "done" for name in stage.depends_on)
        by_name[stage.name] = "runs again" if state == "done" and is_waiting else state
    return list(by_name.values())


def select(stages: Sequence[RoadStage], *, only: str = "", start: str = "") -> list[RoadStage]:
    """The stage ``only``, or ``start`` with all that takes something from it; all where neither is given.

    Raises:
        ConfigError: there is no such stage.
        CheckpointError: a stage before them, that they take something from, is not finished.
    """
    wanted = only or start
    if not wanted:
        return list(stages)
    if wanted not in [stage.name for stage in stages]:
        option = "--only" if only else "--from"
        names = ", ".join(stage.name for stage in stages)
        raise ConfigError(f"no stage {wanted!r}", where=option, todo=f"there are {names}")
    chosen_names = {wanted}
    for stage in stages:  # in an order in which what is waited for comes first
        if start and chosen_names.intersection(stage.depends_on):
            chosen_names.add(stage.name)
    chosen = [stage for stage in stages if stage.name in chosen_names]
    for stage in stages:
        needed = any(stage.name in each.depends_on for each in chosen)
        if needed and stage.name not in chosen_names and not (stage.folder / "run.json").is_file():
            todo = f"run it first: --only {stage.name}"
            raise CheckpointError(f"the stage {stage.name!r} is not finished", where=str(stage.folder), todo=todo)
    return chosen


def _run(config: StageConfig, folder: Path) -> None:
    """One stage, in its worker. Its settings are made here: some are read from a run that was not there before."""
    station = STATIONS[config.uses]
    run = station.run(config, station.settings_of(config, config.name), folder)
    if run.set_aside is not None:
        notify(config.name, f"has other settings or inputs than the run that was there; that is now {run.set_aside}")


def _read_stage(table: dict[str, Any], names: list[str], path: Path, out: Path) -> RoadStage:
    """One stage, with the paths in it resolved; ``names`` are those of the others."""
    name, uses = table["name"], table.get("uses")
    where = f"{path}: stage {name!r}"
    if uses not in STATIONS:
        close = difflib.get_close_matches(str(uses), STATIONS, n=1)
        todo = f"perhaps you mean {close[0]!r}" if close else f"there are {', '.join(STATIONS)}"
        raise ConfigError(f"unknown station uses = {uses!r}", where=where, todo=todo)
    station = STATIONS[uses]
    own = station.stage.model_fields
    for key in table:
        if key not in own and any(key in settings.model_fields for settings in station.settings):
            raise ConfigError(f"{key!r} is a setting of {uses}", where=where, todo="write it into [stages.set] below")
    config = parse(station.stage, table, where=where)
    if wrong := [key for key in config.set if key in station.stage.references]:
        todo = "write it above [stages.set], where it may name a stage"
        raise ConfigError(f"{wrong[0]!r} is a key of the stage", where=f"{where}, set", todo=todo)
    changes, depends_on = dict[str, Any](), list[str]()
    for key in station.stage.references:
        if value := getattr(config, key):
            changes[key], stage = _resolve_reference(value, key, names, path.parent, out, where)
            depends_on += [stage] if stage else []
    for key in station.stage.files:
        value = getattr(config, key)
        if isinstance(value, str):
            changes[key] = _resolve_file(value, key, path.parent, where) if value else ""
        else:
            changes[key] = tuple(_resolve_file(each, key, path.parent, where) for each in value)
    config = config.replace(**changes)
    settings = station.settings_of(config, f"{where}, set")
    return RoadStage(config, settings, out / name, tuple(dict.fromkeys(depends_on)), where)


def _resolve_reference(
    value: str, key: str, names: list[str], base: Path, out: Path, where: str
) -> tuple[str, str | None]:
    """What ``value`` means from anywhere, and the stage that makes it, if one does."""
    run, step = parse_init_from(value) if key == "init_from" else (Path(value), None)
    at = "" if step is None else f"@{step}"
    if str(run) in names:
        folder = out / run / "artefact" / "adapter" if key == "adapter" else out / run
        return f"{folder}{at}", str(run)
    if (base / run.expanduser()).exists():
        return f"{os.path.abspath(base / run.expanduser())}{at}", None
    is_elsewhere = value in fetch.CATALOG or (hub.parse_id(value) and not value.startswith("."))
    if key != "adapter" and (is_elsewhere or (key in ("model", "student") and value in size_names())):
        return value, None
    if key == "model" and is_url(value):
        return value, None
    close = difflib.get_close_matches(value, names, n=1)
    todo = f"perhaps you mean the stage {close[0]!r}" if close else f"name a stage ({', '.join(names)}) or a path"
    raise ConfigError(f"{key} = {value!r} is no stage, and nothing lies there", where=where, todo=todo)


def _resolve_file(value: str, key: str, base: Path, where: str) -> str:
    """The path ``value`` from anywhere; of ``file.py:Class`` the file's."""
    file, colon, rest = value.partition(".py:")
    name = f"{file}.py" if colon else value
    resolved = os.path.abspath(base / Path(name).expanduser())
    if not os.path.exists(resolved):
        raise ConfigError(f"{key} = {value!r}: nothing lies there", where=where, todo="paths are relative to the file")
    return f"{resolved}:{rest}" if colon else resolved


def _in_order(stages: list[RoadStage], path: Path) -> list[RoadStage]:
    """``stages`` as they stand, but each behind those that it takes something from.

    Raises:
        ConfigError: some wait for each other.
    """
    pending, ordered = list(stages), list[RoadStage]()
    while pending:
        done = {stage.name for stage in ordered}
        ready = [stage for stage in pending if done.issuperset(stage.depends_on)]
        if not ready:
            names = ", ".join(stage.name for stage in pending)
            todo = "let one of them start from something else"
            raise ConfigError(f"stages wait for each other: {names}", where=str(path), todo=todo)
        ordered.append(ready[0])
        pending.remove(ready[0])
    return ordered


def _width(stages: Sequence[RoadStage]) -> int:
    """How many of ``stages`` may be at work at once: the most that lie equally deep; at most the cores."""
    depth: dict[str, int] = {}
    for stage in stages:
        depth[stage.name] = 1 + max((depth.get(name, 0) for name in stage.depends_on), default=0)
    depths = list(depth.values())
    return min(max(map(depths.count, depths)), os.cpu_count() or 1)


def _keep_recipe(path: Path, out: Path) -> None:
    """Put a copy of the file into the road's folder, for which the ledger answers."""
    copy = out / RECIPE_FILE
    if path.resolve() != copy.resolve():
        with atomic.replace_file(copy) as temporary:
            shutil.copyfile(path, temporary)
    ledger = Ledger(out / LEDGER_NAME)
    ledger.root_hash()
    ledger.add_file(copy)
