"""The stages of a road, each read by the class of its station: keys, settings, what it waits for, and if it is done."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sprat.config import Config, parse
from sprat.config.road import FinetuneStage, StageConfig
from sprat.config.sizes import size_names
from sprat.data.document import safe_name
from sprat.errors import ConfigError, TrustError
from sprat.files.json import read_json
from sprat.formats import fetch, hub
from sprat.pipeline.road_file import RoadFile, open_road
from sprat.pipeline.stations import STATIONS
from sprat.post.collect import is_url
from sprat.post.rl.questions import is_drawn
from sprat.post.rl.reward_sources import is_command
from sprat.train.checkpoint import parse_init_from
from sprat.trust import run_record


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
        inputs, keys = STATIONS[self.config.uses].inputs, (*self.config.references, *self.config.files)
        try:
            if inputs is not None:
                keys = self.config.references
                expected = {name: self._digest(value) for name, value in inputs(self.config).items()}
                if expected != {name: each for name, each in recorded.items() if name not in keys}:
                    return True
            for key in keys:
                value = _value_of(self.config, key)
                if isinstance(value, tuple) or key == "init_from":
                    continue
                if key in recorded:
                    if not value or (os.path.exists(value) and self._digest(Path(value)) != recorded[key]):
                        return True
                elif value and key == "calibrate":
                    return True
            return False
        except TrustError:
            return True

    def _digest(self, value: run_record.Input) -> str:
        """The digest of an input, as the run would record it."""
        return str(run_record.describe_input(value, self.folder.parent)["digest"])


def read_road(road: str | Path | RoadFile, out: str | Path) -> list[RoadStage]:
    """The stages of the file ``road``, to be run in ``out``, all of them checked; those that others wait for first.

    Raises:
        ConfigError: no such file, an unknown station or key, a value that does not fit, a name that repeats or is none,
            stages that wait for each other, or a path that leads to nothing; says which stage and key.
    """
    road, out = road if isinstance(road, RoadFile) else open_road(road), Path(os.path.abspath(out))
    path, tables = road.path, road.stages
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
    _check_examples(stages)
    _check_splits(stages)
    return _in_order(stages, path)


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
        value, is_drawable = _value_of(config, key), key in station.stage.drawn
        if key in station.stage.examples and value in names:
            changes[key], depends_on = str(out / value), [*depends_on, value]
        elif isinstance(value, tuple):
            changes[key] = tuple(_resolve_file(each, key, path.parent, where, is_drawable) for each in value)
        elif value:
            changes[key] = _resolve_file(value, key, path.parent, where, is_drawable)
    for key in station.stage.rewards:
        if (value := getattr(config, key)) and not is_command(value) and ".py:" in value:
            changes[key] = _resolve_file(value, key, path.parent, where)
    for key in [key for key in changes if "." in key]:
        table_key, _, below = key.partition(".")
        changes[table_key] = getattr(config, table_key).replace(**{below: changes.pop(key)})
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


def _resolve_file(value: str, key: str, base: Path, where: str, is_drawable: bool = False) -> str:
    """The path ``value`` from anywhere; of ``file.py:Class`` the file's; what is drawn by a generator as it is."""
    if is_drawable and is_drawn(value):
        return value
    file, colon, rest = value.partition(".py:")
    name = f"{file}.py" if colon else value
    resolved = os.path.abspath(base / Path(name).expanduser())
    if not os.path.exists(resolved):
        raise ConfigError(f"{key} = {value!r}: nothing lies there", where=where, todo="paths are relative to the file")
    return f"{resolved}:{rest}" if colon else resolved


def _value_of(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _check_examples(stages: Sequence[RoadStage]) -> None:
    """Refuse data that are to come from a stage that writes no examples, or longer ones than are learned.

    Raises:
        ConfigError: there are some.
    """
    makers = {str(stage.folder): stage for stage in stages}
    for stage in stages:
        for key in stage.config.examples:
            if (maker := makers.get(_value_of(stage.config, key))) is None:
                continue
            if maker.config.uses != "sample":
                what = f"{key} names a stage that writes no examples (it uses {maker.config.uses})"
                raise ConfigError(what, where=stage.where, todo='name a stage that uses "sample", or a file')
            longest, rows = (
                _value_of(each.settings, name) for each, name in ((maker, "max_tokens"), (stage, "seq_len"))
            )
            if longest > rows:
                what = f"answers of {maker.name!r} may have {longest} tokens, and rows of {stage.name!r} hold {rows}"
                raise ConfigError(
                    what, where=stage.where, todo="raise seq_len of the one, or lower max_tokens of the other"
                )


def _check_splits(stages: Sequence[RoadStage]) -> None:
    """Refuse stages that hold out different questions of one file: one would train on what another is scored on.

    Raises:
        ConfigError: there are some.
    """
    first = dict[str, tuple[str, float, int]]()  # of each file the first stage that splits it, and how
    for stage in stages:
        config: Any = stage.config
        data, split = getattr(config, "data", ""), getattr(stage.settings, "held_out", None)
        if isinstance(config, FinetuneStage):
            data, split = config.held_out.data, config.held_out
        if not data or split is None:
            continue
        other, *theirs = first.setdefault(data, (stage.name, split.share, split.problems))
        if theirs != [split.share, split.problems]:
            what = f"{stage.name!r} and {other!r} hold out different questions of {Path(data).name}"
            raise ConfigError(what, where=stage.where, todo="give both the same held_out.share and held_out.problems")


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
